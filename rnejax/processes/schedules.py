"""The schedules: what alpha and sigma are. Each works on numpy (float64, host) and on traced jax times alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .gaussian import GaussianProcess
from .process import namespace


def _static(cls: type) -> type:
    """A process is configuration, not data: hashable, compared by value, never traced."""
    return jax.tree_util.register_static(cls)


@_static
@dataclass(frozen=True)
class VariancePreserving(GaussianProcess):
    """beta(t) = beta_min + t (beta_max - beta_min), alpha = exp(-int_0^t beta / 2), sigma^2 = 1 - alpha^2.

    Defaults: t in [1e-3, 1]; alpha(1) = 0.0066, so every prediction type can be used. Song et al. 2021.

    Raises:
      ValueError: unless beta_min >= 0 and beta_max > 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta_min < np.inf and 0 < self.beta_max < np.inf):
            raise ValueError(f"noise is added: beta_min >= 0 and beta_max > 0, got {self.beta_min} and {self.beta_max}")

    def log_alpha(self, t: Any) -> Any:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Any) -> Any:
        return namespace(t).exp(self.log_alpha(t))

    def sigma(self, t: Any) -> Any:
        xp = namespace(t)
        return xp.sqrt(-xp.expm1(2 * self.log_alpha(t)))

    def alpha_rate(self, t: Any) -> Any:
        return -0.5 * self._beta(t) * self.alpha(t)

    def sigma_rate(self, t: Any) -> Any:
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def _beta(self, t: Any) -> Any:
        return self.beta_min + t * (self.beta_max - self.beta_min)


@_static
@dataclass(frozen=True)
class Cosine(GaussianProcess):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Defaults: t in [1e-3, 0.999], where alpha >= 1.6e-3 and every prediction type can be used in float32. ``t_max=1``
    (alpha = 0, pure noise) is legal for x0, v and velocity predictions. Nichol and Dhariwal 2021; Salimans and Ho 2022.
    """

    t_max: float = 0.999

    def log_alpha(self, t: Any) -> Any:
        return namespace(t).log(self.alpha(t))

    def alpha(self, t: Any) -> Any:
        return namespace(t).sin(0.5 * np.pi * (1 - t))  # cos(pi / 2) is 6e-17, sin(0) is 0

    def sigma(self, t: Any) -> Any:
        return namespace(t).sin(0.5 * np.pi * t)

    def alpha_rate(self, t: Any) -> Any:
        return -0.5 * np.pi * self.sigma(t)

    def sigma_rate(self, t: Any) -> Any:
        return 0.5 * np.pi * self.alpha(t)


@_static
@dataclass(frozen=True)
class RectifiedFlow(GaussianProcess):
    """alpha = 1 - t, sigma = t.

    Defaults: t in [1e-3, 0.999]. ``t_max=1`` (alpha = 0) is legal for x0, v and velocity predictions. Liu et al. 2023.
    """

    t_max: float = 0.999

    def log_alpha(self, t: Any) -> Any:
        return namespace(t).log1p(-t)

    def alpha(self, t: Any) -> Any:
        return 1.0 - t

    def sigma(self, t: Any) -> Any:
        return 1.0 * t

    def alpha_rate(self, t: Any) -> Any:
        return namespace(t).full_like(t, -1.0)

    def sigma_rate(self, t: Any) -> Any:
        return namespace(t).ones_like(t)


@_static
@dataclass(frozen=True, init=False)
class VarianceExploding(GaussianProcess):
    """alpha = 1, sigma = t: time is the noise level, as in EDM. Defaults: t in [sigma_min, sigma_max]. Karras et al.
    2022."""

    domain = (0.0, float("inf"))
    default_grid = "edm"
    time_names = ("sigma_min", "sigma_max")

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 10.0, **options: Any):
        super().__init__(t_min=sigma_min, t_max=sigma_max, **options)

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        return {"sigma_min": arguments.pop("t_min"), "sigma_max": arguments.pop("t_max"), **arguments}

    @property
    def sigma_min(self) -> float:
        return self.t_min

    @property
    def sigma_max(self) -> float:
        return self.t_max

    def log_alpha(self, t: Any) -> Any:
        return namespace(t).zeros_like(t)

    def alpha(self, t: Any) -> Any:
        return namespace(t).ones_like(t)

    def sigma(self, t: Any) -> Any:
        return 1.0 * t

    def alpha_rate(self, t: Any) -> Any:
        return namespace(t).zeros_like(t)

    def sigma_rate(self, t: Any) -> Any:
        return namespace(t).ones_like(t)


@_static
@dataclass(frozen=True, init=False)
class DiscreteVariancePreserving(GaussianProcess):
    """A DDPM trained on a table of betas: alpha_t^2 = prod_{i <= t} (1 - beta_i) for t = 1, ..., n.

    Time is the step number, so t = 0 is clean data and ``range(1, n + 1)`` reproduces the table. ``time_grid`` gives
    step numbers only, since a network that was trained on the table knows no others; in between log alpha is linear,
    which leaves every kernel exact. The network of step t is usually called with the index t - 1: build the model with
    ``noise_level="index"``. Ho, Jain and Abbeel 2020.

    Raises:
      ValueError: if the betas are not all in (0, 1).
    """

    betas: tuple[float, ...] = ()

    def __init__(self, betas: Any, **options: Any):
        betas = tuple(float(b) for b in np.asarray(betas, np.float64).reshape(-1))
        if len(betas) < 2 or not all(0 < b < 1 for b in betas):
            raise ValueError(f"betas must be two or more numbers in (0, 1), got {len(betas)}: {betas[:3]} ...")
        object.__setattr__(self, "betas", betas)  # first: the domain, which times are checked against, is theirs
        super().__init__(**{"t_min": 1.0, "t_max": float(len(betas)), **options})

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, float(len(self.betas)))

    default_grid = "uniform"

    def snap(self, times: np.ndarray) -> np.ndarray:
        """The nearest strictly increasing step numbers.

        Raises:
          ValueError: where the range has fewer steps than the grid.
        """
        first, last = np.ceil(times[0]), np.floor(times[-1])
        if last - first < len(times) - 1:
            raise ValueError(
                f"a grid of {len(times) - 1} steps does not fit between the step numbers {first:g} and {last:g} of the "
                f"table: take at most {max(int(last - first), 0)} steps, or give times of your own"
            )
        # Steps that fall on one number are pushed apart, upwards first, then down from the end.
        apart = np.arange(len(times))
        steps = np.maximum.accumulate(np.clip(np.round(times), first, last) - apart) + apart
        return np.minimum(steps, last - apart[::-1])

    def _table(self) -> np.ndarray:
        return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-np.asarray(self.betas)))])

    def log_alpha(self, t: Any) -> Any:
        table = self._table()
        return namespace(t).interp(t, np.arange(len(table)), table)

    def alpha(self, t: Any) -> Any:
        return namespace(t).exp(self.log_alpha(t))

    def sigma(self, t: Any) -> Any:
        xp = namespace(t)
        return xp.sqrt(-xp.expm1(2 * self.log_alpha(t)))

    def _rate(self, t: Any) -> Any:
        """d log alpha / dt on the segment that ends at t: the one that the step down from t crosses."""
        xp = namespace(t)
        segment = xp.clip(xp.ceil(t).astype(int) - 1, 0, len(self.betas) - 1)
        return xp.asarray(np.diff(self._table()))[segment]

    def alpha_rate(self, t: Any) -> Any:
        return self._rate(t) * self.alpha(t)

    def sigma_rate(self, t: Any) -> Any:
        return -self._rate(t) * self.alpha(t) ** 2 / self.sigma(t)
