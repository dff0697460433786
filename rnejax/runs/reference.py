"""rnejax reference: samples of a molecular system at several temperatures, with what says how far to trust them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .. import plot
from ..config import ConfigError, ReferenceRun
from .build import build_system
from .folder import Output, RunFolder, require_molecules, require_pictures


def run(config: ReferenceRun, output: Output) -> None:
    """Independent sets in one file, diagnostics of each, the floor of every metric, energy histograms."""
    from ..systems.references import save_reference
    from ..systems.tempering import check_ladder, parallel_tempering

    system = build_system(config.system)
    ladder = list(config.temperatures)
    kept = ladder if config.keep is None else list(config.keep)
    missing = [each for each in kept if each not in ladder]
    if missing:
        raise ConfigError(f"keep = {missing[0]:g} is none of the temperatures {', '.join(f'{t:g}' for t in ladder)}")
    if config.num_chains % 2:
        raise ConfigError(f"num_chains = {config.num_chains} must be even: half of the chains start cold, half hot")
    try:
        check_ladder(system, ladder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require_pictures()
    require_molecules()
    folder = output.open()
    sets = []
    with folder.timed():
        for number in range(config.num_sets):
            made = parallel_tempering(
                jax.random.fold_in(jax.random.key(config.seed), number),
                system,
                ladder,
                num_chains=config.num_chains,
                num_samples=config.num_samples,
                rounds_between=config.rounds_between,
                burn_in=config.burn_in,
                integration_steps=config.integration_steps,
                step_size=config.step_size,
                target_acceptance=config.target_acceptance,
                batch_size=config.batch_size,
            )
            sets.append(jax.device_get(made))
            folder.record(**{f"set_{number}": diagnostics(system, sets[-1])})
    chosen = [ladder.index(each) for each in kept]
    x = np.stack([made.x[chosen].reshape(len(kept), -1, *system.shape) for made in sets], axis=1)
    energy = np.stack([made.energy[chosen].reshape(len(kept), -1) for made in sets], axis=1)
    metadata: dict[str, Any] = {
        "command": "rnejax reference",
        "config": config.model_dump(mode="json", exclude={"output", "device"}),
        "diagnostics": [diagnostics(system, made) for made in sets],
    }
    # Sampling is what takes long: nothing that is measured afterwards may lose the samples.
    save_reference(folder.path / "reference.npz", kept, x, energy, metadata)
    folder.add("reference.npz")
    measured = [floors(system, *pair) for pair in zip(x, energy, strict=True)] if config.num_sets > 1 else []
    floor = {f"{temperature:g}": each for temperature, each in zip(kept, measured, strict=False)}
    # Of one temperature there is no difference.
    free_energies = [free_energy(system, ladder, made) for made in sets] if len(ladder) > 1 else []
    folder.record(floor=floor, free_energy=free_energies)
    metadata |= {"floor": floor, "free_energy": free_energies}
    save_reference(folder.path / "reference.npz", kept, x, energy, metadata)
    draw(folder, system, ladder, sets)


def diagnostics(system: Any, made: Any) -> dict[str, list[float]]:
    """What parallel tempering says of itself, by temperature; and the effective sample size of the torsions."""
    names = ("temperatures", "acceptance", "swap_rate", "step_size", "effective_sample_size", "rhat", "halves_z")
    found = {name: [float(f"{value:.4g}") for value in np.ravel(getattr(made, name))] for name in names}
    found["mean_energy"] = [float(f"{value:.6g}") for value in np.mean(made.energy, axis=(1, 2))]
    if hasattr(system, "torsions"):
        from blackjax.diagnostics import effective_sample_size

        angles = np.asarray(jax.lax.map(jax.vmap(jax.vmap(system.torsions)), made.x))
        sizes = [
            min(float(effective_sample_size(part)) for part in (np.cos(each[..., 0]), np.sin(each[..., 0])))
            for each in angles
        ]
        found["effective_sample_size_phi"] = [float(f"{size:.4g}") for size in sizes]
    return found


def free_energy(system: Any, ladder: list[float], made: Any) -> dict[str, list[float]]:
    """log Z of every temperature relative to the last one, by MBAR over the whole ladder.

    The error is that of as many independent samples as the smallest effective sample size of the ladder.
    """
    from ..systems.free_energy import multistate_bennett

    energy = np.asarray(made.energy, np.float64).reshape(len(ladder), -1)
    found = multistate_bennett([system.thermal_energy(each) for each in ladder], energy)
    inflation = np.sqrt(max(1.0, energy.shape[1] / float(np.min(made.effective_sample_size))))
    return {
        "temperatures": [float(each) for each in ladder],
        "log_normalizer": [float(f"{value:.6g}") for value in found.log_normalizer],
        "standard_error": [float(f"{value:.3g}") for value in found.standard_error * inflation],
    }


def floors(system: Any, x: np.ndarray, energy: np.ndarray) -> dict[str, float]:
    """Every metric of the first set against the second."""
    from ..systems.metrics import compare

    measured = compare(system, x[0], x[1], energy=energy[0], reference_energy=energy[1])
    return {name: float(f"{value:.4g}") for name, value in measured.items()}


def draw(folder: RunFolder, system: Any, ladder: list[float], sets: list[Any]) -> None:
    """Energies of both halves of the chains at every temperature: where they differ, a barrier was missed."""
    half = sets[0].energy.shape[1] // 2
    hot, cold = (
        {f"{each:g}": np.concatenate([made.energy[i, part].ravel() for made in sets]) for i, each in enumerate(ladder)}
        for part in (slice(half, None), slice(None, half))
    )
    title = "by temperature; solid: chains started hot, dashed: started cold"
    folder.picture("energies.png", plot.histograms(hot, dashed=cold, xlabel="energy", title=title))
    if hasattr(system, "torsions"):
        from ..systems.metrics import torsion_histogram

        plots = {}
        for i in dict.fromkeys((0, len(ladder) - 1)):
            x = np.concatenate([made.x[i].reshape(-1, *system.shape) for made in sets])
            angles = np.asarray(jax.lax.map(system.torsions, x, batch_size=1000))
            plots[f"{ladder[i]:g} K"] = torsion_histogram(angles)
        folder.picture("ramachandran.png", plot.ramachandran(plots))
