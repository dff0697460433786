"""Linear SDEs of any constant drift and diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from .linear import LinearProcess
from .linear_system import System, as_numbers, check_covariance, in_blocks, stationary_covariance


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False, repr=False)
class LinearSDE(LinearProcess):
    r"""dx = -A x beta dt + G sqrt(beta) dW, with constant A and G.

    Args:
      drift: A: a number, (d,) for a diagonal, or a matrix (k, k), which acts on states of k entries, or on the first
        axis of states of shape (k, ...). It need be neither symmetric nor diagonalisable.
      diffusion: G: a number g for g I, (d,), or a matrix (k, r); it may be singular if the drift carries the noise on.
      data_covariance: of the reference's data: a number, (d,), (k, k), or "stationary" for that of the law which the
        process keeps. Match it to the data: less error, and exactness for Gaussian data with any covariance choice.
      t_min, t_max: default time range; t_max by default where no direction keeps more than a thousandth of its
        variance.
      beta: the time change: a number, (beta_min, beta_max) for beta_min + t (beta_max - beta_min), or a positive
        function of time.

    Raises:
      ValueError: for sizes that differ, numbers that are not finite, a covariance that is not symmetric and positive,
        no stationary law where one is asked for, or a process that does not forget its data and no t_max.
    """

    drift: Any = 1.0
    diffusion: Any = float(np.sqrt(2.0))
    data_covariance: Any = 1.0
    t_min: float = 1e-3
    t_max: Any = None
    beta: Any = 1.0

    def __post_init__(self) -> None:
        for name in ("drift", "diffusion", "data_covariance"):
            value = getattr(self, name)
            if name != "data_covariance" or not isinstance(value, str):
                object.__setattr__(self, name, as_numbers(name, value))
        object.__setattr__(self, "beta", tuple(self.beta) if isinstance(self.beta, list) else self.beta)
        self._set_range()

    @cached_property
    def system(self) -> System:
        given = {name: getattr(self, name) for name in ("drift", "diffusion", "data_covariance")}
        if isinstance(self.data_covariance, str):
            if self.data_covariance != "stationary":
                raise ValueError(f"data_covariance must be numbers or 'stationary', got {self.data_covariance!r}")
            del given["data_covariance"]
        blocks = in_blocks(given)
        drift, noise_rate = blocks["drift"], blocks["diffusion"]
        if "data_covariance" in blocks:
            data = check_covariance("data_covariance", blocks["data_covariance"])
        else:
            law = stationary_covariance(drift, noise_rate)
            if law is None:
                slowest = float(np.linalg.eigvals(drift).real.min())
                why = (
                    "there are directions that noise does not reach (the columns of G, A G, ... do not span the space)"
                )
                if not slowest > 0:
                    why = f"an eigenvalue of the drift has the real part {slowest:.3g}, and all must be positive"
                raise ValueError(f"data_covariance='stationary' needs a process that keeps a law, and {why}")
            data = law
        return System(drift, noise_rate, data, np.zeros((len(drift), 0, 0)))

    def __repr__(self) -> str:
        b, n, _ = self.system.drift.shape
        kind = "scalar" if b * n == 1 else "diagonal" if n == 1 else "matrix"
        return f"LinearSDE({kind} of size {b * n}, t_min={self.t_min:g}, t_max={self.t_max:g})"
