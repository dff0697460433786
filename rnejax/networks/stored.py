"""A network and its weights in one file: the header says how to build the network, so the file is enough."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from ..checkpoint import CheckpointError, load_arrays, load_metadata, save_arrays


class StoredNetwork(NamedTuple):
    """A network from a file: `apply(params, *args)`, its weights, and all that the header says."""

    apply: Any
    params: dict[str, Any]
    metadata: dict[str, Any]


def save_network(
    path: str | os.PathLike[str],
    name: str,
    arguments: Mapping[str, Any],
    params: Any,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> None:
    """Write weights with the recipe of their network.

    Args:
        path: the file.
        name, arguments: what `build` makes the network from.
        params: the weights, as `functional` gives them.
        metadata: further entries of the header, JSON: how the weights were made.
        dtype: storage type of the weights, see `rnejax.checkpoint.save_arrays`.
    """
    header = dict(metadata or {}) | {"network": {"name": name, "arguments": dict(arguments)}}
    save_arrays(path, params, header, dtype)


def load_network(path: str | os.PathLike[str]) -> StoredNetwork:
    """Build the network that a file describes and fill it with the file's weights, in float32.

    Raises:
        FileNotFoundError, CheckpointError: as `rnejax.checkpoint.load_arrays`, or the header names no known network.
    """
    from . import build, functional

    recipe = load_metadata(path).get("network")
    if not isinstance(recipe, dict) or not {"name", "arguments"} <= recipe.keys():
        raise CheckpointError(f"{path} does not say which network it belongs to: its header has no entry 'network'")
    try:
        # Abstractly: the initial weights are not wanted, only their shapes.
        module = nnx.eval_shape(lambda: build(recipe["name"], jax.random.key(0), **recipe["arguments"]))
    except ValueError as error:
        raise CheckpointError(f"{path} was made for a network that this version does not have: {error}") from error
    apply, like = functional(module)
    params, metadata = load_arrays(path, like)
    return StoredNetwork(apply, params, metadata)
