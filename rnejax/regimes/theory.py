r"""When a sample commits to a class, and when to one training point: what theory says (mathematics.md, section 8).

Running backwards from noise, a sample first decides on its class (speciation, at t_S), and, if the model knows the
training data by heart, later on the point that it copies (collapse, at t_C). Both are properties of the noising process
and of a few moments of the data. With E the map from x_0 to the mean of x_t and M the covariance of x_t given x_0:

- classes at +-m, each of covariance C: they are s_t = sqrt(m^T E^T (M + E C E^T)^{-1} E m) standard deviations from
  their middle, and t_S is where s_t = 1;
- data of covariance C_0, whatever their classes: t_S is where the largest eigenvalue of M^{-1} E C_0 E^T is 1;
- n points from a Gaussian of covariance C: t_C is where log det(I + M^{-1} E C E^T) / 2 = log n, the entropy of a
  noised point being all that is left of which one it was.

Sources: Biroli, Bonnaire, de Bortoli & Mezard 2024 (arXiv 2402.18491) for scalar processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize

from ..checks import check_count, check_number
from ..processes.process import Process, check_process


class NoTransitionError(ValueError):
    """There is no such time: a criterion is met nowhere, or everywhere."""


def class_separation(process: Process, times: Any, class_mean: Any, within_covariance: Any) -> np.ndarray:
    r"""s_t = sqrt(m^T E_t^T (M_t + E_t C E_t^T)^{-1} E_t m): how far apart noised classes at +-m are, (len(times),).

    Args:
      process: a process of numbers that diffuse.
      times: one or more times.
      class_mean: m, (d,): half the difference of the two classes' means.
      within_covariance: C, of each class: a number, (d,), or (d, d).

    Raises:
      ValueError: for sizes that differ, or a process of tokens.
    """
    mean, covariance = _vector("class_mean", class_mean), within_covariance
    separation = _separation(process, mean, _matrix("within_covariance", covariance, len(mean)))
    times = np.asarray(times, np.float64)
    return np.asarray([separation(float(t)) for t in times.reshape(-1)]).reshape(times.shape)


def same_class_probability(separation: Any, num_nodes: int = 201) -> np.ndarray:
    r"""Phi(s) = E_{y ~ N(s, 1)} [p^2 + (1 - p)^2], p = 1 / (1 + exp(-2 s y)): that two clones end in one class.

    Both are made from one state of two Gaussian classes at a distance of s standard deviations from their middle, each
    by itself. Phi(0) = 1/2, Phi(1) = 0.7752.
    """
    s = np.asarray(separation, np.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    y = s[..., None] + nodes
    p = 1 / (1 + np.exp(-np.clip(2 * s[..., None] * y, -700, 700)))
    return ((p**2 + (1 - p) ** 2) * weights).sum(axis=-1) / np.sqrt(2 * np.pi)


def speciation_time(
    process: Process, class_mean: Any = None, within_covariance: Any = None, *, data_covariance: Any = None
) -> float:
    """t_S, where a sample commits to a class; of two classes, or from the covariance of all data.

    The last time, seen from the data, at which the criterion is still met: where a circulation turns a class
    direction, the separation need not decrease all the way.

    Args:
      process: a process of numbers that diffuse.
      class_mean, within_covariance: of two classes at +-m, see `class_separation`: s_t = 1.
      data_covariance: C_0, instead of these: a number, (d,), or (d, d): the largest eigenvalue of M^{-1} E C_0 E^T is
        1. Centre the data first. A number needs a process that knows its dimension, or a scalar one.

    Raises:
      NoTransitionError: a ValueError, where classes are already indistinguishable at t_min, or still apart where the
        process ends.
      ValueError: for neither or both criteria, sizes that differ, classes whose means are equal, or a process of
        tokens.
    """
    if (class_mean is None) == (data_covariance is None):
        raise ValueError("give class_mean (and within_covariance) for two classes, or data_covariance, and not both")
    if class_mean is not None:
        if within_covariance is None:
            raise ValueError("two classes need their within_covariance: a number, (d,) or (d, d)")
        mean = _vector("class_mean", class_mean)
        if not mean.any():
            raise ValueError("class_mean is zero: both classes have the same mean, and there is nothing to decide")
        separation = _separation(process, mean, _matrix("within_covariance", within_covariance, len(mean)))
        return _last_crossing(process, lambda t: separation(t) - 1, "the classes' separation s_t", 1.0)
    ratios = _signal_to_noise(process, _covariance("data_covariance", data_covariance, process))
    return _last_crossing(
        process, lambda t: float(ratios(t).max()) - 1, "the largest eigenvalue of M^-1 E C_0 E^T", 1.0
    )


def collapse_time(process: Process, num_points: int, covariance: Any) -> float:
    r"""t_C, where a sample commits to one of ``num_points`` training points: log det(I + M^{-1} E C E^T) / 2 = log n.

    For data and noise that are all isotropic, with the variances v and 1 - exp(-2 t) of an Ornstein-Uhlenbeck process,
    t_C = log(1 + v / (n^{2/d} - 1)) / 2.

    Args:
      process: a process of numbers that diffuse.
      num_points: n, at least 2.
      covariance: C, of the data: (d,) or (d, d); it is what says how many dimensions there are.

    Raises:
      NoTransitionError: a ValueError, for so many points that they are not told apart even at t_min, or a process that
        ends before they are confused.
      ValueError: for fewer than two points, sizes that differ, or a process of tokens.
    """
    if check_count("num_points", num_points) < 2:
        raise ValueError("one training point is all there is to collapse to: num_points must be at least 2")
    ratios, entropy = _signal_to_noise(process, _covariance("covariance", covariance, process)), np.log(num_points)
    return _last_crossing(
        process, lambda t: float(0.5 * np.log1p(ratios(t)).sum() - entropy), "log det(I + M^-1 E C E^T) / 2", entropy
    )


def _signal_to_noise(process: Process, covariance: np.ndarray) -> Callable[[float], np.ndarray]:
    """Eigenvalues of M^{-1} E C E^T, as a function of time."""
    if _is_scalar(process):
        variances = np.linalg.eigvalsh(covariance)

        def along_eigenvectors(t: float) -> np.ndarray:
            alpha, noise = _numbers(process, t)
            return alpha**2 * variances / noise

        return along_eigenvectors

    def in_general(t: float) -> np.ndarray:
        signal, noise = _maps(process, t, len(covariance))
        whitened = np.linalg.solve(np.linalg.cholesky(noise), signal @ np.linalg.cholesky(covariance))
        return np.linalg.svd(whitened, compute_uv=False) ** 2

    return in_general


def _separation(process: Process, mean: np.ndarray, covariance: np.ndarray) -> Callable[[float], float]:
    """s_t as a function of time."""
    if _is_scalar(process):
        variances, vectors = np.linalg.eigh(covariance)
        squares = (vectors.T @ mean) ** 2

        def along_eigenvectors(t: float) -> float:
            alpha, noise = _numbers(process, t)
            return float(np.sqrt(np.sum(alpha**2 * squares / (noise + alpha**2 * variances))))

        return along_eigenvectors

    def in_general(t: float) -> float:
        signal, noise = _maps(process, t, len(mean))
        moved = signal @ mean
        return float(np.sqrt(moved @ np.linalg.solve(noise + signal @ covariance @ signal.T, moved)))

    return in_general


def _is_scalar(process: Process) -> bool:
    check_process(process)
    return process.moments(process.t_max).signal.shape == (1, 1, 1)


def _numbers(process: Process, t: float) -> tuple[float, float]:
    signal, noise, _ = process.moments(t)
    return float(signal[0, 0, 0]), float(noise[0, 0, 0])


def _maps(process: Process, t: float, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """The map from x_0 to the mean of x_t, and the covariance of x_t given x_0, as matrices of flattened states."""
    moments = process.moments(float(t))
    b, n, k = moments.signal.shape
    if dimension % (b * k):
        raise ValueError(
            f"sizes differ: {type(process).__name__} acts on {b * k} coordinates, the data have {dimension}"
        )
    copies = dimension // (b * k)

    def full(blocks: np.ndarray) -> np.ndarray:
        rows, columns = blocks.shape[1:]
        out = np.zeros((rows, b, copies, columns, b, copies))
        for block in range(b):
            for copy in range(copies):
                out[:, block, copy, :, block, copy] = blocks[block]
        return out.reshape(rows * b * copies, columns * b * copies)

    return full(moments.signal), full(np.broadcast_to(moments.noise, (b, n, n)))


def _last_crossing(
    process: Process, criterion: Callable[[float], float], what: str, level: float, num: int = 200
) -> float:
    """The largest time at which a criterion is zero and, just below, positive."""
    check_process(process)
    low = process.t_min if process.t_min > 0 else 1e-6 * process.t_max
    high, end = process.t_max, process.domain[1]
    while criterion(high) > 0:
        if not high < end or high > 64 * process.t_max:
            raise NoTransitionError(
                f"{what} is still {criterion(high) + level:.4g} > {level:.4g} at t = {high:.6g}, where "
                f"{type(process).__name__} ends"
            )
        high = min(2 * high, end)
    times = np.unique(np.concatenate([np.geomspace(low, high, num), np.linspace(low, high, num)]))[::-1]
    above = high
    for t in times[1:]:
        if criterion(t) > 0:
            found: float = scipy.optimize.brentq(criterion, t, above, xtol=1e-12, rtol=1e-12)
            return found
        above = t
    raise NoTransitionError(
        f"{what} is nowhere above {level:.4g}: it is {criterion(low) + level:.4g} at t = {low:.6g}, where there is "
        "the least noise"
    )


def _vector(name: str, values: Any) -> np.ndarray:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise ValueError(f"{name} must be a vector of finite numbers, got shape {vector.shape}")
    return vector


def _matrix(name: str, values: Any, size: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape not in ((), (size,), (size, size)):
        raise ValueError(f"sizes differ: {name} must be a number, {(size,)} or {(size, size)}, got {values.shape}")
    matrix = values if values.ndim == 2 else np.diag(np.broadcast_to(values, (size,)))
    asymmetry = float(np.abs(matrix - matrix.T).max())
    if asymmetry > 1e-8 * np.abs(matrix).max():
        raise ValueError(f"{name} must be symmetric: |C - C^T| is {asymmetry:.3g}")
    smallest = float(np.linalg.eigvalsh(matrix).min())
    if not smallest > 0:
        raise ValueError(f"{name} must be positive definite: its smallest eigenvalue is {smallest:.3g}")
    return matrix


def _covariance(name: str, values: Any, process: Process) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        check_number(name, values, positive=True)
        b, _, k = process.moments(process.t_max).signal.shape
        if b * k == 1:
            raise ValueError(f"{name} must say how many dimensions there are: (d,) or (d, d), got a number")
        return _matrix(name, values, b * k)
    return _matrix(name, values, len(values))
