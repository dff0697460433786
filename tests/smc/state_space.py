"""A linear-Gaussian state-space model, as a particle filter and solved exactly by the Kalman filter.

    x_0 ~ N(0, 1),   x_k = a x_{k-1} + N(0, q),   y_k = x_k + N(0, r),   k = 1, ..., K.

It remembers: the state is correlated over time, so weights that are forgotten instead of accumulated give another
answer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

OBSERVATIONS = np.array([0.9, 1.4, -0.2, 0.6, 2.1, 1.7, 0.4, -0.8])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateSpace:
    """The bootstrap filter, a step per observation. A cache and a name show whether particles are gathered whole."""

    memory: Array
    process_variance: Array
    noise_variance: Array

    def init(self, key, num_particles):
        x = jax.random.normal(key, (num_particles,), self.memory.dtype)
        names = jnp.arange(num_particles)
        return {"x": x, "cache": jnp.stack([x, -x], axis=-1), "name": names}, jnp.zeros_like(x)

    def step(self, key, particles, observation):
        x = particles["x"]
        staleness = jnp.max(jnp.abs(particles["cache"] - jnp.stack([x, -x], axis=-1)))
        x = self.memory * x + jnp.sqrt(self.process_variance) * jax.random.normal(key, x.shape, x.dtype)
        log_likelihood = -0.5 * (
            (observation - x) ** 2 / self.noise_variance + jnp.log(2 * jnp.pi * self.noise_variance)
        )
        new = {"x": x, "cache": jnp.stack([x, -x], axis=-1), "name": particles["name"]}
        return new, log_likelihood, {"staleness": staleness}

    def position(self, particles):
        return particles["x"]


def state_space(dtype=None) -> StateSpace:
    return StateSpace(*(jnp.asarray(value, dtype) for value in (0.9, 0.3, 1.0)))


def kalman(problem: StateSpace, observations: np.ndarray) -> tuple[float, float, float]:
    """log p(y), and mean and variance of the last state given all observations."""
    a, q, r = (float(value) for value in (problem.memory, problem.process_variance, problem.noise_variance))
    mean, variance, log_evidence = 0.0, 1.0, 0.0
    for y in observations:
        mean, variance = a * mean, a**2 * variance + q
        total = variance + r
        log_evidence -= 0.5 * ((y - mean) ** 2 / total + np.log(2 * np.pi * total))
        gain = variance / total
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return log_evidence, mean, variance


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deterministic:
    """Particles that stay where they start, weighed by what the steps say: log-increment = height(step) * f(x)."""

    start: Array
    start_log_weights: Array

    def init(self, key, num_particles):
        del key, num_particles
        return self.start, self.start_log_weights

    def step(self, key, particles, height):
        del key
        return particles, height * jnp.sin(3 * particles), None

    def position(self, particles):
        return particles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prescribed:
    """Particles that do nothing, with the log-increments given as steps (steps, num_particles)."""

    start_log_weights: Array

    def init(self, key, num_particles):
        del key
        return jnp.arange(num_particles), self.start_log_weights

    def step(self, key, particles, log_increments):
        del key
        return particles, log_increments, None

    def position(self, particles):
        return particles
