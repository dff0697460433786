r"""Scalar Gaussian noising processes, x_t = alpha_t x_0 + sigma_t eps: one implementation over (alpha, sigma).

Beside the noised data every process has an analytic *reference*: the same noise applied to a Gaussian N(0, data_std^2).
The reference's reverse kernel is known exactly, and everything a network says is kept as its **excess** over the
reference, D(x_t, t) - D_ref(x_t, t) with D = E[x_0 | x_t]. In these terms (mathematics.md, sections 2 and 3)

    reverse kernel      mean      r x_t + gain * excess,         r = a V_s / V_t,  gain = alpha_s v / sigma_t^2
                        covariance  V_s v / V_t + gain^2 * (Cov[x_0 | x_t] - Cov_ref[x_0 | x_t])

so a model and the reference differ only by small terms, which are never obtained by subtracting large ones. All
coefficients are computed in float64 on the host where times are known there (they are, outside a caller's own jit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ..checks import check_number
from ..kernels import Array, FullSpace, Gaussian, Subspace
from .gaussian_steps import GaussianTransition, NoiseLevel
from .process import Moments, Process, namespace


def reference(level: NoiseLevel, shape: tuple[int, ...], subspace: Subspace) -> Gaussian:
    zeros = jnp.zeros(shape, jnp.result_type(float))
    return Gaussian(zeros, zeros, jnp.asarray(level.reference_variance, zeros.dtype), subspace=subspace)


@dataclass(frozen=True)
class GaussianProcess(Process):
    """A scalar Gaussian process: subclasses say what alpha, sigma and their rates are.

    Attributes:
      data_std: standard deviation of the Gaussian reference. Match it to the data's: less error, and exactness for
        Gaussian data with any covariance choice.
      t_min, t_max: default time range, also what ``time_grid`` spans.
      subspace: where the states live.

    Raises:
      ValueError: unless data_std > 0 and t_min < t_max, both finite and in the process's domain.
    """

    data_std: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0
    subspace: Subspace = FullSpace()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        check_number("data_std", self.data_std, positive=True)
        missing = [method for method in ("project", "dimension") if not callable(getattr(self.subspace, method, None))]
        if missing:
            raise ValueError(
                f"subspace must be FullSpace(), CentreOfMassFree() or LinearSubspace(basis), got {self.subspace!r}"
            )
        self._check_range()

    # -- to be given by a schedule: functions of numpy or jax times --------------------------------------------------

    predictions: ClassVar[tuple[str, ...]] = ("score", "x0", "epsilon", "v", "velocity", "energy")
    need_signal: ClassVar[tuple[str, ...]] = ("score", "epsilon", "energy")
    grids: ClassVar[tuple[str, ...]] = ("uniform", "quadratic", "edm", "log_snr")
    default_grid = "quadratic"
    default_proposal: ClassVar[str] = "symmetric"
    is_discrete: ClassVar[bool] = False
    keeps_reference: ClassVar[bool] = False

    def log_alpha(self, t: Any) -> Any:
        raise NotImplementedError

    def alpha(self, t: Any) -> Any:
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        raise NotImplementedError

    def alpha_rate(self, t: Any) -> Any:
        raise NotImplementedError

    def sigma_rate(self, t: Any) -> Any:
        raise NotImplementedError

    @property
    def ends_without_signal(self) -> bool:
        """Whether alpha = 0 at the end of the process's domain, so that a grid may reach it."""
        last = self.domain[1]
        return bool(np.isfinite(last)) and float(self.alpha(np.asarray(last))) == 0

    @property
    def dtype(self) -> Any:
        return jnp.result_type(float)

    def check_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape, if states of the subspace can have it."""
        shape = () if shape is None else shape
        self.subspace.dimension(shape)
        return shape

    def relaxed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    # -- what everything else uses -----------------------------------------------------------------------------------

    def _transition(self, s: Any, t: Any) -> GaussianTransition:
        xp = namespace(s, t)
        at_s, at_t = self._level(s), self._level(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            decay_shift = xp.expm1(self.log_alpha(t) - self.log_alpha(s))
            variance = -xp.expm1(at_t.log_snr - at_s.log_snr) * at_t.sigma**2
        decay = decay_shift + 1
        v_s, v_t = at_s.reference_variance, at_t.reference_variance
        return GaussianTransition(
            s=at_s,
            t=at_t,
            decay=decay,
            decay_shift=decay_shift,
            variance=variance,
            reference_shift=-(decay * v_s * decay_shift + variance) / v_t,
            reference_covariance=v_s * variance / v_t,
            gain=at_s.alpha * variance / at_t.sigma**2,
            share=(at_s.alpha * self.data_std / at_t.sigma) ** 2 * variance / v_s,
            duration=t - s,
            subspace=self.subspace,
        )

    def marginal(self, x0: Array, t: Any) -> Gaussian:
        """The law of x_t given x_0: N(alpha_t x_0, sigma_t^2 I)."""
        level = self.level(t)
        return Gaussian(x0, (level.alpha - 1) * x0, level.sigma**2, subspace=self.subspace)

    def moments(self, t: float) -> Moments:
        """alpha, sigma^2 and the reference's variance, as blocks of one number."""
        level = self._level(np.float64(t))
        numbers = (level.alpha, level.sigma**2, level.reference_variance)
        return Moments(*(np.full((1, 1, 1), float(number)) for number in numbers))

    def reference(self, t: Any, shape: tuple[int, ...] = ()) -> Gaussian:
        """The reference's marginal N(0, (alpha_t^2 data_std^2 + sigma_t^2) I). ``shape`` is needed for sampling."""
        return reference(self.level(t), shape, self.subspace)

    def reference_at(self, level: NoiseLevel, shape: tuple[int, ...]) -> Gaussian:
        """The reference's marginal at a noise level."""
        return reference(level, shape, self.subspace)

    def coordinate(self, kind: str, t: np.ndarray, rho: float) -> np.ndarray:
        """t, sqrt(t), (sigma / alpha)^(1 / rho), or log(sigma^2 / alpha^2) / 2.

        Raises:
          ValueError: where there is no noise or no signal at a time, and the last two are infinite.
        """
        if kind == "uniform":
            return t
        if kind == "quadratic":
            return np.sqrt(t)
        with np.errstate(divide="ignore"):
            log_ratio = np.log(self.sigma(t)) - np.log(self.alpha(t))
        if not np.isfinite(log_ratio).all():
            low, high = t[0], t[-1]
            raise ValueError(
                f"a {kind} grid needs noise and signal at both ends, but sigma = {self.sigma(low):.3g} at t = {low} "
                f"and alpha = {self.alpha(high):.3g} at t = {high}; move t_min or t_max, or use kind='uniform'"
            )
        return np.exp(log_ratio / rho) if kind == "edm" else log_ratio

    def log_snr(self, t: Any) -> Any:
        """log(alpha^2 / sigma^2)."""
        with np.errstate(divide="ignore"):
            return 2.0 * (np.log(self.alpha(t)) - np.log(self.sigma(t)))

    def signal_fraction(self, t: Any) -> Any:
        """The fraction of the reference's variance that is signal, alpha_t^2 data_std^2 / V_t."""
        level = self._level(t)
        return level.alpha**2 * self.data_std**2 / level.reference_variance

    def reward_strengths(self, times: np.ndarray, at: str) -> np.ndarray:
        fraction = self.signal_fraction(times)
        if at == "x0":
            return fraction
        # Where noise makes states larger than data (VarianceExploding), a reward that grows like |x|^2 would keep its
        # weight up to t_max.
        return fraction * np.minimum(1.0, self.data_std**2 / self._level(times).reference_variance)

    def _level(self, t: Any) -> NoiseLevel:
        xp = namespace(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        data_variance = self.data_std**2
        variance = alpha**2 * data_variance + sigma**2
        # Without noise log_snr and some rates are infinite, without signal -infinite: legal ends of a grid.
        with np.errstate(divide="ignore", invalid="ignore"):
            alpha_rate, sigma_rate = self.alpha_rate(t), self.sigma_rate(t)
            log_snr = 2 * (self.log_alpha(t) - xp.log(sigma))
        return NoiseLevel(
            t=t,
            alpha=alpha,
            sigma=sigma,
            alpha_rate=alpha_rate,
            sigma_rate=sigma_rate,
            log_snr=log_snr,
            reference_variance=variance,
            reference_gain=alpha * data_variance / variance,
            reference_posterior_variance=data_variance * sigma**2 / variance,
        )


def require_scalar(process: Process, what: str) -> GaussianProcess:
    """The process, if it is one of numbers that diffuse, all of them alike.

    Raises:
      ValueError: where it is not, and ``what`` does not exist for it.
    """
    if not isinstance(process, GaussianProcess):
        kind = "a process of tokens" if process.is_discrete else "a linear SDE, whose kernels are exact matrices"
        raise ValueError(f"{what} exists for scalar Gaussian processes only; {type(process).__name__} is {kind}")
    return process
