"""What steering costs beside sampling: wall-clock on the digits model, same particles, same steps, runs in turn.

    python scripts/benchmark_cost.py [--particles 64] [--steps 50] [--repeats 5]

Prints medians and their ratio, the same with a network of no cost (what the library itself costs per step), and the
time of a convolution's gradients inside a loop beside XLA's own; writes docs/tables/cost.json. Compilation is not in
the times; it is printed beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rnejax as rj
from rnejax.networks.convolution import convolve

TABLES = Path(__file__).parent.parent / "docs" / "tables"


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every call: the first one alone, then `repeats` rounds in which each has its turn."""
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        rows[name] = {"first_call_seconds": round(time.perf_counter() - start, 2), "seconds": []}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            rows[name]["seconds"].append(round(time.perf_counter() - start, 4))
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
    return rows


def without_cost(model: rj.DiffusionModel) -> rj.DiffusionModel:
    """The same process, shape and covariance with a network that does next to nothing."""
    return rj.DiffusionModel(
        model.process,
        lambda params, x, t, condition: params * x,
        model.prediction,
        model.covariance,
        model.shape,
        params=jnp.full((), 0.1),
        condition=model.condition,
        batched=True,
    )


def convolution_gradients(num_images: int = 32, num_steps: int = 4) -> dict[str, float]:
    """Milliseconds of both gradients of one convolution inside a scan: ours, and that of the built-in one."""
    images = jax.random.normal(jax.random.key(0), (num_images, 28, 28, 32))
    kernel = 0.05 * jax.random.normal(jax.random.key(1), (3, 3, 32, 32))
    settings = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def milliseconds(function: Callable[..., jax.Array]) -> float:
        def step(images: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            d_images, d_kernel = jax.vjp(lambda *both: function(*both, (1, 1), "SAME", **settings), images, kernel)[1](
                images
            )
            return jnp.tanh(d_images), d_kernel

        loop = jax.jit(lambda images: jax.lax.scan(step, images, None, num_steps))
        row = in_turn({"": lambda: loop(images)}, 3)[""]
        return round(1e3 * row["median_seconds"] / num_steps, 1)

    return {"ours_ms": milliseconds(convolve), "built_in_ms": milliseconds(jax.lax.conv_general_dilated)}


def markdown(settings: dict[str, int], rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | evaluations | median seconds | over sample | first call, with compilation | free network, ms per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['evaluations']} | {row['median_seconds']:.2f} | {row['over_sample']:.3f} "
            f"| {row['first_call_seconds']:.1f} | {row['free_network_ms_per_step']:.2f} |"
        )
    options = " ".join(f"--{name} {value}" for name, value in settings.items())
    return "\n".join([*lines, "", f"`python scripts/benchmark_cost.py {options}`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=TABLES)
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    times = rj.time_grid(model.process, arguments.steps)
    n = arguments.particles
    key = jax.random.key(0)

    def calls(model: rj.DiffusionModel) -> dict[str, Callable[[], Any]]:
        def steer(target: Any) -> Callable[[], Any]:
            return lambda: rj.steer(key, target, times, n, warn=False, progress=False).particles

        return {
            "sample": lambda: rj.sample(key, model, times, n, progress=False).x,
            "steer: the model itself": steer(model),
            "steer: temper, exponent 2": steer(rj.temper(model, 2.0)),
        }

    rows = in_turn(calls(model), arguments.repeats)
    free = in_turn(calls(without_cost(model)), arguments.repeats)
    for name, row in rows.items():
        row["evaluations"] = arguments.steps + ("temper" in name)
        row["over_sample"] = round(row["median_seconds"] / rows["sample"]["median_seconds"], 3)
        row["free_network_ms_per_step"] = round(1e3 * free[name]["median_seconds"] / arguments.steps, 2)
    settings = {"particles": n, "steps": arguments.steps, "repeats": arguments.repeats}
    print(markdown(settings, rows))
    gradients = convolution_gradients()
    print("gradients of a 3 x 3 convolution in a loop, 32 images of 28 x 28 x 32: " + str(gradients))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cost.md").write_text(markdown(settings, rows))
    (arguments.output / "cost.json").write_text(
        json.dumps({"settings": settings, "rows": rows, "convolution_gradients": gradients}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
