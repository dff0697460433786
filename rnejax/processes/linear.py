r"""Linear SDEs as noising processes: dx = -A x beta dt + G sqrt(beta) dW with any constant A and G.

Between s < t everything is Gaussian, F(x_t | x_s) = N(E x_s, V), and known exactly (`matrix_kernels.py`;
mathematics.md, sections 1 and 2). As for scalar processes there is an analytic *reference*, the same noise applied to
Gaussian data of covariance C_0, and what a model says is kept as its excess over the reference's denoiser. What makes
matrices as simple as numbers is to use, at each time, the coordinates in which the reference's clean data and its
noised state are correlated in pairs (canonical correlations): with x_0 = W z_0 and x_t = T z_t, each of unit variance,

    z_t = alpha z_0 + sigma eps,    alpha^2 + sigma^2 = 1,    coordinate by coordinate,

so there the formulas of scalar processes hold as they are, with an alpha and a sigma for every coordinate. The same
construction between two times makes the reference's step z_t = kappa z_s + sqrt(u) eps, in frames of its own: the
reverse kernel's covariance is diagonal in the one, that of the forward kernel in the other, and powers of the reference
are stepped through exactly.

Data may be fewer numbers than the state: a position that is noised through its velocity. The other coordinates start
from a Gaussian law of their own that is independent of the data, and is summed out (hybrid score matching, Dockhorn et
al. 2022).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import scipy.linalg

from ..checks import check_number, is_traced
from ..kernels import Array, FullSpace, Gaussian, Subspace
from ..linear import Frame, apply, num_entries, transposed
from .gaussian import tempered_slopes
from .matrix_kernels import Correlation, Matrix, correlate, root, symmetric, transition_kernel
from .process import Moments, Process

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


class CoarseGridWarning(UserWarning):
    """A grid whose steps are long against the rotation of a drift."""


class LinearProcess(Process):
    """Base of linear SDEs. Subclasses are frozen dataclasses with a `system`."""

    domain: Any = (0.0, np.inf)
    predictions: ClassVar[tuple[str, ...]] = ("score", "x0", "epsilon", "energy")
    need_signal: ClassVar[tuple[str, ...]] = ("score", "epsilon", "energy")
    grids: ClassVar[tuple[str, ...]] = ("uniform", "quadratic", "log_time")
    default_grid = "quadratic"
    default_proposal: ClassVar[str] = "symmetric"
    is_discrete: ClassVar[bool] = False
    keeps_reference: ClassVar[bool] = False
    subspace: Subspace = FullSpace()
    t_max: Any
    beta: Any = 1.0

    @property
    def system(self) -> System:
        raise NotImplementedError

    # -- exact flows --------------------------------------------------------------------------------------------------

    def elapsed(self, t: Any) -> np.ndarray:
        """int_0^t beta: the time of the process without its time change."""
        t = np.asarray(t, np.float64)
        if callable(self.beta):
            integral = partial(scipy.integrate.quad, self.beta, 0.0, epsabs=1e-13, epsrel=1e-12)
            each = [integral(float(u))[0] for u in t.reshape(-1)]
            return np.asarray(each).reshape(t.shape)
        low, high = self.beta if isinstance(self.beta, tuple) else (self.beta, self.beta)
        return low * t + 0.5 * (high - low) * t**2

    def flow(self, duration: float) -> tuple[Matrix, Matrix]:
        """E and V of a step of this length in elapsed time, in blocks, float64."""
        return transition_kernel(self.system.drift, self.system.noise_rate, duration)

    @cached_property
    def stationary_covariance(self) -> Matrix | None:
        """Of the law that the process keeps, in blocks; None where there is none."""
        return stationary_covariance(self.system.drift, self.system.noise_rate)

    def moments(self, t: float) -> Moments:
        """Of the noised state at time t, in blocks, float64 on the host."""
        system, elapsed = self.system, float(self.elapsed(t))
        k = system.data.shape[-1]
        decay, noise = self.flow(elapsed) if elapsed > 0 else (np.eye(system.drift.shape[-1])[None], np.zeros(1))
        decay = np.broadcast_to(decay, system.drift.shape)
        noise = symmetric(noise + decay[..., k:] @ system.auxiliary @ np.swapaxes(decay[..., k:], -1, -2))
        signal = decay[..., :k]
        if not self.is_hybrid and self._keeps_its_reference:
            return Moments(signal, noise, system.data)
        return Moments(signal, noise, symmetric(signal @ system.data @ np.swapaxes(signal, -1, -2)) + noise)

    @cached_property
    def _keeps_its_reference(self) -> bool:
        """Whether the reference is the stationary law."""
        law, data = self.stationary_covariance, self.system.data
        return law is not None and law.shape == data.shape and bool(np.abs(law - data).max() <= 1e-12 * law.max())

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """Of the drift A, ordered by real parts, complex; per unit of elapsed time, int beta dt."""
        values = np.linalg.eigvals(self.system.drift).reshape(-1)
        return values[np.argsort(values.real)]

    def steps_needed(self, t_min: float | None = None, t_max: float | None = None, angle: float = 1.0) -> int:
        """Steps, even in elapsed time, in none of which the fastest rotation turns by more than ``angle`` radians."""
        start, end = (self.elapsed(t) for t in (t_min or self.t_min, t_max or self.t_max))
        return max(1, math.ceil(float(np.abs(self.eigenvalues.imag).max() * (end - start)) / angle))

    def warn_of_grid(self, times: np.ndarray, angle: float = 1.0) -> None:
        """Warn (`CoarseGridWarning`) where the fastest rotation turns by more than ``angle`` radians in a step.

        Kernels are exact whatever the step; what a network says of x_t is taken for the whole of it.
        """
        turns = float(np.abs(self.eigenvalues.imag).max()) * np.diff(self.elapsed(times))
        if turns.max() > angle:
            worst = int(turns.argmax())
            warnings.warn(
                f"the drift turns states by {turns[worst]:.3g} radians between t = {times[worst]:.6g} and "
                f"{times[worst + 1]:.6g}, which is much for one step of a model that looks at its start only: "
                f"{self.steps_needed(times[0], times[-1], angle)} steps that are even in elapsed time (kind='uniform' "
                f"for a constant beta) would do, this grid has {len(times) - 1}",
                CoarseGridWarning,
                stacklevel=4,
            )

    # -- levels and transitions ---------------------------------------------------------------------------------------

    num_levels: ClassVar[int] = 512

    @cached_property
    def _table(self) -> tuple[np.ndarray, LinearLevel]:
        """The times, and the levels, that there are under jit: ``num_levels`` of them, even in the root of time."""
        times = np.linspace(np.sqrt(self.t_min), np.sqrt(self.t_max), self.num_levels) ** 2
        times[0], times[-1] = self.t_min, self.t_max
        return times, self._level(times)

    def snap_traced(self, t: Array) -> LinearLevel:
        """The levels of the table that are nearest to times that are known only under jit, (n,)."""
        times, table = self._table
        root = jnp.sqrt(t)
        low, high = (float(np.sqrt(end)) for end in (times[0], times[-1]))
        index = jnp.clip(jnp.round((root - low) / (high - low) * (len(times) - 1)), 0, len(times) - 1).astype(int)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype)[index], table)

    def training_levels(self, t: Any) -> LinearLevel:
        return self.snap_traced(t) if is_traced(t) else self.level(t)

    def log_snr(self, t: Any) -> Any:
        times, table = self._table
        return np.interp(np.sqrt(t), np.sqrt(times), table.log_snr)

    def _level(self, t: Any) -> LinearLevel:
        if is_traced(t):
            raise ValueError(
                f"the coefficients of {type(self).__name__} are matrices that are computed on the host: its times must "
                "be known when the program is traced. Let the network take the level itself (noise_level='level'), or "
                "compute the level outside jax.jit"
            )
        t = np.asarray(t, np.float64)
        return _stacked([self._level_at(float(u), self.moments(float(u))) for u in t.reshape(-1)], t.shape)

    def _level_at(self, t: float, moments: Moments) -> LinearLevel:
        has_noise = self.elapsed(t) > 0
        noise_root = root_of_noise(moments.noise, 0.0, t) if has_noise else root(moments.noise)
        found = correlate(root(self.system.data), moments.signal, noise_root, root(moments.total))
        k = found.kappa.shape[-1]
        u = found.u[..., :k]
        with np.errstate(divide="ignore"):
            snr = 2 * np.log(found.kappa) - np.log(u)
        log_variance = np.linalg.slogdet(self.system.data)[1].mean() / k
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

    def _transition(self, s: Any, t: Any) -> LinearTransition:
        if is_traced(s, t):
            self._level(s if is_traced(s) else t)
        s, t = np.broadcast_arrays(np.asarray(s, np.float64), np.asarray(t, np.float64))
        # The last grid is kept: runs that follow one another mostly share it, and it may have taken half a minute.
        wanted = s.shape, s.tobytes(), t.tobytes(), self.dtype
        if wanted not in self._grids:
            found = self._transitions_of(s, t)
            if s.size < 2:
                return found
            self._grids.clear()
            self._grids[wanted] = jax.tree.map(lambda leaf: np.asarray(leaf, self.dtype), found)
        return self._grids[wanted]

    @cached_property
    def _grids(self) -> dict[Any, LinearTransition]:
        return {}

    def _transitions_of(self, s: np.ndarray, t: np.ndarray) -> LinearTransition:
        pairs = [(float(a), float(b)) for a, b in zip(s.reshape(-1), t.reshape(-1), strict=True)]
        moments = {u: self.moments(u) for u in {time for pair in pairs for time in pair}}
        levels = {u: self._level_at(u, each) for u, each in moments.items()}
        steps = Steps(self)
        return _stacked([self._transition_between(a, b, moments, levels, steps) for a, b in pairs], s.shape)

    def _transition_between(
        self, s: float, t: float, moments: dict[float, Moments], levels: dict[float, LinearLevel], steps: Steps
    ) -> LinearTransition:
        at_s, at_t = levels[s], levels[t]
        decay, noise, found = steps.between(s, t, moments[s].total, moments[t].total)
        identity = np.eye(decay.shape[-1])
        reference_shift = np.swapaxes(np.linalg.solve(moments[t].total, decay @ moments[s].total), -1, -2) - identity
        alpha, sigma = (np.moveaxis(each[..., 0], 0, -1)[..., None, :] for each in (at_t.alpha, at_t.sigma))
        pull = self._pull(decay, noise, moments[s], moments[t], at_t, alpha)
        share_root = found.source_inverse @ (pull * sigma) / np.sqrt(found.u)[..., :, None]
        weighted = share_root * alpha
        values, vectors = np.linalg.eigh(weighted @ np.swapaxes(weighted, -1, -2))
        return LinearTransition(
            s=at_s._replace(noise=None, signal=None, noise_score=None, data=None),
            t=at_t._replace(noise=None, signal=None),
            gain=found.source_inverse @ (pull * alpha),
            before=_frame(found.source, found.source_inverse)._replace(drift=reference_shift),
            after=_frame(found.target, found.target_inverse)._replace(drift=decay - identity),
            kappa=_coordinates(found.kappa),
            u=_coordinates(found.u),
            share=_coordinates(values),
            share_basis=vectors,
            share_root=share_root,
        )

    def _pull(
        self, decay: Matrix, noise: Matrix, at_s: Moments, at_t: Moments, level: LinearLevel, alpha: Matrix
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

    # -- kernels ------------------------------------------------------------------------------------------------------

    def marginal(self, x0: Array, t: Any) -> Gaussian:
        """The law of x_t given x_0."""
        level = self.level(t)
        n, k = level.signal.shape[-2:]
        mean = apply(level.signal, x0).reshape(x0.shape if n == k else (n, *jnp.shape(x0)))
        return Gaussian(mean, jnp.zeros((), mean.dtype), jnp.ones((), mean.dtype), frame=level.noise)

    def reference(self, t: Any, shape: tuple[int, ...] | None = None) -> Gaussian:
        """The reference's marginal at time t, on states of this shape; default: as many numbers as the drift has."""
        return self.reference_at(self.level(t), self.check_shape(shape))

    def reference_at(self, level: LinearLevel, shape: tuple[int, ...]) -> Gaussian:
        """The reference's marginal at a noise level."""
        zeros = jnp.zeros(shape, jnp.result_type(float))
        return Gaussian(zeros, jnp.zeros((), zeros.dtype), jnp.ones((), zeros.dtype), frame=level.frame)

    # -- times --------------------------------------------------------------------------------------------------------

    def alpha(self, t: Any) -> Any:
        """|det E|^{1/n}: what is left of the signal at time t, as a geometric mean over directions."""
        rate = np.trace(self.system.drift, axis1=-2, axis2=-1).mean() / self.system.drift.shape[-1]
        return np.exp(-rate * self.elapsed(t))

    def coordinate(self, kind: str, t: np.ndarray, rho: float) -> np.ndarray:
        """t, sqrt(t), or log(t)."""
        if kind == "log_time":
            if not np.min(t) > 0:
                raise ValueError("a log_time grid needs t_min > 0")
            return np.log(t)
        return t if kind == "uniform" else np.sqrt(t)

    def signal_fraction(self, t: Any) -> Any:
        """The largest share, over directions, of the reference's variance at time t that is signal."""
        return self._squared_correlations(t).max(axis=(-1, -2))

    def reward_strengths(self, times: np.ndarray, at: str) -> np.ndarray:
        squares = self._squared_correlations(times)
        return squares.mean(axis=(-1, -2))

    def _squared_correlations(self, t: Any) -> np.ndarray:
        t = np.asarray(t, np.float64)
        found = []
        for u in t.reshape(-1):
            signal, _, total = self.moments(float(u))
            found.append(np.linalg.svd(np.linalg.solve(root(total), signal @ root(self.system.data)), compute_uv=False))
        squares = np.minimum(np.asarray(found) ** 2, 1.0)
        return squares.reshape(*t.shape, *squares.shape[1:])

    # -- states -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> Any:
        return jnp.result_type(float)

    def check_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        b, n, _ = self.system.drift.shape
        shape = ((b * n,) if b * n > 1 else ()) if shape is None else shape
        k = self.system.data.shape[-1]
        if b * n > 1 and not (num_entries(shape) == b * n or (shape and shape[0] == b * n)):
            raise ValueError(
                f"{type(self).__name__} acts on {b * n} coordinates: a state must have so many entries, or a first "
                f"axis of this length, got shape {shape}"
            )
        if k < n and (not shape or shape[0] != n):
            raise ValueError(
                f"a state of {type(self).__name__} has a first axis of length {n}, one row for the data and others for "
                f"what noise goes through: got shape {shape}"
            )
        return shape

    def relaxed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def prediction_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if self.is_hybrid else shape

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.system.drift.shape[-1], *shape) if self.is_hybrid else shape

    def data_of(self, x: Array) -> Array:
        return x[0] if self.is_hybrid else x

    @property
    def is_hybrid(self) -> bool:
        """Whether states have coordinates that are no data."""
        return bool(self.system.data.shape[-1] < self.system.drift.shape[-1])

    def _set_range(self) -> None:
        """Fill in t_max: where no direction keeps more than a thousandth of its variance."""
        check_number("t_min", self.t_min)
        _check_beta(self.beta)
        if self.t_max is None:
            object.__setattr__(self, "t_max", self._forgetting_time())
        self._check_range()

    def _forgetting_time(self, fraction: float = 1e-3, longest: float = 1e6) -> float:
        slowest = float(np.linalg.eigvals(self.system.drift).real.min())
        if slowest < 0:
            raise ValueError(
                f"{type(self).__name__} does not forget its data: the drift's eigenvalue of the smallest real part, "
                f"{slowest:.3g}, makes a direction grow; say where noise ends, t_max=..."
            )
        high = max(2 * self.t_min, 1e-3)
        while self.signal_fraction(high) > fraction:
            high *= 2
            if high > longest:
                raise ValueError(
                    f"{type(self).__name__} does not forget its data: at t = {longest:g} the largest share of signal "
                    f"is {float(self.signal_fraction(longest)):.3g}; say where noise ends, t_max=..."
                )
        low = high / 2
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.signal_fraction(middle) > fraction else (low, middle)
        return float(f"{high:.4g}")

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        assert isinstance(other, LinearProcess)
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)


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
                object.__setattr__(self, name, _frozen(name, value))
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
            data = _positive("data_covariance", blocks["data_covariance"])
        else:
            law = stationary_covariance(drift, noise_rate)
            if law is None:
                slowest = np.linalg.eigvals(drift).real.min()
                raise ValueError(
                    "data_covariance='stationary' needs a process that keeps a law: every eigenvalue of the drift must "
                    f"have a positive real part, the smallest is {slowest:.3g}, and noise must reach every direction"
                )
            data = law
        return System(drift, noise_rate, data, np.zeros((len(drift), 0, 0)))

    def __repr__(self) -> str:
        b, n, _ = self.system.drift.shape
        kind = "scalar" if b * n == 1 else "diagonal" if n == 1 else "matrix"
        return f"LinearSDE({kind} of size {b * n}, t_min={self.t_min:g}, t_max={self.t_max:g})"


# ---------------------------------------------------------------------------------------------------- shared by all


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


def stationary_covariance(drift: Matrix, noise_rate: Matrix) -> Matrix | None:
    """The solution S of A S + S A^T = 2D in blocks, or None where the process does not forget all else for that law."""
    if np.linalg.eigvals(drift).real.min() <= 0:
        return None
    law = np.stack([scipy.linalg.solve_continuous_lyapunov(a, q) for a, q in zip(drift, noise_rate, strict=True)])
    law = symmetric(law)
    return law if np.linalg.eigvalsh(law).min() > 0 else None


def _positive(name: str, covariance: Matrix) -> Matrix:
    asymmetry = float(np.abs(covariance - np.swapaxes(covariance, -1, -2)).max())
    if asymmetry > 1e-10 * np.abs(covariance).max():
        raise ValueError(f"{name} must be symmetric: |C - C^T| is {asymmetry:.3g}")
    smallest = float(np.linalg.eigvalsh(covariance).min())
    if not smallest > 0:
        raise ValueError(f"{name} must be positive definite: its smallest eigenvalue is {smallest:.3g}")
    return symmetric(covariance)


def _frozen(name: str, value: Any) -> np.ndarray:
    """Numbers as a read-only array of float64."""
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {value!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, but {int((~np.isfinite(array)).sum())} of its entries are not")
    array.setflags(write=False)
    return array


def _check_beta(beta: Any) -> None:
    if callable(beta):
        return
    numbers = beta if isinstance(beta, tuple) else (beta,)
    if len(numbers) > 2 or not all(np.isfinite(b) and b >= 0 for b in numbers) or not max(numbers) > 0:
        raise ValueError(
            f"beta must be a positive number, a pair (beta_min, beta_max) or a function of time, got {beta!r}"
        )


def _frame(matrix: Matrix, inverse: Matrix | None = None) -> Frame:
    with np.errstate(divide="ignore"):
        log_det = np.linalg.slogdet(matrix)[1].sum()
    return Frame(matrix, np.linalg.inv(matrix) if inverse is None else inverse, log_det)


def _coordinates(values: Matrix) -> Matrix:
    """Numbers of blocks (b, k) in the shape of coordinates, (k, b, 1)."""
    return values.T[..., None]


def _stacked(trees: list[Any], shape: tuple[int, ...]) -> Any:
    def stack(*leaves: Any) -> Any:
        return leaves[0] if shape == () else np.stack(leaves).reshape(*shape, *np.shape(leaves[0]))

    return jax.tree.map(stack, *trees)
