"""Energies and forces of alanine dipeptide against OpenMM's, on frames of OpenMM's own dynamics.

    pip install '.[openmm]'
    python scripts/check_alanine_dipeptide.py

1,000 frames, 0.2 ps apart, at each of 300, 800 and 1,200 K, from Langevin dynamics with a step of 1 fs. Every twelfth
of them stays in tests/systems/alanine_dipeptide_frames.npz, for the test that needs no OpenMM. Some minutes.
"""

from pathlib import Path

import jax
import numpy as np

try:
    import openmm
    from openmm import unit
    from openmmtools.testsystems import AlanineDipeptideImplicit
except ImportError as error:
    raise SystemExit(
        f"{error}: OpenMM is needed to compare energies and forces with, and for nothing else; pip install '.[openmm]'"
    ) from None

from rnejax.systems import AlanineDipeptide

TEMPERATURES = (300.0, 800.0, 1200.0)
FRAMES = 1000
KEPT = 80  # of each temperature, in the repository
TARGET = Path(__file__).parents[1] / "tests" / "systems" / "alanine_dipeptide_frames.npz"


def dynamics(temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (nm), energies (kJ/mol) and forces (kJ/mol/nm) of frames, evaluated in float64."""
    made = AlanineDipeptideImplicit(constraints=None)
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.001)  # K, 1/ps, ps
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(made.system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    judge = openmm.Context(made.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(made.positions)
    context.setVelocitiesToTemperature(temperature, seed)
    integrator.step(5000)
    frames = []
    for _ in range(FRAMES):
        integrator.step(200)
        judge.setPositions(context.getState(positions=True).getPositions(asNumpy=True))
        state = judge.getState(positions=True, energy=True, forces=True)
        frames.append(
            (
                state.getPositions(asNumpy=True).value_in_unit(unit.nanometer),
                state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole),
                state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer),
            )
        )
    return tuple(np.asarray(column) for column in zip(*frames, strict=True))


def main() -> None:
    system = AlanineDipeptide()
    kept = []
    for seed, temperature in enumerate(TEMPERATURES, start=1):
        positions, energies, forces = dynamics(temperature, seed)
        for precision in (np.float64, np.float32):
            with jax.enable_x64(precision is np.float64):
                both = jax.jit(jax.vmap(jax.value_and_grad(system.energy)))
                ours, gradients = (np.asarray(value, np.float64) for value in both(positions.astype(precision)))
            of_energy = np.abs(ours - energies) / np.abs(energies)  # energies cross zero at 800 K
            of_force = np.linalg.norm(gradients + forces, axis=(1, 2)) / np.linalg.norm(forces, axis=(1, 2))
            print(
                f"{temperature:6g} K, {np.dtype(precision).name}, {len(energies)} frames: largest relative error of "
                f"energies {of_energy.max():.1e}, of forces {of_force.max():.1e}; mean {energies.mean():.1f} kJ/mol"
            )
        stride = FRAMES // KEPT
        kept.append((positions[::stride][:KEPT], energies[::stride][:KEPT], forces[::stride][:KEPT]))
    positions, energies, forces = (np.stack(column) for column in zip(*kept, strict=True))
    np.savez_compressed(
        TARGET, positions=positions, energies=energies, forces=forces.astype(np.float32), temperatures=TEMPERATURES
    )
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, {KEPT} frames of each temperature")


if __name__ == "__main__":
    main()
