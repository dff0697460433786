"""How much of a gradient is signal: paths of different sources, where posteriors begin to be learned.

    python scripts/benchmark_path_gradients.py digits_posterior [MODEL] [--batches 12] [--paths 20]
    python scripts/benchmark_path_gradients.py verses_middle [MODEL] [--batches 12] [--paths 32]

The posteriors of a config of `rnejax finetune`, of its network as it begins, or of a tuned MODEL. For every source of
paths: the cosine of the mean gradients of two halves of the batches; 0 is noise, 1 is none. If a batch's gradient is
signal and independent noise, whose squared norms are s and v, halves of n batches have a cosine of about
s / (s + v / n), and "noise" is v / s.

Writes docs/tables/path_gradients_CONFIG.{json,md}.
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
from rnejax.runs.finetune import make_loss
from rnejax.runs.finetuning import build_problem
from rnejax.training import Examples, FineTuned

Sources = dict[str, tuple[dict[str, float], bool]]
SOURCES: dict[str, Sources] = {
    "digits_posterior": {
        "generated": ({"generated": 1.0}, False),
        "own samples, noised again": ({"renoised": 1.0}, False),
        "own samples, noised again, averaged": ({"renoised": 1.0}, True),
        "data under their class and any, noised": ({"noised": 1.0}, False),
        "data under their class and any, noised, averaged": ({"noised": 1.0}, True),
    },
    "verses_middle": {
        "four generated": ({"generated": 1.0}, False),
        "four own samples, noised again, averaged": ({"renoised": 1.0}, True),
        "what was written and three generated": ({"noised": 0.25, "generated": 0.75}, False),
        "what was written and three own samples, noised again, averaged": ({"noised": 0.25, "renoised": 0.75}, True),
    },
}
"""The shares of sources, and whether gradients are averaged. Of verses, paths of the same sentence are compared."""


def measure(
    problem: Any, config: Any, weights: Any, sources: dict[str, float], averaged: bool, batches: int, paths: int
) -> Any:
    loss = make_loss(config.model_copy(update={"sources": sources, "averaged": averaged}), problem)
    # Of classes: a tenth of what the model makes is of each.
    guess = jnp.full(problem.num_classes, -np.log(10.0)) if problem.num_classes else jnp.zeros(())
    no_data = Examples(jnp.zeros((10_000, 1)), problem.conditions(10_000)) if problem.num_classes else None
    examples = problem.data(jax.random.key(0)) if no_data is None or "noised" in sources else no_data

    def value(weights: Any, key: Any, batch: Any) -> Any:
        values, report = loss(key, FineTuned(weights, guess), batch)
        return values.mean(), report

    gradient = jax.jit(jax.grad(value, has_aux=True))
    found, squared = [], []
    random = np.random.default_rng(0)
    for i in range(batches):
        rows = random.choice(len(examples.x), paths, replace=False)
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples)
        each, report = gradient(weights, jax.random.key(i), batch)
        found.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)]).astype(np.float64))
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
    parser.add_argument("config", choices=SOURCES)
    parser.add_argument("model", nargs="?", default=None, help="model.safetensors of rnejax finetune CONFIG")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--paths", type=int, default=20, help="of a batch")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    config: Any = load_config(FinetuneRun, arguments.config, [])
    problem: Any = build_problem(config)
    weights = problem.posterior.params
    if arguments.model is not None:
        tuned = rj.load_model(arguments.model).params
        weights = {name: tuned[name] for name in weights}
    start = "the network as it begins" if arguments.model is None else "the network is tuned"
    report: dict[str, Any] = {"start": start, "batches": arguments.batches, "paths": arguments.paths, "rows": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (sources, averaged) in SOURCES[arguments.config].items():
        found = measure(problem, config, weights, sources, averaged, arguments.batches, arguments.paths)
        report["rows"][name] = found
        print(name, found, flush=True)
    path = arguments.output / f"path_gradients_{arguments.config}"
    path.with_suffix(".json").write_text(json.dumps(report) + "\n")
    path.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
