r"""Alanine dipeptide in implicit solvent: AMBER ff96 with OBC generalised Born, 22 atoms, no constraints.

The energy is that of ``openmmtools.testsystems.AlanineDipeptideImplicit(constraints=None)``: bonds and angles are
harmonic, torsions periodic, all non-bonded pairs interact without a cutoff, and the solvent polarises around Born radii
that depend on all positions (Onufriev, Bashford and Case 2004). The parameters are stored beside this file
(``scripts/extract_alanine_dipeptide.py`` reads them from OpenMM), so that nothing here needs OpenMM.

Positions are in nm, energies in kJ/mol, temperatures in K.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..kernels import Array, CentreOfMassFree, Subspace
from .potentials import check_configuration, check_temperature

GAS_CONSTANT = 8.31446261815324e-3  # kJ / (mol K), exact by definition of the mole and the kelvin
PARAMETERS = Path(__file__).parent / "data" / "alanine_dipeptide.json"


@dataclass(frozen=True)
class AlanineDipeptide:
    """ACE-ALA-NME, 22 atoms, in OpenMM's order (``atom_names``)."""

    @property
    def shape(self) -> tuple[int, int]:
        return (22, 3)

    @property
    def subspace(self) -> Subspace:
        return CentreOfMassFree()

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Force-field parameters as numpy arrays."""
        raw = json.loads(PARAMETERS.read_text(encoding="utf-8"))
        return {name: np.asarray(value) if isinstance(value, list) else value for name, value in raw.items()}

    @property
    def atom_names(self) -> list[str]:
        return [str(name) for name in self.parameters["atom_names"]]

    @property
    def length_unit(self) -> str:
        return "nm"

    @property
    def bonds(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of bonded atoms (n, 2), and their lengths at rest in nm (n,)."""
        return self.parameters["bond_atoms"], self.parameters["bond_length"]

    @property
    def phi_atoms(self) -> tuple[int, int, int, int]:
        """C(ACE), N, CA, C(ALA)."""
        return (4, 6, 8, 14)

    @property
    def psi_atoms(self) -> tuple[int, int, int, int]:
        """N, CA, C(ALA), N(NME)."""
        return (6, 8, 14, 16)

    @property
    def chiral_atoms(self) -> tuple[int, int, int, int]:
        """CA, N, C(ALA), CB: three bonds that turn the other way in the mirror image."""
        return (8, 6, 14, 10)

    def start(self, key: Array) -> Array:
        """A configuration to start from: that of OpenMM's test system, whatever the key."""
        return self.subspace.project(jnp.asarray(self.parameters["initial_positions"], jnp.result_type(float)))

    @property
    def kinds(self) -> tuple[int, ...]:
        """Which atoms are alike: the three hydrogens of each methyl group are, all others are not."""
        # "NME:H1" to "NME:H3" are alike; "NME:H" is another atom.
        names = [name[:-1] + "#" if name[-1] in "123" else name for name in self.atom_names]
        return tuple(sorted(set(names), key=names.index).index(name) for name in names)

    def thermal_energy(self, temperature: Any) -> float:
        """kT per mole at a temperature in K, in kJ/mol.

        Raises:
          ValueError: for anything but a positive number.
        """
        return GAS_CONSTANT * check_temperature(temperature)

    def torsions(self, x: Array) -> Array:
        """(phi, psi) of one configuration, in radians in (-pi, pi]."""
        check_configuration(self, x)
        return dihedral(x, np.asarray([self.phi_atoms, self.psi_atoms]))

    def to_l_form(self, x: Array) -> Array:
        """One configuration (22, 3), mirrored where the alanine is of the D form.

        A model that sees distances alone cannot tell a molecule from its mirror image, nor can the energy.
        """
        check_configuration(self, x)
        centre, nitrogen, carbonyl, methyl = (x[i] for i in self.chiral_atoms)
        volume = jnp.dot(nitrogen - centre, jnp.cross(carbonyl - centre, methyl - centre))
        return x * jnp.where(volume < 0, jnp.asarray([1.0, 1.0, -1.0], x.dtype), 1.0)

    @cached_property
    def methyl_groups(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """The carbon and the three hydrogens of each methyl group."""
        bonds = np.asarray(self.parameters["bond_atoms"])
        groups = []
        for kind in sorted({kind for kind in self.kinds if self.kinds.count(kind) == 3}):
            hydrogens = np.flatnonzero(np.asarray(self.kinds) == kind)
            bond = next(bond for bond in bonds if hydrogens[0] in bond)
            groups.append((bond[bond != hydrogens[0]][0], hydrogens))
        return tuple(groups)

    def standard_form(self, x: Array) -> Array:
        """One configuration (22, 3) among all that no network of distances and alike hydrogens can tell apart.

        That is the L form, with the hydrogens of every methyl group named in the sense of OpenMM's configuration. They
        keep that sense in any simulation, for turning it takes breaking a bond, while a model has both.
        """
        x = self.to_l_form(x)
        initial = np.asarray(self.parameters["initial_positions"])
        for carbon, hydrogens in self.methyl_groups:
            sense = jnp.linalg.det(x[hydrogens] - x[carbon])
            expected = np.linalg.det(initial[hydrogens] - initial[carbon])
            other = hydrogens[[0, 2, 1]]
            x = x.at[hydrogens].set(jnp.where(sense * np.sign(expected) < 0, x[other], x[hydrogens]))
        return x

    def energy(self, x: Array) -> Array:
        """Of one configuration (22, 3) in nm, in kJ/mol.

        Raises:
          ValueError: for another shape.
        """
        return jnp.sum(self.energy_terms(x))

    def energy_terms(self, x: Array) -> Array:
        """Energies of bonds, angles, torsions, non-bonded pairs and solvent, in kJ/mol: (5,)."""
        check_configuration(self, x)
        p = self.parameters
        # All ordered pairs: sums over chosen ones have slow gradients on a CPU. An atom is one away from itself.
        squares = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
        squares = squares + jnp.asarray(np.eye(22), squares.dtype)
        return jnp.stack(
            [_bonds(p, x), _angles(p, x), _torsions(p, x), _pairs(self.pair_parameters, squares), _solvent(p, squares)]
        )

    @cached_property
    def pair_parameters(self) -> dict[str, Any]:
        """Those of non-bonded pairs as symmetric matrices (22, 22), zero on the diagonal; sigma is one there."""
        p = self.parameters
        first, second = np.triu_indices(22, k=1)
        found: dict[str, Any] = {"coulomb_constant": p["coulomb_constant"]}
        for name in ("pair_sigma", "pair_epsilon", "pair_charge_product"):
            matrix = np.zeros((22, 22))
            matrix[first, second] = p[name]
            found[name] = matrix + matrix.T
        found["pair_sigma"] = found["pair_sigma"] + np.eye(22)
        return found


def dihedral(x: Array, atoms: np.ndarray) -> Array:
    """Torsion angles about the middle bond of (n, 4) atoms, in radians in (-pi, pi], IUPAC's sign: (n,)."""
    a, b, c, d = (x[atoms[:, k]] for k in range(4))
    left, axis, right = b - a, c - b, d - c
    normal, other = jnp.cross(left, axis), jnp.cross(axis, right)
    length = jnp.sqrt(jnp.sum(axis**2, axis=-1))
    return jnp.arctan2(length * jnp.sum(left * other, axis=-1), jnp.sum(normal * other, axis=-1))


def _bonds(p: dict[str, Any], x: Array) -> Array:
    atoms, length, stiffness = p["bond_atoms"], p["bond_length"], p["bond_stiffness"]
    distance = jnp.sqrt(jnp.sum((x[atoms[:, 0]] - x[atoms[:, 1]]) ** 2, axis=-1))
    return 0.5 * jnp.sum(stiffness * (distance - length) ** 2)


def _angles(p: dict[str, Any], x: Array) -> Array:
    atoms, angle, stiffness = p["angle_atoms"], p["angle"], p["angle_stiffness"]
    left, right = x[atoms[:, 0]] - x[atoms[:, 1]], x[atoms[:, 2]] - x[atoms[:, 1]]
    across = jnp.sqrt(jnp.sum(jnp.cross(left, right) ** 2, axis=-1))
    found = jnp.arctan2(across, jnp.sum(left * right, axis=-1))
    return 0.5 * jnp.sum(stiffness * (found - angle) ** 2)


def _torsions(p: dict[str, Any], x: Array) -> Array:
    angle = dihedral(x, p["torsion_atoms"])
    return jnp.sum(p["torsion_barrier"] * (1 + jnp.cos(p["torsion_periodicity"] * angle - p["torsion_phase"])))


def _pairs(p: dict[str, Any], squares: Array) -> Array:
    """Coulomb and Lennard-Jones, 4 eps ((s / r)^12 - (s / r)^6); bonded neighbours have none."""
    attraction = (p["pair_sigma"] ** 2 / squares) ** 3
    dispersion = 4 * p["pair_epsilon"] * attraction * (attraction - 1)
    coulomb = p["coulomb_constant"] * p["pair_charge_product"] / jnp.sqrt(squares)
    return 0.5 * jnp.sum(dispersion + coulomb)


def _solvent(p: dict[str, Any], squares: Array) -> Array:
    """Generalised Born with OBC radii (model I, tanh of 0.8 psi + 2.909125 psi^3), and the surface term."""
    charge, radius, offset_radius = p["gb_charge"], p["gb_radius"], p["gb_offset_radius"]
    others = 1 - np.eye(22)
    by_others = _descreening(jnp.sqrt(squares), offset_radius[:, None], p["gb_scale"][None, :])
    psi = jnp.sum(by_others * others, axis=1) * offset_radius
    born = 1 / (1 / offset_radius - jnp.tanh(0.8 * psi + 2.909125 * psi**3) / radius)
    polarisation = p["gb_constant"] * (1 / p["solute_dielectric"] - 1 / p["solvent_dielectric"])
    own = jnp.sum(-0.5 * polarisation * charge**2 / born)
    product = born[:, None] * born[None, :]
    effective = jnp.sqrt(squares + product * jnp.exp(-squares / (4 * product)))
    mutual = 0.5 * jnp.sum(-polarisation * np.outer(charge, charge) * others / effective)
    surface = jnp.sum(p["surface_constant"] * (radius + p["probe_radius"]) ** 2 * (radius / born) ** 6)
    return own + mutual + surface


def _descreening(r: Array, own: np.ndarray, other: np.ndarray) -> Array:
    """How much of the space around an atom of radius ``own`` a sphere of radius ``other`` at distance r takes away."""
    upper = r + other
    lower = jnp.maximum(own, jnp.abs(r - other))
    value = 0.5 * (
        1 / lower
        - 1 / upper
        + 0.25 * (r - other**2 / r) * (1 / upper**2 - 1 / lower**2)
        + 0.5 * jnp.log(lower / upper) / r
    )
    return jnp.where(upper > own, value, 0.0)
