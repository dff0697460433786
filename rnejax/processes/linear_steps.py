"""What is known of a linear SDE at one time and between two: levels and transitions, in canonical coordinates.

See `rnejax.processes.linear` for what these coordinates are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..kernels import Array, FullSpace, Gaussian, Subspace
from ..linear import Frame, apply, transposed
from .gaussian_steps import tempered_slopes

Coefficients = Any  # arrays in float64 on the host where they are made, in JAX's default type where they are used


class LinearLevel(NamedTuple):
    """A noise level: z_t = alpha z_0 + sigma eps in the coordinates of ``frame`` (states) and ``data`` (clean data).

    Maps are blocks (see `rnejax.linear`); alpha and sigma have shape (k, b, 1), one number per coordinate of the data.
    States may have more coordinates, which have no signal.
    """

    t: Coefficients
    alpha: Coefficients
    sigma: Coefficients
    log_snr: Coefficients  # mean over coordinates of log(alpha^2 / sigma^2), per variance of the data
    frame: Frame
    data: Coefficients  # a frame
    noise: Coefficients  # the Cholesky factor of the covariance of x_t given x_0
    signal: Coefficients  # the map x_0 -> E[x_t | x_0]
    noise_score: Coefficients  # the map from the last coordinates of a standard noise to those of minus the score

    @property
    def in_a_step(self) -> LinearLevel:
        """As steps have it: without the maps that make a noised state of clean data."""
        return self._replace(noise=None, signal=None)

    def excess(self, output: Array, x: Array, prediction: str) -> Array:
        """The network's denoiser minus the reference's, in the coordinates of clean data, of a batch of states."""
        return jax.vmap(lambda output, x: self._excess(output, x, prediction))(output, x)

    def _excess(self, output: Array, x: Array, prediction: str) -> Array:
        z = self.frame.coordinates(x)
        k = self.alpha.shape[-3]
        if prediction == "x0":
            return self.data.coordinates(output) - self.alpha * z[:k]
        if prediction == "epsilon":
            b, rows, _ = self.noise_score.shape
            output = -apply(self.noise_score, output.reshape(rows, b, -1))
        # Where less is left of the signal than rounding leaves of a score, it says nothing, and the reference is right.
        heard = self.alpha > jnp.finfo(x.dtype).eps
        slope = jnp.where(heard, self.sigma**2 / jnp.where(heard, self.alpha, 1), 0)
        if output.size == x.size:  # score = T^{-T} (alpha / sigma^2 excess - z)
            return slope * (apply(transposed(self.frame.matrix), output) + z)[:k]
        # The score of the coordinates that noise drives says all: as many numbers as the data have.
        pulls = transposed(self.frame.inverse)[:, -k:]
        driven = output.reshape(k, *z.shape[1:]) + apply(pulls, z)
        return slope * apply(jnp.linalg.inv(pulls[:, :, :k]), driven)

    def is_valid(self, excess: Array) -> Array:
        """Whether every number of an excess is finite, of each state of a batch."""
        return jnp.all(jnp.isfinite(excess.reshape(len(excess), -1)), axis=1)

    def denoised(self, x: Array, excess: Array) -> Array:
        """E[x_0 | x_t], of the shape of the data."""
        k = self.alpha.shape[-3]
        z = self.frame.coordinates(x)
        clean = apply(self.data.matrix, self.alpha * z[:k] + excess)
        return clean.reshape(x.shape if len(z) == k else x.shape[1:])

    def clean_state(self, x: Array, excess: Array) -> Array:
        """The denoised state, of the shape of a state: coordinates that are no data are zero."""
        clean = self.denoised(x, excess)
        return clean if clean.shape == x.shape else jnp.zeros_like(x).at[0].set(clean)

    def score(self, x: Array, excess: Array) -> Array:
        """grad log p_t(x)."""
        z = self.frame.coordinates(x)
        return apply(transposed(self.frame.inverse), self._lifted(excess, len(z)) - z).reshape(x.shape)

    def excess_score(self, x: Array, excess: Array) -> Array:
        """grad log p_t(x) - grad log ref_t(x), of the shape of x."""
        n = self.frame.matrix.shape[-1]
        return apply(transposed(self.frame.inverse), self._lifted(excess, n)).reshape(x.shape)

    def reference_score(self, x: Array) -> Array:
        return -apply(transposed(self.frame.inverse), self.frame.coordinates(x)).reshape(x.shape)

    def _lifted(self, excess: Array, size: int) -> Array:
        """alpha / sigma^2 times the excess, and zeros for coordinates that carry no signal."""
        pulled = (self.alpha / self.sigma**2) * excess
        return jnp.concatenate([pulled, jnp.zeros((size - len(pulled), *pulled.shape[1:]), pulled.dtype)])

    def whiten(self, x: Array) -> Array:
        """What of a state says something of x_0, in coordinates in which its noise is standard, (m,)."""
        return (self.frame.coordinates(x)[: self.alpha.shape[-3]] / self.sigma).reshape(-1)

    def whiten_mean(self, x0: Array) -> Array:
        """E[x_t | x_0] in these coordinates."""
        return ((self.alpha / self.sigma) * self.data.coordinates(x0)).reshape(-1)

    # -- training ----------------------------------------------------------------------------------------------------

    def noised(self, x0: Array, noise: Array) -> Array:
        """x_t for a standard noise of the state's shape."""
        return apply(self.signal, x0).reshape(noise.shape) + self.noise.event(self.noise.view(noise), noise.shape)

    def target(self, prediction: str, x0: Array, noise: Array) -> Array:
        """What a network that predicts this should say of a noised state."""
        if prediction == "x0":
            return x0
        driven = self.noise.view(noise)[-self.noise_score.shape[-1] :]
        if prediction == "score":
            driven = -apply(self.noise_score, driven)
        return driven.reshape(x0.shape)

    def predicted(self, prediction: str, score: Array) -> Array:
        """A score as a network says it that predicts ``score`` or ``epsilon``."""
        k = self.noise_score.shape[-1]
        if len(score) == k or self.frame.matrix.shape[-1] == k:
            driven, shape = score, score.shape
        else:
            driven, shape = score[-k:], score.shape[1:]
        if prediction == "score":
            return driven.reshape(shape)
        return -apply(transposed(self.noise.matrix)[:, -k:, -k:], driven).reshape(shape)

    # -- what a covariance of x_0 given x_t is measured in -------------------------------------------------------------

    # Cov[z_0 | z_t] - sigma^2 is sigma S sigma with S_ij = dexcess_i/dz_j sigma_j / (sigma_i alpha_j). Directions of
    # which no signal is left have alpha = 0, and of S they say nothing: what is kept is alpha S alpha.

    def probe(self, direction: Array, shape: tuple[int, ...]) -> Array:
        """The change of a state along which the excess changes by `relative` of the posterior covariance."""
        z = jnp.where(self._has_curvature, self.sigma, 0) * direction
        n = self.frame.matrix.shape[-1]
        return self.frame.event(jnp.concatenate([z, jnp.zeros((n - len(z), *z.shape[1:]), z.dtype)]), shape)

    def relative(self, change: Array) -> Array:
        """A change of the excess in units of the reference's posterior standard deviation."""
        return jnp.where(self._has_curvature, self.alpha / self.sigma, 0) * change

    @property
    def _has_curvature(self) -> Array:
        """Where the Jacobian of a score still says something of the clean data: as for the score, but quadratically."""
        return self.alpha**2 > jnp.finfo(self.alpha.dtype).eps

    def mean_spread(self, trace: Array, dimension: int) -> Array:
        """One number for all directions, each counted by the signal that it has, from a trace in the units above."""
        return trace / (dimension * jnp.mean(self.alpha**2))

    def spectrum(self, spread: Array) -> tuple[Array, None]:
        """A dense spread as it is kept: the matrix itself, for a step turns it anyway."""
        return spread, None

    def clipped(self, diagonal: Array) -> Array:
        """A diagonal spread, where a covariance can be."""
        return jnp.maximum(diagonal, -(self.alpha**2))

    def in_posterior_std(self, error: Array) -> Array:
        """An error of the denoiser in units of the standard deviation of the reference's posterior; as `mean_spread`
        counts directions.
        """
        return (self.alpha / self.sigma) * self.data.coordinates(error) / jnp.sqrt(jnp.mean(self.alpha**2))

    @property
    def largest_spread(self) -> Array:
        """That of data of which nothing else is known, over the reference's, less 1."""
        return 1 / jnp.mean(self.alpha**2) - 1

    @property
    def state_scale(self) -> Array:
        """The reference's root mean square of an entry of x_t."""
        return jnp.sqrt(jnp.mean(jnp.sum(self.frame.matrix**2, axis=-1)))

    @property
    def posterior_scale(self) -> Array:
        """The root mean square error of the reference's denoiser on its own data, of an entry."""
        errors = self.data.matrix * self.sigma[..., 0].T[:, None, :]
        return jnp.sqrt(jnp.mean(jnp.sum(errors**2, axis=-1)))


class LinearTransition(NamedTuple):
    """Everything that is known about the step between ``s`` (less noise) and ``t`` (more noise).

    In the coordinates of ``before`` (of x_s) and ``after`` (of x_t) the reference's step is z_t = kappa z_s + sqrt(u)
    eps, and its reversal z_s = kappa z_t + sqrt(u) eps.
    """

    s: LinearLevel
    t: LinearLevel
    gain: Coefficients  # from an excess at t to the mean of x_s in the coordinates of ``before``
    before: Frame  # its drift is V_s E^T V_t^{-1} - I
    after: Frame  # its drift is E - I
    kappa: Coefficients  # (n, b, 1)
    u: Coefficients  # 1 - kappa^2
    share: Coefficients  # eigenvalues (n, b, 1) and ...
    share_basis: (
        Coefficients  # ... vectors (b, n, n) of that part of the reverse covariance that knowing x_0 would take away
    )
    share_root: Coefficients  # (b, n, k): a root of it, acting on the data's coordinates over alpha

    subspace: Subspace = FullSpace()

    def forward(self, x_s: Array) -> Gaussian:
        """F(x_t | x_s)."""
        return Gaussian(x_s, jnp.zeros((), x_s.dtype), self.u, frame=self.after)

    def reference_reverse(self, x_t: Array) -> Gaussian:
        """The reference's reverse kernel K_ref(x_s | x_t), exact."""
        return Gaussian(x_t, jnp.zeros((), x_t.dtype), self.u, frame=self.before)

    def reverse(self, x_t: Array, excess: Array, spread: Any = None, basis: Any = None) -> Gaussian:
        """K(x_s | x_t) for a denoiser with this excess, and a posterior covariance with this relative excess.

        ``spread`` is C^{-1/2} (Cov[x_0 | x_t] - C) C^{-1/2}, C the reference's: None (zero), a number, or, times alpha
        from both sides (see `LinearLevel`), a diagonal or a matrix in the coordinates of clean data.
        """
        shift = apply(self.gain, excess)
        if spread is None:
            return Gaussian(x_t, shift, self.u, frame=self.before)
        spread = jnp.asarray(spread)
        view = self.before.view(x_t).shape
        if spread.ndim == 0:
            relative = jnp.broadcast_to(spread * self.share, view)
            return Gaussian(x_t, shift, self.u, relative, self.share_basis, frame=self.before)
        roots = self._share_of_flat_data(excess)
        matrix = spread if spread.ndim == 2 else jnp.diag(jnp.broadcast_to(spread, excess.shape).reshape(-1))
        values, vectors = jnp.linalg.eigh(roots @ matrix @ roots.T)
        # Knowing x_0 takes away no more than its share; a learned denoiser may say otherwise.
        return Gaussian(x_t, shift, self.u, jnp.maximum(values, -jnp.max(self.share)), vectors, frame=self.before)

    def tempered_reverse(self, x_t: Array, exponent: Array) -> Gaussian:
        """The step down of the reference's tempered path, ref^exponent (mathematics.md, section 4)."""
        rho, slope = tempered_slopes(exponent, self.u, self.kappa)
        return Gaussian(x_t, slope * self.after.coordinates(x_t), rho * self.u, frame=self.before)

    def tempered_forward(self, x_s: Array, exponent: Array) -> Gaussian:
        """The step up of the reference's tempered path; both are each other's reversal."""
        rho, slope = tempered_slopes(exponent, self.u, self.kappa)
        return Gaussian(x_s, slope * self.before.coordinates(x_s), rho * self.u, frame=self.after)

    def _share_of_flat_data(self, excess: Array) -> Array:
        """``share_root`` as a matrix between flattened coordinates."""
        units = jnp.eye(excess.size, dtype=excess.dtype).reshape(-1, *excess.shape)
        return jax.vmap(lambda unit: apply(self.share_root, unit).reshape(-1), out_axes=1)(units)
