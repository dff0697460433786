"""Whether a result should be trusted, in numbers and in plain words."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from rnejax.smc.estimates import WeightedParticles
from rnejax.smc.weights import effective_sample_size

__all__ = ["diagnose", "pareto_k"]


@jax.jit
def pareto_k(log_weights: Array) -> Array:
    """k-hat: the shape of the generalised Pareto law that fits the largest weights, by blackjax.

    ``log_weights`` (..., n), the result (...). Weights of shape k have finite moments of order below 1/k: below 0.5 the
    variance is finite; above 0.7 no practical number of particles makes estimates reliable (Vehtari, Simpson,
    Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling).

    inf where the tail is fewer than five weights (n < 25); NaN where the tail holds no shape to fit, as when a few
    equal weights carry everything.
    """
    from blackjax.diagnostics import psis_weights

    flat = log_weights.reshape(-1, log_weights.shape[-1])
    return jax.vmap(lambda row: psis_weights(row)[1])(flat).reshape(log_weights.shape[:-1])


def diagnose(
    result: WeightedParticles,
    *,
    max_pareto_k: float = 0.7,
    min_ess_fraction: float = 0.05,
    min_ess: float = 5.0,
    min_unique_fraction: float = 0.05,
    max_zero_fraction: float = 0.5,
    max_group_spread: float = 1.0,
) -> list[str]:
    """Reasons not to trust ``result`` (concrete values), a sentence each; an empty list if nothing speaks against it.

    With groups, each sentence is about the worst of them.

    Args:
        result: as returned by `rnejax.smc.run`.
        max_pareto_k: largest tolerated k-hat of the final weights, see `pareto_k`; where it cannot be fitted,
            nothing is said.
        min_ess_fraction: smallest tolerated effective sample size at any step, relative to the number of particles.
        min_ess: smallest tolerated effective sample size in particles: from fewer, no error can be told.
        min_unique_fraction: smallest tolerated share of initial particles that still have descendants.
        max_zero_fraction: largest tolerated share of final particles of zero weight.
        max_group_spread: largest tolerated standard deviation of log Z over the groups, nats.
    """
    log_weights = np.atleast_2d(np.asarray(result.log_weights))
    num_groups, num = log_weights.shape
    if not np.all(np.isfinite(log_weights).any(axis=-1)) or np.isnan(log_weights).any():
        return ["some log-weights are NaN, or all of a group's are -inf: nothing in this result means anything"]
    messages = []

    k_hat = np.asarray(pareto_k(jax.numpy.asarray(log_weights)))
    fitted = k_hat[np.isfinite(k_hat)]
    if fitted.size and fitted.max() > max_pareto_k:
        messages.append(
            f"the largest weights have a heavy tail (k-hat {fitted.max():.2f} > {max_pareto_k}): means and log Z "
            "are dominated by a few particles and have no reliable error; use more steps, a milder target or another "
            "proposal"
        )

    traces = _traces(result.info, num_groups)
    final_ess = np.asarray(effective_sample_size(jax.numpy.asarray(log_weights)))[:, None]
    ess = np.concatenate([traces["ess"], final_ess], axis=1)
    smallest = np.unravel_index(np.argmin(ess), ess.shape)
    if num < min_ess:
        messages.append(
            f"{'a single particle' if num == 1 else f'only {num} particles'} per run: one cannot tell from so few how "
            "good they are; use more particles"
        )
    elif ess[smallest] < max(min_ess_fraction * num, min_ess):
        step = min(smallest[1], ess.shape[1] - 2)
        messages.append(
            f"the effective sample size fell to {ess[smallest]:.1f} of {num} particles at step {step}: use more "
            "particles, or more steps there"
        )

    unique = min(np.unique(row).size for row in np.atleast_2d(np.asarray(result.info.eve)))
    if unique < min_unique_fraction * num:
        total = traces["resampled"].sum(axis=1).max()
        messages.append(
            f"all {num} particles descend from only {unique} initial ones after {total} resamplings: they are not "
            "independent; resample less often (a lower ess_threshold, partial resampling) or use more particles"
        )

    zero_fraction = np.mean(log_weights == -np.inf, axis=-1).max()
    if zero_fraction > max_zero_fraction:
        messages.append(
            f"{zero_fraction:.0%} of the final particles have weight zero: the target excludes most of what the "
            "proposal reaches"
        )

    if num_groups > 1:
        log_normalizer = np.asarray(result.log_normalizer)
        spread = float(np.std(log_normalizer, ddof=1))
        if not spread <= max_group_spread:
            messages.append(
                f"independent groups disagree: their log Z range from {log_normalizer.min():.2f} to "
                f"{log_normalizer.max():.2f} (standard deviation {spread:.2f} nats > {max_group_spread}); use more "
                "particles per group"
            )
    return messages


def _traces(info: Any, num_groups: int) -> dict[str, np.ndarray]:
    """Per-step arrays with a group axis, (num_groups, steps)."""
    return {name: np.asarray(getattr(info, name)).reshape(num_groups, -1) for name in ("ess", "resampled")}
