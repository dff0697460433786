"""Log-weights: sums that keep their digits, means, normalisation, effective sample size.

Weights live in log space throughout. ``-inf`` is a legal log-weight, that of a particle of zero weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["CompensatedSum", "effective_sample_size", "log_mean_exp", "normalize", "relative_error_of_mean"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompensatedSum:
    """A running sum that carries the rounding error of its own additions (elementwise, any shape).

    Each addition is Knuth's two-sum, which splits a + b exactly into its rounded value and the error of that rounding;
    the errors are summed on the side, as in Neumaier (1974). The error of `value` after n additions is one
    rounding of the sum plus O(n eps^2) times the sum of magnitudes, instead of O(n eps): 1,000 terms whose float32
    sum is 1e4 stay within half a unit in the last place (5e-4).

    A sum that is not finite (-inf is legal for a log-weight) has no rounding error: its compensation is zero, so that
    infinities and NaN behave as in ordinary addition. Gradients are those of ordinary addition.
    """

    total: Array
    compensation: Array

    @classmethod
    def of(cls, value: ArrayLike) -> CompensatedSum:
        """The sum that consists of ``value`` alone (an array of floats of any shape)."""
        total = jnp.asarray(value)
        return cls(total, jnp.zeros_like(total))

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = (), dtype: Any = float) -> CompensatedSum:
        """The empty sum."""
        return cls.of(jnp.zeros(shape, dtype))

    def add(self, term: ArrayLike) -> CompensatedSum:
        """The sum with ``term`` (broadcastable to the shape of the sum) added."""
        term = jnp.asarray(term, self.total.dtype)
        total = self.total + term
        absorbed = total - self.total
        error = (self.total - (total - absorbed)) + (term - absorbed)
        compensation = jnp.where(jnp.isfinite(total), self.compensation + error, 0.0)
        return CompensatedSum(total, compensation.astype(self.total.dtype))

    @property
    def value(self) -> Array:
        """The sum, rounded once."""
        return self.total + self.compensation


def log_mean_exp(log_weights: Array, axis: int = -1) -> Array:
    """log of the mean weight, log( sum_i exp(lw_i) / n ), in nats; -inf if every weight is zero."""
    # The mean is taken inside the logarithm: subtracting log n from a logsumexp would lose the digits of a result near
    # zero, and the mean of equal weights would not be exactly theirs.
    largest = jax.lax.stop_gradient(jnp.max(log_weights, axis=axis, keepdims=True))
    scale = jnp.where(jnp.isfinite(largest), largest, 0.0)
    mean = jnp.mean(jnp.exp(log_weights - scale), axis=axis)
    return jnp.log(mean) + jnp.squeeze(scale, axis)


def relative_error_of_mean(log_weights: Array) -> Array:
    """sd(w) / (sqrt(n) mean(w)) of n independent weights along the last axis, given by their logarithms.

    By the delta method this is the standard error of `log_mean_exp`, in nats. NaN for n = 1: one number has no
    spread.
    """
    num = log_weights.shape[-1]
    ratio = jnp.exp(log_weights - log_mean_exp(log_weights)[..., None])
    variance = jnp.sum((ratio - 1) ** 2, axis=-1) / (num - 1) if num > 1 else jnp.full(ratio.shape[:-1], jnp.nan)
    return jnp.sqrt(variance / num).astype(log_weights.dtype)


def normalize(log_weights: Array, axis: int = -1) -> Array:
    """Weights that sum to one, W_i = exp(lw_i) / sum_j exp(lw_j); NaN if every weight is zero."""
    return jax.nn.softmax(log_weights, axis=axis)


def effective_sample_size(log_weights: Array, axis: int = -1) -> Array:
    """(sum_i w_i)^2 / sum_i w_i^2, between 1 and n (Kong, Liu & Wong 1994).

    Zero if every weight is zero; NaN if a log-weight is NaN or +inf.
    """
    largest = jnp.max(log_weights, axis=axis, keepdims=True)
    # With all weights zero there is nothing to scale by, and exp(-inf - 0) is the zero that is wanted.
    weights = jnp.exp(log_weights - jnp.where(largest == -jnp.inf, 0.0, largest))
    sum_of_squares = jnp.sum(weights**2, axis=axis)
    no_weight = sum_of_squares == 0
    return jnp.where(no_weight, 0.0, jnp.sum(weights, axis=axis) ** 2 / jnp.where(no_weight, 1.0, sum_of_squares))


def effective_ancestors(eve: Array, log_weights: Array) -> Array:
    """1 / sum over initial ancestors a of (weight of the descendants of a)^2, between 1 and the number of them left.

    How many independent particles the weighted ones are worth, as far as their descent tells: what 500 surviving
    ancestors leave behind may be mostly the descendants of 20. Its inverse is the leading term of the relative
    variance that the genealogy estimates (Lee and Whiteley 2018). Descendants that have moved apart since make it too
    small.

    Args:
      eve: of each particle, ``result.info.eve``: integers (..., n).
      log_weights: (..., n).
    """
    weights = normalize(log_weights)
    flat = [each.reshape(-1, eve.shape[-1]) for each in (eve, weights)]
    families = jax.vmap(lambda eve, weights: jnp.zeros_like(weights).at[eve].add(weights))(*flat)
    return (1 / jnp.sum(families**2, axis=-1)).reshape(eve.shape[:-1])
