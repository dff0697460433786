"""How much of a gradient is signal: paths of different sources, where posteriors of digits are learned.

    python scripts/benchmark_path_gradients.py [MODEL] [--batches 12] [--paths 20]

The posteriors of all ten classes by configs/digits_posterior.yaml, of the network as it begins, which knows no class,
or of a tuned MODEL. For every source of paths: the cosine of the mean gradients of two halves of the batches, in the
ten vectors that stand for classes; 0 is noise, 1 is none. If a batch's gradient is signal and independent noise, whose
squared norms are s and v, halves of n batches have a cosine of about s / (s + v / n), and "noise" is v / s.

Writes docs/tables/path_gradients.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.config import FinetuneRun, load_config
from rnejax.runs.finetuning import build_problem
from rnejax.training import Examples, FineTuned, trajectory_balance_loss

SOURCES = {
    "generated": ("generated", False),
    "own samples, noised again": ("renoised", False),
    "own samples, noised again, averaged": ("renoised", True),
    "data under their class and any, noised": ("noised", False),
    "data under their class and any, noised, averaged": ("noised", True),
}


def measure(problem: Any, config: Any, weights: Any, source: str, averaged: bool, batches: int, paths: int) -> Any:
    loss = trajectory_balance_loss(
        problem.posterior,
        problem.prior,
        problem.times,
        problem.log_reward,
        sources={source: 1.0},
        normalizer=lambda table, label: table[label],
        bound=config.bound,
        least_log_reward=config.least_log_reward,
        num_steps=config.gradient_steps,
        averaged=averaged,
        above=problem.above,
    )
    examples = problem.data(jax.random.key(0)) if source == "noised" else None
    guess = jnp.full(10, -np.log(10.0))  # a tenth of what the model makes is of each class

    def value(weights: Any, key: Any, batch: Any) -> Any:
        values, report = loss(key, FineTuned(weights, guess), batch)
        return values.mean(), report

    gradient = jax.jit(jax.grad(value, has_aux=True))
    found, squared = [], []
    random = np.random.default_rng(0)
    for i in range(batches):
        batch = Examples(jnp.zeros((paths, 1)), jnp.arange(paths, dtype=jnp.int32) % 10)
        if examples is not None:
            rows = random.choice(len(examples.x), paths, replace=False)
            batch = Examples(examples.x[rows], examples.condition[rows])
        each, report = gradient(weights, jax.random.key(i), batch)
        found.append(np.asarray(each["class_embedding"]["embedding"], np.float64)[:10].ravel())
        squared.append(float(report["squared_residual"][0]))
    gradients = np.array(found)
    # Of many ways to take halves the mean, so that no order counts.
    cosines = []
    for _ in range(200):
        order = random.permutation(batches)
        one, other = (gradients[half].mean(axis=0) for half in np.array_split(order, 2))
        cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    noise = gradients.var(axis=0, ddof=1).sum()
    signal = (gradients.mean(axis=0) ** 2).sum() - noise / batches
    return {
        "cosine_of_halves": float(np.mean(cosines)),
        "noise_per_signal": float(noise / signal) if signal > 0 else None,
        "squared_residual": float(np.mean(squared)),
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['batches']} batches of {report['paths']} paths; {report['start']}.",
        "",
        "| paths | cosine of halves | noise | squared residual |",
        "|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        noise = "no signal" if row["noise_per_signal"] is None else f"{row['noise_per_signal']:.1f}"
        lines.append(f"| {name} | {row['cosine_of_halves']:.2f} | {noise} | {row['squared_residual']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=None, help="model.safetensors of rnejax finetune digits_posterior")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--paths", type=int, default=20, help="of a batch")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    config: Any = load_config(FinetuneRun, "digits_posterior", [])
    problem: Any = build_problem(config)
    weights = problem.posterior.params
    if arguments.model is not None:
        weights = {"class_embedding": rj.load_model(arguments.model).params["class_embedding"]}
    start = "the network knows no class" if arguments.model is None else "the network is tuned"
    report: dict[str, Any] = {"start": start, "batches": arguments.batches, "paths": arguments.paths, "rows": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (source, averaged) in SOURCES.items():
        found = measure(problem, config, weights, source, averaged, arguments.batches, arguments.paths)
        report["rows"][name] = found
        print(name, found, flush=True)
    (arguments.output / "path_gradients.json").write_text(json.dumps(report) + "\n")
    (arguments.output / "path_gradients.md").write_text(table(report))


if __name__ == "__main__":
    main()
