"""Energy-based training: score matching alone against three residuals, on mixtures whose log-density is known.

Quality is the standard deviation of log p_theta - log p over exact samples of p_t (a constant is free; with the pin at
t_max its mean is shown too), at t = 0.002, 0.02 and 0.1 of the variance-preserving process. Every row sees as many
batches; seconds per step are those of training, evaluation left out, and depend on what else the machine does.

    python scripts/benchmark_energy_training.py [--problems plane high] [--seeds 3] [--steps 6000]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from energy_losses import LOSSES, Row, collect, markdown

import rnejax as rj
from rnejax.networks import build, functional, num_weights
from rnejax.systems.mixture import random_mixture
from rnejax.training import energy_loss, fit, make_optimizer, time_law

TIMES = (0.002, 0.02, 0.1)
PROBLEMS: dict[str, dict[str, Any]] = {
    "plane": {"dimension": 2, "std": 0.0486, "hidden": 128, "curvature": False, "covariance": "full"},
    "high": {"dimension": 100, "std": 0.3, "hidden": 256, "curvature": True, "covariance": "hutchinson"},
}


def train(problem: dict[str, Any], weights: dict[str, float], seed: int, steps: int) -> dict[str, Any]:
    """One network: its errors, and the time of a step."""
    dimension = problem["dimension"]
    mixture = random_mixture(jax.random.key(0), 40, dimension, problem["std"])
    process = rj.processes.VariancePreserving(t_min=1e-3, data_std=float(mixture.std))
    network = build(
        "mlp",
        jax.random.key(seed),
        shape=(dimension,),
        hidden=problem["hidden"],
        depth=3,
        output="energy",
        curvature=problem["curvature"],
        time_scale="log",
    )
    apply, params = functional(network)
    data = jax.vmap(mixture.sample)(jax.random.split(jax.random.key(10), 100_000))
    loss = energy_loss(
        process, apply, weights=weights, covariance=problem["covariance"], times=time_law(process, log_snr_share=0.5)
    )
    optimizer = make_optimizer(1e-3, num_steps=steps, warmup_steps=min(100, steps // 10), decay_steps=2 * steps // 3)
    # Ten reports; the first one's time has the compilation in it.
    fitted = fit(
        jax.random.key(seed + 100), loss, params, data, optimizer,
        num_steps=steps, batch_size=512, steps_per_call=50, report_every=steps // 10, save_every=steps,
    )  # fmt: skip
    seconds = float(np.median([report["seconds_per_step"] for report in fitted.metrics[1:]]))
    found: dict[str, Any] = {"ms_per_step": 1e3 * seconds, "num_weights": num_weights(params)}
    for t in TIMES:
        noised = mixture.noised(process.level(t))
        x = jax.vmap(noised.sample)(jax.random.split(jax.random.key(3), 4000))
        error = -apply(fitted.average, x, jnp.full(len(x), t)) - jax.vmap(noised.log_prob)(x)
        found[f"sd_{t}"], found[f"mean_{t}"] = float(error.std()), float(error.mean())
    return found


def table(rows: list[Row]) -> str:
    """By problem and loss, in Markdown."""
    columns = {f"{kind}_{t}": f"{kind} at t = {t}" for t in TIMES for kind in ("sd", "mean")}
    return markdown(rows, columns, lambda loss, name: name.startswith("mean") and loss == "score matching")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="rows of other seeds are kept")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()

    def measure(problem: str, loss: str, seed: int) -> Row:
        return train(PROBLEMS[problem], LOSSES[loss], seed, options.steps)

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    settings = {"steps": options.steps, "jax": jax.__version__}
    path = options.output / "energy_training.json"
    collect(path, settings, options.problems, options.losses, seeds, measure, table)


if __name__ == "__main__":
    main()
