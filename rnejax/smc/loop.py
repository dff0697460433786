"""The loop over time: resample if due, move and weigh, once per step, for one or many groups of particles.

With carried log-weights lw_i (their mean weight is one) and an accumulated log Z, step k does

    1. where ESS(lw) < threshold:  a_i ~ weights,  x_i <- x_{a_i} (the whole particle),  lw_i <- 0
    2. x_i, g_i <- problem.step(x_i)
    3. log Z += log mean_i exp(lw_i + g_i)  [= logsumexp(lw + g) - logsumexp(lw)],  lw_i <- lw_i + g_i - that

so that weights accumulate between resamplings and what comes out is still weighted: exp(log Z + lw_i) is particle i's
unnormalised weight, and mean_i exp(log Z + lw_i) f(x_i) is unbiased for the unnormalised target's integral of f,
whatever the thresholds, schemes and times of resampling (Del Moral 2004; Chopin & Papaspiliopoulos 2020).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rnejax.checks import check_count, check_key, is_traced
from rnejax.smc.contract import (
    SAVEABLE,
    FeynmanKac,
    SMCInfo,
    SMCResult,
    count_steps,
    log_weight_array,
    require_leading_axis,
    require_pytree,
    require_same_layout,
    saved_names,
    strongly_typed,
)
from rnejax.smc.faults import Fault, FaultCode, raise_on_fault
from rnejax.smc.progress import piece_length, progress_bar
from rnejax.smc.resampling import Resampling, draw_ancestors
from rnejax.smc.weights import CompensatedSum, effective_sample_size, log_mean_exp

__all__ = ["SAVEABLE", "FeynmanKac", "SMCInfo", "SMCResult", "run"]


def run(
    key: Array,
    problem: FeynmanKac,
    steps: Any,
    *,
    num_particles: int,
    num_groups: int | None = None,
    resampling: Resampling | None = None,
    save: Iterable[str] = (),
    progress: bool | None = None,
    check: bool = True,
    describe: Callable[[int], str] | None = None,
) -> SMCResult:
    """Run ``problem`` over all ``steps`` with weighted, resampled particles.

    Args:
        key: a typed key (``jax.random.key``).
        problem: a `FeynmanKac` pytree. Another problem of the same structure and static fields recompiles
            nothing.
        steps: pytree of arrays with one leading axis of steps; each step gets its slice.
        num_particles: particles per group.
        num_groups: that many independent runs at once: resampling, effective sample size and log Z are each group's
            own, while ``problem`` sees all ``num_groups * num_particles`` particles in one call. None: one run, and
            no group axis.
        resampling: when and how; default ``Resampling()``, systematic below half the particles.
        save: what to stack over steps, of `SAVEABLE`. Nothing else grows with the number of steps but scalars
            and aux.
        progress: a bar on stderr; None shows it on a terminal only. Ignored under the caller's jit. The loop then
            runs in compiled pieces, all of the same shape, so that it is compiled once.
        check: raise `SMCError` if log-weights became NaN, +inf, or all -inf in a group; impossible (and
            skipped) under the caller's jit, where ``info.fault`` tells. With check=False nothing waits for the
            device.
        describe: words for a step number in that error, such as its time.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything runs.
        SMCError: see ``check``. A run with a bar stops at the piece that went wrong, others run to the end first.
        KeyboardInterrupt: says how many steps were finished.
    """
    plan = _Plan(num_particles, num_groups, Resampling() if resampling is None else resampling, saved_names(save))
    check_key(key)
    require_pytree(problem)
    steps = jax.tree.map(jnp.asarray, steps)
    num_steps = count_steps(steps)

    state = _start(key, problem, plan=plan)
    traced = is_traced(key, state, steps, problem)
    with_bar = not traced and (sys.stderr.isatty() if progress is None else progress)
    length = piece_length(num_steps) if with_bar else num_steps
    histories = []
    with progress_bar(num_steps, with_bar) as advance:
        try:
            for start in range(0, num_steps, length):
                state, history = _advance(state, key, problem, steps, jnp.int32(start), length=length, plan=plan)
                histories.append(history)
                if with_bar:
                    # Reading the code waits for the piece, which is what makes the bar tell the truth.
                    faulty = bool(jnp.any(state.fault.code != FaultCode.NONE))
                    advance(min(length, num_steps - start))
                    if check and faulty:
                        break
        except KeyboardInterrupt:
            finished = min(len(histories) * length, num_steps)
            raise KeyboardInterrupt(f"interrupted: {finished} of {num_steps} steps were finished") from None
    history = histories[0]
    if len(histories) > 1 or length * len(histories) > num_steps:
        history = jax.tree.map(lambda *pieces: jnp.concatenate(pieces)[:num_steps], *histories)
    result = _finish(state, history, key, problem, plan=plan)
    if check and not traced:
        raise_on_fault(result, num_particles=num_particles, num_steps=num_steps, describe=describe)
    return result


@dataclass(frozen=True)
class _Plan:
    """The static part of a run."""

    num_particles: int
    num_groups: int | None
    resampling: Resampling
    save: tuple[str, ...]

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        if self.num_groups is not None:
            check_count("num_groups", self.num_groups)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_groups or 1, self.num_particles

    @property
    def total(self) -> int:
        return self.shape[0] * self.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What the loop carries. G groups of N particles; particles are flat, everything else has the group axis."""

    particles: Any  # leading axis G * N
    log_weights: CompensatedSum  # (G, N)
    log_normalizer: CompensatedSum  # (G,)
    ess: Array  # (G,)
    eve: Array  # (G, N)
    unique_ancestors: Array  # (G,)
    fault: Fault  # (G,)


@partial(jax.jit, static_argnames="plan")
def _start(key: Array, problem: FeynmanKac, *, plan: _Plan) -> _State:
    particles, log_weights = problem.init(_init_key(key), plan.total)
    particles = strongly_typed(particles)
    require_leading_axis(particles, plan.total)
    initial = _grouped(log_weight_array(log_weights, "problem.init", "log-weights", plan.total), plan)
    groups, num = plan.shape
    nothing = CompensatedSum.zeros((groups,), initial.dtype)
    centred, log_normalizer, _ = _centre(CompensatedSum.of(initial), nothing)
    return _State(
        particles=particles,
        log_weights=centred,
        log_normalizer=log_normalizer,
        ess=effective_sample_size(centred.value),
        eve=jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32), (groups, num)),
        unique_ancestors=jnp.full(groups, num, jnp.int32),
        fault=Fault.none(groups).or_in(initial, -1),
    )


class _History(NamedTuple):
    """What a step leaves to be stacked: (G,) arrays, then aux as it is, then what was asked for."""

    ess: Array
    resampled: Array
    log_normalizer_increments: Array
    unique_ancestors: Array
    aux: Any
    saved: dict[str, Any]


@partial(jax.jit, static_argnames=("length", "plan"))
def _advance(
    state: _State, key: Array, problem: FeynmanKac, steps: Any, start: Array, *, length: int, plan: _Plan
) -> tuple[_State, _History]:
    """Steps start, ..., start + length - 1; those beyond the last one do nothing."""
    num_steps = count_steps(steps)

    @jax.jit  # the trace is shared by the branch below and by the question for its shapes
    def take_step(state: _State, index: Array) -> tuple[_State, _History]:
        step = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, num_steps - 1)], steps)
        return _step(state, key, problem, index, step, plan)

    def take_step_or_idle(state: _State, index: Array) -> tuple[_State, _History]:
        _, history_shape = jax.eval_shape(take_step, state, index)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), history_shape)
        return lax.cond(index < num_steps, take_step, lambda state, _: (state, nothing), state, index)

    body = take_step if num_steps % length == 0 else take_step_or_idle
    return lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))


def _step(
    state: _State, key: Array, problem: FeynmanKac, index: Array, step: Any, plan: _Plan
) -> tuple[_State, _History]:
    key_resample, key_move = jax.random.split(_step_key(key, index))
    due = plan.resampling.is_due(index, state.ess, plan.num_particles) & (state.fault.code == FaultCode.NONE)
    state, ancestors, gained_by_resampling = _resample_where(due, key_resample, state, plan)

    particles, log_increments, aux = problem.step(key_move, state.particles, step)
    particles = strongly_typed(particles)
    require_same_layout(state.particles, particles)
    log_increments = _grouped(log_weight_array(log_increments, "problem.step", "log-increments", plan.total), plan)

    log_weights = state.log_weights.add(log_increments)
    fault = state.fault.or_in(log_weights.value, index)
    log_weights, log_normalizer, gained = _centre(log_weights, state.log_normalizer)
    ess = effective_sample_size(log_weights.value)
    saveable = {
        "ancestors": lambda: ancestors,
        "log_weights": lambda: log_weights.value,
        "log_increments": lambda: log_increments,
        "particles": lambda: jax.tree.map(lambda leaf: _grouped(leaf, plan), problem.position(particles)),
    }
    history = _History(
        ess=ess,
        resampled=due,
        log_normalizer_increments=gained_by_resampling + gained,
        unique_ancestors=state.unique_ancestors,
        aux=aux,
        saved={name: saveable[name]() for name in plan.save},
    )
    state = replace(
        state, particles=particles, log_weights=log_weights, log_normalizer=log_normalizer, ess=ess, fault=fault
    )
    return state, history


def _resample_where(due: Array, key: Array, state: _State, plan: _Plan) -> tuple[_State, Array, Array]:
    """The state with the groups in ``due`` resampled, everybody's ancestors (G, N), and the change of log Z (G,)."""
    identity = jnp.broadcast_to(jnp.arange(plan.num_particles, dtype=jnp.int32), plan.shape)
    unchanged = jnp.zeros_like(state.log_normalizer.total)
    if plan.resampling.never:
        return state, identity, unchanged
    # One branch for all groups together: under vmap a cond becomes a select, and particles would be gathered at
    # every step.
    return lax.cond(
        jnp.any(due),
        lambda state: _resample(due, key, state, plan),
        lambda state: (state, identity, unchanged),
        state,
    )


def _resample(due: Array, key: Array, state: _State, plan: _Plan) -> tuple[_State, Array, Array]:
    """As `_resample_where`, without asking whether any group is due."""
    groups, num = plan.shape
    old = state.log_weights.value
    draw = jax.vmap(partial(draw_ancestors, resampling=plan.resampling))
    ancestors, new = draw(jax.random.split(key, groups), old)
    ancestors = jnp.where(due[:, None], ancestors, jnp.arange(num, dtype=jnp.int32))
    flat = (ancestors + num * jnp.arange(groups, dtype=jnp.int32)[:, None]).ravel()
    eve = jnp.take_along_axis(state.eve, ancestors, axis=1)
    # Where nothing was drawn, the carried rounding error stays; what is drawn has none yet.
    log_weights = CompensatedSum(
        jnp.where(due[:, None], new, state.log_weights.total),
        jnp.where(due[:, None], jnp.zeros_like(new), state.log_weights.compensation),
    )
    # The mean weight differs from one by rounding; what is dropped from the weights here is kept in log Z.
    log_weights, log_normalizer, gained = _centre(log_weights, state.log_normalizer)
    state = replace(
        state,
        particles=jax.tree.map(lambda leaf: leaf[flat], state.particles),
        log_weights=log_weights,
        log_normalizer=log_normalizer,
        eve=eve,
        unique_ancestors=jax.vmap(lambda row: jnp.zeros(num, jnp.int32).at[row].set(1).sum(dtype=jnp.int32))(eve),
    )
    return state, ancestors, gained


def _centre(
    log_weights: CompensatedSum, log_normalizer: CompensatedSum
) -> tuple[CompensatedSum, CompensatedSum, Array]:
    """Move the log-mean weight of each group from its weights to its log Z; returns both and what was moved, (G,).

    Both sums are compensated, so exp(log Z + lw_i) is kept to twice the working precision, and an error in what is
    moved here is made good at the next call. Without any weight, or with faulty weights, log Z becomes -inf, NaN or
    +inf, and the weights stay.
    """
    gained = log_mean_exp(log_weights.value)
    shift = jnp.where(jnp.isfinite(gained), gained, 0.0)
    return log_weights.add(-shift[:, None]), log_normalizer.add(gained), gained


@partial(jax.jit, static_argnames="plan")
def _finish(state: _State, history: _History, key: Array, problem: FeynmanKac, *, plan: _Plan) -> SMCResult:
    if plan.resampling.final:
        everyone = replace(plan, resampling=Resampling(scheme=plan.resampling.scheme))
        state, _, _ = _resample(state.fault.code == FaultCode.NONE, _final_key(key), state, everyone)
    per_step = {name: jnp.swapaxes(value, 0, 1) for name, value in history._asdict().items() if name in _SCALARS}
    per_step["num_resamplings"] = jnp.sum(history.resampled, axis=0, dtype=jnp.int32) + int(plan.resampling.final)
    saved = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), history.saved)
    in_groups = partial(jax.tree.map, lambda leaf: _grouped(leaf, plan))
    particles, raw = in_groups(problem.position(state.particles)), in_groups(state.particles)
    weights = state.log_weights.value, state.log_normalizer.value
    ancestry = state.eve, state.fault
    everything = particles, weights, raw, per_step, ancestry, saved
    if plan.num_groups is None:
        everything = jax.tree.map(lambda leaf: leaf[0], everything)
    particles, weights, raw, per_step, ancestry, saved = everything
    info = SMCInfo(**per_step, aux=history.aux, eve=ancestry[0], fault=ancestry[1], saved=saved)
    return SMCResult(particles, *weights, raw, info)


_SCALARS = ("ess", "resampled", "log_normalizer_increments", "unique_ancestors")


# Independent streams for the start, for each step and for the end, whatever the pieces in which the loop runs.
def _init_key(key: Array) -> Array:
    return jax.random.split(key, 3)[0]


def _step_key(key: Array, index: Array) -> Array:
    return jax.random.fold_in(jax.random.split(key, 3)[1], index)


def _final_key(key: Array) -> Array:
    return jax.random.split(key, 3)[2]


def _grouped(leaf: Array, plan: _Plan) -> Array:
    """(G * N, ...) as (G, N, ...)."""
    return leaf.reshape(*plan.shape, *leaf.shape[1:])
