"""Rewards: what tilts a target, where it is evaluated, how its strength grows, and what the proposal learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["fn", "schedule", "exact", "at", "gradient", "host", "factors"],
)
@dataclass(frozen=True)
class Reward:
    """One reward of a target; see :func:`rnejax.tilt` for the arguments.

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
    data: Any = None

    @classmethod
    def of(cls, fn: Any, **options: Any) -> Reward:
        """A reward from the arguments of :func:`rnejax.tilt`.

        Raises:
          ValueError: for an unknown ``at``, the gradient of a host reward, or a reward that cannot be called.
        """
        if not callable(fn):
            raise ValueError(f"reward must be a function of one example, got {type(fn).__name__}")
        reward = cls(None, data=fn, **options) if not jax.tree_util.all_leaves([fn]) else cls(fn, **options)
        reward._check()
        return reward

    def _check(self) -> None:
        if self.at not in ("x", "x0"):
            raise ValueError(f"at must be 'x' (the noisy state) or 'x0' (the predicted clean state), got {self.at!r}")
        if self.gradient and self.host:
            raise ValueError("a host reward has no gradient: use gradient=False, or write the reward in JAX")

    def strengths_at(self, process: Any, times: np.ndarray) -> np.ndarray:
        """lambda(t) at every time.

        Raises:
          ValueError: if a schedule of the user's own does not end at 1 at t_min, where the target would be another.
        """
        strengths: np.ndarray
        if self.schedule is None:
            level = process._level(times)
            fraction = level.alpha**2 / level.reference_variance
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
        out = jax.ShapeDtypeStruct((len(y),), y.dtype)
        return jax.pure_callback(
            lambda batch: self._checked(np.asarray(self._call(np.asarray(batch)), y.dtype), len(y)), out, y
        )

    def without_schedule(self) -> Reward:
        """What is left when the strengths have been computed: two schedules of the same reward compile once."""
        return replace(self, schedule=None, factors=())

    def _call(self, y: Any) -> Any:
        return self.data(y) if self.fn is None else self.fn(y)

    def _one(self, y: Array) -> Array:
        value = jnp.asarray(self._call(y))
        if value.shape != ():
            raise ValueError(f"reward(x) on one example must return a scalar, got shape {value.shape}")
        return value.astype(y.dtype)

    @staticmethod
    def _checked(values: np.ndarray, n: int) -> np.ndarray:
        if values.shape != (n,):
            raise ValueError(
                f"a host reward must return one number per example: expected shape ({n},), got {values.shape}"
            )
        return values
