"""Levels and transitions of linear SDEs, computed in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import numpy as np

from ..linear import Frame
from .linear_steps import LinearLevel, LinearTransition
from .matrix_kernels import Correlation, Matrix, correlate, root
from .process import Moments

if TYPE_CHECKING:
    from .linear import LinearProcess


Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The last few results of something that takes long."""

    def __init__(self, most: int):
        self.most = most
        self._found: dict[Any, Value] = {}

    def peek(self, key: Any) -> Value | None:
        return self._found.get(key)

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        if key not in self._found:
            found = make()
            while len(self._found) >= self.most:
                self._found.pop(next(iter(self._found)))
            self._found[key] = found
        return self._found[key]


class Steps:
    """The steps of one grid: E, V and the canonical coordinates between them; equal ones are computed once."""

    def __init__(self, process: LinearProcess):
        self.process = process
        self._flows: dict[str, tuple[Matrix, Matrix]] = {}
        self._correlations: dict[str, Correlation] = {}

    def between(self, s: float, t: float, total_s: Matrix, total_t: Matrix) -> tuple[Matrix, Matrix, Correlation]:
        duration = float(self.process.elapsed(t)) - float(self.process.elapsed(s))
        equal = f"{duration:.11e}"  # steps that are meant to be equal differ in their last digits
        if equal not in self._flows:
            self._flows[equal] = self.process.flow(duration)
        decay, noise = self._flows[equal]
        if total_s is total_t and equal in self._correlations:
            return decay, noise, self._correlations[equal]
        noise_root = root_of_noise(noise, s, t)
        found = correlate(root(total_s), decay, noise_root, root(total_t))
        if total_s is total_t:
            self._correlations[equal] = found
        return decay, noise, found


def level_at(t: float, moments: Moments, data: Matrix, has_noise: bool) -> LinearLevel:
    """The level of one time, from its moments and the covariance of the reference's data."""
    noise_root = root_of_noise(moments.noise, 0.0, t) if has_noise else root(moments.noise)
    found = correlate(root(data), moments.signal, noise_root, root(moments.total))
    k = found.kappa.shape[-1]
    u = found.u[..., :k]
    with np.errstate(divide="ignore"):
        snr = 2 * np.log(found.kappa) - np.log(u)
    log_variance = np.linalg.slogdet(data)[1].mean() / k
    # Without noise (t = 0) there is no inverse, and nobody may ask for it.
    noise_frame = _frame(noise_root, None if has_noise else np.full_like(noise_root, np.inf))
    return LinearLevel(
        t=np.float64(t),
        alpha=_coordinates(found.kappa),
        sigma=_coordinates(np.sqrt(u)),
        log_snr=snr.mean() - log_variance,
        frame=_frame(found.target, found.target_inverse),
        data=_frame(found.source, found.source_inverse),
        noise=noise_frame,
        signal=moments.signal,
        noise_score=np.swapaxes(noise_frame.inverse[..., -k:, -k:], -1, -2),
    )


def transition_between(
    levels: tuple[LinearLevel, LinearLevel],
    moments: tuple[Moments, Moments],
    step: tuple[Matrix, Matrix, Correlation],
) -> LinearTransition:
    """The step between two levels: from both ends' moments, and E, V and canonical coordinates of what is between."""
    (at_s, at_t), (start, end), (decay, noise, found) = levels, moments, step
    identity = np.eye(decay.shape[-1])
    reference_shift = np.swapaxes(np.linalg.solve(end.total, decay @ start.total), -1, -2) - identity
    alpha, sigma = (np.moveaxis(each[..., 0], 0, -1)[..., None, :] for each in (at_t.alpha, at_t.sigma))
    pull = pull_of_excess(decay, noise, start, end, at_t, alpha)
    share_root = found.source_inverse @ (pull * sigma) / np.sqrt(found.u)[..., :, None]
    weighted = share_root * alpha
    values, vectors = np.linalg.eigh(weighted @ np.swapaxes(weighted, -1, -2))
    # Of a direction without signal no curvature is known (`LinearLevel.probe`), and its root over alpha would overflow.
    share_root = np.where(alpha**2 > np.finfo(np.float64).eps, share_root, 0)
    return LinearTransition(
        s=at_s.in_a_step._replace(noise_score=None, data=None),
        t=at_t.in_a_step,
        gain=found.source_inverse @ (pull * alpha),
        before=_frame(found.source, found.source_inverse)._replace(drift=reference_shift),
        after=_frame(found.target, found.target_inverse)._replace(drift=decay - identity),
        kappa=_coordinates(found.kappa),
        u=_coordinates(found.u),
        share=_coordinates(values),
        share_basis=vectors,
        share_root=share_root,
    )


def pull_of_excess(
    decay: Matrix, noise: Matrix, at_s: Moments, at_t: Moments, level: LinearLevel, alpha: Matrix
) -> Matrix:
    """What an excess of the denoiser, over alpha, contributes to the mean of x_s: (b, n, k).

    G = E^{-1} V noise_t^{-1} signal_t = signal_s - noise_s E^T noise_t^{-1} signal_t, in the coordinates of clean
    data, where signal_t is T alpha. The first form has no difference of large terms where a step is short, the
    second no inverse of what has decayed where it is long.
    """
    frame = level.frame.matrix[..., : alpha.shape[-1]]
    if np.linalg.cond(decay).max() < 1e6:
        return np.linalg.solve(decay, noise @ np.linalg.solve(at_t.noise, frame))
    back = at_s.noise @ np.swapaxes(decay, -1, -2) @ np.linalg.solve(at_t.noise, at_t.signal)
    gain = (at_s.signal - back) @ level.data.matrix
    return np.where(alpha > 0, gain / np.where(alpha > 0, alpha, 1), 0)


def root_of_noise(noise: Matrix, s: float, t: float) -> Matrix:
    """The Cholesky factor of the covariance of x_t given x_s.

    Raises:
      ValueError: where noise does not reach every direction.
    """
    try:
        return np.linalg.cholesky(noise)
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(noise)
        raise ValueError(
            f"the noise between s = {s:.6g} and t = {t:.6g} has no density: the eigenvalues of its covariance go from "
            f"{values.min():.3g} to {values.max():.3g}. Noise must reach every coordinate, through the drift where not "
            "directly (the columns of G, A G, A^2 G, ... must span the space), and a step must be long enough for it"
        ) from None


def _frame(matrix: Matrix, inverse: Matrix | None = None) -> Frame:
    with np.errstate(divide="ignore"):
        log_det = np.linalg.slogdet(matrix)[1].sum()
    return Frame(matrix, np.linalg.inv(matrix) if inverse is None else inverse, log_det)


def _coordinates(values: Matrix) -> Matrix:
    """Numbers of blocks (b, k) in the shape of coordinates, (k, b, 1)."""
    return values.T[..., None]


def stacked(trees: list[Any], shape: tuple[int, ...]) -> Any:
    def stack(*leaves: Any) -> Any:
        return leaves[0] if shape == () else np.stack(leaves).reshape(*shape, *np.shape(leaves[0]))

    return jax.tree.map(stack, *trees)
