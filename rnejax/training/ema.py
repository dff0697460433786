"""Exponential moving averages of weights."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def ema_update(average: Tree, new: Tree, decay: jax.Array | float) -> Tree:
    """decay * average + (1 - decay) * new, leaf by leaf.

    The *old* average is kept for the most part: with decay = 0.999 one step moves it by a thousandth of the way. After
    n steps from a_0 with constant new value b, it is b + decay^n (a_0 - b).
    """
    return jax.tree.map(lambda old, fresh: old + (1.0 - decay) * (fresh - old), average, new)


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + step) / (10 + step)): a short memory at first, so that the initial weights are soon forgotten."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
