r"""How well a picture of tokens fits a prompt: a reward, and a judge that shares nothing with it.

`Match` scores a picture against a prompt of `digit_tokens` with one of two networks (`load_matcher`),
and `judge` tells with the other one, and by measurement, whether it was met:

    reward = Match(load_matcher("reward"), "a bold slanted seven")
    target = rnejax.tilt(model, reward, gradient=True, at="x0")
    verdict = judge(tokens, "a bold slanted seven")
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_integers, check_number, is_traced
from . import digits
from .digit_tokens import NULL, NULL_DIGIT, NUM_OPTIONS, VOCAB_SIZE, classify, decode, ink_of, parse

MATCHERS = ("reward", "judge")
"""The networks that `load_matcher` knows."""


class LogProbs(NamedTuple):
    """Log-probabilities in nats of each option: digit (..., 10), width (..., 3), slant (..., 3)."""

    digit: jax.Array
    width: jax.Array
    slant: jax.Array


class Verdict(NamedTuple):
    """How well pictures fit prompts; all of shape (...). What a prompt does not say is True, and counts 0.

    Attributes:
      log_prob: log p of all that the prompt says, in nats, by the network "judge".
      digit: whether that network finds the digit more probable than any other.
      width, slant: whether these are as the prompt says, measured (`digit_tokens.classify`).
      all: whether all three are.
    """

    log_prob: np.ndarray
    digit: np.ndarray
    width: np.ndarray
    slant: np.ndarray
    all: np.ndarray


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["apply"])
@dataclass(frozen=True, eq=False)
class Matcher:
    """A network that tells digit, width and slant of pictures: a pytree, called with ink (..., 28, 28, 1) in [0, 1].

    The network's 16 outputs are three groups, and each is normalised by itself.
    """

    apply: Any
    params: Any

    def __call__(self, ink: jax.Array) -> LogProbs:
        """Log-probabilities of the options of each entry."""
        parts = jnp.split(self.apply(self.params, ink), np.cumsum(NUM_OPTIONS)[:-1], axis=-1)
        return LogProbs(*[jax.nn.log_softmax(part, axis=-1) for part in parts])


@lru_cache
def load_matcher(name: str) -> Matcher:
    """A shipped network that scores pictures against the entries of a condition.

    "reward" (strided convolutions, smooth, trained on the first half of the training images, also on pictures that are
    only partly known) is meant as a reward, of tokens or of predicted x_0. "judge" (another architecture, trained on
    the other half) is meant only to judge what was made with the help of the first: it has seen binary pictures only,
    and is sure of itself where it should not be on any other. Accuracies are in the model cards beside the checkpoints;
    `scripts/train_prompt_matchers.py` makes both.

    Args:
      name: "reward" or "judge".

    Returns:
      a pytree that is called with ink, shape (..., 28, 28, 1), from 0 (paper) to 1, and returns `LogProbs`.

    Raises:
      ValueError: if ``name`` is another word.
    """
    if name not in MATCHERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, MATCHERS))}: got {name!r}")
    from ..networks import load_network

    with resources.as_file(resources.files("rnejax") / "checkpoints" / f"digit_tokens_{name}.safetensors") as path:
        network = load_network(path)
    return Matcher(network.apply, network.params)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Match:
    """A reward: how well a picture fits a prompt, scale * (sum of log p(entry | picture) over what the prompt says).

    A pytree of data: another prompt, scale or weights of the network recompile nothing. With a "reward" matcher it is
    made for `rnejax.tilt` with ``gradient=True`` (rows of probabilities, of which it sees the expected ink) as
    well as without (tokens), at ``x0`` as at ``x``.

    Attributes:
      matcher: a function of ink, such as `load_matcher` returns.
      condition: a prompt, or (digit, width, slant), shape (3,), integers, as `digit_tokens.parse` returns it; null
        entries count 0.
      scale: multiplies the log-probabilities; at 1, the tilted law is that of the pictures given the prompt, as the
        matcher sees it.

    Raises:
      ValueError: for what is no condition, or no finite scale.
    """

    matcher: Any
    condition: Any
    scale: Any = 1.0

    _fields: ClassVar[tuple[str, ...]] = ("matcher", "condition", "scale")

    def __post_init__(self) -> None:
        condition = parse(self.condition) if isinstance(self.condition, str) else self.condition
        condition = condition if is_traced(condition) else np.asarray(condition)
        _check_conditions("condition", condition, condition.shape == (3,), "(3,)")
        object.__setattr__(self, "condition", condition if is_traced(condition) else condition.astype(np.int32))
        if not is_traced(self.scale):
            object.__setattr__(self, "scale", check_number("scale", self.scale))

    def __call__(self, tokens_or_rows: jax.Array) -> jax.Array:
        """In nats, a scalar, for tokens, shape (196,), or rows of probabilities, shape (196, 16).

        Differentiable in rows, by way of the expected ink (`digit_tokens.ink_of`).
        """
        ink = ink_of(tokens_or_rows)
        if ink.ndim != len(digits.IMAGE_SHAPE):
            shape = jnp.shape(tokens_or_rows)
            raise ValueError(f"a Match takes one picture, got shape {shape}; for more of them use jax.vmap(match)")
        return self.scale * sum(_log_probs_said(self.matcher(ink), jnp.asarray(self.condition)))

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._fields], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Match:
        self = object.__new__(cls)  # whatever JAX puts there in place of arrays is not checked
        for name, child in zip(cls._fields, children):
            object.__setattr__(self, name, child)
        return self


def judge(tokens: Any, conditions: Any) -> Verdict:
    """Whether pictures fit prompts, by a network that no reward should have seen, and by measurement.

    Width and slant are measured exactly, so ``width`` and ``slant`` of the verdict are facts, and the network's opinion
    of them is only in ``log_prob``. Which digit it is only the network can say. Where the prompt does not say the
    digit, the slant is counted from the upright of the one that the network sees.

    Args:
      tokens: shape (..., 196), integers from 0 to 15: complete pictures.
      conditions: (digit, width, slant), null for what is not said; shape (..., 3), or (3,) for one and the same, or
        its prompt.

    Returns:
      Verdict, numpy arrays of shape (...). A picture without ink has no width and no slant.

    Raises:
      ValueError: for other shapes, MASK or numbers out of range.
      ImportError: if ``mlxtend`` is not installed.
    """
    tokens = np.asarray(tokens)
    conditions = parse(conditions) if isinstance(conditions, str) else np.asarray(conditions)
    check_integers("tokens", tokens, VOCAB_SIZE - 1)
    images, leading = decode(tokens), tokens.shape[:-1]
    fits = conditions.shape in ((3,), (*leading, 3))
    _check_conditions("conditions", conditions, fits, f"(3,) or {(*leading, 3)}, as the tokens do")
    conditions = np.broadcast_to(conditions, (*leading, 3))
    found = load_matcher("judge")(jnp.asarray(images))
    log_prob = sum(_log_probs_said(found, jnp.asarray(conditions)))
    seen = np.asarray(jnp.argmax(found.digit, axis=-1))
    digit = conditions[..., 0]
    unsaid = conditions == np.array(NULL)
    measured = classify(images, np.where(digit == NULL_DIGIT, seen, digit))
    measured[..., 0] = seen
    agrees = unsaid | (measured == conditions)
    digit_fits, width_fits, slant_fits = np.moveaxis(agrees, -1, 0)
    return Verdict(np.asarray(log_prob), digit_fits, width_fits, slant_fits, agrees.all(-1))


def _log_probs_said(found: LogProbs, conditions: jax.Array) -> list[jax.Array]:
    """Of each entry the log-probability of what is said, and 0 where nothing is."""
    said = []
    for entry, (log_probs, options) in enumerate(zip(found, NUM_OPTIONS)):
        option = conditions[..., entry]
        one = jnp.take_along_axis(log_probs, jnp.minimum(option, options - 1)[..., None], axis=-1)[..., 0]
        said.append(jnp.where(option < options, one, 0.0))
    return said


def _check_conditions(name: str, conditions: Any, fits: bool, shape: str) -> None:
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, for digit, width and slant, got {conditions.shape}")
    check_integers(name, conditions, NULL)
