"""Drawing ancestors: four resampling schemes behind one signature and one guard, and when to use them.

The index functions are those of blackjax. What is added here is a guard. They search a cumulative sum, and in
float32 that sum ends a little below or above one and need not even be monotone, so that with a million particles 1
to 16 % of the draws contain a particle of weight zero (the last one, when the uniform lies beyond the end; the
first one, when it is exactly zero). No particle of zero weight has descendants here, ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rnejax.checks import check_count, check_number
from rnejax.smc.weights import log_mean_exp, normalize

__all__ = [
    "SCHEMES",
    "Resampler",
    "Resampling",
    "draw_ancestors",
    "multinomial",
    "resampler",
    "residual",
    "stratified",
    "systematic",
]

Resampler = Callable[[Array, Array, int], Array]
"""(key, weights, num_samples) -> ancestors: weights (n,) sum to one, ancestors (num_samples,) are int32 in [0, n)."""


@dataclass(frozen=True)
class Resampling:
    """When and how particles are resampled. Static and hashable.

    Resampling happens at the *start* of a step, on the weights that the steps before left behind.

    Attributes:
        scheme: "multinomial", "stratified", "systematic" or "residual".
        ess_threshold: resample when the effective sample size is below this fraction of the number of particles;
            0 never, above 1 always.
        every: resample at the start of every step k > 0 that is a multiple of ``every`` instead, whatever the
            effective sample size.
        window: resample only at the start of steps k with window[0] <= k < window[1]. (1, n) leaves the initial
            weights alone.
        partial: the fraction of particles that take part, those with the most extreme weights (half the largest, half
            the smallest; at least two particles). They share the mean weight of the subset, so estimates stay unbiased;
            the others keep particle and weight.
        final: resample once more after the last step, all particles, so that they come out equally weighted.

    Raises:
        ValueError: for a scheme that does not exist or a number outside its range.
    """

    scheme: str = "systematic"
    ess_threshold: float = 0.5
    every: int | None = None
    window: tuple[int, int] | None = None
    partial: float | None = None
    final: bool = False

    def __post_init__(self) -> None:
        resampler(self.scheme)
        if self.ess_threshold != math.inf and check_number("ess_threshold", self.ess_threshold) < 0:
            raise ValueError(
                f"ess_threshold is a fraction of the number of particles, 0 (never) or more (above 1: always); "
                f"got {self.ess_threshold}"
            )
        if self.every is not None:
            check_count("every, which counts steps between resamplings,", self.every)
        if self.window is not None:
            window = tuple(self.window)
            if len(window) != 2 or not 0 <= window[0] < window[1]:
                raise ValueError(
                    f"window must be a pair of step numbers (first, end) with 0 <= first < end, got {self.window}"
                )
            object.__setattr__(self, "window", window)  # a list would not be hashable
        if self.partial is not None and not 0 < check_number("partial", self.partial) <= 1:
            raise ValueError(f"partial is the fraction of particles that take part, in (0, 1]; got {self.partial}")

    @property
    def never(self) -> bool:
        """Whether no step can begin with a resampling."""
        return self.every is None and self.ess_threshold == 0

    def is_due(self, step: Array, ess: Array, num_particles: int) -> Array:
        """Whether step number ``step`` begins with a resampling; bool, the shape of ``ess`` (the carried weights')."""
        if self.every is None:
            due = ess < self.ess_threshold * num_particles
        else:
            due = jnp.broadcast_to((step > 0) & (step % self.every == 0), ess.shape)
        if self.window is not None:
            due = due & (step >= self.window[0]) & (step < self.window[1])
        return due


def multinomial(key: Array, weights: Array, num_samples: int) -> Array:
    """Independent draws: ancestors i.i.d. with probabilities ``weights``. The largest variance."""
    return _guarded(_of_blackjax().multinomial, key, weights, num_samples)


def stratified(key: Array, weights: Array, num_samples: int) -> Array:
    """One uniform in each of ``num_samples`` equal strata (Kitagawa 1996)."""
    return _guarded(_of_blackjax().stratified, key, weights, num_samples)


def systematic(key: Array, weights: Array, num_samples: int) -> Array:
    """One uniform shared by all strata (Carpenter et al. 1999): floor or ceil of num_samples W_i descendants."""
    return _guarded(_of_blackjax().systematic, key, weights, num_samples)


def residual(key: Array, weights: Array, num_samples: int) -> Array:
    """floor(num_samples W_i) descendants for certain, the rest multinomial (Liu & Chen 1998)."""
    return _guarded(_of_blackjax().residual, key, weights, num_samples)


def _of_blackjax() -> Any:
    """blackjax's index functions, imported when the first is wanted.

    To import blackjax starts a JAX backend, after which the device can no longer be chosen, so `import rnejax` must not
    do it; and it computes constants, which must not become part of whatever is being traced just then.
    """
    with jax.ensure_compile_time_eval():
        import blackjax.smc.resampling
    return blackjax.smc.resampling


SCHEMES: Mapping[str, Resampler] = MappingProxyType(
    {"multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual}
)


def resampler(scheme: str) -> Resampler:
    """The resampler of that name; ValueError that lists the names otherwise."""
    try:
        return SCHEMES[scheme]
    except (KeyError, TypeError):
        raise ValueError(f"resampling scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}") from None


def draw_ancestors(key: Array, log_weights: Array, resampling: Resampling) -> tuple[Array, Array]:
    """Ancestors of all particles and the log-weights they have afterwards, both (n,).

    The expected total weight of every particle's descendants is its weight (unbiased), and the mean weight
    is unchanged: without ``partial`` all get log mean exp(log_weights), with it only those that take part.
    """
    draw = resampler(resampling.scheme)
    num = log_weights.shape[0]
    if resampling.partial is None:
        return draw(key, normalize(log_weights), num), jnp.full_like(log_weights, log_mean_exp(log_weights))
    taking_part = min(num, max(2, round(resampling.partial * num)))
    order = jnp.argsort(log_weights)
    num_smallest = taking_part // 2
    subset = jnp.concatenate([order[:num_smallest], order[num - (taking_part - num_smallest) :]])
    subset_log_weights = log_weights[subset]
    drawn = subset[draw(key, normalize(subset_log_weights), taking_part)].astype(jnp.int32)
    ancestors = jnp.arange(num, dtype=jnp.int32).at[subset].set(drawn)
    return ancestors, log_weights.at[subset].set(log_mean_exp(subset_log_weights))


def _guarded(index_function: Resampler, key: Array, weights: Array, num_samples: int) -> Array:
    """Ancestors by ``index_function``, moved from particles of zero weight to the last one before of positive weight.

    Within a cumulative sum, a particle of zero weight owns an interval of length zero; rounding alone can land
    there, and the interval that was meant ends just before it. Before the first positive weight there is no earlier
    one: there it is the first.
    """
    num = weights.shape[0]
    positive = weights > 0
    latest_positive = jax.lax.cummax(jnp.where(positive, jnp.arange(num, dtype=jnp.int32), -1))
    first_positive = jnp.argmax(positive).astype(jnp.int32)
    # blackjax draws its uniforms in JAX's default float and mixes integers with floats, which a caller may have
    # forbidden.
    with jax.numpy_dtype_promotion("standard"):
        drawn = index_function(key, weights.astype(jnp.result_type(float)), num_samples)
    ancestors = latest_positive[drawn]
    return jnp.where(ancestors < 0, first_positive, ancestors)
