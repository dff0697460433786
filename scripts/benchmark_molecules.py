"""Annealing of molecular models, against parallel tempering of the true energy.

Rows: the base model at its own temperature; then, at each lower temperature, score scaling without weights,
Feynman-Kac correctors, the proposal (1, 0), the symmetric one, the symmetric one tuned on pilot runs, and these two
reweighted to the true energy at the last step. All rows take as many particles and steps; the rows whose auxiliary
kernel looks at the last state cost one evaluation more, and "tuned" two pilots of a quarter of the particles: at equal
evaluations it has two thirds of the particles. Feynman-Kac correctors make Euler-Maruyama steps, so they get a grid
that suits these: as many steps, equal in log-SNR, from t = 0.95. Every number is a mean over seeds with its standard
error. "floor" is the metric of as many samples of one reference set against the other one. The shipped models have the
covariance of springs between their particles; with --covariance the model is given another one, "analytic" measured on
the reference of its own temperature, and rows are "..., analytic". Energies and lengths are in the system's units,
phi_free_energy is in kT, and ramachandran_js in nats. The table has the rows of 2,000 particles and 200 steps; rows of
other sizes are kept beside them, for the curves that scripts/figures.py draws.

    python scripts/benchmark_molecules.py [--systems dw4 lj13] [--seeds 3] [--particles 2000] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rnejax as rj
from rnejax.systems import metrics
from rnejax.systems.references import load_reference

SYSTEMS: dict[str, dict[str, Any]] = {
    "dw4": {"start": 2.0, "targets": (1.0, 0.5)},
    "lj13": {"start": 2.0, "targets": (1.5, 0.8)},
    "alanine_dipeptide": {"start": 800.0, "targets": (300.0,)},
}
NAMES = ("energy_w1", "energy_w2", "distance_w2", "distance_mmd", "energy_tvd", "distance_tvd", "outside")
OF_TORSIONS = ("aligned_w2", "phi_free_energy", "ramachandran_js")
ROWS = ("floor", "base", "score scaling", "FKC", "(1, 0)", "symmetric", "tuned")


class InChunks:
    """A network of one example, called on as many at a time as fit into a CPU's cache."""

    def __init__(self, apply: Callable[..., Any], size: int = 32):
        self.apply, self.size = apply, size

    def __call__(self, params: Any, x: Any, t: Any, condition: Any = None) -> Any:
        return jax.lax.map(lambda each: self.apply(params, *each, None), (x, t), batch_size=self.size)


def load(name: str) -> rj.DiffusionModel:
    """The model, called in chunks."""
    model = rj.load_model(name)
    return rj.load_model(name, fn=InChunks(model.fn))


def run_row(
    row: str, model: Any, beta: float, times: Any, seed: int, particles: int
) -> tuple[Any, Any, dict[str, Any]]:
    """The steered particles, their log-weights as the row uses them, and what else there is to tell."""
    target = rj.temper(model, beta)
    key = jax.random.fold_in(jax.random.key(20), seed)
    options: dict[str, Any] = {"num_particles": particles, "warn": False}
    if row == "base":
        result = rj.steer(key, model, times, ess_threshold=0.0, **options)
        return result, None, {}
    if row == "score scaling":
        return rj.steer(key, target, times, ess_threshold=0.0, proposal=(1.0, 0.0), **options), None, {}
    if row == "tuned":
        pilots = jax.random.fold_in(jax.random.key(21), seed)
        tuned = rj.tune_proposal(pilots, target, times, particles // 4)
        result = rj.steer(key, target, times, proposal=tuned.proposal, **options)
        return result, np.asarray(result.log_weights), {"pilot_variances": tuned.variances.tolist()}
    if row == "FKC":
        # On the process's own grid, Euler-Maruyama's first steps from nearly pure noise blow up: log Z of DW-4 came out
        # as 4e7 instead of -23, and the one particle that was off the most was the ancestor of all.
        times = rj.time_grid(model.process, len(times) - 1, "log_snr", t_max=0.95)
    proposal: Any = {"FKC": "feynman_kac", "(1, 0)": (1.0, 0.0), "symmetric": "symmetric"}[row]
    result = rj.steer(key, target, times, proposal=proposal, **options)
    return result, np.asarray(result.log_weights), {}


def measure(name: str, rows: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows of one system, one dictionary per row, temperature and seed, as they come."""
    problem = SYSTEMS[name]
    path = options.model or name
    model = load(path)
    start, targets = problem["start"], options.temperatures or problem["targets"]
    stored = load_reference(name, start)
    system = stored.system
    times = rj.time_grid(model.process, options.steps, options.grid)
    if options.covariance == "analytic":
        model = rj.calibrate(jax.random.key(5), model, rj.time_grid(model.process, 100), stored.x[0][:2000])
    elif options.covariance is not None:
        model = model.with_covariance(options.covariance)
    suffix = "" if options.covariance is None else f", {options.covariance}"

    def made(temperature: float, row: str, seed: int, **values: Any) -> dict[str, Any]:
        size = {"particles": options.particles, "steps": options.steps}
        return {"system": name, "temperature": temperature, "row": row, "seed": seed, **size, **values}

    for temperature in (start, *targets):
        reference = load_reference(name, temperature)
        theirs = reference.x[1], reference.energy[1]
        rng = np.random.default_rng(0)
        for seed in range(10) if "floor" in rows else ():
            chosen = rng.choice(len(reference.x[0]), options.particles, replace=False)
            values = metrics.compare(
                system,
                reference.x[0][chosen],
                theirs[0],
                energy=reference.energy[0][chosen],
                reference_energy=theirs[1],
            )
            yield made(temperature, "floor", seed, **values)
        beta = start / temperature
        for row in rows:
            if row == "floor" or (row == "base") != (temperature == start):
                continue
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                began = time.perf_counter()
                result, log_weights, found = run_row(row, model, beta, times, seed, options.particles)
                particles = np.asarray(result.particles)  # waits for the device
                x = metrics.standard_form(system, particles)
                seconds = time.perf_counter() - began
                info = found | {
                    "seconds": round(seconds, 1),
                    "log_normalizer": float(result.log_normalizer),
                    "ancestors": int(np.asarray(result.info.unique_ancestors)[-1]),
                    "ess": float(np.asarray(result.info.ess)[-1]),
                    "families": float(rj.smc.effective_ancestors(result.info.eve, result.log_weights)),
                    "resamplings": int(np.sum(result.info.resampled)),
                }
                energy = metrics.energies(system, x)
                known = {"energy": energy, "reference_energy": theirs[1]}
                values = metrics.compare(system, x, theirs[0], log_weights, **known)
                yield made(temperature, row + suffix, seed, **values, **info)
                if row not in ("base", "symmetric", "tuned"):
                    continue
                kT = system.thermal_energy(temperature)
                target = model if row == "base" else rj.temper(model, beta)
                again = rj.reweight(result, target, lambda x, kT=kT: -system.energy(x) / kT)
                new = np.asarray(again.log_weights)
                info |= {
                    "log_normalizer": float(again.log_normalizer),
                    "ess": float(rj.smc.effective_sample_size(again.log_weights)),
                    "pareto_k": float(rj.smc.pareto_k(again.log_weights)),
                }
                values = metrics.compare(system, x, theirs[0], new, **known)
                yield made(temperature, f"{row}{suffix}, true energy", seed, **values, **info)


def table(found: list[dict[str, Any]], particles: int = 2000, steps: int = 200) -> str:
    """Means and standard errors over seeds, in Markdown, of one number of particles and steps."""
    found = [each for each in found if (each["particles"], each["steps"]) == (particles, steps)]
    extra = ("ancestors", "families", "ess", "pareto_k", "seconds")
    names = (*NAMES, *(name for name in OF_TORSIONS if any(name in each for each in found)))
    lines = ["| system | T | row | seeds | " + " | ".join((*names, *extra)) + " |"]
    lines.append("|" + "---|" * (4 + len(names) + len(extra)))

    def order(row: str) -> tuple[Any, ...]:
        return ROWS.index(next(name for name in ROWS if row.startswith(name))), row.replace(", true energy", ""), row

    keys = {(each["system"], each["temperature"], each["row"]) for each in found}
    for key in sorted(keys, key=lambda key: (key[0], -key[1], order(key[2]))):
        rows = [each for each in found if (each["system"], each["temperature"], each["row"]) == key]
        cells = []
        for name in (*names, *extra):
            values = np.asarray([each[name] for each in rows if name in each], np.float64)
            # The weights of what is used without weights say nothing about it.
            if values.size == 0 or (name == "ess" and key[2] == "score scaling"):
                cells.append("-")
            elif name in extra:
                cells.append(f"{values.mean():.3g}")
            else:
                error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
                cells.append(f"{values.mean():.3g} ± {error:.1g}")
        lines.append(f"| {key[0]} | {key[1]:g} | {key[2]} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--model", help="another model file, of the one system given")
    parser.add_argument("--temperatures", nargs="+", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--grid", default=None)
    parser.add_argument("--covariance", default=None, help="of the reverse kernel; by default the model's own")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    path = options.output / "molecules.json"
    same = ("system", "temperature", "row", "seed", "particles", "steps")
    for name in options.systems:
        for row in measure(name, options.rows, options):
            print(json.dumps(row), flush=True)
            # Read anew: another run may have added rows meanwhile.
            kept = json.loads(path.read_text())["rows"] if path.exists() else []
            kept = [each for each in kept if any(each[key] != row[key] for key in same)] + [row]
            settings = {"jax": jax.__version__}
            options.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings, "rows": kept}, indent=1) + "\n")
            (options.output / "molecules.md").write_text(table(kept))
    print(table(json.loads(path.read_text())["rows"]))


if __name__ == "__main__":
    main()
