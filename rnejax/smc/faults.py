"""Weights that are no weights: recorded inside jit as numbers, told outside as an error that says where to look."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Fault", "FaultCode", "SMCError", "raise_on_fault"]


class FaultCode(IntEnum):
    """What is wrong with a group's log-weights (-inf for some particles is not wrong)."""

    NONE = 0
    NAN = 1
    PLUS_INFINITY = 2
    NO_WEIGHT = 3
    """All particles have weight zero."""


class Fault(NamedTuple):
    """The first fault of each group of particles; () or (num_groups,) int32.

    ``code`` is a `FaultCode`, 0 where nothing was wrong; ``step`` is the number of the step whose
    weighing went wrong, -1 if the initial weights were wrong already (or nothing was); ``num_particles`` is the
    number of particles concerned.
    """

    step: Array
    code: Array
    num_particles: Array

    @classmethod
    def none(cls, num_groups: int) -> Fault:
        """No fault yet in any of ``num_groups`` groups."""
        zeros = jnp.zeros(num_groups, jnp.int32)
        return cls(zeros - 1, zeros, zeros)

    def or_in(self, log_weights: Array, step: Array | int) -> Fault:
        """The fault that is known already, else what is wrong with ``log_weights`` (num_groups, n) after ``step``."""
        num_nan = jnp.sum(jnp.isnan(log_weights), axis=-1, dtype=jnp.int32)
        num_plus = jnp.sum(log_weights == jnp.inf, axis=-1, dtype=jnp.int32)
        num_zero = jnp.sum(log_weights == -jnp.inf, axis=-1, dtype=jnp.int32)
        conditions = [num_nan > 0, num_plus > 0, num_zero == log_weights.shape[-1]]
        codes = [FaultCode.NAN, FaultCode.PLUS_INFINITY, FaultCode.NO_WEIGHT]
        zero = jnp.zeros_like(self.code)
        code = jnp.select(conditions, [zero + int(code) for code in codes], zero)
        number = jnp.select(conditions, [num_nan, num_plus, num_zero], zero)
        is_first = (self.code == FaultCode.NONE) & (code != FaultCode.NONE)
        return Fault(
            jnp.where(is_first, jnp.asarray(step, jnp.int32), self.step),
            jnp.where(is_first, code, self.code),
            jnp.where(is_first, number, self.num_particles),
        )


class SMCError(RuntimeError, FloatingPointError):
    """The log-weights of at least one group became NaN, +inf, or -inf for every particle.

    ``result`` is what the run returned, with ``result.info.fault``; the steps after the fault mean nothing.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


_WHAT_HAPPENED = {
    FaultCode.NAN: "became NaN",
    FaultCode.PLUS_INFINITY: "became +inf",
    FaultCode.NO_WEIGHT: "became -inf, so that no particle is left",
}
_WHERE_TO_LOOK = {
    FaultCode.NAN: "look at what enters the log-increments there: the network's output, the reward, a 0/0 or inf - inf",
    FaultCode.PLUS_INFINITY: "look at what enters the log-increments there: a density that is infinite, an overflow, a "
    "division by zero (by a law that excludes what the others allow, where its exponent is negative, as in guidance)",
    FaultCode.NO_WEIGHT: "the target excludes everything the proposal reached: relax the reward or introduce it more "
    "gradually, use more particles, or check the sign of the log-increments",
}


def raise_on_fault(
    result: Any, *, num_particles: int, num_steps: int, describe: Callable[[int], str] | None = None
) -> None:
    """Raise `SMCError` on the earliest fault of ``result`` (concrete values only).

    ``describe(step)`` may add words on a step, such as its time.
    """
    fault = result.info.fault
    code, step, number = (np.atleast_1d(np.asarray(field)) for field in (fault.code, fault.step, fault.num_particles))
    faulty = np.flatnonzero(code)
    if faulty.size == 0:
        return
    group = faulty[np.argmin(step[faulty])]
    kind = FaultCode(int(code[group]))
    words = f" ({describe(int(step[group]))})" if describe is not None else ""
    if step[group] < 0:
        where = f"before the first step{words or ' (the initial log-weights)'}"
    else:
        where = f"at step {step[group]} of {num_steps}{words}, counting from 0"
    which = "" if np.ndim(fault.code) == 0 else f" in group {group} ({faulty.size} of {code.size} groups are affected)"
    raise SMCError(
        f"the log-weights of {number[group]} of {num_particles} particles{which} {_WHAT_HAPPENED[kind]} {where}; "
        f"{_WHERE_TO_LOOK[kind]}. The run is in this error's .result.",
        result,
    )
