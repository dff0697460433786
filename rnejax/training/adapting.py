"""A model of numbers or tokens of which only some weights are tuned: low-rank changes, or parts of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..kernels import Array
from ..model import DiffusionModel
from ..networks import adapted, low_rank_adapters


def low_rank_model(key: Array, model: DiffusionModel, rank: int, scale: float = 1.0) -> DiffusionModel:
    """The same model, whose ``params`` are adapters (LoRA): weights W + scale A B with W fixed. It begins as it was.

    Once tuned, ``model.with_params(adapted(model.params, adapters, scale))`` is a model with plain weights again, which
    costs what the first one does and can be saved.

    Args:
      key: a typed key.
      model: with weights in ``params``.
      rank: of the changes.
      scale: of the changes.

    Raises:
      ValueError: for a model without weights, or what `rnejax.networks.low_rank_adapters` refuses.
    """
    _check_weights(model)
    adapters = low_rank_adapters(key, model.params, rank)
    return model._replace(fn=_Merged(model.fn, lambda changes: adapted(model.params, changes, scale)), params=adapters)


def partial_model(model: DiffusionModel, parts: Sequence[str]) -> DiffusionModel:
    """The same model, whose ``params`` are some of its network's parts, by their names at the top; others are fixed.

    Once tuned, ``model.with_params(model.params | tuned.params)`` is a model with all of its weights again.

    Raises:
      ValueError: for a model without weights, no parts, or names that its network does not have.
    """
    _check_weights(model)
    known = sorted(model.params) if isinstance(model.params, dict) else []
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        raise ValueError(f"parts must be among {', '.join(known)}: got {', '.join(map(str, unknown)) or 'none'}")
    weights = {part: model.params[part] for part in parts}
    return model._replace(fn=_Merged(model.fn, lambda changed: model.params | changed), params=weights)


def _check_weights(model: DiffusionModel) -> None:
    if model.params is None:
        raise ValueError("the model has no weights to adapt: DiffusionModel(process, fn, ..., params=weights)")


@jax.tree_util.register_static
class _Merged:
    """A network's function of other weights, from which its own are made."""

    def __init__(self, fn: Callable[..., Array], merge: Callable[[Any], Any]):
        self.fn, self.merge = fn, merge

    def __call__(self, weights: Any, x: Array, t: Any, condition: Any) -> Array:
        return self.fn(self.merge(weights), x, t, condition)
