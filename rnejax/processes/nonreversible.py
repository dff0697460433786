r"""Non-reversible noise: a circulation that keeps the stationary law (mathematics.md, section 8).

dx = -(I + Q) U x beta dt + sqrt(2 beta) dW with U symmetric and positive and Q skew keeps N(0, U^{-1}) for every Q:
A = (I + Q) U satisfies A U^{-1} + U^{-1} A^T = 2 I. What Q does is to carry slow directions through fast ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from .linear import LinearProcess
from .linear_system import System, as_numbers, check_covariance


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False, repr=False)
class NonReversible(LinearProcess):
    r"""dx = -(I + Q) U x beta dt + sqrt(2 beta) dW, which keeps N(0, U^{-1}).

    Args:
      precision: U, symmetric positive definite, (d, d), or its diagonal, (d,).
      skew: Q, skew-symmetric, (d, d); None for 0, the reversible process. See `rnejax.regimes.optimal_skew`,
        `rnejax.regimes.random_skew` and `rnejax.regimes.rotation_skew`.
      data_covariance: of the reference's data: a number, (d,), (d, d), or "stationary" for U^{-1}.
      t_min, t_max, beta: as for `LinearSDE`.

    Raises:
      ValueError: for a precision that is not symmetric or not positive definite, a skew that is not skew (naming the
        violated equation and by how much), sizes that differ, or what `LinearSDE` refuses.
    """

    precision: Any
    skew: Any = None
    data_covariance: Any = "stationary"
    t_min: float = 1e-3
    t_max: Any = None
    beta: Any = 1.0

    def __post_init__(self) -> None:
        precision = as_numbers("precision", self.precision)
        if precision.ndim not in (1, 2) or precision.shape[0] != precision.shape[-1]:
            raise ValueError(f"precision must be a square matrix or its diagonal, got shape {precision.shape}")
        size = len(precision)
        matrix = np.diag(precision) if precision.ndim == 1 else precision
        check_covariance("precision", matrix[None])
        object.__setattr__(self, "precision", precision)
        if self.skew is not None:
            object.__setattr__(self, "skew", check_skew(self.skew, size))
        covariance = self.data_covariance
        if not isinstance(covariance, str):
            covariance = as_numbers("data_covariance", covariance)
            if covariance.ndim > 0 and covariance.shape not in ((size,), (size, size)):
                raise ValueError(
                    f"data_covariance must be a number, {(size,)} or {(size, size)}, got shape {covariance.shape}"
                )
            object.__setattr__(self, "data_covariance", covariance)
        elif covariance != "stationary":
            raise ValueError(f"data_covariance must be numbers or 'stationary', got {covariance!r}")
        object.__setattr__(self, "beta", tuple(self.beta) if isinstance(self.beta, list) else self.beta)
        self._set_range()

    @cached_property
    def system(self) -> System:
        covariance = self.data_covariance
        if self.skew is None and self.precision.ndim == 1 and np.ndim(covariance) < 2:
            # Every coordinate for itself.
            drift = self.precision[:, None, None]
            given = 1 / self.precision if isinstance(covariance, str) else np.broadcast_to(covariance, len(drift))
            data = given[:, None, None].copy()
        else:
            precision = np.diag(self.precision) if self.precision.ndim == 1 else self.precision
            skew = np.zeros_like(precision) if self.skew is None else self.skew
            drift = (precision + skew @ precision)[None]
            if isinstance(covariance, str):
                data = np.linalg.inv(precision)[None]
            elif covariance.ndim < 2:
                data = np.diag(np.broadcast_to(covariance, len(precision)))[None]
            else:
                data = covariance[None]
        data = check_covariance("data_covariance", data)
        noise_rate = np.broadcast_to(2 * np.eye(drift.shape[-1]), drift.shape).copy()
        return System(drift, noise_rate, data, np.zeros((len(drift), 0, 0)))

    # -- diagnostics --------------------------------------------------------------------------------------------------

    @property
    def spectral_gap(self) -> float:
        """The smallest real part: the rate at which the slowest direction is forgotten, at most tr(U) / d."""
        return float(self.eigenvalues.real.min())

    @property
    def entropy_production(self) -> float:
        """In the stationary law, in nats per unit of elapsed time: tr(Q U Q^T) = |Q U^{1/2}|^2; 0 where reversible.

        The irreversible velocity -Q U x has mean square E|Q U x|^2 = tr(Q U Q^T) under N(0, U^{-1}), and D = I.
        """
        if self.skew is None:
            return 0.0
        precision = np.diag(self.precision) if self.precision.ndim == 1 else self.precision
        return float(np.trace(self.skew @ precision @ self.skew.T))

    @property
    def stiffness(self) -> float:
        """|A| / spectral gap: how many of the shortest times the slowest direction takes."""
        return float(np.linalg.norm(self.system.drift, 2, axis=(-2, -1)).max() / self.spectral_gap)

    def __repr__(self) -> str:
        kind = "reversible" if self.skew is None else f"|Q| = {np.linalg.norm(self.skew):.4g}"
        return f"NonReversible({kind}, size {len(self.precision)}, t_min={self.t_min:g}, t_max={self.t_max:g})"


def check_skew(skew: Any, size: int) -> np.ndarray:
    """The matrix, if it is skew-symmetric and of this size; else ValueError."""
    matrix = as_numbers("skew", skew)
    if matrix.shape != (size, size):
        raise ValueError(f"sizes differ: precision {size}, skew {matrix.shape}")
    violation = float(np.abs(matrix + matrix.T).max())
    if violation > 1e-10 * max(1.0, float(np.abs(matrix).max())):
        raise ValueError(f"skew must satisfy Q + Q^T = 0: the largest entry of Q + Q^T is {violation:.3g}")
    exact = 0.5 * (matrix - matrix.T)
    exact.setflags(write=False)
    return exact
