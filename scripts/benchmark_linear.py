"""What matrices cost: host set-up of a grid of a dense linear SDE, and a step of it against one of a scalar process.

    python scripts/benchmark_linear.py [--dimension 256] [--steps 200] [--particles 1024]

Prints tables in Markdown: seconds of host set-up and the memory of its coefficients, for uneven and even steps, and
where there is no stationary law to start from; and milliseconds per step of `rnejax.sample`, best of several runs, with
a network that costs nothing and with one of two hidden layers. One product is that of all particles with one d x d
matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.increments import transitions
from rnejax.processes import LinearSDE, NonReversible, VariancePreserving
from rnejax.regimes import optimal_skew


def best_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest run, after one that compiles."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def set_up(process: Any, num_steps: int, kind: str) -> tuple[float, float]:
    """Seconds and megabytes of the coefficients of all steps of a grid."""
    start = time.perf_counter()
    steps = transitions(process, rj.time_grid(process, num_steps, kind))
    jax.block_until_ready(steps)
    seconds = time.perf_counter() - start
    return seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(steps)) / 1e6


def network(dimension: int, width: int) -> tuple[Any, Callable[..., Any]]:
    """A multilayer perceptron on batches, whose weights do not matter."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(dimension, width), (width, width), (width, dimension)]
    params = [jax.random.normal(key, size) / np.sqrt(size[0]) for key, size in zip(keys, sizes, strict=True)]

    def fn(params: Any, x: Any, t: Any, condition: Any) -> Any:
        for matrix in params[:-1]:
            x = jax.nn.silu(x @ matrix)
        return x @ params[-1]

    return params, fn


def step_seconds(process: Any, num_particles: int, params: Any, fn: Callable[..., Any], few: int = 10) -> float:
    """Of one step of a run: the difference of a long run and a short one, so that start and end do not count."""
    dimension = params[0].shape[0] if isinstance(params, list) else params.shape[0]
    model = rj.DiffusionModel(process, fn, "x0", shape=(dimension,), params=params, batched=True)
    seconds = []
    for num_steps in (few, 5 * few):
        times = rj.time_grid(process, num_steps, "uniform")
        seconds.append(best_of(lambda times=times: rj.sample(jax.random.key(1), model, times, num_particles).x, 15))
    return (seconds[1] - seconds[0]) / (4 * few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--particles", type=int, default=1024)
    arguments = parser.parse_args()
    d, n = arguments.dimension, arguments.particles
    rates = 25 ** (np.arange(d) / (d - 1))
    rates *= d / rates.sum()
    stationary = NonReversible(rates, optimal_skew(rates), t_max=5.0)
    rng = np.random.default_rng(0)
    drifting = LinearSDE(np.diag(rates) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d), 1.0, t_max=5.0)

    print(f"| host set-up, d = {d}, {arguments.steps} steps | seconds | MB |\n|---|---|---|")
    for name, process, kind in (
        ("non-reversible, uneven steps", stationary, "quadratic"),
        ("non-reversible, even steps", stationary, "uniform"),
        ("reference not stationary, uneven steps", drifting, "quadratic"),
    ):
        seconds, megabytes = set_up(process, arguments.steps, kind)
        print(f"| {name} | {seconds:.1f} | {megabytes:.0f} |", flush=True)

    x, matrix = jnp.ones((n, d)), jnp.ones((d, d))
    multiply = jax.jit(lambda x, matrix: jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST))
    product = best_of(lambda: multiply(x, matrix), repeats=50)
    print(f"\none product of {n} particles: {1e3 * product:.2f} ms\n")
    print("| a step, ms | scalar | dense | dense / (scalar + product) |\n|---|---|---|---|")
    free = (jnp.full(d, 0.5), lambda params, x, t, condition: params * x)
    for name, (params, fn) in (("network for nothing", free), ("512 hidden units, twice", network(d, 512))):
        scalar = step_seconds(VariancePreserving(), n, params, fn)
        dense = step_seconds(stationary, n, params, fn)
        print(f"| {name} | {1e3 * scalar:.1f} | {1e3 * dense:.1f} | {dense / (scalar + product):.2f} |", flush=True)


if __name__ == "__main__":
    main()
