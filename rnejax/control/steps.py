"""The iterations of a steered run, as arrays that the loop is given one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import Array
from ..processes import Process


class ControlStep(NamedTuple):
    """One iteration: move from t to s, then look at the state at s. The first only looks, at t_max."""

    transition: Any
    next: Any  # the transition of the next iteration, for proposals that look ahead, else None
    up: Any  # from where the transition ends to where the state is looked at
    is_renoised: Array  # whether that is further up
    level: Any  # where the state is looked at
    exponents_s: Array
    exponents_t: Array
    exponents_ahead: Array  # at the end of the next iteration
    strengths_s: Array
    strengths_t: Array
    strengths_ahead: Array
    is_first: Array
    is_last: Array
    evaluate: Array


def control_steps(
    process: Process,
    times: np.ndarray,
    tops: np.ndarray,
    exponents: np.ndarray,
    strengths: np.ndarray,
    evaluate_last: bool,
    looks_ahead: bool = False,
) -> ControlStep:
    """The n + 1 iterations of a grid with n steps, in order of execution.

    A step leads down to one of the ``times`` and, where ``tops`` are above them, from there up again by the noising
    kernel; exponents and strengths are those at ``tops``.
    """
    n = len(times) - 1

    steps = process.steps(times[:-1], tops[1:], backwards=True)
    at_s = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf]), steps)  # the first iteration moves nothing
    levels = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), process.level(tops))
    renoised = tops > times
    up = at_s
    if renoised.any():
        stand_in = int(np.flatnonzero(renoised)[0])  # a transition that exists, where none is made
        up = process.steps(
            np.where(renoised, times, times[stand_in]), np.where(renoised, tops, tops[stand_in]), backwards=True
        )

    def by_step(increasing: np.ndarray) -> tuple[Array, Array, Array]:
        values = jnp.asarray(increasing[::-1], jnp.result_type(float))
        return values, jnp.concatenate([values[:1], values[:-1]]), jnp.concatenate([values[1:], values[-1:]])

    exponents_s, exponents_t, exponents_ahead = by_step(exponents)
    strengths_s, strengths_t, strengths_ahead = by_step(strengths)
    index = np.arange(n + 1)
    return ControlStep(
        transition=at_s,
        next=jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[-1:]]), steps) if looks_ahead else None,
        up=up,
        is_renoised=jnp.asarray(renoised[::-1].copy()),
        level=levels,
        exponents_s=exponents_s,
        exponents_t=exponents_t,
        exponents_ahead=exponents_ahead,
        strengths_s=strengths_s,
        strengths_t=strengths_t,
        strengths_ahead=strengths_ahead,
        is_first=jnp.asarray(index == 0),
        is_last=jnp.asarray(index == n),
        evaluate=jnp.asarray((index < n) | evaluate_last),
    )
