"""Two potentials composed: models trained under bias potentials, multiplied and divided, against simulation.

DW-4 at T = 2 with a spring b1 between the first two particles, or b2 between the last two, or none: three models, each
trained on samples of its own potential. Steered together they give laws that none of them has seen:

    p1 p2        exp(-(2 U + b1 + b2) / kT), which is U + (b1 + b2) / 2 at T = 1
    p1 p2 / p0   exp(-(U + b1 + b2) / kT)

held against parallel tempering of those potentials. Errors are over seeds of steering; "floor" is as many samples of
one reference set against the other one.

    python scripts/benchmark_composition.py [--seeds 4] [--particles 2000] [--steps 200] [--training-steps 6000]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rnejax as rj
from rnejax.kernels import CentreOfMassFree
from rnejax.networks import build, functional
from rnejax.systems import Biased, DistanceBias, DoubleWell, metrics
from rnejax.systems.tempering import parallel_tempering
from rnejax.training import denoising_loss, fit, make_optimizer, time_law

TEMPERATURE = 2.0
SCALE = 2.0  # the networks' unit of length: models that are multiplied must agree on it
PAIRS = ((0, 1), (2, 3))
NAMES = ("energy_w1", "distance_w2", "energy_tvd", "distance_tvd", "first_spring_w1", "second_spring_w1")


def system(first: float, second: float) -> Any:
    """DW-4 with springs of these stiffnesses."""
    springs = [DistanceBias(pair, k, 2.5) for pair, k in zip(PAIRS, (first, second), strict=True) if k > 0]
    return Biased(DoubleWell(4), tuple(springs))


def samples(key: Any, of: Any, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Configurations and energies of two halves, (2, n, ...), from chains that began cold and hot."""
    ladder = [temperature * factor for factor in (1.0, 1.4, 2.0)]
    made = parallel_tempering(
        key, of, ladder, num_chains=32, num_samples=1250, rounds_between=10, burn_in=1000, progress=False
    )
    if float(np.max(made.rhat)) > 1.01 or float(np.max(np.abs(made.halves_z))) > 4:
        raise RuntimeError(f"the reference has not converged: rhat {made.rhat}, halves_z {made.halves_z}")
    # Neighbouring chains started alike; both halves get as many of either kind.
    x, energy = np.asarray(made.x[0]), np.asarray(made.energy[0])
    parts = [np.arange(start, 32, 2) for start in (0, 1)]
    return (
        np.stack([x[part].reshape(-1, *of.shape) for part in parts]),
        np.stack([energy[part].reshape(-1) for part in parts]),
    )


def train(key: Any, x: np.ndarray, steps: int) -> rj.DiffusionModel:
    """A model of samples at the common scale; the two springs' particles are of two kinds."""
    process = rj.processes.Cosine(t_min=0.003, subspace=CentreOfMassFree())
    key_network, key_fit, key_calibrate = jax.random.split(key, 3)
    network = build(
        "egnn", key_network, shape=(4, 2), kinds=(0, 0, 1, 1), features=64, num_layers=3, num_radial=48, reach=6.0
    )
    apply, params = functional(network)
    loss = denoising_loss(
        process, apply, lambda key, batch: (batch, None), prediction="v", times=time_law(process), antithetic=True
    )
    data = (x / SCALE).astype(np.float32)
    optimizer = make_optimizer(3e-3, num_steps=steps, warmup_steps=100, decay_steps=2 * steps // 3)
    fitted = fit(
        key_fit, loss, params, data, optimizer,
        num_steps=steps, batch_size=128, steps_per_call=20, report_every=steps, save_every=steps,
    )  # fmt: skip
    model = rj.DiffusionModel(
        process, apply.as_prediction(), "v", shape=(4, 2), params=fitted.average, transform=rj.transforms.Affine(SCALE),
        batched=True,
    )  # fmt: skip
    return rj.calibrate(key_calibrate, model, rj.time_grid(process, 100), data=x[:2000])


def compare(of: Any, x: np.ndarray, reference: np.ndarray, log_weights: Any = None) -> dict[str, float]:
    """The usual metrics, and W1 of the two distances that the springs act on."""
    found = metrics.compare(of, x, reference, log_weights)
    weights = metrics.weights_of(log_weights, len(x))
    for name, (i, j) in zip(("first_spring_w1", "second_spring_w1"), PAIRS, strict=True):
        ours, theirs = (np.linalg.norm(each[:, i] - each[:, j], axis=-1) for each in (x, reference))
        found[name] = metrics.wasserstein(ours, theirs, 1, weights)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard errors over seeds, in Markdown."""
    lines = ["| law | row | " + " | ".join(NAMES) + " | ESS | log Z |", "|" + "---|" * (len(NAMES) + 4)]
    for law, row in dict.fromkeys((each["law"], each["row"]) for each in rows):
        chosen = [each for each in rows if (each["law"], each["row"]) == (law, row)]
        cells = []
        for name in (*NAMES, "ess", "log_normalizer"):
            values = np.asarray([each[name] for each in chosen if name in each])
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            cells.append(f"{values.mean():.3g} ± {error:.1g}" if len(values) else "-")
        lines.append(f"| {law} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--training-steps", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    key = jax.random.key(60)
    models = []
    for number, stiffness in enumerate(((0.0, 0.0), (4.0, 0.0), (0.0, 4.0))):
        key_data, key_train = jax.random.split(jax.random.fold_in(key, number))
        x, _ = samples(key_data, system(*stiffness), TEMPERATURE)
        models.append(train(key_train, x.reshape(-1, 4, 2), options.training_steps))
    unbiased, first, second = models
    laws: dict[str, tuple[Any, float, Any]] = {
        "p1": (system(4.0, 0.0), TEMPERATURE, first),
        "p1 p2": (system(2.0, 2.0), TEMPERATURE / 2, rj.product([first, second])),
        "p1 p2 / p0": (
            system(4.0, 4.0),
            TEMPERATURE,
            rj.product([first, second, unbiased], exponents=[1.0, 1.0, -1.0]),
        ),
    }
    times = rj.time_grid(unbiased.process, options.steps)
    rows: list[dict[str, Any]] = []
    path = options.output / "composition.json"
    for number, (law, (of, temperature, target)) in enumerate(laws.items()):
        x, _ = samples(jax.random.fold_in(key, 10 + number), of, temperature)
        kT = of.thermal_energy(temperature)
        rng = np.random.default_rng(0)
        for seed in range(10):
            some = rng.choice(x.shape[1], options.particles, replace=False)
            rows.append({"law": law, "row": "floor", "seed": seed, **compare(of, x[0][some], x[1])})
        for row, threshold in (("no weights", 0.0), ("symmetric", 0.5)):
            for seed in range(options.seeds):
                result = rj.steer(
                    jax.random.fold_in(key, 100 + seed), target, times, num_particles=options.particles, warn=False,
                    ess_threshold=threshold, progress=False,
                )  # fmt: skip
                particles = np.asarray(result.particles)
                log_weights = None if row == "no weights" else np.asarray(result.log_weights)
                ess = {} if log_weights is None else {"ess": float(rj.smc.effective_sample_size(result.log_weights))}
                rows.append({"law": law, "row": row, "seed": seed, **compare(of, particles, x[1], log_weights), **ess})
                if log_weights is not None:
                    again = rj.reweight(result, target, lambda x, of=of, kT=kT: -of.energy(x) / kT)
                    rows.append({
                        "law": law, "row": "symmetric, true energy", "seed": seed,
                        **compare(of, particles, x[1], np.asarray(again.log_weights)),
                        "ess": float(rj.smc.effective_sample_size(again.log_weights)),
                        "log_normalizer": float(again.log_normalizer),
                    })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
        settings = {name: getattr(options, name) for name in ("particles", "steps", "training_steps")}
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
