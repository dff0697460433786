r"""Token processes: continuous-time Markov chains that lose the tokens of a sequence, one independently of another.

A state is a sequence of ``length`` integers 0, ..., vocab_size - 1. By time t each token has survived with probability
alpha_t, the *survival*, and what is lost is replaced by a special token (`Masked`) or by one drawn uniformly
(`Uniform`). `AnyOrder` is the jump chain of the first: it masks one token per step, in random order.

The reference is the same process started from uniform tokens, so that a network says nothing new where its token
probabilities mu are 1/V; what it says is kept as the excess log(V mu). With it (mathematics.md, section 5)

    Masked    log K - log K_ref = sum over the tokens revealed of log(V mu_k(x_t)),
    Uniform   log K - log K_ref = sum over all tokens, with i = x_t and j = x_s at a position, of
              log sum_k mu_k(x_t) [alpha_s d_jk + (1 - alpha_s)/V] / [alpha_t d_ik + (1 - alpha_t)/V].

All coefficients are computed in float64 on the host where times are known there.

Sources: Austin et al. 2021 (D3PM), Campbell et al. 2022; Lou et al. 2024 (SEDD, whose concrete scores are understood);
Shi et al. 2024 (MD4), Sahoo et al. 2024 (MDLM); Hoogeboom et al. 2022 for any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, is_traced
from ..kernels import Array, Categorical, FullSpace
from .process import Process, namespace
from .token_steps import (
    AnyOrderTransition,
    MaskedLevel,
    MaskedTransition,
    Scattered,
    UniformLevel,
    UniformTransition,
    Vocabulary,
)

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda t: 1 - t,
    # MaskGIT's and MD4's: slow at first
    "cosine": lambda t: 1 - namespace(t).cos(0.5 * np.pi * (1 - t)),
    # SEDD's and MDLM's name for the linear one that stops short of losing everything
    "log_linear": lambda t: 1 - (1 - 1e-3) * t,
}


@dataclass(frozen=True)
class TokenProcess(Process):
    """What the token processes share.

    Attributes:
      vocab_size: number of tokens V, without MASK.
      length: of a sequence.
      schedule: the survival alpha(t): ``linear`` (1 - t), ``cosine`` (1 - cos(pi (1 - t) / 2)), ``log_linear`` (1 -
        (1 - 1e-3) t), or a function of time, decreasing from 1 at t = 0.
      t_min, t_max: default time range.

    Raises:
      ValueError: for fewer than two tokens, no length, a schedule that is no survival, or impossible times.
    """

    vocab_size: int
    length: int
    schedule: str | Callable[[Any], Any] = "linear"
    t_min: float = 0.0
    t_max: float = 1.0

    predictions: ClassVar[tuple[str, ...]] = ("logits", "concrete_score")
    need_signal: ClassVar[tuple[str, ...]] = ()
    grids: ClassVar[tuple[str, ...]] = ("uniform", "survival", "geometric")
    default_grid = "uniform"
    default_proposal: ClassVar[str] = "locally_optimal"
    is_discrete: ClassVar[bool] = True
    keeps_reference: ClassVar[bool] = True
    has_mask: ClassVar[bool] = True
    failure: ClassVar[str] = "NaN, infinity, or a row with no finite logit, as for a condition out of its range"
    subspace = FullSpace()

    def __post_init__(self) -> None:
        if check_count("vocab_size", self.vocab_size) < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}")
        check_count("length", self.length)
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"unknown schedule {self.schedule!r}; one of {', '.join(SCHEDULES)}, or a function alpha(t)"
            )
        if not isinstance(self.schedule, str) and not callable(self.schedule):
            raise ValueError(f"schedule must be a name or a function alpha(t), got {self.schedule!r}")
        self._check_survival()
        self._check_range()

    @property
    def hint_of_output(self) -> str:  # type: ignore[override]
        return f" One logit for each of the {self.vocab_size} tokens; MASK has no logit." if self.has_mask else ""

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size, self.has_mask)

    @property
    def mask_token(self) -> int:
        """The number of MASK.

        Raises:
          ValueError: where there is no such token.
        """
        if not self.has_mask:
            raise ValueError(f"{type(self).__name__} has no MASK token")
        return self.vocab_size

    def alpha(self, t: Any) -> Any:
        """The survival: the probability that a token is still there at time t."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        value = schedule(t)
        return value if namespace(t) is jnp else np.asarray(value, np.float64)

    def coordinate(self, kind: str, t: np.ndarray, rho: float) -> np.ndarray:
        """t, 1 - alpha, or log(1 - alpha).

        Raises:
          ValueError: where nothing is lost at a time, and the last is infinite.
        """
        if kind == "uniform":
            return t
        lost = 1 - np.asarray(self.alpha(t), np.float64)
        if kind == "survival":
            return lost
        if not (lost > 0).all():
            raise ValueError(
                f"a geometric grid needs lost tokens at both ends, but alpha = 1 at t = {t[0]}; move t_min, or use "
                "kind='survival'"
            )
        return np.log(lost)

    def signal_fraction(self, t: Any) -> Any:
        """The survival."""
        return self.alpha(t)

    def reward_strengths(self, times: np.ndarray, at: str) -> np.ndarray:
        return np.asarray(self.alpha(times), np.float64)

    @property
    def dtype(self) -> Any:
        return jnp.int32

    def relaxed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.vocab_size)

    def check_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        """(length,).

        Raises:
          ValueError: for another shape.
        """
        if shape is not None and shape != (self.length,):
            raise ValueError(f"states of {type(self).__name__} have shape ({self.length},), its length; got {shape}")
        return (self.length,)

    def check_tokens(self, name: str, x: Any, clean: bool = True, batch: bool = True) -> Array:
        """Sequences with a batch axis, or one without, as int32.

        Raises:
          ValueError: for anything but integers, sequences of another shape, tokens that are none, or MASK among those
            that should be ``clean``; traced tokens are not looked at.
        """
        x = jnp.asarray(x)
        if x.ndim != 1 + batch or x.shape[-1] != self.length:
            expected = f"(n, {self.length}), sequences" if batch else f"({self.length},), one sequence"
            raise ValueError(f"{name} must have shape {expected} of that length, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, the numbers of tokens, got {x.dtype}")
        if not is_traced(x):
            values = np.asarray(x)
            allowed = self.vocab_size + (self.has_mask and not clean)
            bad = (values < 0) | (values >= allowed)
            if bad.any():
                where = tuple(np.argwhere(bad)[0].tolist())
                token = values[where]
                if self.has_mask and token == self.vocab_size:
                    what = f"is MASK ({token}), which clean data have not"
                else:
                    what = f"is {token}, but tokens are 0, ..., {allowed - 1}"
                count = f"; {bad.any(axis=1).sum()} of {len(bad)} rows" if batch else ""
                raise ValueError(f"{name}[{', '.join(map(str, where))}] {what}{count}")
        return x.astype(jnp.int32)

    def forward(self, x_s: Array, s: Any, t: Any) -> Any:
        """The noising kernel F(x_t | x_s) of one sequence.

        Raises:
          ValueError: for another shape, and outside of compiled code for what are no tokens.
        """
        return super().forward(self.check_tokens("x_s", x_s, clean=False, batch=False), s, t)

    def _alphas(self, t: Any) -> Any:
        value = self.alpha(t)
        return namespace(t).clip(value, 0.0, 1.0)

    def _check_survival(self) -> None:
        t = np.linspace(0.0, 1.0, 1001)
        try:
            values = np.asarray(self.alpha(t), np.float64)
        except Exception as error:  # whatever the user's function may raise
            raise ValueError(f"schedule failed on an array of times ({type(error).__name__}: {error})") from error
        good = values.shape == t.shape and np.isfinite(values).all() and (np.diff(values) < 0).all()
        if not good or abs(values[0] - 1) > 1e-6 or values[-1] < 0:
            raise ValueError(
                "a schedule must be the survival alpha(t), decreasing strictly from 1 at t = 0 to 0 or more at t = 1; "
                f"{self.schedule!r} gives {np.ravel(values)[[0, len(np.ravel(values)) // 2, -1]]} at 0, 1/2 and 1"
            )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Masked(TokenProcess):
    """Masked (absorbing) diffusion: a token becomes MASK, the number ``vocab_size``, with probability 1 - alpha_t.

    The network predicts mu_k(x_t), the probabilities of what the masked tokens were; where it is independent of t (the
    time-free parametrisation, which is exact: Ou et al. 2025), ``fn`` ignores its time. Grids end at t = 0, where
    nothing is masked: what is masked at the end is part of the state.
    """

    grid_hints: ClassVar[dict[str, str]] = {
        "one_token": "; one token per step is a process of its own, model.with_process(process.one_token_per_step())"
    }

    def one_token_per_step(self) -> AnyOrder:
        """The jump chain: one token per step, for which the reverse kernel is exact.

        A model of this process is one of that too: ``model.with_process(model.process.one_token_per_step())``.
        """
        return AnyOrder(self.vocab_size, self.length, self.schedule)

    def marginal(self, x0: Array, t: Any) -> Categorical:
        """The law of x_t given x_0, one sequence.

        Raises:
          ValueError: for another shape, and outside of compiled code for what are no tokens, or MASK.
        """
        nothing, level = self._level(np.float64(0)), self.level(t)
        return self._step(nothing, level).forward(self.check_tokens("x0", x0, batch=False))

    def reference_at(self, level: MaskedLevel, shape: tuple[int, ...]) -> Categorical:
        """Uniform tokens, masked with probability 1 - alpha."""
        tokens = jnp.full(self.vocab_size, jnp.log(level.alpha) - np.log(self.vocab_size))
        row = jnp.concatenate([tokens, jnp.log1p(-level.alpha)[None]])
        return Categorical(jnp.broadcast_to(row, (*shape, self.vocab_size + 1)))

    def _level(self, t: Any) -> MaskedLevel:
        return MaskedLevel(t, self._alphas(t), self.vocabulary)

    def _transition(self, s: Any, t: Any) -> MaskedTransition:
        return self._step(self._level(s), self._level(t))

    def _step(self, s: MaskedLevel, t: MaskedLevel) -> MaskedTransition:
        xp = namespace(s.alpha, t.alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            return MaskedTransition(
                s,
                t,
                log_keep=xp.log(t.alpha) - xp.log(s.alpha),
                log_lose=xp.log((s.alpha - t.alpha) / s.alpha),
                log_reveal=xp.log((s.alpha - t.alpha) / (1 - t.alpha)),
                log_stay=xp.log((1 - s.alpha) / (1 - t.alpha)),
                vocabulary=self.vocabulary,
            )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Uniform(TokenProcess):
    """Uniform diffusion: a token is drawn anew, uniformly, with probability 1 - alpha_t.

    The default range ends where 1 - alpha = 0.01, and the default grid is geometric in 1 - alpha: with steps that do
    not shorten towards the data the weights of targets diverge, for K / F of a token that changes late is unbounded
    (mathematics.md, section 5). The target is p_{t_min}, data with one token in a hundred drawn anew.
    """

    t_min: float | None = None  # type: ignore[assignment]

    default_grid = "geometric"
    has_mask: ClassVar[bool] = False
    need_signal: ClassVar[tuple[str, ...]] = ("concrete_score",)

    def __post_init__(self) -> None:
        if self.t_min is None:
            object.__setattr__(self, "t_min", 0.0)
            super().__post_init__()
            object.__setattr__(self, "t_min", time_of_survival(self.alpha, 0.99, self.t_max))
        super().__post_init__()

    def marginal(self, x0: Array, t: Any) -> Categorical:
        """The law of x_t given x_0, one sequence; raises what ``Masked.marginal`` does."""
        return self._step(self._level(np.float64(0)), self.level(t)).forward(self.check_tokens("x0", x0, batch=False))

    def reference_at(self, level: UniformLevel, shape: tuple[int, ...]) -> Categorical:
        """Uniform tokens, at every time."""
        return Categorical(jnp.full((*shape, self.vocab_size), -jnp.log(jnp.asarray(float(self.vocab_size)))))

    def _level(self, t: Any) -> UniformLevel:
        return UniformLevel(t, self._alphas(t), self.vocabulary)

    def _transition(self, s: Any, t: Any) -> UniformTransition:
        return self._step(self._level(s), self._level(t))

    def _step(self, s: UniformLevel, t: UniformLevel) -> UniformTransition:
        xp = namespace(s.alpha, t.alpha)
        keep = t.alpha / s.alpha
        with np.errstate(divide="ignore"):
            return UniformTransition(
                s,
                t,
                log_own=xp.log(keep + (1 - keep) / self.vocab_size),
                log_other=xp.log((1 - keep) / self.vocab_size),
                vocabulary=self.vocabulary,
            )


@jax.tree_util.register_static
@dataclass(frozen=True)
class AnyOrder(TokenProcess):
    """One token per step: the forward kernel masks one of the tokens that are left, all with the same probability.

    This is the jump chain of `Masked` (Hoogeboom et al. 2022 generate in any order this way): the reverse kernel
    reveals one masked token, and is exact if mu is. Times are numbers of masked tokens, 0, ..., length, and the grid
    has all of them: ``time_grid(process, process.length)``. The network is given the time of the schedule at which as
    many are expected to be masked.
    """

    t_max: float | None = None  # type: ignore[assignment]

    grids: ClassVar[tuple[str, ...]] = ("uniform",)

    def __post_init__(self) -> None:
        if self.t_max is None:
            object.__setattr__(self, "t_max", float(check_count("length", self.length)))
        super().__post_init__()

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, float(self.length))

    def alpha(self, t: Any) -> Any:
        """The fraction of tokens that are not masked."""
        return 1 - t / self.length

    def snap(self, times: np.ndarray) -> np.ndarray:
        """The times, which have to be all numbers of masked tokens between two.

        Raises:
          ValueError: where there are too few of them, or too many.
        """
        first, last = np.ceil(times[0]), np.floor(times[-1])
        if last - first != len(times) - 1:
            raise ValueError(
                f"one token per step: from {last:g} masked tokens to {first:g} it takes {last - first:g} steps, "
                f"got {len(times) - 1}"
            )
        return np.arange(first, last + 1)

    def marginal(self, x0: Array, t: Any) -> Scattered:
        """The law of x_t given x_0: t masks at random positions; raises what ``Masked.marginal`` does."""
        return Scattered(
            self._num_masked(self.level(t)), self.vocabulary, self.length, self.check_tokens("x0", x0, batch=False)
        )

    def reference_at(self, level: MaskedLevel, shape: tuple[int, ...]) -> Scattered:
        """Uniform tokens, as many of them masked as there are at this time, at random positions."""
        return Scattered(self._num_masked(level), self.vocabulary, self.length)

    def _num_masked(self, level: MaskedLevel) -> Array:
        return jnp.round((1 - level.alpha) * self.length)

    def _level(self, t: Any) -> MaskedLevel:
        xp = namespace(t)
        index = xp.round(xp.clip(t, 0, self.length)).astype(int)
        return MaskedLevel(xp.asarray(self._times_of_schedule())[index], self.alpha(t), self.vocabulary)

    def _transition(self, s: Any, t: Any) -> AnyOrderTransition:
        known = not is_traced(s, t)
        if known and not (np.all(t - s == 1) and np.all(s == np.round(s))):
            raise ValueError(
                f"AnyOrder masks one token per step, so times are consecutive numbers of masked tokens; got a step "
                f"between {np.ravel(s)[0]:g} and {np.ravel(t)[0]:g}"
            )
        return AnyOrderTransition(self._level(s), self._level(t), self.vocabulary)

    def _times_of_schedule(self) -> np.ndarray:
        """When 0, 1, ..., length tokens are expected to be masked."""
        survival = Masked(self.vocab_size, self.length, self.schedule).alpha
        wanted = 1 - np.arange(self.length + 1) / self.length
        return np.asarray([time_of_survival(survival, alpha, 1.0) for alpha in wanted])

    def _check_survival(self) -> None:
        Masked(self.vocab_size, self.length, self.schedule)


def time_of_survival(alpha: Callable[[Any], Any], wanted: float, t_max: float, iterations: int = 100) -> float:
    """The time at which the survival is ``wanted``, by bisection; t_max where it never is as small."""
    if wanted >= 1:
        return 0.0
    low, high = 0.0, t_max
    for _ in range(iterations):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(alpha(np.float64(middle))) > wanted else (low, middle)
    return high
