"""The numbers that make a linear SDE: checked, and in blocks (see `rnejax.linear`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from .matrix_kernels import Matrix, symmetric


class System(NamedTuple):
    """A linear SDE in blocks, (b, ., .): what all quantities are computed from.

    Attributes:
      drift: A, (b, n, n).
      noise_rate: 2 D = G G^T, (b, n, n).
      data: covariance of the reference's clean data, (b, k, k); these are the first coordinates of a state.
      auxiliary: covariance of the other coordinates at the start, (b, n - k, n - k).
    """

    drift: Matrix
    noise_rate: Matrix
    data: Matrix
    auxiliary: Matrix


def in_blocks(given: dict[str, np.ndarray]) -> dict[str, Matrix]:
    """Drift, diffusion (as G G^T) and covariances, each a number, a diagonal or a matrix, as blocks of one kind.

    Raises:
      ValueError: where sizes differ.
    """
    sizes = {name: value.shape[0] for name, value in given.items() if value.ndim > 0}
    if len(set(sizes.values())) > 1:
        words = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"sizes differ: {words}")
    for name, value in given.items():
        if value.ndim > 2 or (value.ndim == 2 and name != "diffusion" and value.shape[0] != value.shape[1]):
            raise ValueError(f"{name} must be a number, a diagonal or a square matrix, got shape {value.shape}")
    size = next(iter(sizes.values()), 1)
    dense = any(value.ndim == 2 for value in given.values())

    def block(name: str, value: np.ndarray) -> Matrix:
        if value.ndim == 2:
            return (value @ value.T if name == "diffusion" else value)[None]
        value = value**2 if name == "diffusion" else value
        flat = np.broadcast_to(value, (size,))
        return np.diag(flat)[None] if dense else flat[:, None, None].copy()

    return {name: block(name, value) for name, value in given.items()}


def stationary_covariance(drift: Matrix, noise_rate: Matrix) -> Matrix | None:
    """The solution S of A S + S A^T = 2D in blocks, or None where the process does not forget all else for that law."""
    if np.linalg.eigvals(drift).real.min() <= 0:
        return None
    law = np.stack([scipy.linalg.solve_continuous_lyapunov(a, q) for a, q in zip(drift, noise_rate, strict=True)])
    law = symmetric(law)
    return law if np.linalg.eigvalsh(law).min() > 0 else None


def check_covariance(name: str, covariance: Matrix) -> Matrix:
    asymmetry = float(np.abs(covariance - np.swapaxes(covariance, -1, -2)).max())
    if asymmetry > 1e-10 * np.abs(covariance).max():
        raise ValueError(f"{name} must be symmetric: |C - C^T| is {asymmetry:.3g}")
    smallest = float(np.linalg.eigvalsh(covariance).min())
    if not smallest > 0:
        raise ValueError(f"{name} must be positive definite: its smallest eigenvalue is {smallest:.3g}")
    return symmetric(covariance)


def as_numbers(name: str, value: Any) -> np.ndarray:
    """Numbers as a read-only array of float64."""
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {value!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, but {int((~np.isfinite(array)).sum())} of its entries are not")
    array.setflags(write=False)
    return array


def check_beta(beta: Any) -> None:
    if callable(beta):
        return
    numbers = beta if isinstance(beta, tuple) else (beta,)
    are_numbers = all(isinstance(b, (int, float, np.number)) and not isinstance(b, bool) for b in numbers)
    is_valid = are_numbers and len(numbers) <= 2 and all(np.isfinite(b) and b >= 0 for b in numbers)
    if not is_valid or not max(numbers) > 0:
        raise ValueError(
            f"beta must be a positive number, a pair (beta_min, beta_max) or a function of time, got {beta!r}"
        )
