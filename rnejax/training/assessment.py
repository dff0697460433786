"""What paths of a fine-tuned model say of it: bounds on log Z, importance sampling, the residual's variance."""

from __future__ import annotations

import math
from typing import NamedTuple

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
      ValueError: for fewer than two paths, or none of a reward above zero.
    """
    log_weights = np.asarray(generated.log_reward - generated.log_ratio, np.float64)
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
