"""Laws of short token sequences that can be counted: the exact conditionals, densities and targets of a small world.

A law over all V^L sequences is given by a table. From it come the network that a perfectly trained model would be (for
masked and for uniform tokens), the law at every time, and what steering adds up to on a grid of any length, by
multiplying matrices over all states. Every claim about tokens is tested against these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..model import DiffusionModel
from ..processes import AnyOrder, Masked, Uniform


@dataclass(frozen=True)
class TokenLaw:
    """A law over all sequences.

    Attributes:
      vocab_size, length: V and L; V^L numbers are kept, and their square where paths are summed.
      log_probs: logarithms of the probabilities, (V^L,), in lexicographic order of the sequences; -inf forbids.

    Raises:
      ValueError: where they are no such law.
    """

    vocab_size: int
    length: int
    log_probs: np.ndarray

    def __post_init__(self) -> None:
        expected = (self.vocab_size**self.length,)
        if np.shape(self.log_probs) != expected:
            raise ValueError(f"log_probs must have shape {expected}, one for each sequence; got {self.log_probs.shape}")
        total = np.logaddexp.reduce(self.log_probs)
        if not abs(total) < 1e-6:
            raise ValueError(f"probabilities must sum to 1; the logarithm of their sum is {total:.3g}")

    @classmethod
    def random(cls, seed: int, vocab_size: int = 3, length: int = 5, spread: float = 1.5) -> TokenLaw:
        """Probabilities proportional to exp of independent normal numbers with this standard deviation."""
        logits = spread * np.random.default_rng(seed).normal(size=vocab_size**length)
        return cls(vocab_size, length, logits - np.logaddexp.reduce(logits))

    @cached_property
    def sequences(self) -> np.ndarray:
        """All of them, (V^L, L)."""
        return np.asarray(list(itertools.product(range(self.vocab_size), repeat=self.length)), np.int32)

    def index(self, x: Any) -> np.ndarray:
        """Where sequences (..., L) stand in that list."""
        found: np.ndarray = np.asarray(x) @ self.vocab_size ** np.arange(self.length)[::-1]
        return found

    def log_prob(self, x: Any) -> np.ndarray:
        """log p of sequences (..., L), in nats."""
        found: np.ndarray = self.log_probs[self.index(x)]
        return found

    # -- networks -----------------------------------------------------------------------------------------------------

    def conditional(self, x: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """log p(x_0 at i = k | the tokens of x that are not masked), (L, V): for any time."""
        sequences = jnp.asarray(self.sequences)
        fits = jnp.all((x == self.vocab_size) | (sequences == x), axis=1)
        return self._marginals(jnp.where(fits, jnp.asarray(self.log_probs, jnp.result_type(float)), -jnp.inf))

    def posterior(self, alpha: Callable[[Any], Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """fn(x, t) = log p(x_0 at i = k | x_t = x), (L, V), of the uniform process with survival ``alpha``."""

        def fn(x: jax.Array, t: jax.Array) -> jax.Array:
            rest = (1 - alpha(t)) / self.vocab_size
            same = jnp.asarray(self.sequences) == x
            likelihood = jnp.sum(jnp.where(same, jnp.log(alpha(t) + rest), jnp.log(rest)), axis=1)
            return self._marginals(jnp.asarray(self.log_probs, jnp.result_type(float)) + likelihood)

        return fn

    def masked(self, **options: Any) -> DiffusionModel:
        """The exact model of masked tokens."""
        return DiffusionModel(Masked(self.vocab_size, self.length, **options), self.conditional)

    def one_by_one(self) -> DiffusionModel:
        """The exact model that reveals one token per step."""
        return DiffusionModel(AnyOrder(self.vocab_size, self.length), self.conditional)

    def uniform(self, **options: Any) -> DiffusionModel:
        """The exact model of uniform tokens."""
        process = Uniform(self.vocab_size, self.length, **options)
        return DiffusionModel(process, self.posterior(process.alpha))

    # -- answers ------------------------------------------------------------------------------------------------------

    def marginal(self, alpha: float) -> TokenLaw:
        """The law of uniform tokens at the time at which the survival is ``alpha``."""
        kernel = alpha * np.eye(self.vocab_size) + (1 - alpha) / self.vocab_size
        table = np.exp(self.log_probs).reshape((self.vocab_size,) * self.length)
        for axis in range(self.length):
            table = np.moveaxis(np.tensordot(kernel, table, axes=(0, axis)), 0, axis)
        log_probs = np.log(table.reshape(-1))
        return TokenLaw(self.vocab_size, self.length, log_probs - np.logaddexp.reduce(log_probs))

    def total_variation(self, log_target: np.ndarray, x: Any, log_weights: Any = None) -> float:
        """Between weighted sequences (n, L) and a law given by an unnormalised logarithm, (V^L,)."""
        x = np.asarray(x).reshape(-1, self.length)
        log_weights = np.zeros(len(x)) if log_weights is None else np.asarray(log_weights, np.float64).reshape(-1)
        weights = np.exp(log_weights - log_weights.max())
        found = np.bincount(self.index(x), weights / weights.sum(), len(self.log_probs))
        return float(0.5 * np.abs(found - np.exp(log_target - np.logaddexp.reduce(log_target))).sum())

    def _marginals(self, log_probs: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(jnp.asarray(self.sequences), self.vocab_size)  # (sequences, L, V)
        chosen = jnp.where(one_hot > 0, log_probs[:, None, None], -jnp.inf)
        return jax.nn.logsumexp(chosen, axis=0)


def path_sum(
    models: Sequence[DiffusionModel], exponents: Sequence[float], times: np.ndarray, log_ratio_of_auxiliary: Any = None
) -> np.ndarray:
    """What steering adds up to on a grid, for every sequence that it may end in: log of

        ref(x_0)^{bar - 1} sum over paths ref(x_n) prod_steps K_ref(x_s | x_t) prod_i (K_i / K_ref)(x_s | x_t)^{beta_i}

    by multiplying matrices over all states: no particles, no proposal, no weights.

    Args:
      models: of one token process.
      exponents: beta_i.
      times: the grid.
      log_ratio_of_auxiliary: (step, x (n, L), evaluations) -> log B(x_t | x_s) / F(x_t | x_s), (t, s) of all states,
        for another auxiliary kernel than the noising kernel.

    Returns:
      (V^L,), in lexicographic order of the sequences.
    """
    process: Any = models[0].process
    size, length = process.vocab_size, process.length
    states = np.asarray(list(itertools.product(range(size + process.has_mask), repeat=length)), np.int32)
    x = jnp.asarray(states)

    @jax.jit
    def log_step(step: Any) -> jax.Array:
        log_reference = jax.vmap(lambda x_t: jax.vmap(step.reference_reverse(x_t).log_prob)(x))(x)
        possible = log_reference > -jnp.inf
        total = log_reference
        for model, beta in zip(models, exponents, strict=True):

            def log_model(x_t: jax.Array, evaluation: Any, model: DiffusionModel = model) -> jax.Array:
                return jax.vmap(model.kernel(step, x_t, evaluation).log_prob)(x)

            found = jax.vmap(log_model)(x, model.evaluate(jax.random.key(0), x, step.t))
            total = total + jnp.where(possible, beta * (found - jnp.where(possible, log_reference, 0.0)), 0.0)
        if log_ratio_of_auxiliary is not None:
            at_s = [model.evaluate(jax.random.key(0), x, step.s) for model in models]
            total = total + log_ratio_of_auxiliary(step, x, at_s)
        return total

    def reference(time: float) -> np.ndarray:
        law = process.reference_at(process.level(time), (length,))
        return np.asarray(jax.vmap(law.log_prob)(x), np.float64)

    log_law = reference(times[-1])
    for s, t in zip(times[:-1][::-1], times[1:][::-1], strict=True):
        log_law = np.logaddexp.reduce(log_law[:, None] + np.asarray(log_step(process.transition(s, t)), np.float64), 0)
    clean = (states < size).all(axis=1)
    found: np.ndarray = log_law[clean] + (sum(exponents) - 1) * reference(times[0])[clean]
    return found
