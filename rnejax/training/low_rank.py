"""A model of numbers or tokens of which only low-rank changes of its weights are tuned."""

from __future__ import annotations

from collections.abc import Callable
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
    if model.params is None:
        raise ValueError("the model has no weights to adapt: DiffusionModel(process, fn, ..., params=weights)")
    adapters = low_rank_adapters(key, model.params, rank)
    return model._replace(fn=_Adapted(model.fn, model.params, scale), params=adapters)


@jax.tree_util.register_static
class _Adapted:
    def __init__(self, fn: Callable[..., Array], params: Any, scale: float):
        self.fn, self.params, self.scale = fn, params, scale

    def __call__(self, adapters: Any, x: Array, t: Any, condition: Any) -> Array:
        return self.fn(adapted(self.params, adapters, self.scale), x, t, condition)
