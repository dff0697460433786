"""What paths of a fine-tuned model say of it: bounds on log Z, importance sampling, the residual's variance, modes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .trajectory_balance import Trajectories


class Assessment(NamedTuple):
    """How far a tuned model is from the posterior, from paths of its own.

    Attributes:
      lower_bound: mean of log r - log_ratio <= log Z in expectation, in nats, and its standard error.
      log_normalizer: log Z by importance sampling, log of the mean of exp(log r - log_ratio); consistent, and too low
        on average by half the squared error.
      standard_error: of it, to first order; meaningless where the effective sample size is a few.
      effective_sample_size: of the paths as importance samples of the posterior, between 1 and their number.
      residual_variance: of log_ratio - log r, in nats^2: zero for the posterior, whatever log Z.
      upper_bound: mean of log r - log_ratio over paths that noise makes of samples of the posterior >= log Z in
        expectation, and its standard error; None without such samples.
    """

    lower_bound: tuple[float, float]
    log_normalizer: float
    standard_error: float
    effective_sample_size: float
    residual_variance: float
    upper_bound: tuple[float, float] | None


def assess(generated: Trajectories, noised: Trajectories | None = None) -> Assessment:
    """Bounds on log Z, importance sampling and the residual's variance.

    Args:
      generated: paths by the model's own kernels, not inflated, of `trajectory_balance_residual`.
      noised: paths of samples of the posterior itself (``x`` of the same function), where there are any.

    Raises:
      ValueError: for fewer than two paths, none of a reward above zero, or a reward or ratio that is no number.
    """
    log_weights = np.asarray(generated.log_reward - generated.log_ratio, np.float64)
    if np.isnan(log_weights).any():
        raise ValueError(
            f"{np.isnan(log_weights).sum()} of {len(log_weights)} paths have a reward or ratio that is NaN"
        )
    if len(log_weights) < 2 or not np.isfinite(log_weights).any():
        raise ValueError("two paths or more, and one of a reward above zero, are needed to say anything")
    relative = np.exp(log_weights - log_weights.max())
    count = len(relative)
    sample_size = relative.sum() ** 2 / (relative**2).sum()

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    possible = log_weights[np.isfinite(log_weights)]
    return Assessment(
        lower_bound=mean(log_weights) if len(possible) == count else (-math.inf, math.nan),
        log_normalizer=float(log_weights.max() + np.log(relative.mean())),
        standard_error=float(relative.std(ddof=1) / relative.mean() / math.sqrt(count)),
        effective_sample_size=float(sample_size),
        residual_variance=float(log_weights.var(ddof=1)) if len(possible) == count else math.inf,
        upper_bound=None if noised is None else mean(np.asarray(noised.log_reward - noised.log_ratio, np.float64)),
    )


class ModeCoverage(NamedTuple):
    """Shares of samples by mode, against those expected.

    Attributes:
      shares: of the samples, (k,).
      total_variation: half the sum of absolute differences.
      kl_divergence: of what is expected from the samples' shares, sum p log(p / q), in nats; inf if a mode is missing.
      num_found: of the modes expected, those with at least ``found_above`` of their share.
      num_expected: modes that are expected at all.
      floor: the total variation of as many independent draws from what is expected, on average.
    """

    shares: np.ndarray
    total_variation: float
    kl_divergence: float
    num_found: int
    num_expected: int
    floor: float


def mode_coverage(modes: Any, expected: Any, log_weights: Any = None, *, found_above: float = 0.5) -> ModeCoverage:
    """Whether samples have found all modes, in the right proportions.

    Args:
      modes: of every sample the number of its mode, integers (n,) in [0, k).
      expected: shares (k,), which are made to sum to one; zero for modes that should not be there.
      log_weights: of the samples, (n,); equal by default.
      found_above: the part of its share from which on a mode counts as found.

    Raises:
      ValueError: for no samples, modes outside [0, k), shares that are negative or all zero, or weights that are NaN or
        all zero.
    """
    modes, expected = np.asarray(modes), np.asarray(expected, np.float64)
    if modes.ndim != 1 or len(modes) == 0 or not np.issubdtype(modes.dtype, np.integer):
        raise ValueError(f"modes must be integers of shape (n,), n at least 1: got {modes.dtype} of {modes.shape}")
    if expected.ndim != 1 or not (expected >= 0).all() or not 0 < expected.sum() < math.inf:
        raise ValueError(f"expected must be non-negative shares with a positive sum, got {expected}")
    if not ((modes >= 0) & (modes < len(expected))).all():
        raise ValueError(f"modes must be numbers from 0 to {len(expected) - 1}, got {modes.min()} to {modes.max()}")
    weights = np.ones(len(modes))
    if log_weights is not None:
        log_weights = np.asarray(log_weights, np.float64)
        if log_weights.shape != modes.shape or np.isnan(log_weights).any() or not np.isfinite(log_weights.max()):
            raise ValueError("log_weights must be one per sample, none of them NaN or +inf and not all of them -inf")
        weights = np.exp(log_weights - log_weights.max())
    expected = expected / expected.sum()
    shares = np.bincount(modes, weights, len(expected)) / weights.sum()
    present = expected > 0
    with np.errstate(divide="ignore"):
        divergence = np.sum(expected[present] * (np.log(expected[present]) - np.log(shares[present])))
    # |X| of a normal number has a mean of sqrt(2 / pi) standard deviations.
    deviations = np.sqrt(expected * (1 - expected) / len(modes))
    return ModeCoverage(
        shares=shares,
        total_variation=float(0.5 * np.abs(shares - expected).sum()),
        kl_divergence=float(divergence),
        num_found=int(np.sum(shares[present] >= found_above * expected[present])),
        num_expected=int(present.sum()),
        floor=float(0.5 * math.sqrt(2 / math.pi) * deviations.sum()),
    )
