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
from dataclasses import fields
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

from ..checks import check_number, is_traced
from ..kernels import Array, FullSpace, Gaussian, Subspace
from ..linear import apply, num_entries
from .linear_grids import Kept, Steps, level_at, stacked, transition_between
from .linear_steps import LinearLevel, LinearTransition
from .linear_system import System, check_beta, stationary_covariance
from .matrix_kernels import Matrix, root, symmetric, transition_kernel
from .process import Moments, Process


class CoarseGridWarning(UserWarning):
    """A grid whose steps are long against the rotation of a drift."""


class PrecisionWarning(UserWarning):
    """A grid with steps so short that states, in the precision at hand, do not resolve their noise."""


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
            each = np.asarray([integral(float(u))[0] for u in t.reshape(-1)])
            if not np.all(each[t.reshape(-1) > 0] > 0) or np.any(np.diff(each[np.argsort(t, axis=None)]) < 0):
                raise ValueError(f"beta must be a positive function of time: its integral goes through {each}")
            return each.reshape(t.shape)
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
        start = self.elapsed(self.t_min if t_min is None else t_min)
        end = self.elapsed(self.t_max if t_max is None else t_max)
        return max(1, math.ceil(float(np.abs(self.eigenvalues.imag).max() * (end - start)) / angle))

    def warn_of_grid(self, times: np.ndarray, angle: float = 1.0) -> None:
        """Warn of a grid that is too coarse (`CoarseGridWarning`) or too fine (`PrecisionWarning`).

        Kernels are exact whatever the step; what a network says of x_t is taken for the whole of it, so that the
        fastest rotation should not turn by more than ``angle`` radians. And states are rounded: where a step's noise in
        some direction is no larger, what residuals are left there are rounding errors, in nats.
        """
        self._warn_of_rounding(times)
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

    def _warn_of_rounding(self, times: np.ndarray, share: float = 0.03) -> None:
        noise = np.asarray(self.steps(times[:-1], times[1:], backwards=True).u, np.float64)[::-1]
        smallest = np.sqrt(noise.reshape(len(noise), -1).min(axis=1))
        rounding = float(jnp.finfo(self.dtype).eps)
        if rounding > share * smallest.min():
            worst = int(smallest.argmin())
            warnings.warn(
                f"between t = {times[worst]:.6g} and {times[worst + 1]:.6g} noise moves some direction of a state by "
                f"{smallest[worst]:.2g} of its size, and {jnp.dtype(self.dtype).name} rounds states to "
                f"{rounding:.2g}: densities can be off by nats. Let the grid end at a larger t_min, take fewer steps "
                "near it (kind='quadratic'), or compute in double precision (jax.enable_x64)",
                PrecisionWarning,
                stacklevel=5,
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
        return self._nearest(self._table[1], t)

    def _nearest(self, table: Any, t: Array) -> Any:
        """Of what there is one of for every time of the table, those for the nearest to t (n,)."""
        low, high = np.sqrt(self._table[0][[0, -1]])
        index = jnp.round((jnp.sqrt(t) - low) / (high - low) * (self.num_levels - 1))
        index = jnp.clip(index, 0, self.num_levels - 1).astype(int)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype)[index], table)

    def training_levels(self, t: Any) -> LinearLevel:
        return self.snap_traced(t) if is_traced(t) else self.level(t)

    def training_steps(self, t: Any, uniforms: Array, ratio: tuple[float, float]) -> LinearTransition:
        """Steps down from the times of the table that are nearest to t: one for each, of a ratio of its own."""
        if ratio not in self._training_steps:
            times, (low, high) = self._table[0], ratio
            if not times[0] > 0:
                raise ValueError(f"steps of a ratio t / s lead from t > 0: t_min must be positive, got {self.t_min:g}")
            # Multiples of the golden ratio fill the unit interval evenly, and so do those of any run of neighbours.
            spread = 0.01 + 0.99 * np.mod(np.arange(len(times)) * (np.sqrt(5) - 1) / 2, 1)
            starts = np.maximum(times / (low + (high - low) * spread), 0.999 * times[0])
            self._training_steps.clear()
            self._training_steps[ratio] = self._transitions_of(starts, times)
        return self._nearest(self._training_steps[ratio], t)

    @cached_property
    def _training_steps(self) -> dict[tuple[float, float], LinearTransition]:
        return {}

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

        def make() -> LinearLevel:
            found = stacked([self._level_at(float(u), self.moments(float(u))) for u in t.reshape(-1)], t.shape)
            return found if t.size < 2 else jax.tree.map(lambda leaf: np.asarray(leaf, self.dtype), found)

        kept = self._levels if t.size < 2 else self._grid_of_levels
        return kept.get((t.shape, t.tobytes(), self.dtype), make)

    @cached_property
    def _levels(self) -> Kept[LinearLevel]:
        return Kept(8)  # the ends of grids

    @cached_property
    def _grid_of_levels(self) -> Kept[LinearLevel]:
        return Kept(1)

    def _level_at(self, t: float, moments: Moments) -> LinearLevel:
        return level_at(t, moments, self.system.data, bool(self.elapsed(t) > 0))

    def _transition(self, s: Any, t: Any) -> LinearTransition:
        if is_traced(s, t):
            self._level(s if is_traced(s) else t)
        return self._transitions_of(*np.broadcast_arrays(np.asarray(s, np.float64), np.asarray(t, np.float64)))

    def steps(self, s: Any, t: Any, backwards: bool) -> LinearTransition:
        """As of every process. The last two results are kept, on the device.

        Runs that follow one another mostly share their grid, and one may take half a minute and a gigabyte.
        """
        if is_traced(s, t):
            return super().steps(s, t, backwards)  # says why there are none
        grid = np.asarray(s, np.float64).tobytes(), np.asarray(t, np.float64).tobytes(), self.dtype

        def make() -> LinearTransition:
            with jax.ensure_compile_time_eval():  # a tracer must not be kept
                other = self._steps.peek((*grid, not backwards))
                if other is not None:
                    return jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), other)
                return super(LinearProcess, self).steps(s, t, backwards)

        return self._steps.get((*grid, backwards), make)

    @cached_property
    def _steps(self) -> Kept[LinearTransition]:
        return Kept(2)

    def _transitions_of(self, s: np.ndarray, t: np.ndarray) -> LinearTransition:
        pairs = [(float(a), float(b)) for a, b in zip(s.reshape(-1), t.reshape(-1), strict=True)]
        moments = {u: self.moments(u) for u in {time for pair in pairs for time in pair}}
        levels = {u: self._level_at(u, each) for u, each in moments.items()}
        steps = Steps(self)
        made = [
            transition_between(
                (levels[a], levels[b]),
                (moments[a], moments[b]),
                steps.between(a, b, moments[a].total, moments[b].total),
            )
            for a, b in pairs
        ]
        return stacked(made, s.shape)

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
                raise ValueError(f"a log_time grid is one of times above 0, got t_min = {float(np.min(t)):g}")
            return np.log(t)
        return t if kind == "uniform" else np.sqrt(t)

    def signal_fraction(self, t: Any) -> Any:
        """The largest share, over directions, of the reference's variance at time t that is signal."""
        t = np.asarray(t, np.float64)
        return self._fractions.get(t.tobytes(), lambda: self._squared_correlations(t).max(axis=(-1, -2)))

    @cached_property
    def _fractions(self) -> Kept[np.ndarray]:
        return Kept(8)

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
        check_beta(self.beta)
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
