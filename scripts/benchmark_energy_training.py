"""Energy-based training: score matching alone against three residuals, on mixtures whose log-density is known.

Quality is the standard deviation of log p_theta - log p over exact samples of p_t (a constant is free; with the pin at
t_max its mean is shown too), at t = 0.002, 0.02 and 0.1 of the variance-preserving process. Every row sees as many
batches; seconds per step are those of training, evaluation left out, and depend on what else the machine does.

    python scripts/benchmark_energy_training.py [--problems plane high] [--seeds 3] [--steps 6000]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.networks import build, functional, num_weights
from rnejax.systems.mixture import random_mixture
from rnejax.training import energy_loss, fit, make_optimizer, time_law

TIMES = (0.002, 0.02, 0.1)
PROBLEMS: dict[str, dict[str, Any]] = {
    "plane": {"dimension": 2, "std": 0.0486, "hidden": 128, "covariance": "full"},
    "high": {"dimension": 100, "std": 0.3, "hidden": 256, "covariance": "hutchinson"},
}
LOSSES: dict[str, dict[str, float]] = {
    "score matching": {"score": 1.0},
    "RNE, Euler-Maruyama (the paper's)": {"score": 1.0, "rne_euler": 0.1, "prior": 0.1},
    "RNE, covariance-corrected": {"score": 1.0, "rne": 0.1, "prior": 0.1},
    "Fokker-Planck": {"score": 1.0, "fokker_planck": 0.1, "prior": 0.1},
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
        time_scale="log",
    )
    apply, params = functional(network)
    data = jax.vmap(mixture.sample)(jax.random.split(jax.random.key(10), 100_000))
    loss = energy_loss(
        process, apply, weights=weights, covariance=problem["covariance"], times=time_law(process, log_snr_share=0.5)
    )
    optimizer = make_optimizer(1e-3, num_steps=steps, warmup_steps=100, decay_steps=2 * steps // 3)
    options: dict[str, Any] = {"batch_size": 512, "steps_per_call": 50, "report_every": steps, "save_every": steps}
    fit(
        jax.random.key(1),
        loss,
        params,
        data,
        optimizer,
        num_steps=100,
        **options | {"report_every": 100, "save_every": 100},
    )
    began = time.perf_counter()
    fitted = fit(jax.random.key(seed + 100), loss, params, data, optimizer, num_steps=steps, **options)
    seconds = (time.perf_counter() - began) / steps
    found: dict[str, Any] = {"ms_per_step": 1e3 * seconds, "num_weights": num_weights(params)}
    for t in TIMES:
        noised = mixture.noised(process.level(t))
        x = jax.vmap(noised.sample)(jax.random.split(jax.random.key(3), 4000))
        error = -apply(fitted.average, x, jnp.full(len(x), t)) - jax.vmap(noised.log_prob)(x)
        found[f"sd_{t}"], found[f"mean_{t}"] = float(error.std()), float(error.mean())
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard errors over seeds, in Markdown."""
    names = [f"{kind}_{t}" for t in TIMES for kind in ("sd", "mean")]
    heads = [f"{'sd' if name.startswith('sd') else 'mean'} at t = {name.split('_')[1]}" for name in names]
    lines = ["| problem | loss | seeds | " + " | ".join(heads) + " | ms per step |", "|" + "---|" * (4 + len(names))]
    for key in dict.fromkeys((row["problem"], row["loss"]) for row in rows):
        chosen = [row for row in rows if (row["problem"], row["loss"]) == key]
        cells = []
        for name in names:
            values = np.asarray([row[name] for row in chosen])
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            free = name.startswith("mean") and key[1] == "score matching"
            cells.append("free" if free else f"{values.mean():.3f} ± {error:.3f}")
        speed = np.mean([row["ms_per_step"] for row in chosen])
        lines.append(f"| {key[0]} | {key[1]} | {len(chosen)} | " + " | ".join(cells) + f" | {speed:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    path = options.output / "energy_training.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for problem in options.problems:
        for seed in range(options.seeds):
            for loss in options.losses:
                row = {"problem": problem, "loss": loss, "seed": seed, "weights": LOSSES[loss]}
                row |= train(PROBLEMS[problem], LOSSES[loss], seed, options.steps)
                same = ("problem", "loss", "seed")
                rows = [each for each in rows if any(each[name] != row[name] for name in same)] + [row]
                print(json.dumps(row), flush=True)
                options.output.mkdir(parents=True, exist_ok=True)
                settings = {"steps": options.steps, "jax": jax.__version__}
                path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
                (options.output / "energy_training.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
