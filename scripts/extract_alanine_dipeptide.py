"""The parameters of alanine dipeptide, from OpenMM's system into rnejax/systems/data/alanine_dipeptide.json.

    pip install '.[openmm]'
    python scripts/extract_alanine_dipeptide.py

Run once, with the versions that the file names; nothing at run time needs OpenMM. Refuses a system that is put together
otherwise than rnejax.systems.alanine_dipeptide computes it.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

try:
    import openmm
    from openmm import unit
    from openmmtools.testsystems import AlanineDipeptideImplicit
except ImportError as error:
    raise SystemExit(
        f"{error}: OpenMM is needed to read its test system's parameters, and for nothing else; pip install '.[openmm]'"
    ) from None

TARGET = Path(__file__).parents[1] / "rnejax" / "systems" / "data" / "alanine_dipeptide.json"
# What the solvent's energy is made of, as OpenMM's custom force writes it, without the constants that follow.
SOLVENT = {
    "I": "select(step(r+sr2-or1), 0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r), 0);"
    "U=r+sr2;L=max(or1, D);D=abs(r-sr2)",
    "B": "1/(1/or-tanh(0.8*psi+2.909125*psi^3)/radius);psi=I*or; radius=or+offset; offset=0.009",
}
TERMS = (
    "-0.5*138.935485*(1/soluteDielectric-1/solventDielectric)*charge^2/B",
    "28.3919551*(radius+0.14)^2*(radius/B)^6; radius=or+offset",
    "-138.935485*(1/soluteDielectric-1/solventDielectric)*charge1*charge2/f;f=sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))",
)
CONSTANTS = "; solventDielectric=78.5; soluteDielectric=1; kappa=0; offset=0.008999999999999999"


def in_units(quantity: object) -> float:
    return float(quantity.value_in_unit_system(unit.md_unit_system)) if unit.is_quantity(quantity) else float(quantity)


def main() -> None:
    made = AlanineDipeptideImplicit(constraints=None)
    system, num = made.system, made.system.getNumParticles()
    forces = {type(force).__name__: force for force in system.getForces()}
    assert set(forces) == {
        "HarmonicBondForce", "HarmonicAngleForce", "PeriodicTorsionForce", "NonbondedForce", "CustomGBForce",
        "CMMotionRemover",
    }, sorted(forces)  # fmt: skip
    assert system.getNumConstraints() == 0
    parameters: dict[str, object] = {
        "source": f"openmmtools {version('openmmtools')} AlanineDipeptideImplicit(constraints=None), "
        f"OpenMM {openmm.__version__}; units nm, kJ/mol, rad, e",
        "atom_names": [f"{atom.residue.name}:{atom.name}" for atom in made.topology.atoms()],
        "atom_elements": [atom.element.symbol for atom in made.topology.atoms()],
        "mass": [in_units(system.getParticleMass(i)) for i in range(num)],
        "initial_positions": np.asarray(made.positions.value_in_unit(unit.nanometer)).tolist(),
    }

    force = forces["HarmonicBondForce"]
    bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
    parameters |= {
        "bond_atoms": [list(bond[:2]) for bond in bonds],
        "bond_length": [in_units(bond[2]) for bond in bonds],
        "bond_stiffness": [in_units(bond[3]) for bond in bonds],
    }
    force = forces["HarmonicAngleForce"]
    angles = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
    parameters |= {
        "angle_atoms": [list(angle[:3]) for angle in angles],
        "angle": [in_units(angle[3]) for angle in angles],
        "angle_stiffness": [in_units(angle[4]) for angle in angles],
    }
    force = forces["PeriodicTorsionForce"]
    torsions = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
    torsions = [torsion for torsion in torsions if in_units(torsion[6]) != 0]
    parameters |= {
        "torsion_atoms": [list(torsion[:4]) for torsion in torsions],
        "torsion_periodicity": [int(torsion[4]) for torsion in torsions],
        "torsion_phase": [in_units(torsion[5]) for torsion in torsions],
        "torsion_barrier": [in_units(torsion[6]) for torsion in torsions],
    }

    force = forces["NonbondedForce"]
    assert force.getNonbondedMethod() == openmm.NonbondedForce.NoCutoff
    charge, sigma, epsilon = np.asarray(
        [[in_units(value) for value in force.getParticleParameters(i)] for i in range(num)]
    ).T
    products = np.outer(charge, charge)
    sigmas = 0.5 * (sigma[:, None] + sigma)
    epsilons = np.sqrt(np.outer(epsilon, epsilon))
    for i in range(force.getNumExceptions()):
        a, b, *values = force.getExceptionParameters(i)
        for table, value in zip((products, sigmas, epsilons), values, strict=True):
            table[min(a, b), max(a, b)] = in_units(value)
    upper = np.triu_indices(num, k=1)
    parameters |= {
        "coulomb_constant": 138.93545764438198,  # e^2 / (4 pi eps_0) per mole, kJ nm / mol; OpenMM's, from CODATA 2018
        "pair_charge_product": products[upper].tolist(),
        "pair_sigma": sigmas[upper].tolist(),
        "pair_epsilon": epsilons[upper].tolist(),
    }

    force = forces["CustomGBForce"]
    assert force.getNonbondedMethod() == openmm.CustomGBForce.NoCutoff
    assert force.getNumExclusions() == 0
    values = [force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())]
    assert {name: expression for name, expression, _ in values} == SOLVENT, values
    terms = [force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms())]
    assert terms == [term + CONSTANTS for term in TERMS], terms
    assert [force.getPerParticleParameterName(i) for i in range(3)] == ["charge", "or", "sr"]
    charge, offset_radius, scale = np.asarray([force.getParticleParameters(i) for i in range(num)]).T
    parameters |= {
        "gb_constant": 138.935485,
        "solute_dielectric": 1.0,
        "solvent_dielectric": 78.5,
        "surface_constant": 28.3919551,
        "probe_radius": 0.14,
        "gb_charge": charge.tolist(),
        "gb_radius": (offset_radius + 0.009).tolist(),
        "gb_offset_radius": offset_radius.tolist(),
        "gb_scale": scale.tolist(),
    }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(parameters, indent=None, separators=(", ", ": ")) + "\n")
    counts = f"{len(bonds)} bonds, {len(angles)} angles, {len(torsions)} torsions"
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, {counts}")


if __name__ == "__main__":
    main()
