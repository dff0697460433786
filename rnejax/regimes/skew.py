r"""Circulations for `rnejax.processes.NonReversible`: skew-symmetric matrices Q that go with a precision U.

All keep the stationary law N(0, U^{-1}); what differs is how fast the rest is forgotten. Without Q each eigendirection
of U has its own rate, the slowest of which is the smallest eigenvalue; no Q forgets faster than at the mean of the
eigenvalues, tr(U) / d, and the optimal ones forget everything at that rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks import check_count, check_number
from ..processes.linear_system import as_numbers, check_covariance


def optimal_skew(precision: Any, basis: Any = None, values: Any = None) -> np.ndarray:
    r"""The Q for which every eigenvalue of (I + Q) U has the real part tr(U) / d.

    With orthonormal v_1, ..., v_d of equal v_k . U v_k = tr(U) / d and distinct numbers lambda_k > 0, and H = V^T U V,

        T_jk = H_jk (lambda_j + lambda_k) / (lambda_j - lambda_k),  T_jj = 0,   Q = U^{-1/2} V T V^T U^{-1/2}.

    It is not unique: V and lambda are free, and how strong the circulation is depends on them.

    Args:
      precision: U, (d, d) symmetric positive definite, or its diagonal, (d,).
      basis: V, with the vectors as columns; default: from the eigenvectors by d - 1 plane rotations, each of which
        makes one of the v_k . U v_k the mean.
      values: lambda, (d,); default: 1, ..., d.

    Returns:
      Q, (d, d), float64.

    Raises:
      ValueError: for a precision that is not symmetric or not positive definite, a basis that is not orthonormal or
        whose v_k . U v_k differ, values that are not positive and distinct, or sizes that differ; by how much.

    Source: Lelievre, Nier & Pavliotis 2013, section 2; mathematics.md, section 8.
    """
    matrix = _precision(precision)
    size = len(matrix)
    rates, vectors = np.linalg.eigh(matrix)
    mean = rates.mean()
    if basis is None:
        columns = vectors @ _equalising_rotations(rates)
    else:
        columns = as_numbers("basis", basis)
        if columns.shape != matrix.shape:
            raise ValueError(f"sizes differ: precision {size}, basis {columns.shape}")
        defect = float(np.abs(columns.T @ columns - np.eye(size)).max())
        if defect > 1e-8:
            raise ValueError(f"basis must be orthonormal: |V^T V - I| is {defect:.3g}")
    turned = columns.T @ matrix @ columns
    uneven = float(np.abs(np.diag(turned) - mean).max())
    if uneven > 1e-8 * rates.max():
        raise ValueError(
            f"basis must make all v . U v equal tr(U) / d = {mean:.6g}: the largest difference is {uneven:.3g}"
        )
    weights = np.arange(1.0, size + 1) if values is None else as_numbers("values", values)
    if weights.shape != (size,):
        raise ValueError(f"sizes differ: precision {size}, values {weights.shape}")
    if not weights.min() > 0 or len(np.unique(weights)) < size:
        raise ValueError(f"values must be positive and distinct, got {weights}")
    difference = weights[:, None] - weights + np.eye(size)
    circulation = turned * (weights[:, None] + weights) / difference
    np.fill_diagonal(circulation, 0.0)
    inverse_root = (vectors / np.sqrt(rates)) @ vectors.T
    skew = inverse_root @ columns @ circulation @ columns.T @ inverse_root
    return 0.5 * (skew - skew.T)


def random_skew(seed: int, size: int, strength: float) -> np.ndarray:
    """S - S^T of independent normal numbers, scaled to the spectral norm ``strength``.

    Raises:
      ValueError: for a strength that is not positive, or a size below 2.
    """
    if check_count("size", size) < 2:
        raise ValueError("in one dimension there is no circulation: size must be at least 2")
    numbers = np.random.default_rng(seed).normal(size=(size, size))
    skew = numbers - numbers.T
    scaled: np.ndarray = skew * (check_number("strength", strength, positive=True) / np.linalg.norm(skew, 2))
    return scaled


def rotation_skew(precision: Any, strength: float) -> np.ndarray:
    """Rotations in planes, each of a slow and a fast eigendirection of U: the slowest with the fastest, and so on.

    With u < u' the rates of a pair, its block of the drift has the eigenvalues (u + u') / 2 +- sqrt((u' - u)^2 / 4 -
    strength^2 u u'): from strength (u' - u) / (2 sqrt(u u')) on both have the mean of the two as their real part.

    Args:
      precision: U, (d, d), or its diagonal, (d,).
      strength: of Q in every plane; its spectral norm.

    Raises:
      ValueError: for a precision that is not symmetric or not positive definite, or a strength that is no number.
    """
    matrix, strength = _precision(precision), check_number("strength", strength)
    _, vectors = np.linalg.eigh(matrix)
    skew = np.zeros_like(matrix)
    for slow in range(len(matrix) // 2):
        one, other = vectors[:, slow], vectors[:, -1 - slow]
        skew += strength * (np.outer(one, other) - np.outer(other, one))
    return skew


def _precision(precision: Any) -> np.ndarray:
    matrix = as_numbers("precision", precision)
    matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"precision must be a square matrix or its diagonal, got shape {matrix.shape}")
    found: np.ndarray = check_covariance("precision", matrix[None])[0]
    return found


def _equalising_rotations(rates: np.ndarray) -> np.ndarray:
    """An orthogonal R with a constant diagonal of R^T diag(rates) R.

    A plane rotation of two columns, one above and one below the mean, makes the first equal it; the other takes the
    rest. One of the remaining d - k is always on the other side of the mean, or all are there.
    """
    size, mean = len(rates), rates.mean()
    matrix, rotation = np.diag(rates).astype(np.float64), np.eye(size)
    left = list(range(size))
    while len(left) > 1:
        diagonal = matrix[left, left] - mean
        low, high = left[int(np.argmin(diagonal))], left[int(np.argmax(diagonal))]
        a, b, c = matrix[low, low] - mean, matrix[low, high], matrix[high, high] - mean
        if a >= 0 or c <= 0:
            break
        # cos^2 a + 2 sin cos b + sin^2 c = 0 for tan = t: c t^2 + 2 b t + a = 0, with a < 0 < c.
        tangent = (-b + np.sqrt(b * b - a * c)) / c
        cosine = 1 / np.sqrt(1 + tangent**2)
        plane = np.array([[cosine, -tangent * cosine], [tangent * cosine, cosine]])
        pair = [low, high]
        matrix[:, pair] = matrix[:, pair] @ plane
        matrix[pair, :] = plane.T @ matrix[pair, :]
        rotation[:, pair] = rotation[:, pair] @ plane
        left.remove(low)
    return rotation
