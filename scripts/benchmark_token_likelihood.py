"""Likelihood of held-out digits and sentences in bits per token: the variational bound, and one, 8 and 64 paths.

    python scripts/benchmark_token_likelihood.py [digits_tokens] [verses] [--points 100] [--paths 64] [--quick]

A path that reveals one token per step is one draw of an order; minus its log-density is unbiased for the variational
bound, which `rnejax.training.likelihood_bound` estimates in another way: by masking a random number of tokens at once.
The log-mean-exp over several paths is a bound too, and a tighter one: by how much, and for how many evaluations of the
network, is what this measures. Beside them, paths of fewer steps.

Paths of one token per step are the same ones, in groups of 1, 8 or 64, and a row is the mean over groups: what it would
be for one group is as noisy as that. The bound is estimated from other noise, on the same sequences, and differences
from it are paired by sequence. Standard errors are over sequences.
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
from rnejax.smc.weights import log_mean_exp
from rnejax.training import likelihood_bound

MODELS = ("digits_tokens", "verses")


def held_out(name: str, count: int) -> np.ndarray:
    """Test sequences."""
    if name == "digits_tokens":
        from rnejax.systems import digit_tokens

        return digit_tokens.load("test").tokens[:count]
    from rnejax.systems import text

    return text.load("test")[:count]


def paths(key: jax.Array, model: rj.DiffusionModel, x: np.ndarray, times: Any, num_paths: int, at_once: int) -> Any:
    """Log-densities of single paths, (n, num_paths), a few sequences at a time."""
    found = []
    for first in range(0, len(x), at_once):
        part = jnp.asarray(x[first : first + at_once])
        density = rj.log_density(
            jax.random.fold_in(key, first), model, part, times, num_paths=num_paths, progress=False
        )
        found.append(np.asarray(density.per_path, np.float64))
    return np.concatenate(found)


def measure(name: str, num_points: int, num_paths: int, seed: int) -> list[dict[str, Any]]:
    model = rj.load_model(name)
    one_by_one = model.with_process(model.process.one_token_per_step())
    x = held_out(name, num_points)
    length = model.shape[0]
    key_bound, key_paths, key_steps = jax.random.split(jax.random.key(seed), 3)
    rows: list[dict[str, Any]] = []

    def add(method: str, nats: np.ndarray, evaluations: int, reference: np.ndarray | None) -> None:
        bits = nats / length / np.log(2)
        row = {
            "model": name,
            "points": len(x),
            "seed": seed,
            "method": method,
            "bits_per_token": float(bits.mean()),
            "standard_error": float(bits.std(ddof=1) / np.sqrt(len(bits))),
            "nats_per_sequence": float(nats.mean()),
            "evaluations_per_sequence": evaluations,
        }
        if reference is not None:
            change = bits - reference / length / np.log(2)
            row["below_bound"] = float(-change.mean())
            row["below_bound_error"] = float(change.std(ddof=1) / np.sqrt(len(change)))
        rows.append(row)
        print(row, flush=True)

    samples = 4 * num_paths
    bound = np.asarray(likelihood_bound(key_bound, model, x, num_samples=samples, batch_size=8).bound, np.float64)
    add("variational bound, by number of masks", bound, samples, None)

    times = rj.time_grid(one_by_one.process, length)
    per_path = paths(key_paths, one_by_one, x, times, num_paths, max(1, 512 // num_paths))
    for group in sorted({1, min(8, num_paths), num_paths}):
        grouped = per_path.reshape(len(x), num_paths // group, group)
        nats = -np.asarray(log_mean_exp(jnp.asarray(grouped)), np.float64).mean(axis=1)
        add(f"{group} path{'s' * (group > 1)}, one token per step", nats, group * length, bound)
    for divisor in (2, 4):
        steps = length // divisor
        few = paths(key_steps, model, x, rj.time_grid(model.process, steps), min(8, num_paths), 64)
        nats = -np.asarray(log_mean_exp(jnp.asarray(few)), np.float64)
        add(f"{few.shape[1]} paths of {steps} steps", nats, few.shape[1] * steps, bound)
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Test sequences; errors are standard errors over them.",
        "",
        "| model | sequences | estimate of -log2 p | bits per token | below the bound | evaluations per sequence |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        below = f"{r['below_bound']:+.4f} ± {r['below_bound_error']:.4f}" if "below_bound" in r else "-"
        lines.append(
            f"| `{r['model']}` | {r['points']} "
            f"| {r['method']} | {r['bits_per_token']:.4f} ± {r['standard_error']:.4f} | {below} | "
            f"{r['evaluations_per_sequence']:,} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="which; default, both")
    parser.add_argument("--points", type=int, default=100, help="test sequences")
    parser.add_argument("--paths", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    parser.add_argument("--quick", action="store_true", help="few of everything: whether it runs, not what it says")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.points, arguments.paths = 4, 8
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "token_likelihood.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.models or MODELS:
        report[name] = measure(name, arguments.points, arguments.paths, arguments.seed)
        path.write_text(json.dumps(report, indent=1) + "\n")
    rows = [row for name in MODELS for row in report.get(name, [])]
    text = "\n".join(markdown(rows))
    (arguments.output / "token_likelihood.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
