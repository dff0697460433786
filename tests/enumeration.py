"""Small worlds of tokens in which everything can be counted: random joint laws and their exact conditionals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj


@dataclass(frozen=True)
class World:
    """A law over all sequences of ``length`` tokens, given by its logarithm, (V ** length,) in lexicographic order."""

    vocab_size: int
    length: int
    log_probs: np.ndarray

    @classmethod
    def random(cls, seed: int, vocab_size: int = 3, length: int = 5, spread: float = 1.5) -> World:
        logits = spread * np.random.default_rng(seed).normal(size=vocab_size**length)
        return cls(vocab_size, length, logits - np.logaddexp.reduce(logits))

    @cached_property
    def sequences(self) -> np.ndarray:
        return np.asarray(list(itertools.product(range(self.vocab_size), repeat=self.length)), np.int32)

    def index(self, x) -> np.ndarray:
        """Where sequences (n, length) stand in the list."""
        return np.asarray(x) @ self.vocab_size ** np.arange(self.length)[::-1]

    def log_prob(self, x) -> np.ndarray:
        return self.log_probs[self.index(x)]

    def conditional(self, x: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """log p(x_0 at i = k | the tokens of x that are not masked), (length, V): exact, for any time."""
        sequences = jnp.asarray(self.sequences)
        fits = jnp.all((x == self.vocab_size) | (sequences == x), axis=1)
        return self._marginals(jnp.where(fits, jnp.asarray(self.log_probs, jnp.result_type(float)), -jnp.inf))

    def posterior(self, alpha):
        """fn(x, t): log p(x_0 at i = k | x_t) of the uniform process with this survival, (length, V)."""

        def fn(x: jax.Array, t: jax.Array) -> jax.Array:
            rest = (1 - alpha(t)) / self.vocab_size
            same = jnp.asarray(self.sequences) == x
            likelihood = jnp.sum(jnp.where(same, jnp.log(alpha(t) + rest), jnp.log(rest)), axis=1)
            return self._marginals(jnp.asarray(self.log_probs, jnp.result_type(float)) + likelihood)

        return fn

    def marginal(self, alpha: float) -> World:
        """The law of the uniform process at this survival."""
        kernel = alpha * np.eye(self.vocab_size) + (1 - alpha) / self.vocab_size
        table = np.exp(self.log_probs).reshape((self.vocab_size,) * self.length)
        for axis in range(self.length):
            table = np.moveaxis(np.tensordot(kernel, table, axes=(0, axis)), 0, axis)
        return World(self.vocab_size, self.length, np.log(table.reshape(-1)))

    def _marginals(self, log_probs: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(jnp.asarray(self.sequences), self.vocab_size)  # (sequences, length, V)
        masked = jnp.where(one_hot > 0, log_probs[:, None, None], -jnp.inf)
        return jax.nn.logsumexp(masked, axis=0)

    def masked(self, **options) -> rj.DiffusionModel:
        return rj.DiffusionModel(rj.processes.Masked(self.vocab_size, self.length, **options), self.conditional)

    def one_by_one(self) -> rj.DiffusionModel:
        return rj.DiffusionModel(rj.processes.AnyOrder(self.vocab_size, self.length), self.conditional)

    def uniform(self, **options) -> rj.DiffusionModel:
        process = rj.processes.Uniform(self.vocab_size, self.length, **options)
        return rj.DiffusionModel(process, self.posterior(process.alpha))


def total_variation(world: World, log_target: np.ndarray, x, log_weights=None) -> float:
    """Between weighted sequences and a law given by an unnormalised logarithm."""
    x = np.asarray(x).reshape(-1, world.length)
    log_weights = np.zeros(len(x)) if log_weights is None else np.asarray(log_weights, np.float64).reshape(-1)
    weights = np.exp(log_weights - log_weights.max())
    found = np.bincount(world.index(x), weights / weights.sum(), len(world.log_probs))
    return 0.5 * np.abs(found - np.exp(log_target - np.logaddexp.reduce(log_target))).sum()


def end_law(models, exponents, times) -> np.ndarray:
    """What steering adds up to on a grid, for every sequence it may end in: log of

        ref(x_0)^{bar - 1} sum over paths ref(x_n) prod_steps K_ref(x_s | x_t) prod_i (K_i / K_ref)(x_s | x_t)^{beta_i}

    by multiplying matrices over all states, in float64: no particles, no proposal, no weights.
    """
    process = models[0].process
    size, length = process.vocab_size, process.length
    states = np.asarray(list(itertools.product(range(size + process.has_mask), repeat=length)), np.int32)
    x = jnp.asarray(states)

    @jax.jit
    def log_step(step):
        log_reference = jax.vmap(lambda x_t: jax.vmap(step.reference_reverse(x_t).log_prob)(x))(x)
        total = log_reference
        for model, beta in zip(models, exponents, strict=True):
            evaluation = model.evaluate(jax.random.key(0), x, step.t)
            log_model = jax.vmap(lambda x_t, e, model=model: jax.vmap(model.kernel(step, x_t, e).log_prob)(x))(
                x, evaluation
            )
            possible = log_reference > -jnp.inf
            total = total + jnp.where(possible, beta * (log_model - jnp.where(possible, log_reference, 0.0)), 0.0)
        return total

    log_law = np.asarray(jax.vmap(process.reference_at(process.level(times[-1]), (length,)).log_prob)(x), np.float64)
    for s, t in zip(times[:-1][::-1], times[1:][::-1], strict=True):
        log_law = np.logaddexp.reduce(log_law[:, None] + np.asarray(log_step(process.transition(s, t)), np.float64), 0)
    clean = (states < size).all(axis=1)
    log_reference = np.asarray(jax.vmap(process.reference_at(process.level(times[0]), (length,)).log_prob)(x))
    return log_law[clean] + (sum(exponents) - 1) * log_reference[clean]
