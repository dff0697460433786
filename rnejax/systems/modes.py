"""Nine modes out of 25, in new proportions: a posterior of which everything is known.

The prior is a mixture of 25 equal Gaussians of variance 0.3 on the grid {-10, -5, 0, 5, 10}^2; the posterior has nine
of them, with weights between 4/61 and 15/61. log r = log posterior - log prior, so that log Z = 0; KL(posterior ||
prior) = 1.156 nats, and draws from the prior have an effective sample size of 27.6 % as importance samples of the
posterior.

Source: Venkatraman et al. 2024 (arXiv 2405.20971), section 3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ..kernels import Array
from .mixture import GaussianMixture

GRID = (-10.0, -5.0, 0.0, 5.0, 10.0)
KEPT = ((-10, -5), (-5, -10), (-5, 0), (10, -5), (0, 0), (0, 5), (5, -5), (5, 0), (5, 10))
WEIGHTS = (4, 10, 4, 5, 10, 5, 4, 15, 4)
VARIANCE = 0.3


class ModeSelection(NamedTuple):
    """Prior and posterior, as mixtures of the same 25 components.

    Attributes:
      prior: with equal weights.
      posterior: with weights that are zero for 16 of them.
    """

    prior: GaussianMixture
    posterior: GaussianMixture

    def log_reward(self, x: Array) -> Array:
        """log r(x) = log posterior(x) - log prior(x), of one point (2,), in nats; log Z = 0."""
        return self.posterior.log_prob(x) - self.prior.log_prob(x)

    @property
    def shares(self) -> np.ndarray:
        """Weights of the 25 modes in the posterior."""
        return np.asarray(self.posterior.weights, np.float64)

    def modes(self, x: Any) -> np.ndarray:
        """Of points (n, 2), the mode of the prior that each most probably belongs to, (n,)."""
        return np.asarray(jax.vmap(self.prior.component)(x))


def mode_selection() -> ModeSelection:
    """25 modes, of which 9 stay."""
    means = np.array([(a, b) for a in GRID for b in GRID])
    weights = np.zeros(len(means))
    for mean, weight in zip(KEPT, WEIGHTS, strict=True):
        weights[np.flatnonzero((means == mean).all(axis=1))] = weight
    std = math.sqrt(VARIANCE)
    return ModeSelection(GaussianMixture(means, std), GaussianMixture(means, std, weights))
