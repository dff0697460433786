"""Low-rank adapters (LoRA): weights W + A B with W fixed, on any pytree of weights.

Of flax's own LoRA modules there is one for dense layers; here a weight of any shape is taken for a matrix from all of
its axes but the last to the last, so that convolutions and attention have adapters as well.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count

Array = jax.Array


class Adapter(NamedTuple):
    """The factors of a change of one weight, (inputs, rank) and (rank, outputs)."""

    down: Array
    up: Array


def low_rank_adapters(key: Array, params: Any, rank: int) -> dict[str, Adapter]:
    """Adapters for all weights of two axes or more, by path; together they change nothing to begin with.

    Args:
      key: a typed key; ``down`` is normal with variance 1 / inputs, ``up`` zero.
      params: a pytree of weights.
      rank: of the changes; no higher than a weight's own.

    Raises:
      ValueError: for a rank below 1, or weights none of which is a matrix.
    """
    check_count("rank", rank)
    adapters = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        if jnp.ndim(leaf) < 2:
            continue
        outputs = leaf.shape[-1]
        inputs = int(np.prod(leaf.shape[:-1]))
        size = min(rank, inputs, outputs)
        down = jax.random.normal(jax.random.fold_in(key, i), (inputs, size), leaf.dtype) / np.sqrt(inputs)
        adapters[jax.tree_util.keystr(path)] = Adapter(down, jnp.zeros((size, outputs), leaf.dtype))
    if not adapters:
        raise ValueError("params hold no weight of two axes or more, and nothing else has a rank to adapt")
    return adapters


def adapted(params: Any, adapters: dict[str, Adapter], scale: float = 1.0) -> Any:
    """The weights W + scale A B, of which only the adapters have a gradient.

    Raises:
      ValueError: for adapters that belong to no weight.
    """
    known = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    strange = sorted(adapters.keys() - known)
    if strange:
        raise ValueError(f"adapters belong to other weights: there is no {strange[0]}")

    def change(path: Any, leaf: Array) -> Array:
        leaf = jax.lax.stop_gradient(leaf)
        adapter = adapters.get(jax.tree_util.keystr(path))
        return leaf if adapter is None else leaf + scale * (adapter.down @ adapter.up).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(change, params)
