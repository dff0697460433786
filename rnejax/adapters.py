"""Flax modules as pure functions of their weights, ``fn(params, x, t, condition)``; weights are checked on the way in.

Flax is looked at only where the user has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .kernels import Array


def adapt(fn: Any, params: Any) -> tuple[Callable[..., Array], Any]:
    """A plain function for a flax module, and its weights: those given, else the nnx module's own.

    Raises:
      ValueError: where fn cannot be called, a linen module comes without variables, or the weights given have another
        structure or other shapes than the nnx module's.
    """
    if "flax" in sys.modules:
        from flax import linen, nnx

        if isinstance(fn, nnx.Module):
            call, own = split_nnx(fn)
            return call, own if params is None else call.weights(params)
        if isinstance(fn, linen.Module):
            if params is None:
                raise ValueError(
                    "a linen module needs its variables: DiffusionModel(process, module, params=variables)"
                )
            return LinenCall(fn), params
    if not callable(fn):
        raise ValueError(f"fn must be a function, a flax nnx module or a flax linen module, got {type(fn).__name__}")
    return fn, fn.weights(params) if isinstance(fn, NnxCall) else params


def weights_like(fn: Any) -> tuple[Any, Any]:
    """fn as a function that takes weights, and what these look like, where fn says so (an nnx module), else None."""
    if "flax" in sys.modules:
        from flax import nnx

        if isinstance(fn, nnx.Module):
            call, _ = split_nnx(fn)
            return call, call.like
    return fn, None


def split_nnx(module: Any) -> tuple[NnxCall, Any]:
    """An nnx module as a pure function, and its state (all but random streams) as nested dictionaries of arrays."""
    from flax import nnx

    graph, random_streams, state = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
    return NnxCall(graph, random_streams, jax.tree.map(_abstract, state)), nnx.to_pure_dict(state)


class Functional:
    """An nnx module's graph as a pure function of its state: ``apply(params, *args) == module(*args)``.

    Two of them are equal, and hash alike, where their modules have the same structure, so that nothing that is
    compiled for one is compiled again for the other. The random streams of dropout are no weights: nothing reads them
    in evaluation mode, the only one allowed here unless streams are passed as arguments.
    """

    def __init__(self, graph: Any, random_streams: Any, abstract: Any):
        self.graph = graph
        self._random_streams = random_streams
        self._abstract = abstract  # nnx.State of shapes: the names and kinds of the weights

    def as_prediction(self) -> NnxCall:
        """What a model calls, ``fn(params, x, t, condition)``: a module that takes no condition is given none."""
        return NnxCall(self.graph, self._random_streams, self._abstract)

    @property
    def like(self) -> Any:
        """The weights' names, shapes and types: nested dictionaries of ``jax.ShapeDtypeStruct``."""
        from flax import nnx

        return nnx.to_pure_dict(self._abstract)

    def weights(self, params: Any) -> Any:
        """Nested dictionaries of arrays from such dictionaries or from an ``nnx.State``.

        Raises:
          ValueError: where their structure or a shape is not the module's.
        """
        from flax import nnx

        if isinstance(params, nnx.State):
            params = nnx.to_pure_dict(nnx.split_state(params, nnx.RngState, ...)[1])
        check_weights(params, self.like, "the nnx module")
        return params

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        from flax import nnx

        # Variables of our own for this call: those of the user's module belong to another trace.
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        streams = jax.tree.map(lambda leaf: leaf, self._random_streams)
        nnx.replace_by_pure_dict(state, params)
        module = nnx.merge(self.graph, streams, state)
        before = _named(nnx.to_pure_dict(nnx.state(module)))
        output = module(*args, **kwargs)
        after = _named(nnx.to_pure_dict(nnx.state(module)))
        changed = [name for name, leaf in before.items() if after.get(name) is not leaf]
        if changed:
            raise ValueError(
                f"the nnx module changes its own state when it is called ({', '.join(changed[:3])}), as dropout and "
                "batch normalisation do in training mode; a density needs a fixed function: call module.eval() first"
            )
        return output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Functional) and type(other) is type(self) and self.graph == other.graph

    def __hash__(self) -> int:
        return hash(self.graph)


class NnxCall(Functional):
    """An nnx module as what a model calls, ``fn(params, x, t, condition)``."""

    def __call__(self, params: Any, x: Array, t: Array, condition: Any) -> Array:
        return super().__call__(params, x, t, *([] if condition is None else [condition]))


class LinenCall:
    """A linen module as a pure function of its variables."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, params: Any, x: Array, t: Array, condition: Any) -> Array:
        return self.module.apply(params, x, t) if condition is None else self.module.apply(params, x, t, condition)

    def check(self, params: Any, *arguments: Any) -> None:
        """Raises ValueError where a collection of variables is not the one that ``module.init`` would make."""
        made = jax.eval_shape(self.module.init, jax.random.key(0), *arguments)
        wanted = {name: variables for name, variables in made.items() if name == "params" or name in params}
        check_weights(dict(params), wanted, f"the linen module {type(self.module).__name__}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinenCall) and self.module == other.module

    def __hash__(self) -> int:
        return hash(self.module)


def check_weights(given: Any, wanted: Any, whose: str) -> None:
    """Raises ValueError, with the first differences, where names or shapes of two pytrees of arrays differ."""
    have, want = _named(given), _named(wanted)
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not wanted" for name in have if name not in want]
    wrong += [
        f"{name} is {jnp.shape(have[name])}, not {leaf.shape}"
        for name, leaf in want.items()
        if name in have and jnp.shape(have[name]) != leaf.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"params are not those of {whose}: {'; '.join(wrong[:3])}{more}")


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
