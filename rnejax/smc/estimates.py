"""What a finished run says: weighted means, log Z, equally weighted particles, each with its error where there is one.

The functions accept anything with ``particles``, ``log_weights``, ``log_normalizer`` and ``info`` as returned by
`rnejax.smc.run`; a second axis of ``log_weights`` means independent groups of particles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from rnejax.checks import check_count, check_key
from rnejax.smc.resampling import resampler
from rnejax.smc.weights import log_mean_exp, normalize, relative_error_of_mean

__all__ = ["WeightedParticles", "log_normalizer_with_error", "resample", "weighted_mean"]


class WeightedParticles(Protocol):
    """What the estimators below read; `rnejax.smc.SMCResult` has it.

    ``particles``: pytree with leading axes (num_particles,) or (num_groups, num_particles); ``log_weights``: the
    array of those axes; ``log_normalizer``: () or (num_groups,), so that ``exp(log_normalizer + log_weights)`` are
    unnormalised weights; ``info``: has ``eve`` (shape of ``log_weights``) and ``num_resamplings``.
    """

    @property
    def particles(self) -> Any: ...
    @property
    def log_weights(self) -> Array: ...
    @property
    def log_normalizer(self) -> Array: ...
    @property
    def info(self) -> Any: ...


def log_normalizer_with_error(result: WeightedParticles) -> tuple[Array, Array]:
    """The estimate of log Z and its standard error, both scalars, in nats.

    With groups: log of the mean of the groups' Z_g (each of which is unbiased), and the standard error of that mean
    divided by the mean (delta method), sd(Z_g) / (sqrt(G) mean(Z_g)).

    Without groups and without a single resampling this is plain importance sampling, and the error is the
    same expression over the N particles' weights. With resampling, a final one included, one run does not know its own
    error: it is NaN; ask for groups (``num_groups``). One group or one particle has no standard error either (NaN).
    """
    _check_result("log_normalizer_with_error", result)
    log_normalizer = result.log_normalizer
    if log_normalizer.ndim == 1:
        return log_mean_exp(log_normalizer), relative_error_of_mean(log_normalizer)
    error = relative_error_of_mean(result.log_weights)
    return log_normalizer, jnp.where(result.info.num_resamplings > 0, jnp.nan, error)


def weighted_mean(f: Callable[[Any], Any], result: WeightedParticles) -> tuple[Any, Any]:
    """Self-normalised estimate of E[f(x)] under the final target, and its standard error.

    ``f`` maps one particle to an array or a pytree of arrays; both returned values have the structure and shapes of
    its value.

    With groups, groups are pooled with their unnormalised weights (mean = sum_g Z_g m_g / sum_g Z_g) and the error
    is that of this ratio over independent groups, sqrt( G/(G-1) sum_g z_g^2 (m_g - mean)^2 ) with z_g = Z_g / sum
    Z.

    Without groups it is taken from the genealogy: particles with the same initial ancestor are dependent, families
    are not, so error^2 = (N/(N-1))^(r+1) sum_families ( sum_{i in family} W_i (f_i - mean) )^2 after r resamplings
    (Chan & Lai 2013; Lee & Whiteley 2018). It is consistent for multinomial resampling and too large, not too
    small, for the schemes of lower variance; NaN where fewer than two families are left (or one particle, or one
    group), since then the genealogy knows nothing. With few families left (``info.unique_ancestors``) it is very
    noisy: use groups.

    Particles of zero weight do not enter, whatever f is there. f that is not finite at a particle of positive
    weight gives NaN or an infinity.
    """
    _check_result("weighted_mean", result)
    if not callable(f):
        raise TypeError(f"f must be a function of one particle, got {f!r}")
    grouped = result.log_weights.ndim == 2
    particle_axes = 2 if grouped else 1
    evaluate = f
    for _ in range(particle_axes):
        evaluate = jax.vmap(evaluate)
    weights = _pooled_weights(result)
    if grouped:
        parts = jnp.broadcast_to(jnp.arange(weights.shape[0])[:, None], weights.shape).ravel()
        num_parts = weights.shape[0]
        correction = jnp.asarray(num_parts / (num_parts - 1) if num_parts > 1 else jnp.nan, weights.dtype)
    else:
        parts = result.info.eve
        num_parts = weights.shape[0]
        num_families = jnp.zeros(num_parts, bool).at[parts].set(True).sum()
        ratio = num_parts / (num_parts - 1) if num_parts > 1 else jnp.nan
        exponent = (result.info.num_resamplings + 1).astype(weights.dtype)
        correction = jnp.where(num_families > 1, jnp.asarray(ratio, weights.dtype) ** exponent, jnp.nan)
    weights = weights.ravel()

    def estimate(values: Array) -> tuple[Array, Array]:
        values = values.reshape(weights.size, *values.shape[particle_axes:])
        column = weights.reshape(-1, *[1] * (values.ndim - 1))
        values = jnp.where(column > 0, values, jnp.zeros_like(values))
        mean = jnp.sum(column * values, axis=0)
        deviations = jnp.where(column > 0, column * (values - mean), 0.0)
        by_part = jax.ops.segment_sum(deviations, parts, num_segments=num_parts)
        return mean, jnp.sqrt(correction * jnp.sum(by_part**2, axis=0))

    values, structure = jax.tree.flatten(evaluate(result.particles))
    estimates = [estimate(value) for value in values]
    means, errors = ([pair[i] for pair in estimates] for i in range(2))
    return jax.tree.unflatten(structure, means), jax.tree.unflatten(structure, errors)


def resample(
    key: Array, result: WeightedParticles, num_samples: int | None = None, *, scheme: str = "systematic"
) -> Any:
    """Equally weighted particles: a pytree with leading axis ``num_samples`` (default: as many as there are).

    Groups are pooled with their unnormalised weights, exp(log_normalizer + log_weights). The order is random, so
    that any slice is a fair sample. A particle of zero weight is never returned. ``scheme`` as in
    `rnejax.smc.Resampling`. ValueError for a scheme that does not exist or a ``num_samples`` below one.
    """
    _check_result("resample", result)
    weights = _pooled_weights(result)
    check_key(key)
    num_samples = weights.size if num_samples is None else check_count("num_samples", num_samples)
    key_draw, key_order = jax.random.split(key)
    chosen = resampler(scheme)(key_draw, weights.ravel(), num_samples)
    chosen = jax.random.permutation(key_order, chosen)
    return jax.tree.map(lambda leaf: leaf.reshape(weights.size, *leaf.shape[weights.ndim :])[chosen], result.particles)


def _check_result(name: str, result: Any) -> None:
    missing = [field for field in ("particles", "log_weights", "log_normalizer", "info") if not hasattr(result, field)]
    if missing:
        raise TypeError(
            f"{name} takes the weighted particles of steer or smc.run; {type(result).__name__} has no "
            f"{', no '.join(missing)}"
        )


def _pooled_weights(result: WeightedParticles) -> Array:
    """Weights in the shape of ``log_weights`` that sum to one over all groups together."""
    log_weights = result.log_weights
    if log_weights.ndim == 2:
        log_weights = log_weights + result.log_normalizer[:, None]
    return normalize(log_weights.ravel()).reshape(log_weights.shape)
