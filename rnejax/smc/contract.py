"""What the loop is given and what it returns, and the checks that what it is given fits.

Checks on shapes and dtypes happen while a run is traced: at the first call, before anything is computed, and at no
cost later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from rnejax.smc.faults import Fault

__all__ = ["SAVEABLE", "FeynmanKac", "SMCInfo", "SMCResult"]

SAVEABLE = ("ancestors", "log_weights", "log_increments", "particles")
"""What ``save`` may name."""


class FeynmanKac(Protocol):
    """What is run: a pytree (say, a frozen registered dataclass) with dynamic arrays and hashable static fields.

    Particles are any pytree of arrays that all have the leading axis n (all particles of all groups); whatever is
    cached per particle belongs into it, since resampling gathers it whole. Values that particles share belong into
    the problem, ``steps`` or aux.
    """

    def init(self, key: Array, num_particles: int) -> tuple[Any, Array]:
        """n initial particles and their log-weights (n,)."""
        ...

    def step(self, key: Array, particles: Any, step: Any) -> tuple[Any, Array, Any]:
        """All n particles after one step, their log-increments (n,), and a pytree to be stacked into ``info.aux``.

        ``step`` is one slice of the ``steps`` given to `run`. Particles keep their structure, shapes and dtypes.
        """
        ...

    def position(self, particles: Any) -> Any:
        """What is returned and saved as particles; leading axis n."""
        ...


class SMCInfo(NamedTuple):
    """What happened, in order of execution. With groups, a group axis comes first (except in ``aux``).

    Attributes:
        ess: (steps,) effective sample size after each step's weighing.
        resampled: (steps,) whether each step began with a resampling.
        num_resamplings: () how many there were, a final one included.
        log_normalizer_increments: (steps,) what each step added to log Z, nats. Their sum and the log-mean of the
            initial weights make ``log_normalizer``.
        unique_ancestors: (steps,) how many of the initial particles have descendants during each step.
        aux: third value of ``problem.step``, each leaf with a leading axis of steps.
        eve: (num_particles,) index of the initial ancestor of each final particle (within its group).
        fault: the first `Fault`, of scalars; ``fault.code`` is 0 if there was none.
        saved: what ``save`` asked for. "ancestors" (steps, num_particles), within the group; "log_weights",
            centred, after each step's weighing; "log_increments"; "particles": positions after each step.
    """

    ess: Array
    resampled: Array
    num_resamplings: Array
    log_normalizer_increments: Array
    unique_ancestors: Array
    aux: Any
    eve: Array
    fault: Fault
    saved: dict[str, Any]


class SMCResult(NamedTuple):
    """Weighted particles and the estimate of log Z. With groups, a group axis comes first everywhere.

    Attributes:
        particles: ``problem.position`` of the final particles, leading axis (num_particles,).
        log_weights: (num_particles,), centred: their mean weight is one, and ``exp(log_normalizer + log_weights)``
            are the unnormalised weights.
        log_normalizer: (), nats. Its exponential is unbiased; itself, it is low by about half its variance.
        state: the final particles as ``problem.step`` left them.
        info: `SMCInfo`.
    """

    particles: Any
    log_weights: Array
    log_normalizer: Array
    state: Any
    info: SMCInfo


def require_leading_axis(particles: Any, total: int) -> None:
    """Every array of the initial particles has one entry per particle."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(particles):
        if leaf.shape[:1] != (total,):
            raise ValueError(
                f"every array in the particles must have the leading axis {total} (all particles of all groups), since "
                f"they are gathered together; problem.init returned particles{jax.tree_util.keystr(path)} of shape "
                f"{leaf.shape}"
            )


def strongly_typed(particles: Any) -> Any:
    """Python scalars and the like leave weak types behind, with which a loop's state would change its type."""

    def convert(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(convert, particles)


def log_weight_array(values: Any, source: str, name: str, total: int) -> Array:
    values = jnp.asarray(values)
    if values.shape != (total,):
        raise ValueError(f"{source} must return {name} of shape ({total},), one per particle; got {values.shape}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{source} must return {name} of a floating-point dtype, got {values.dtype}")
    return values


def require_same_layout(before: Any, after: Any) -> None:
    given: Any = jax.tree.structure(before)
    returned: Any = jax.tree.structure(after)
    if given != returned:
        raise ValueError(
            f"problem.step must return particles of the structure it was given: given {given}, returned {returned}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"problem.step must keep the shapes and dtypes of particles: particles{jax.tree_util.keystr(path)} "
                f"went from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
            )


def require_pytree(problem: Any) -> None:
    if jax.tree_util.all_leaves([problem]):
        raise TypeError(
            f"the problem must be a pytree (register {type(problem).__name__} with jax.tree_util.register_dataclass), "
            "so that its arrays can change without recompilation"
        )


def count_steps(steps: Any) -> int:
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(steps)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "steps must be a pytree of arrays with one common leading axis, the number of steps, of at least 1; got "
            f"leading axes {sorted(lengths)}"
        )
    return lengths.pop()[0]


def saved_names(save: Iterable[str]) -> tuple[str, ...]:
    names = (save,) if isinstance(save, str) else tuple(sorted(set(save)))
    if unknown := [name for name in names if name not in SAVEABLE]:
        raise ValueError(f"save may name {', '.join(SAVEABLE)}; got {', '.join(map(repr, unknown))}")
    return names
