r"""What a linear SDE does in a step, in float64 on the host: dX = -A X dt + G dW, with 2D = G G^T (mathematics.md, 1).

All matrices are stacks of blocks, ``(b, k, k)`` (see `rnejax.linear`). Nothing here diagonalises A: drifts need not be
diagonalisable (critical damping), and eigenvectors of one that is far from normal lose the digits that a small step
needs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Matrix = np.ndarray


def transition_kernel(drift: Matrix, noise_rate: Matrix, duration: float) -> tuple[Matrix, Matrix]:
    r"""E = exp(-A h) and V = int_0^h exp(-A u) 2D exp(-A^T u) du for h = ``duration``.

    Both from their Taylor series for a short time, and from there by doubling, E_2h = E_h^2 and V_2h = V_h + E_h V_h
    E_h^T. The series of V is that of Van Loan's integral (1978); unlike his single matrix exponential it keeps the
    digits of entries that are of high order in h, such as the h^3 of a position that is pushed by noisy velocities.
    """
    size = np.abs(drift).sum(axis=-1).max() * duration
    doublings = max(0, int(np.ceil(np.log2(max(size, 1e-300) / 0.25))))
    h = duration / 2**doublings
    identity = np.broadcast_to(np.eye(drift.shape[-1]), drift.shape)
    decay_term, noise_term = identity.copy(), h * noise_rate
    decay, noise = decay_term.copy(), noise_term.copy()
    # |A h| <= 1/4, so that terms fall by a factor 1 / (2 j): eps after 14 of them.
    for j in range(1, 16):
        decay_term = -(h / j) * (drift @ decay_term)
        decay = decay + decay_term
        flow = drift @ noise_term
        noise_term = -(h / (j + 1)) * (flow + np.swapaxes(flow, -1, -2))
        noise = noise + noise_term
    for _ in range(doublings):
        noise = noise + decay @ noise @ np.swapaxes(decay, -1, -2)
        decay = decay @ decay
    return decay, symmetric(noise)


def symmetric(matrix: Matrix) -> Matrix:
    return 0.5 * (matrix + np.swapaxes(matrix, -1, -2))


def root(covariance: Matrix) -> Matrix:
    """R with R R^T = covariance: triangular where it is positive definite, else from its eigenvectors.

    Raises:
      ValueError: where an eigenvalue is negative by more than rounding.
    """
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        if values.min() < -1e-10 * np.abs(values).max():
            raise ValueError(
                f"a covariance must be positive semi-definite: the smallest eigenvalue is {values.min():.3g}, "
                f"the largest {values.max():.3g}"
            ) from None
        return vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]


class Correlation(NamedTuple):
    r"""Two Gaussian states x and y = regression x + noise in coordinates where they are correlated in pairs.

    x = source z_x and y = target z_y with z_x and z_y of unit variance, and z_y,i = kappa_i z_x,i + noise of variance
    u_i = 1 - kappa_i^2. Where y has more coordinates than x, the rest of them is noise: u_i = 1.

    Attributes:
      source, source_inverse: (b, k, k).
      target, target_inverse: (b, n, n).
      kappa: canonical correlations, decreasing, (b, k).
      u: variances that are noise, (b, n); kappa and u both keep their digits where they are small.
    """

    source: Matrix
    source_inverse: Matrix
    target: Matrix
    target_inverse: Matrix
    kappa: Matrix
    u: Matrix


def correlate(source_root: Matrix, regression: Matrix, noise_root: Matrix, target_root: Matrix) -> Correlation:
    """The canonical coordinates of x = source_root xi and y = regression x + noise_root eta.

    ``target_root`` is a root of the covariance of y. A singular value decomposition of the noise gives its share u with
    all its digits, and an orthogonalisation kappa with its own: 1 - u would have none where noise is all. There the
    noise is the same in all directions up to rounding, and the signal tells them apart.
    """
    k, n = source_root.shape[-1], target_root.shape[-1]
    signal = np.linalg.solve(target_root, regression @ source_root)
    noise = np.linalg.solve(target_root, noise_root)
    left, values, _ = np.linalg.svd(noise)
    left, values = left[..., ::-1], values[..., ::-1]  # the least noisy first
    left, values = _told_apart_by_signal(left, values, signal, noise)
    right, triangle = np.linalg.qr(np.swapaxes(signal, -1, -2) @ left[..., :k])
    diagonal = np.diagonal(triangle, axis1=-2, axis2=-1)
    right = right * np.where(diagonal < 0, -1.0, 1.0)[..., None, :]
    u = np.minimum(values**2, 1.0)
    u[..., k:n] = 1.0
    source, target = source_root @ right, target_root @ left
    return Correlation(
        source=source,
        source_inverse=np.swapaxes(right, -1, -2) @ np.linalg.inv(source_root),
        target=target,
        target_inverse=np.swapaxes(left, -1, -2) @ np.linalg.inv(target_root),
        kappa=np.minimum(np.abs(diagonal), 1.0),
        u=u,
    )


def _told_apart_by_signal(left: Matrix, values: Matrix, signal: Matrix, noise: Matrix) -> tuple[Matrix, Matrix]:
    """Singular vectors and values of the noise, those directions turned in which more than half is noise."""
    left, values = left.copy(), values.copy()
    for vectors, sizes, of_signal, of_noise in zip(left, values, signal, noise, strict=True):
        clear = int((sizes**2 < 0.5).sum())
        if len(sizes) - clear < 2:
            continue
        heard, faint = of_signal.T @ vectors[:, :clear], of_signal.T @ vectors[:, clear:]
        onto = np.linalg.qr(heard)[0]
        turn = np.linalg.svd(faint - onto @ (onto.T @ faint))[2].T
        vectors[:, clear:] = vectors[:, clear:] @ turn
        sizes[clear:] = np.linalg.norm(of_noise.T @ vectors[:, clear:], axis=0)
    return left, values
