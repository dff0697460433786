r"""Posterior sampling: the model's law given an observation y = A(x_0) + noise, as a reward tilt.

The reward is the Gaussian log-likelihood of the predicted clean state. On the way, x_0 is known from x_t only up to
Cov[x_0 | x_t], so the likelihood of D(x_t, t) is not log N(y; A(D), s^2 I) but, to leading order for an operator of
unit gain, that of a variance s^2 + c_t with c_t = Cov[x_0 | x_t]: its strength is lambda_t = s^2 / (s^2 + c_t). The
exact scheme makes the end of the path exact whatever the strengths on the way are; they decide how many particles
survive.

Sources: Song et al. 2023 (pseudo-inverse guidance) for the variance; Wu et al. 2023 (TDS) for the particles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number, is_traced
from ..covariance import Analytic
from ..kernels import Array
from ..model import DiffusionModel
from .targets import Target, as_target, tilt


@dataclass(frozen=True)
class LikelihoodStrength:
    """lambda_t = (s^2 + c_min) / (s^2 + c_t), 1 at t_min; c_t is Cov[x_0 | x_t] by the model, in the user's units.

    Attributes:
      noise_variance: s^2.
      log_snr, ratio: the model's table of Cov[x_0 | x_t] relative to the reference's; empty for the reference itself.
      gain: squared scale of the transform from the network's to the user's units.
    """

    noise_variance: float
    log_snr: tuple[float, ...]
    ratio: tuple[float, ...]
    gain: float

    def strengths(self, process: Any, times: np.ndarray) -> np.ndarray:
        level = process._level(times)
        variance = level.reference_posterior_variance * self.gain
        if self.log_snr:
            variance = variance * np.interp(level.log_snr, self.log_snr, self.ratio)
        strength = self.noise_variance / (self.noise_variance + variance)
        return strength / strength[0]


def observe(
    model_or_target: DiffusionModel | Target,
    operator: Callable[[Array], Array],
    y: Any,
    noise_std: float,
    exact: bool = True,
) -> Target:
    """p(x | y) for y = operator(x) + noise_std * N(0, I); ``steer``'s ``log_normalizer`` is then the evidence log p(y).

    Args:
      model_or_target: the prior.
      operator: from one example in the user's coordinates to an observation of y's shape, in JAX and differentiable: a
        mask, a blur, a projection.
      y: what was observed. It is data: another observation recompiles nothing.
      noise_std: standard deviation of the observation's noise, in y's units. The smaller it is, the more particles and
        steps the posterior takes.
      exact: the scheme of :func:`tilt`.

    Raises:
      ValueError: for a noise that is not a positive number, a y that is not finite, an operator that returns another
        shape than y's, or a model that is known only to compiled code.
    """
    base = as_target(model_or_target)
    model = base.models[0]
    y = jnp.asarray(y, jnp.result_type(float))
    noise_std = check_number("noise_std", noise_std)
    if not noise_std > 0:
        raise ValueError(f"noise_std must be positive, got {noise_std}: without noise the posterior has no density")
    if not is_traced(y) and not np.isfinite(np.asarray(y)).all():
        raise ValueError("y must be finite: leave out what was not observed (an operator that selects the rest)")
    returned = jax.eval_shape(operator, jax.ShapeDtypeStruct(model.shape, jnp.result_type(float)))
    if returned.shape != y.shape:
        raise ValueError(
            f"operator returns shape {returned.shape} for one example of shape {model.shape}, but y has {y.shape}"
        )
    likelihood = jax.tree_util.Partial(
        log_likelihood, jax.tree_util.Partial(operator), y, jnp.asarray(noise_std, y.dtype)
    )
    covariance = model.covariance
    table = (covariance.log_snr, covariance.ratio) if isinstance(covariance, Analytic) else ((), ())
    if is_traced(table):
        raise ValueError(
            "the model's covariance table must be known when the program is traced, because the likelihood's strength "
            "is computed from it on the host: call observe outside jax.jit, or let the function close over the model"
        )
    log_snr, ratio = (tuple(float(value) for value in np.asarray(column)) for column in table)
    gain = float(np.mean(np.asarray(getattr(model.transform, "scale", 1.0)) ** 2))
    schedule = LikelihoodStrength(float(noise_std) ** 2, log_snr, ratio, gain)
    return tilt(base, likelihood, schedule, exact, at="x0")


def log_likelihood(operator: Callable[[Array], Array], y: Array, noise_std: Array, x: Array) -> Array:
    """log N(y; operator(x), noise_std^2 I), in nats."""
    residual = (y - operator(x)) / noise_std
    return -0.5 * jnp.sum(residual**2) - y.size * (jnp.log(noise_std) + 0.5 * jnp.log(2 * jnp.pi))
