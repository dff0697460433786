"""Cloning through the library's own reverse kernels against theory: Phi(s_t), for two Gaussian classes.

    python scripts/benchmark_regimes.py [--pairs 4000] [--steps 400] [--output docs/tables]

Two problems. The fixed example of mathematics.md, section 8: 32 dimensions, three class directions, reversible, random
and optimal circulation (that of the Hadamard matrix), each at the time of speciation and at half and twice of it. And
that of Biroli et al. 2024: isotropic classes with |m|^2 = d under reversible noise, at the dimensions and times at
which they print phi. Clones start from noised data; z is the difference to theory in standard errors of the experiment.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import rnejax as rj
from rnejax.processes import LinearSDE, NonReversible
from rnejax.regimes import (
    class_separation,
    cloning_probability,
    optimal_skew,
    random_skew,
    same_class_probability,
    speciation_time,
)

PUBLISHED = ((256, 3.0, 0.701), (1024, 3.5, 0.765), (4096, 4.5, 0.674))


class Classes:
    """+-m with unit covariance, in closed form and with little memory: E[x_0 | x_t] along m, and the rest alone."""

    def __init__(self, mean: np.ndarray):
        self.mean = jnp.asarray(mean, jnp.float32)

    def sample(self, key: Any, num: int) -> Any:
        key_sign, key_noise = jax.random.split(key)
        signs = jax.random.rademacher(key_sign, (num, 1), jnp.float32)
        return signs * self.mean + jax.random.normal(key_noise, (num, len(self.mean)))

    def side(self, x: Any) -> Any:
        return self.mean @ x > 0


def phi(key: Any, process: Any, mean: np.ndarray, t: float, pairs: int, steps: int, model: Any) -> Any:
    """phi at one time."""
    classes = Classes(mean)
    key_data, key_clones = jax.random.split(key)
    times = rj.time_grid(process, steps, t_max=t)
    data = classes.sample(key_data, pairs)
    chunk = max(50, min(pairs, 2_000_000 // len(mean)))
    return cloning_probability(
        key_clones, model, times, classes.side, num_pairs=pairs, num_times=1, data=data, chunk_size=chunk
    )


def isotropic_model(process: Any, mean: np.ndarray) -> Any:
    """E[x_0 | x_t] of +-m with unit covariance under scalar noise that keeps unit variance."""
    direction = jnp.asarray(mean, jnp.float32)

    def denoise(x: Any, level: Any) -> Any:
        alpha = level.alpha[0, 0, 0]
        # x_t ~ N(+-alpha m, I), so that the sign has the expectation tanh(alpha m . x), and given it x_0 is Gaussian.
        return alpha * x + (1 - alpha**2) * jnp.tanh(alpha * direction @ x) * direction

    return rj.DiffusionModel(process, denoise, "x0", shape=mean.shape, noise_level="level")


def rows(pairs: int, steps: int) -> Iterator[tuple[str, float, float, float]]:
    """(problem, t, measured, theory) of the fixed example."""
    size = 32
    rates = 25 ** (np.arange(size) / (size - 1))
    rates *= size / rates.sum()
    skews = {
        "reversible": None,
        "random": random_skew(0, size, 5.0),
        "optimal": optimal_skew(rates, basis=scipy.linalg.hadamard(size) / np.sqrt(size)),
    }
    directions = {"slowest": np.eye(size)[0], "uniform": np.ones(size) / np.sqrt(size), "fastest": np.eye(size)[-1]}
    count = 0
    for name, skew in skews.items():
        process = NonReversible(rates, skew, data_covariance=1.0)
        for along, direction in directions.items():
            mean = np.sqrt(size) * direction
            model = rj.systems.GaussianMixture([mean, -mean], 1.0).model(process, "x0")
            speciation = speciation_time(process, mean, 1.0)
            for factor in (0.5, 1.0, 2.0):
                t, key = factor * speciation, jax.random.fold_in(jax.random.key(0), count)
                found = phi(key, process, mean, t, pairs, steps, model)
                theory = float(same_class_probability(class_separation(process, t, mean, 1.0)))
                yield f"{name}, {along}, {factor:g} t_S", t, float(found.probability[0]), theory
                count += 1


def published(pairs: int, steps: int) -> Iterator[tuple[str, float, float, float, float]]:
    """(problem, t, measured, theory, printed) of isotropic classes."""
    process = LinearSDE(1.0)
    for i, (dimension, t, printed) in enumerate(PUBLISHED):
        mean = np.ones(dimension)
        found = phi(
            jax.random.fold_in(jax.random.key(1), i), process, mean, t, pairs, steps, isotropic_model(process, mean)
        )
        theory = float(same_class_probability(class_separation(process, t, mean, 1.0)))
        yield f"d = {dimension}", t, float(found.probability[0]), theory, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = ["| classes | t | phi, by cloning | theory | z |", "|---|---|---|---|---|"]
    largest = 0.0
    for name, t, measured, theory in rows(arguments.pairs, arguments.steps):
        error = np.sqrt(theory * (1 - theory) / arguments.pairs)
        z = (measured - theory) / error
        largest = max(largest, abs(z))
        lines.append(f"| {name} | {t:.3f} | {measured:.4f} ± {error:.4f} | {theory:.4f} | {z:+.1f} |")
        print(lines[-1], flush=True)
    lines += ["", f"Largest of these |z|: {largest:.1f}.", ""]
    lines += [
        "| isotropic classes | t | phi, by cloning | theory | printed by Biroli et al. |",
        "|---|---|---|---|---|",
    ]
    for name, t, measured, theory, printed in published(arguments.pairs, arguments.steps // 4):
        error = np.sqrt(theory * (1 - theory) / arguments.pairs)
        lines.append(f"| {name} | {t:g} | {measured:.4f} ± {error:.4f} | {theory:.4f} | {printed} |")
        print(lines[-1], flush=True)
    if arguments.output is not None:
        (arguments.output / "regimes_cloning.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
