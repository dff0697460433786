"""Networks (flax nnx), built by name, so that a checkpoint's header says how to build the network it belongs to.

The core imports nothing from here: any function of (x, t) is a network to it.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .classifier import PooledClassifier, StridedClassifier
from .egnn import EGNN
from .functional import Functional, functional
from .low_rank import Adapter, adapted, low_rank_adapters
from .mlp import MLP
from .stored import StoredNetwork, load_network, save_network
from .tokens import TokenTransformer, TokenUNet
from .unet import UNet

NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "egnn": EGNN,
    "mlp": MLP,
    "pooled_classifier": PooledClassifier,
    "strided_classifier": StridedClassifier,
    "token_transformer": TokenTransformer,
    "token_unet": TokenUNet,
    "unet": UNet,
}

__all__ = [
    "EGNN",
    "MLP",
    "NETWORKS",
    "Adapter",
    "Functional",
    "PooledClassifier",
    "StoredNetwork",
    "StridedClassifier",
    "TokenTransformer",
    "TokenUNet",
    "UNet",
    "adapted",
    "build",
    "default_arguments",
    "functional",
    "load_network",
    "low_rank_adapters",
    "num_weights",
    "save_network",
]


def build(name: str, key: jax.Array, **arguments: Any) -> nnx.Module:
    """The network of this name with fresh weights.

    Args:
        name: one of `NETWORKS`.
        key: a typed key for the initial weights.
        arguments: of the network's constructor; lists, as JSON and YAML give them, serve as tuples.

    Raises:
        ValueError: unknown name or argument; the message names the nearest valid one.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}{_nearest(name, NETWORKS)}: there are {', '.join(NETWORKS)}")
    known = list(_parameters(name))
    for argument in arguments:
        if argument not in known:
            raise ValueError(
                f"network {name!r} has no argument {argument!r}{_nearest(argument, known)}: it has {', '.join(known)}"
            )
    settled = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return NETWORKS[name](**settled, rngs=nnx.Rngs(key))


def default_arguments(name: str) -> dict[str, Any]:
    """What `build` takes where nothing is given, of a known network; empty for an unknown one."""
    if name not in NETWORKS:
        return {}
    defaults = {parameter.name: parameter.default for parameter in _parameters(name).values()}
    return {argument: value for argument, value in defaults.items() if value is not inspect.Parameter.empty}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    # Of __init__: the signature of an nnx class itself is that of its metaclass, (*args, **kwargs).
    parameters = inspect.signature(NETWORKS[name].__init__).parameters
    return {parameter: each for parameter, each in parameters.items() if parameter not in ("self", "rngs")}


def num_weights(params: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _nearest(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
