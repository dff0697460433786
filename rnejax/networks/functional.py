"""From a flax nnx module to a pure function and a plain dictionary of weights."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from ..adapters import Functional


def functional(module: nnx.Module) -> tuple[Functional, dict[str, Any]]:
    """(apply, params) with `apply(params, *args, **kwargs) == module(*args, **kwargs)`.

    `params` is a nested dictionary of arrays, which every jax and optax transformation understands. `nnx.jit` is not
    needed, and not wanted in a loop: it walks the module in Python at every call.

    Args:
        module: a flax nnx module whose only state is weights (`nnx.Param`): no batch statistics, no random streams.

    Raises:
        ValueError: if the module has other state, which a pure function would silently forget.
    """
    graph, weights, *others = nnx.split(module, nnx.Param, ...)
    (rest,) = others
    if jax.tree.leaves(rest):
        kinds = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)})
        raise ValueError(f"the module must hold weights only (nnx.Param): it also holds {', '.join(kinds)}")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    return Functional(graph, rest, shapes), nnx.to_pure_dict(weights)
