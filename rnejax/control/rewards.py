"""Rewards: what tilts a target, where it is evaluated, how its strength grows, and what the proposal learns from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import is_traced
from ..kernels import Array


class RewardError(RuntimeError):
    """A reward on the host raised, or returned something that is not one number per example."""


@dataclass(frozen=True)
class HostGuard:
    """A numpy function of a batch, whose errors survive being called back from compiled code.

    An exception in a callback ends as a runtime error of the device, with a traceback for each step. So the first one
    is kept, by the function (compiled code may hold another guard of the same one), and NaN returned, which stops a run
    that looks.
    """

    function: Callable[[Any], Any]
    failures: ClassVar[dict[Any, Exception]] = {}

    def __call__(self, x: Any) -> np.ndarray:
        try:
            return check_host_values(self.function(x), len(x))
        except Exception as error:  # whatever the user's function may raise
            self.failures.setdefault(self.function, error)
            return np.full(len(x), np.nan)

    def raise_failure(self) -> None:
        failure = self.failures.pop(self.function, None)
        if failure is not None:
            function: Any = self.function
            named = hasattr(function, "__qualname__")
            name = f"{function.__module__}:{function.__qualname__}" if named else repr(function)
            what = f"{type(failure).__name__}: {failure}"
            raise RewardError(f"the reward {name} failed on a batch of states: {what}") from failure


def check_host_values(values: Any, n: int) -> np.ndarray:
    """The values that a host reward returned for n examples; ValueError where they are not n numbers."""
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"a host reward must return one number per example: expected shape ({n},), got {values.shape}")
    return values


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["fn", "schedule", "exact", "at", "gradient", "host", "factors", "draws"],
)
@dataclass(frozen=True)
class Reward:
    """One reward of a target; see `rnejax.tilt` for the arguments.

    A reward that is itself a pytree (``jax.tree_util.Partial(fn, weights)``, say) travels as ``data``: other weights
    recompile nothing. Any other function is static.
    """

    fn: Callable[[Any], Any] | None
    schedule: Any  # None, a function of time, or an object whose strengths(process, times) are 1 at t_min
    exact: bool
    at: str
    gradient: bool
    host: bool
    factors: tuple[Any, ...] = ()  # numbers or functions of time that multiply the strength
    draws: int = 1  # completions of tokens, for at="x0"
    data: Any = None

    @classmethod
    def of(cls, fn: Any, **options: Any) -> Reward:
        """A reward from the arguments of `rnejax.tilt`.

        Raises:
          ValueError: for an unknown ``at``, the gradient of a host reward, or a reward that cannot be called.
        """
        if not callable(fn):
            raise ValueError(f"reward must be a function of one example, got {type(fn).__name__}")
        is_data = not jax.tree_util.all_leaves([fn])
        reward = cls(None, data=fn, **options) if is_data else cls(fn, **options)
        reward._check()
        return reward

    def check_on(self, process: Any, shape: tuple[int, ...]) -> None:
        """Try a JAX reward abstractly on one example, so that what is wrong with it is told before a run.

        Raises:
          ValueError: where it returns no scalar, or does with JAX arrays what only numpy's can.
        """
        if self.host:
            return
        relaxed = process.is_discrete and self.gradient
        example = (process.relaxed_shape(shape), jnp.result_type(float)) if relaxed else (shape, process.dtype)
        shape = example[0]
        try:
            jax.eval_shape(self._one, jax.ShapeDtypeStruct(*example))
            if relaxed:
                batch = jax.ShapeDtypeStruct((1, *example[0]), example[1])
                changes = jax.eval_shape(self.values_and_changes, batch)[1]
                if changes.shape != batch.shape:
                    raise ValueError(f"changes(rows) must have the shape of the rows, got {changes.shape[1:]}")
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
            raise ValueError(
                "the reward is traced by JAX, but it asks for the numbers in its argument (numpy functions, float(), a "
                "branch): write it in jax.numpy, or pass host=True for a numpy function of a batch"
            ) from error
        except Exception as error:  # whatever the user's function may raise
            raise ValueError(
                f"reward failed on one example of shape {shape} ({type(error).__name__}: {error}); it takes one, "
                "without a batch axis, as a JAX array"
            ) from error
        if relaxed:
            self._warn_if_deaf(example[0])

    def _warn_if_deaf(self, shape: tuple[int, ...]) -> None:
        """A function of rows that never changes was most likely written for tokens, of which x == 2 can be true."""
        if self.fn is None:  # a pytree, which may be traced, and large
            return
        some = np.random.default_rng(0).dirichlet(np.ones(shape[-1]), (4, *shape[:-1]))
        rows = jnp.asarray(some, jnp.result_type(float))
        changes = self.values_and_changes(rows)[1]
        if not is_traced(changes) and not np.any(np.asarray(changes)):  # within compiled code there is nothing to see
            warnings.warn(
                f"with gradient=True the reward is given rows of token probabilities, {shape}, and this one does not "
                "change with them: was it written for tokens? (x == 2 is never true of rows; x[:, 2] is the "
                "probability of token 2 at each position)",
                stacklevel=4,
            )

    def _check(self) -> None:
        if self.at not in ("x", "x0"):
            raise ValueError(f"at must be 'x' (the noisy state) or 'x0' (the predicted clean state), got {self.at!r}")
        if self.draws != 1 and (self.at != "x0" or self.gradient):
            raise ValueError("draws are completions of a reward of tokens at='x0' without a gradient")
        if self.gradient and self.host:
            raise ValueError("a host reward has no gradient: use gradient=False, or write the reward in JAX")
        if self.host and self.fn is None:
            raise ValueError("a host reward is a plain function of a numpy batch; this one is a pytree of JAX arrays")
        if self.schedule is not None and not callable(self.schedule) and not hasattr(self.schedule, "strengths"):
            raise ValueError(
                "schedule must be a function of time, or have a method strengths(process, times), got "
                f"{self.schedule!r} (multiply a reward with scale=)"
            )

    def strengths_at(self, process: Any, times: np.ndarray) -> np.ndarray:
        """lambda(t) at every time.

        Raises:
          ValueError: if a schedule of the user's own does not end at 1 at t_min, where the target would be another.
        """
        strengths: np.ndarray
        if self.schedule is None:
            fraction = process.reward_strengths(times, self.at)
            strengths = fraction / fraction[0]
        elif hasattr(self.schedule, "strengths"):
            strengths = self.schedule.strengths(process, times)
        else:
            strengths = np.asarray([float(self.schedule(t)) for t in times])
            if not np.isfinite(strengths).all() or abs(strengths[0] - 1) > 1e-6:
                raise ValueError(
                    f"a reward's schedule must be finite everywhere and 1 at t_min = {times[0]:g}, where the target "
                    f"is; it gives {strengths[0]:.6g} there (scale the reward with scale=)"
                )
        for factor in self.factors:
            strengths = strengths * np.asarray([float(factor(t)) if callable(factor) else float(factor) for t in times])
        return strengths

    def values(self, y: Array) -> Array:
        """Rewards of a batch in the user's coordinates: (n, *shape) -> (n,)."""
        if not self.host:
            return jax.vmap(self._one)(y)
        out = jax.ShapeDtypeStruct((len(y),), _floating(y))
        return jax.pure_callback(
            lambda batch: check_host_values(self._call(np.asarray(batch)), len(y)).astype(out.dtype), out, y
        )

    def values_and_changes(self, rows: Array) -> tuple[Array, Array]:
        """Of rows of token probabilities m, (n, length, V): rewards (n,), and (n, length, V) what it would do to them
        if a position were token k: what the reward's method ``changes`` says, or to first order of its gradient g,
        g_ik - sum_j m_ij g_ij.
        """
        own = getattr(self.data if self.fn is None else self.fn, "changes", None)
        if own is not None:
            return self.values(rows), jax.vmap(own)(rows).astype(rows.dtype)
        values, pullback = jax.vjp(self.values, rows)
        (gradient,) = pullback(jnp.ones_like(values))
        return values, gradient - jnp.sum(rows * gradient, axis=-1, keepdims=True)

    def without_schedule(self) -> Reward:
        """What is left when the strengths have been computed: two schedules of the same reward compile once."""
        return replace(self, schedule=None, factors=())

    def guarded(self) -> Reward:
        """The same reward; if it runs on the host, what it raises is kept for `raise_failure`."""
        return self if self.fn is None or not self.host else replace(self, fn=HostGuard(self.fn))

    def raise_failure(self) -> None:
        """Raises RewardError if a call of the guarded reward has failed since the last time this was asked."""
        if isinstance(self.fn, HostGuard):
            self.fn.raise_failure()

    def _call(self, y: Any) -> Any:
        return self.data(y) if self.fn is None else self.fn(y)

    def _one(self, y: Array) -> Array:
        value = jnp.asarray(self._call(y))
        if value.shape != ():
            raise ValueError(f"reward(x) on one example must return a scalar, got shape {value.shape}")
        return value.astype(_floating(y))


def _floating(y: Array) -> Any:
    return y.dtype if jnp.issubdtype(y.dtype, jnp.floating) else jnp.result_type(float)
