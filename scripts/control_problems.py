"""Targets on mixtures with exact scores whose answers are known: what benchmark_control.py measures.

Annealing, products, guidance, tilts, observations and compositions, with log Z, mode weights or means by closed forms,
quadrature or long importance sampling. All are those of the law at t_min, the noise level that a grid ends with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.covariance import Analytic
from rnejax.systems.mixture import GaussianMixture, many_modes, random_mixture

BETA = 2.0
PROCESSES: dict[str, Any] = {
    "VP": rj.processes.VariancePreserving,
    "VE": rj.processes.VarianceExploding,
    "flow": rj.processes.RectifiedFlow,
}


@dataclass(frozen=True)
class Problem:
    """A target, and what is known about it.

    Attributes:
      name, process: as printed.
      target: what steer gets.
      times: the grid.
      log_normalizer: the truth, in nats.
      modes: a mixture whose components are the modes, with their true weights and as many exact samples as one likes.
      mean: the true mean of the target.
    """

    name: str
    process: str
    target: Any
    times: np.ndarray
    log_normalizer: float
    modes: tuple[GaussianMixture, np.ndarray] | None = None
    mean: np.ndarray | None = None


@lru_cache
def eight_modes(dimension: int) -> GaussianMixture:
    """Eight separated modes of uneven weights 1 : 2 : ... : 8."""
    means = random_mixture(jax.random.key(8), 8, dimension, std=1.0).means
    return GaussianMixture(means, std=0.3, weights=np.arange(1, 9))


def anneal(
    mixture: GaussianMixture, name: str, process: str, num_steps: int, covariance: str, beta: Any = BETA
) -> Problem:
    """p^beta, with beta a number or a function of time that ends at a number."""
    noising = PROCESSES[process](data_std=mixture.std)
    model, times = tabulated(mixture, noising, num_steps, covariance)
    final = float(beta(times[0])) if callable(beta) else float(beta)
    at_end, log_normalizer, weights = truth_of_power(mixture, noising, final)
    return Problem(name, process, rj.temper(model, beta), times, log_normalizer, (at_end, weights))


def tabulated(mixture: GaussianMixture, process: Any, num_steps: int, covariance: str) -> tuple[Any, np.ndarray]:
    """The exact model on a grid, with the analytic covariance, or the reference's as a table of ones (one program)."""
    model, times = calibrated(mixture, process, num_steps)
    if covariance == "analytic":
        return model, times
    return model.with_covariance(Analytic(model.covariance.log_snr, jnp.ones_like(model.covariance.ratio))), times


@lru_cache
def calibrated(mixture: GaussianMixture, process: Any, num_steps: int) -> tuple[Any, np.ndarray]:
    times = rj.time_grid(process, num_steps)
    data = draw(mixture, jax.random.split(jax.random.key(1), 4096))
    return rj.calibrate(jax.random.key(2), mixture.model(process), times, data), times


@lru_cache
def truth_of_power(mixture: GaussianMixture, process: Any, beta: float) -> tuple[GaussianMixture, float, np.ndarray]:
    """The law at the grid's end, log of the integral of its power, and the share of each mode in that."""
    mixture = mixture.noised(process.level(process.t_min))
    x, log_weights = draw_power(mixture, jax.random.key(3), beta)
    weights = np.asarray(mode_weights(mixture, x[None], log_weights[None])[0], np.float64)
    if beta == int(beta) and mixture.num_components**beta < 10**4:
        return mixture, mixture.log_normalizer(int(beta)), weights
    return mixture, float(rj.smc.log_mean_exp(log_weights)), weights


@jax.jit
def draw(mixture: GaussianMixture, keys: Any) -> Any:
    return jax.vmap(mixture.sample)(keys)


@partial(jax.jit, static_argnames=("beta", "num_samples"))
def draw_power(mixture: GaussianMixture, key: Any, beta: float, num_samples: int = 400_000) -> Any:
    return mixture.sample_power(key, beta, num_samples)


@jax.jit
def mode_weights(mixture: GaussianMixture, x: Any, log_weights: Any) -> Any:
    """Of every group."""
    return jax.vmap(mixture.mode_weights)(x, log_weights)


@lru_cache
def plane_mixtures() -> tuple[GaussianMixture, GaussianMixture]:
    first = GaussianMixture([[-1.0, 0.0], [1.0, 0.6], [0.2, -1.0]], std=[0.35, 0.3, 0.4], weights=[3, 4, 3])
    second = GaussianMixture([[-0.8, 0.4], [0.9, 0.2]], std=[0.4, 0.35], weights=[1, 2])
    return first, second


def quadrature(
    log_density: Callable[[Any], Any], half_width: float = 5.0, points: int = 1001
) -> tuple[float, np.ndarray]:
    """log of the integral over a square, and the mean, of exp(log_density); spectrally accurate for smooth decay."""
    axis = np.linspace(-half_width, half_width, points)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    values = np.asarray(jax.vmap(log_density)(jnp.asarray(grid, float)), np.float64)
    weights = np.exp(values - values.max())
    cell = (axis[1] - axis[0]) ** 2
    return math.log(weights.sum() * cell) + values.max(), weights @ grid / weights.sum()


def pull(x: Any) -> Any:
    """A quadratic reward."""
    return -2.0 * jnp.sum((x - jnp.array([0.8, -0.2])) ** 2)


def plane_cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name: the target made of two models, and its log-density made of theirs."""
    return {
        "product": (lambda a, b: rj.product([a, b]), lambda p, q, r: p + q),
        "guidance, scale 2": (lambda a, b: rj.guide(a, b, 2.0), lambda p, q, r: 2 * q - p),
        "quadratic reward, exact": (lambda a, b: rj.tilt(a, pull), lambda p, q, r: p + r),
        "quadratic reward, low variance": (lambda a, b: rj.tilt(a, pull, exact=False), lambda p, q, r: p + r),
        "p^1.5 q^0.5 e^r": (
            lambda a, b: rj.tilt(rj.product([a, b], [1.5, 0.5]), pull, exact=False),
            lambda p, q, r: 1.5 * p + 0.5 * q + r,
        ),
        "(p^-0.5 q^1.5)^1.3 e^r": (
            lambda a, b: rj.tilt(rj.temper(rj.guide(a, b, 1.5), 1.3), pull, exact=False),
            lambda p, q, r: 1.3 * (1.5 * q - 0.5 * p) + r,
        ),
    }


def plane_problem(name: str, process: str, num_steps: int) -> Problem:
    """Products, guidance, tilts and all of them together in two dimensions, where quadrature knows the answers."""
    first, second = plane_mixtures()
    noising = PROCESSES[process](data_std=first.std)
    (a, times), (b, _) = (tabulated(mixture, noising, num_steps, "analytic") for mixture in (first, second))
    p, q = (mixture.noised(noising.level(times[0])).log_prob for mixture in (first, second))
    make_target, log_density = plane_cases()[name]
    log_normalizer, mean = quadrature(lambda x: log_density(p(x), q(x), pull(x)))
    return Problem(name, process, make_target(a, b), times, log_normalizer, mean=mean)


def reward_problem(scale: float, process: str, num_steps: int, coefficient: float) -> Problem:
    """One of the models in two dimensions, tilted by the quadratic reward, mild or steep, in the exact scheme."""
    mixture, _ = plane_mixtures()
    noising = PROCESSES[process](data_std=mixture.std)
    model, times = tabulated(mixture, noising, num_steps, "analytic")
    p = mixture.noised(noising.level(times[0])).log_prob
    log_normalizer, mean = quadrature(lambda x: p(x) + scale * pull(x))
    target = rj.tilt(model, pull, scale=scale, gradient=coefficient > 0)
    return Problem(f"reward times {scale:g}", process, target, times, log_normalizer, mean=mean)


def observation_problem(noise_std: float, process: str, num_steps: int, coefficient: float) -> Problem:
    """Half of eight coordinates observed with noise: a reward at predicted x_0, and evidence in closed form."""
    means = 0.7 * np.random.default_rng(0).normal(size=(8, 8))
    mixture, half = GaussianMixture(means, 0.3), 4
    model, times = tabulated(mixture, PROCESSES[process](data_std=0.8), num_steps, "analytic")
    y = means[2, :half] + 0.1
    noised = mixture.noised(model.process.level(times[0]))
    variance = noise_std**2 + float(noised.variances[0, 0])
    squares = np.sum((y - np.asarray(noised.means, np.float64)[:, :half]) ** 2, axis=1) / variance
    log_evidence = np.logaddexp.reduce(-0.5 * squares) - math.log(8) - half / 2 * math.log(2 * math.pi * variance)
    target = rj.observe(model, lambda x: x[:half], y, noise_std)
    if coefficient == 0:
        target = replace(target, rewards=tuple(replace(reward, gradient=False) for reward in target.rewards))
    return Problem(f"noise {noise_std:g}", process, target, times, float(log_evidence))


def growing(t: Any) -> Any:
    """1 at pure noise, 2 at the data's end (to 1e-4, the grid's own noise level)."""
    process = PROCESSES["VP"]()
    return 1 + float(process.alpha(t) / process.alpha(process.t_min)) ** 2


@lru_cache
def scaled_many_modes() -> GaussianMixture:
    """GMM40 in units of 40, so that the variance-preserving process sees data of size 1."""
    mixture = many_modes(jax.random.key(40))
    return GaussianMixture(mixture.means / 40, std=float(jnp.sqrt(mixture.variances[0, 0])) / 40)
