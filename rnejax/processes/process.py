"""What every noising process provides, whatever its states are: numbers that diffuse or tokens that are lost.

The rest of the library speaks to a process through this interface only. What a model says of a state is kept as its
**excess** over an analytic reference marginal of the same process, and all kernels of a step share an anchor, so that
a model and the reference differ by small terms that are never obtained by subtracting large ones:

=========== =================================================== =================================================
            Gaussian processes                                  token processes
=========== =================================================== =================================================
reference   the process started from N(0, data_std^2)           the process started from uniform tokens
excess      D(x_t, t) - D_ref(x_t, t), D = E[x_0 given x_t]     log mu(x_t, t) - log(1/V), mu = p(x_0 given x_t)
kernels     `Gaussian`                   `Categorical`
=========== =================================================== =================================================
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number
from ..kernels import Array, FullSpace, Kernel, Subspace


def namespace(*times: Any) -> Any:
    """jax.numpy for jax arrays (traced or not), else numpy in float64 on the host."""
    return jnp if any(isinstance(t, jax.Array) for t in times) else np


def host(t: Any) -> Any:
    """A known time as float64 on the host; a traced one as it is."""
    return t if isinstance(t, jax.core.Tracer) else np.asarray(t, np.float64)


def working_precision(value: Any) -> Any:
    """What was computed on the host, as an array of JAX's default floating type."""
    return value if isinstance(value, jax.core.Tracer) else jnp.asarray(value, jnp.result_type(float))


class Level(Protocol):
    """The coefficients of a process at one time (or at several, stacked): a NamedTuple of arrays."""

    @property
    def t(self) -> Array: ...

    def excess(self, output: Array, x: Array, prediction: str) -> Array:
        """What the network said of a batch of states, as its excess over the reference."""
        ...

    def is_valid(self, excess: Array) -> Array:
        """Whether an excess is what a network may say: finite numbers, or log-probabilities; of each state (n,)."""
        ...

    def denoised(self, x: Array, excess: Array) -> Array:
        """What is known of the clean state: E[x_0 | x_t], or the probability of every token."""
        ...


class Transition(Protocol):
    """Everything that is known about the step between ``s`` (less noise) and ``t`` (more noise)."""

    @property
    def s(self) -> Any: ...

    @property
    def t(self) -> Any: ...

    def forward(self, x_s: Array) -> Kernel:
        """The noising kernel F(x_t | x_s)."""
        ...

    def reference_reverse(self, x_t: Array) -> Kernel:
        """The reference's reverse kernel K_ref(x_s | x_t), exact."""
        ...

    def reverse(self, x_t: Array, excess: Array, spread: Array | float = 0.0, basis: Array | None = None) -> Kernel:
        """The model's reverse kernel K(x_s | x_t)."""
        ...


class Moments(NamedTuple):
    """Of a level, in blocks: the map x_0 -> E[x_t | x_0], the covariance of x_t given x_0, that of the reference."""

    signal: np.ndarray
    noise: np.ndarray
    total: np.ndarray


class Process:
    """Base class of all noising processes.

    Attributes:
      t_min, t_max: default time range, also what ``time_grid`` spans.
      domain: where times may lie.
      subspace: where the states live.
    """

    t_min: float
    t_max: float
    subspace: Subspace = FullSpace()

    domain: Any = (0.0, 1.0)
    time_names = ("t_min", "t_max")  # as the constructor calls them
    predictions: ClassVar[tuple[str, ...]]
    need_signal: ClassVar[tuple[str, ...]]  # predictions that say nothing of x_0 where alpha = 0
    grids: ClassVar[tuple[str, ...]]
    grid_hints: ClassVar[dict[str, str]] = {}  # what to say to who asks for a grid that there is not
    default_grid: str
    default_proposal: ClassVar[str]
    is_discrete: ClassVar[bool]
    failure: ClassVar[str] = "NaN or infinity"  # what a network returns that is none of the process's
    hint_of_output = ""  # appended to the message about a network's output of the wrong shape
    # Whether targets' paths keep the reference, q_t ~ ref_t^{1 - bar} prod p_i^{beta_i}, or temper it as well
    keeps_reference: ClassVar[bool]

    # -- kernels ------------------------------------------------------------------------------------------------------

    def level(self, t: Any) -> Any:
        """The coefficients at time t (or at many times, stacked)."""
        return jax.tree.map(working_precision, self._level(host(t)))

    def training_levels(self, t: Any) -> Any:
        """Levels for training at random times (n,): at these, or at the nearest ones that there are under jit."""
        return self.level(t)

    def training_steps(self, t: Any, uniforms: Array, ratio: tuple[float, float]) -> Any:
        """Steps for training that begin at random times t (n,), with t / s uniform in ``ratio``, stacked.

        They end at t_min at the lowest, or just below it, so that none has length zero. Under jit t may have to be
        times of `training_levels`, and the steps those that there are from them.
        """
        low, high = ratio
        return self.transition(jnp.maximum(t / (low + (high - low) * uniforms), 0.999 * self.t_min), t)

    def transition(self, s: Any, t: Any) -> Any:
        """The step between s < t (or many steps, stacked).

        Raises:
          ValueError: where s >= t. Times that are traced are not checked.
        """
        s, t = host(s), host(t)
        if not isinstance(s, jax.core.Tracer) and not isinstance(t, jax.core.Tracer) and not np.all(s < t):
            s, t = (each[~(s < t)][0] for each in np.broadcast_arrays(s, t))
            raise ValueError(f"a step leads from t to s < t, but s = {s:.6g} and t = {t:.6g}: are they swapped?")
        return jax.tree.map(working_precision, self._transition(s, t))

    def steps(self, s: Any, t: Any, backwards: bool) -> Any:
        """Many transitions as what a loop is given, stacked: in the order of s and t, or from the last to the first."""
        steps = self.transition(s, t)
        return jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), steps) if backwards else steps

    def forward(self, x_s: Array, s: Any, t: Any) -> Any:
        """The noising kernel F(x_t | x_s)."""
        return self.transition(s, t).forward(x_s)

    def reference_reverse(self, x_t: Array, t: Any, s: Any) -> Any:
        """The reference's reverse kernel, exact for s < t."""
        return self.transition(s, t).reference_reverse(x_t)

    def reference_at(self, level: Any, shape: tuple[int, ...]) -> Any:
        """The reference's marginal at a level, on states of this shape."""
        raise NotImplementedError

    def _level(self, t: Any) -> Any:
        raise NotImplementedError

    def _transition(self, s: Any, t: Any) -> Any:
        raise NotImplementedError

    def moments(self, t: float) -> Moments:
        """Of the noised state at time t, of numbers that diffuse; in float64 on the host.

        Raises:
          ValueError: for a process of tokens.
        """
        raise ValueError(f"states of {type(self).__name__} are tokens, which have no mean and no covariance")

    # -- times --------------------------------------------------------------------------------------------------------

    def alpha(self, t: Any) -> Any:
        """What is left of the signal at time t: decreasing from 1."""
        raise NotImplementedError

    def coordinate(self, kind: str, t: np.ndarray, rho: float) -> np.ndarray:
        """The increasing function of time in which the grid ``kind`` is uniform."""
        raise NotImplementedError

    def warn_of_grid(self, times: np.ndarray) -> None:
        """Warn where a grid is too coarse for the process itself; here, none is."""

    def snap(self, times: np.ndarray) -> np.ndarray:
        """The nearest grid of times at which the process is known; here, all times are."""
        return times

    def signal_fraction(self, t: Any) -> Any:
        """How much of a state at time t is signal, between 0 and 1, if the data are the reference."""
        raise NotImplementedError

    def reward_strengths(self, times: np.ndarray, at: str) -> np.ndarray:
        """The default strengths of a reward, up to a factor; 'at' is where it is evaluated, ``x`` or ``x0``."""
        raise NotImplementedError

    # -- states -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> Any:
        """Of states."""
        raise NotImplementedError

    def relaxed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is known of a clean state of this shape: numbers as they are, tokens as rows of probabilities."""
        raise NotImplementedError

    def prediction_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what a network says of one state of this shape."""
        return self.relaxed_shape(shape)

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a state whose data have this shape."""
        return shape

    def data_of(self, x: Array) -> Array:
        """The part of a state that is data: all of it, unless noise goes through coordinates of its own."""
        return x

    def log_snr(self, t: Any) -> Any:
        """log of the signal-to-noise ratio at times on the host, of numbers that diffuse: infinite at either end."""
        raise NotImplementedError

    def check_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape of a state, if it is one; the process's own where it has one and none is given."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What the constructor has to be given to make this process again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _check_range(self) -> None:
        low, high = self.domain
        first, last = self.time_names
        for name, time in zip((first, last), (self.t_min, self.t_max), strict=True):
            check_number(name, time)
        if not (low <= self.t_min < self.t_max <= high and np.isfinite(self.t_max)):
            raise ValueError(
                f"{type(self).__name__} needs {low:g} <= {first} < {last} <= {high:g}, got {first} = {self.t_min} and "
                f"{last} = {self.t_max}"
            )


def check_process(process: Any) -> None:
    """Raises ValueError for anything but an instance of a process; the class itself is a common slip."""
    if not isinstance(process, Process):
        hint = f"an instance, {process.__name__}(), not the class" if isinstance(process, type) else "an instance"
        raise ValueError(f"process must be a noising process, such as Cosine(): {hint}; got {process!r}")
