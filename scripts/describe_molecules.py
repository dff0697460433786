"""How good a molecular model is where annealing will look: the score against the true force, log p against the energy.

At the model's own temperature T0 and at each colder one, on reference samples of that temperature:

    score error   |score at t_min + grad U / kT0|^2 / |grad U / kT0|^2, summed over samples
    delta         log p(x) + U(x) / kT0 + log Z, by RNE with several paths: its mean, its spread, and its slope against
                  U, which is by how much the model gets 1 / kT0 wrong. log Z makes the mean zero at T0.

    energy_shift   by how much the mean energy of p^(T0 / T) lies above that of the reference, with its error:
                   the reference reweighted by exp((T0 / T) delta), which is what annealing by the model's own densities
                   would give.
    shift_of_paths   the same with the mean over noising paths of p^(T0 / T) in place of the power of the mean, which is
                   what weights of paths lead to, however many particles there are. The two differ where paths disagree
                   about log p ("path_sd", in nats), and about some configurations more than about others. What a
                   sampler misses beyond it is the sampler's.

A slope of d makes an annealed sample of exponent beta one of temperature 1 / (beta (1 / kT0 - d)).

With --samples, as many of the model's own samples are looked at as well: the share whose energy lies above all of the
reference's, the mean excess of the others, and for a molecule how it is made up of bonds, angles, torsions, pairs and
solvent. With another number of steps this tells an error of the network from one of the steps.

    python scripts/describe_molecules.py lj13 --start 2.0 --temperatures 1.5 0.8 [--reference lj13] [--points 96]
    python scripts/describe_molecules.py alanine_dipeptide --start 800 --points 0 --samples 600 [--steps 400]
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_molecules import load
from scipy.special import logsumexp

import rnejax as rj
from rnejax.systems import metrics
from rnejax.systems.references import load_reference

TERMS = ("bonds", "angles", "torsions", "pairs", "solvent")


def describe_samples(model: rj.DiffusionModel, stored: Any, times: Any, count: int) -> dict[str, float]:
    """Whose energies are too high, and in which terms, in the system's units."""
    system = stored.system
    made, real = rj.sample(jax.random.key(5), model, times, num_samples=count).x, jnp.asarray(stored.x[0])
    energy, reference = metrics.energies(system, made), metrics.energies(system, real)
    inside = energy <= reference.max()
    row = {
        "above_all": 1 - float(inside.mean()),
        "excess": float(energy[inside].mean() - reference.mean()),
        "error_of_excess": float(np.hypot(*(each.std() / np.sqrt(len(each)) for each in (energy[inside], reference)))),
    }
    if hasattr(system, "energy_terms"):
        terms = [np.asarray(jax.lax.map(system.energy_terms, each, batch_size=1000)) for each in (made[inside], real)]
        row |= dict(zip(TERMS, (terms[0].mean(0) - terms[1].mean(0)).tolist(), strict=True))
    return row


def reweighted(energy: np.ndarray, log_weights: np.ndarray) -> tuple[float, float, float]:
    """By how much weights change the mean energy, the error of that, and their effective sample size."""
    weights = np.exp(log_weights - logsumexp(log_weights))
    shift = weights @ energy - energy.mean()
    # Of a ratio of means, and against the mean of the same configurations.
    influence = len(energy) * weights * (energy - weights @ energy) - (energy - energy.mean())
    return float(shift), float(influence.std(ddof=1) / np.sqrt(len(energy))), float(1 / np.sum(weights**2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the name of a shipped model, or a file")
    parser.add_argument("--reference", help="by default the model's name")
    parser.add_argument("--start", type=float, required=True)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[])
    parser.add_argument("--points", type=int, default=96, help="configurations of each temperature; 0 for none")
    parser.add_argument("--samples", type=int, default=0, help="of the model itself, at its own temperature")
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--grid", default=None)
    parser.add_argument("--covariance", default=None, help="of the reverse kernel; by default the calibrated one")
    options = parser.parse_args()
    model, reference = load(options.model), options.reference or options.model
    model = model if options.covariance is None else model.with_covariance(options.covariance)
    system = load_reference(reference, options.start).system
    kT = system.thermal_energy(options.start)
    times = rj.time_grid(model.process, options.steps, options.grid)
    scale = float(model.transform.scale)
    if options.samples:
        row = describe_samples(model, load_reference(reference, options.start), times, options.samples)
        print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
    log_normalizer = None
    for temperature in (options.start, *options.temperatures) if options.points else ():
        stored = load_reference(reference, temperature).x[-1]
        x = jnp.asarray(stored[:: max(1, len(stored) // options.points)][: options.points])
        force = -jax.vmap(jax.grad(system.energy))(x) * scale / kT
        score = jax.vmap(lambda x: model.score(model.transform.to_model(x), model.process.t_min))(x)
        energy = metrics.energies(system, x)
        density = rj.log_density(jax.random.key(0), model, x, times, num_paths=options.paths)
        delta = np.asarray(density.log_density, np.float64) + energy / kT
        log_normalizer = -delta.mean() if log_normalizer is None else log_normalizer
        delta = delta + log_normalizer
        beta = options.start / temperature
        shift, error, ess = reweighted(energy, beta * delta)
        per_path = np.asarray(density.per_path, np.float64) + energy[:, None] / kT
        shift_of_paths, error_of_paths, ess_of_paths = reweighted(energy, logsumexp(beta * per_path, axis=1))
        row = {
            "temperature": temperature,
            "score_error": float(jnp.sum((score - force) ** 2) / jnp.sum(force**2)),
            "delta": float(delta.mean()),
            "delta_sd": float(delta.std(ddof=1)),
            "delta_slope": float(np.polyfit(energy, delta, 1)[0]),
            "energy_shift": shift,
            "error_of_shift": error,
            "ess": ess,
            "shift_of_paths": shift_of_paths,
            "error_of_shift_of_paths": error_of_paths,
            "ess_of_paths": ess_of_paths,
            "path_sd": float(np.sqrt(np.mean(per_path.var(axis=1, ddof=1)))) if options.paths > 1 else math.nan,
            "path_error": float(np.nanmean(np.asarray(density.standard_error))),
            "log_normalizer_at_start": log_normalizer,
        }
        print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
