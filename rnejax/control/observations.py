r"""Posterior sampling: the model's law given an observation y = A(x_0) + noise, as a reward tilt.

The reward is the Gaussian log-likelihood of the predicted clean state. On the way x_0 is known from x_t only up to an
error, so the likelihood of D(x_t, t) is not log N(y; A(D), s^2 I) but, to leading order, that of the covariance
s^2 I + C_t with C_t = Cov[A(x_0) | x_t]. A scalar strength lambda_t = s^2 / (s^2 + c_t) stands for the matrix. The
residual y - A(D) lies where C_t is large, not evenly in all directions: a direction of variance C_i has the share
C_i / tr C of it. So c_t = tr(C_t^2) / tr(C_t), the variance that the residual itself sees, and not tr(C_t) / k: pixels
are predicted together, rightly or wrongly, and taken for independent they would be believed some ten times too much
where there is mostly noise. `prediction_error` measures it; without, the model's own Cov[x_0 | x_t] has to do.

The exact scheme makes the end of the path exact whatever the strengths on the way are; they decide how many particles
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

from ..calibration import clean_states, residuals, tabulate
from ..checks import check_count, check_key, check_number, is_traced
from ..covariance import Analytic
from ..density import check_times
from ..kernels import Array
from ..model import DiffusionModel
from ..processes import NoiseLevel
from .targets import Target, as_target, tilt


@dataclass(frozen=True)
class PredictionError:
    """c_t = tr(C^2) / tr(C) of the error of a predicted observation, over log-SNR; made by `prediction_error`.

    Attributes:
      log_snr: increasing.
      variances: c_t at these, in y's units; interpolated linearly in their logarithm, constant outside.
    """

    log_snr: tuple[float, ...]
    variances: tuple[float, ...]

    def variance(self, process: Any, times: np.ndarray) -> np.ndarray:
        logarithms = np.log(np.maximum(self.variances, 1e-30))
        return np.exp(np.interp(process.log_snr(times), self.log_snr, logarithms))


@dataclass(frozen=True)
class ModelCovariance:
    """c_t = Cov[x_0 | x_t] as the model's covariance has it, for want of something better.

    Attributes:
      log_snr, ratio: the model's table of Cov[x_0 | x_t] relative to the reference's; empty for the reference itself.
      gain: squared scale of the transform from the network's to the user's units.
    """

    log_snr: tuple[float, ...]
    ratio: tuple[float, ...]
    gain: float

    def variance(self, process: Any, times: np.ndarray) -> np.ndarray:
        scales = jax.vmap(lambda level: level.posterior_scale)(process.level(times))
        variance = np.asarray(scales, np.float64) ** 2 * self.gain
        if self.log_snr:
            variance = variance * np.interp(process.log_snr(times), self.log_snr, self.ratio)
        return np.asarray(variance)


@dataclass(frozen=True)
class LikelihoodStrength:
    """lambda_t = s^2 / (s^2 + c_t), normalised to 1 at t_min.

    Attributes:
      noise_variance: s^2.
      error: what knows c_t.
    """

    noise_variance: float
    error: PredictionError | ModelCovariance

    def strengths(self, process: Any, times: np.ndarray) -> np.ndarray:
        strength = self.noise_variance / (self.noise_variance + self.error.variance(process, times))
        return np.asarray(strength / strength[0])


def prediction_error(
    key: Array,
    model: DiffusionModel,
    operator: Callable[[Array], Array],
    times: Any,
    data: Any = None,
    *,
    num_samples: int = 256,
) -> PredictionError:
    """How far off a predicted observation A(D(x_t, t)) is: what `observe` takes as ``error``.

    For independent clean points i != j with errors e = A(x_0) - A(D), E (e_i . e_j)^2 = tr(C^2) and E|e|^2 = tr(C) with
    C the mean of Cov[A(x_0) | x_t]; no derivative is needed.

    Args:
      key: a typed key.
      model: the prior.
      operator: as for `observe`.
      times: the times of the table, a few tens of them; in between it is interpolated in log-SNR.
      data: clean points in the user's coordinates, (n, *shape), n >= 2. Default: a pilot run of ``num_samples``.
      num_samples: of the pilot run.

    Costs one network evaluation per point and time, and a pilot run. The result is for all observations by this
    operator.

    Raises:
      ValueError: for unsuitable times or data, fewer than two points, or an operator that fails on one example.
      TypeError: for a key that is not a single typed one.
    """
    check_key(key)
    times = check_times(model, times)
    key_pilot, key_noise = jax.random.split(key)
    x0 = clean_states(key_pilot, model, times, data, check_count("num_samples", num_samples))
    if len(x0) < 2:
        raise ValueError("the prediction's error is measured on pairs of points: give two or more, better a hundred")

    _observed(operator, model)

    @jax.jit
    def variance(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> Array:
        observed = jax.vmap(lambda x: operator(model.transform.to_data(x)))
        errors = (observed(x0) - observed(x0 - residuals(model, x0, key, level))).reshape(len(x0), -1)
        products = errors @ errors.T
        squares = jnp.diagonal(products)
        between = jnp.sum(products**2) - jnp.sum(squares**2)
        return between / ((len(x0) - 1) * jnp.maximum(jnp.sum(squares), jnp.finfo(errors.dtype).tiny))

    log_snr, variances = tabulate(key_noise, model, x0, times, variance)
    return PredictionError(tuple(np.asarray(log_snr).tolist()), tuple(np.asarray(variances).tolist()))


def observe(
    model_or_target: DiffusionModel | Target,
    operator: Callable[[Array], Array],
    y: Any,
    noise_std: float,
    exact: bool = True,
    *,
    error: PredictionError | None = None,
) -> Target:
    """p(x | y) for y = operator(x) + noise_std * N(0, I); ``steer``'s ``log_normalizer`` is then the evidence log p(y).

    Args:
      model_or_target: the prior.
      operator: from one example in the user's coordinates to an observation of y's shape, in JAX and differentiable: a
        mask, a blur, a projection.
      y: what was observed. It is data: another observation recompiles nothing.
      noise_std: standard deviation of the observation's noise, in y's units. The smaller it is, the more particles and
        steps the posterior takes.
      exact: the scheme of `tilt`.
      error: how far off predicted observations are, from `rnejax.control.prediction_error`: it decides how strong
        the likelihood is on the way, and with it how many particles survive. Default: the model's own covariance, as if
        the errors of all numbers in y were independent, which on pictures is far too confident.

    Raises:
      ValueError: for a noise that is not a positive number, a y that is not finite, an operator that returns another
        shape than y's, or a model that is known only to compiled code.
    """
    base = as_target(model_or_target)
    model = base.models[0]
    if model.process.is_discrete:
        raise ValueError(f"observations with Gaussian noise are of numbers; {type(model.process).__name__} has tokens")
    y = jnp.asarray(y, jnp.result_type(float))
    noise_std = check_number("noise_std", noise_std)
    if not noise_std > 0:
        raise ValueError(f"noise_std must be positive, got {noise_std}: without noise the posterior has no density")
    if not is_traced(y) and not np.isfinite(np.asarray(y)).all():
        raise ValueError("y must be finite: leave out what was not observed (an operator that selects the rest)")
    returned = _observed(operator, model)
    if returned.shape != y.shape:
        raise ValueError(
            f"operator returns shape {returned.shape} for one example of shape {model.shape}, but y has {y.shape}"
        )
    likelihood = jax.tree_util.Partial(
        log_likelihood, jax.tree_util.Partial(operator), y, jnp.asarray(noise_std, y.dtype)
    )
    if error is not None and not isinstance(error, PredictionError):
        raise ValueError(f"error must be what rnejax.control.prediction_error returns, got {error!r}")
    schedule = LikelihoodStrength(noise_std**2, _model_covariance(model) if error is None else error)
    return tilt(base, likelihood, schedule, exact, at="x0")


def _observed(operator: Callable[[Array], Array], model: DiffusionModel) -> jax.ShapeDtypeStruct:
    """What the operator makes of one example, abstractly; ValueError where it fails."""
    try:
        observed: jax.ShapeDtypeStruct = jax.eval_shape(
            operator, jax.ShapeDtypeStruct(model.shape, jnp.result_type(float))
        )
    except Exception as error:  # whatever the user's function may raise
        raise ValueError(
            f"operator failed on one example of shape {model.shape} ({type(error).__name__}: {error}); it takes one "
            "example, without a batch axis, as a JAX array"
        ) from error
    if not hasattr(observed, "shape"):
        raise ValueError(f"operator must return one array, got {observed}")
    return observed


def _model_covariance(model: DiffusionModel) -> ModelCovariance:
    covariance = model.covariance
    table = (covariance.log_snr, covariance.ratio) if isinstance(covariance, Analytic) else ((), ())
    if is_traced(table):
        raise ValueError(
            "the model's covariance table must be known when the program is traced, because the likelihood's strength "
            "is computed from it on the host: call observe outside jax.jit, or let the function close over the model"
        )
    log_snr, ratio = (tuple(float(value) for value in np.asarray(column)) for column in table)
    gain = float(np.mean(np.asarray(getattr(model.transform, "scale", 1.0)) ** 2))
    return ModelCovariance(log_snr, ratio, gain)


def log_likelihood(operator: Callable[[Array], Array], y: Array, noise_std: Array, x: Array) -> Array:
    """log N(y; operator(x), noise_std^2 I), in nats."""
    residual = (y - operator(x)) / noise_std
    return -0.5 * jnp.sum(residual**2) - y.size * (jnp.log(noise_std) + 0.5 * jnp.log(2 * jnp.pi))
