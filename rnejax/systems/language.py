"""Small autoregressive models of the sentences of `rnejax.systems.text`: rewards and judges of what is filled in.

    log p(x) = sum over positions i of log p(x_i | x_1, ..., x_{i-1}),

by a causal transformer, PAD being a token like any other, so that they know where a sentence ends. "reward" has learned
from the first half of the training sentences, "judge" from the second, with other sizes and another seed;
`scripts/train_language_models.py` makes both, and their model cards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp

from .text import MASK, PAD

NAMES = ("reward", "judge")


def next_token_log_probs(network: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """log p(x_i | x_<i) of every token, in nats.

    Args:
      network: logits (length, vocab_size) of (length,) tokens, each of which sees those before it and itself.
      x: tokens, (length,), none of them MASK.
    """
    # What a token is predicted from are those before it; MASK stands before the first.
    before = jnp.concatenate([jnp.full((1,), MASK, x.dtype), x[:-1]])
    log_probs = jax.nn.log_softmax(network(before), axis=-1)
    return jnp.take_along_axis(log_probs, x[:, None], axis=-1)[:, 0]


@lru_cache
def load_language_model(name: str) -> Callable[[jax.Array], jax.Array]:
    """A shipped model: fn(x) -> log p(x_i | x_<i) of each of the 32 tokens of one sentence, a pytree.

    Args:
      name: "reward" or "judge".

    Raises:
      ValueError: if `name` is another word.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, NAMES))}: got {name!r}")
    from ..networks import load_network

    with resources.as_file(resources.files("rnejax") / "checkpoints" / f"language_{name}.safetensors") as path:
        network = load_network(path)
    return jax.tree_util.Partial(_log_probs, jax.tree_util.Partial(network.apply, network.params))


def _log_probs(network: Any, x: jax.Array) -> jax.Array:
    return next_token_log_probs(lambda tokens: network(tokens, jnp.zeros(())), x)


def until_the_end(x: jax.Array) -> jax.Array:
    """True up to the end of a sentence and at its first PAD, (length,): what comes after says nothing."""
    return jnp.cumsum(x == PAD) <= 1
