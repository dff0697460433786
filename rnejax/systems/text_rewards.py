"""Rewards of the sentences of `text`, in nats: that a word is in it, its length, which part of the book it is of.

Each is a pytree and a function of one sentence (or of any number, on leading axes), given in either of two ways:

- *tokens*: integers, shape (32,). MASK stands for what is not known yet, and says nothing.
- *rows*: probabilities of the tokens at each position, shape (32, 2048), as `rnejax.tilt(..., gradient=True)` gives to
  rewards. All rewards are differentiable in them. The rows of tokens are one-hot, and zeros for MASK; of them a reward
  is what it is of the tokens. Other rows are treated as if the positions were independent of each other.

Words, numbers and weights are data: with another word of as many pieces, another number or another group, what was
compiled is used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number, is_traced
from ..kernels import Array
from . import text

GROUPS = {"history": (1, 17), "poetry": (18, 22), "prophets": (23, 39), "gospels": (40, 66)}
"""The groups that the classifiers know, in the order of their log-probabilities: the first and the last book of each.

Law and history (Genesis to Esther), poetry and wisdom (Job to the Song of Solomon), prophets (Isaiah to Malachi), and
gospels and letters (the New Testament).
"""

CLASSIFIERS = ("reward", "judge")

_UNKNOWN = 5.0

MAX_PENALTY = 80.0
"""The largest finite penalty of a missing word, in nats: e^-80 is about what a float32 can still tell from 0."""

_T = TypeVar("_T", bound=type)


def _pytree(cls: _T) -> _T:
    """Registers a dataclass as a pytree whose fields are all data.

    As `jax.tree_util.register_dataclass`, but put together without `__init__`, which takes something else than the
    fields, and checks it.
    """
    names = [field.name for field in fields(cls)]

    def flatten(reward: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(reward, name)) for name in names], None

    def unflatten(_: None, values: Any) -> Any:
        reward: Any = object.__new__(cls)
        reward.__dict__.update(zip(names, values, strict=True))
        return reward

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


# ----- words and lengths


@_pytree
@dataclass(frozen=True, init=False, eq=False)
class ContainsWord:
    """0 where the sentence has the word, as a whole word, and -penalty where it has not.

    The word is there if its tokens follow one another and no piece that begins with a letter comes after them: "lord"
    is in "the lord's people", at the start of a sentence too, but not in "lords" nor in "the landlord". Only the
    spelling of `text.word_token_sequences` counts, wherever it stands. A MASK is no part of the word, and what it hides
    does not lengthen one.

    Of rows it is log(e^-penalty + (1 - e^-penalty) P), the log of the mean of exp(reward) where the word has the
    probability P = 1 - prod_i (1 - p_i), with p_i that it starts at position i: the product of the probabilities of its
    pieces, and of no letter after them. So it is never below -penalty, and nearly log P where P is far above
    e^-penalty.

    Its gradient is that of P divided by P: thousands of nats where the word is not expected, for tokens that would
    change the reward by a few. So proposals are told what changes would do (`changes`), not the gradient.

    Args:
        word: one word, or several, in the vocabulary's characters.
        penalty: in nats; `math.inf` allows nothing but sentences with the word.

    Raises:
        ValueError: as `text.encode` does of the word; or if the penalty is not positive, or above `MAX_PENALTY` and
            finite.
    """

    pieces: Array
    penalty: Array

    def __init__(self, word: str, penalty: Any = 10.0):
        (pieces,) = text.word_token_sequences(word)
        if not is_traced(penalty) and not (np.ndim(penalty) == 0 and penalty == math.inf):
            number = check_number("penalty", penalty, positive=True)
            if number > MAX_PENALTY:
                raise ValueError(
                    f"penalty must be at most {MAX_PENALTY:g} nats, or math.inf for a word that must be there: got "
                    f"{number:g}"
                )
        self.__dict__.update(pieces=jnp.asarray(pieces), penalty=_number(penalty))

    @property
    def word(self) -> str:
        return text.decode(self.pieces)

    def __call__(self, x: Any) -> Array:
        """The reward, shape (...), of tokens, shape (..., 32), or rows, shape (..., 32, 2048)."""
        return _log_mixture(self._probability(x), self.penalty)

    def changes(self, rows: Array) -> Array:
        """What it would do to the reward of rows, shape (32, 2048), if a position were a token: shape (32, 2048).

        P is a polynomial in the rows, and taken to be linear in each (it is but for a position that two possible words
        share).
        """
        probability, pullback = jax.vjp(self._probability, rows)
        (slope,) = pullback(jnp.ones_like(probability))
        changed = jnp.clip(probability + slope - jnp.sum(rows * slope, axis=-1, keepdims=True), 0.0, 1.0)
        before = jnp.maximum(_log_mixture(probability, self.penalty), -MAX_PENALTY)
        return jnp.maximum(_log_mixture(changed, self.penalty), -MAX_PENALTY) - before

    def _probability(self, x: Any) -> Array:
        x, is_rows = _sentences(x)
        if is_rows:
            matches = x[..., self.pieces]
            ends = 1 - jnp.sum(jnp.where(_begins_with_letter()[: text.VOCAB_SIZE], x, 0), axis=-1)
        else:
            matches = (x[..., None] == self.pieces).astype(self.penalty.dtype)
            ends = 1 - jnp.asarray(_begins_with_letter(), self.penalty.dtype)[x]
        length = len(self.pieces)
        starts = np.arange(text.LENGTH - length + 1)
        pieces = matches[..., starts[:, None] + np.arange(length), np.arange(length)]
        ends = jnp.concatenate([ends, jnp.ones_like(ends[..., :1])], axis=-1)  # the end of the sequence ends a word
        present = _reduce(lambda p, q: p * q, 1, pieces) * ends[..., length:]
        return _reduce(lambda p, q: p + q * (1 - p), 0, present)


@_pytree
@dataclass(frozen=True, init=False, eq=False)
class Length:
    """-(n - target)^2 / (2 spread^2), with n the number of tokens that are not PAD: of rows, its expectation.

    n is the number of tokens before the end, where nothing but PAD follows the first PAD, as in every sentence of the
    corpus. PAD inside a sentence does not end it. So it does not matter that, while a sentence is made, the predicted
    positions are not independent of each other: completions drawn from them have PAD in many places, but as many as
    they should. A MASK counts as a token; so give it predictions, ``at="x0"``.

    Args:
        target: in tokens, from 0 to 32 (of the corpus, 21.5 on average).
        spread: in tokens, the standard deviation of the reward as a density.

    Raises:
        ValueError: if they are not finite numbers, or the spread is not positive.
    """

    target: Array
    spread: Array

    def __init__(self, target: Any, spread: Any):
        if not is_traced(target) and not 0 <= check_number("target", target) <= text.LENGTH:
            raise ValueError(f"target must be a number of tokens from 0 to {text.LENGTH}: got {target}")
        if not is_traced(spread):
            check_number("spread", spread, positive=True)
        self.__dict__.update(target=_number(target), spread=_number(spread))

    def __call__(self, x: Any) -> Array:
        """The reward, shape (...), of tokens, shape (..., 32), or rows, shape (..., 32, 2048)."""
        x, is_rows = _sentences(x)
        ended = x[..., text.PAD] if is_rows else x == text.PAD
        n = jnp.sum(1 - ended.astype(self.target.dtype), axis=-1)
        return -0.5 * ((n - self.target) / self.spread) ** 2


def _number(value: Any) -> Array:
    return jnp.asarray(value, jnp.result_type(float))


@lru_cache(maxsize=1)
def _begins_with_letter() -> np.ndarray:
    """By token, MASK included: whether it would go on with a word."""
    return np.array([piece[:1].isalpha() for piece in text.pieces()] + [False])


def _reduce(combine: Callable[[Array, Array], Array], neutral: float, p: Array) -> Array:
    """What an associative function makes of the last axis: in pairs, so that it is a few operations, exact for zeros
    and ones in the gradient too.
    """
    while p.shape[-1] > 1:
        if p.shape[-1] % 2:
            p = jnp.concatenate([p, jnp.full_like(p[..., :1], neutral)], axis=-1)
        p = combine(p[..., 0::2], p[..., 1::2])
    return p[..., 0]


def _log_mixture(probability: Array, penalty: Array) -> Array:
    """log(e^-penalty + (1 - e^-penalty) P), log P for an infinite penalty; exact where P is 0 or 1.

    The gradient is 0 where the value is -inf.
    """
    is_hard = jnp.isinf(penalty)
    finite = jnp.where(is_hard, 1.0, penalty)
    is_small = probability < 0.5
    small = jnp.where(is_small, probability, 0)
    near = jnp.where(is_small, 1, probability)
    # Two forms of the same: the first is -penalty at P = 0, the second 0 at P = 1, without rounding.
    soft = jnp.where(
        is_small, -finite + jnp.log1p(jnp.expm1(finite) * small), jnp.log1p(jnp.expm1(-finite) * (1 - near))
    )
    is_possible = probability > 0
    hard = jnp.where(is_possible, jnp.log(jnp.where(is_possible, probability, 1)), -jnp.inf)
    return jnp.where(is_hard, hard, soft)


# ----- groups


def group_labels(books: Any) -> np.ndarray:
    """Which of `GROUPS` each book is in, by number, from 0: int32, the shape of `books`.

    Args:
        books: from 1 to 66, as `text.load_with_books` gives them.

    Raises:
        ValueError: for a number outside.
    """
    books = np.asarray(books)
    lasts = [last for _, last in GROUPS.values()]
    outside = books[(books < 1) | (books > lasts[-1])]
    if outside.size:
        raise ValueError(f"books are numbered from 1 to {lasts[-1]}: got {outside.flat[0]}")
    return np.searchsorted(lasts, books).astype(np.int32)


@lru_cache
def load_text_classifier(name: str) -> Callable[[Any], Array]:
    """A shipped classifier: fn(x) -> log-probabilities of the `GROUPS` that a sentence may be from.

    "reward" (`pairs`, smooth, trained on the first half of the training sentences, some of whose tokens were masked) is
    meant as a reward, of tokens or predicted rows. "judge" (`windows`, another architecture, trained on the other half)
    is meant only to judge what was made with the help of the first. A sentence tells little of where it is from, so
    that either errs in about a quarter of the cases: the model cards beside the checkpoints say how often, and
    `scripts/train_text_classifiers.py` makes both.

    Args:
        name: "reward" or "judge".

    Returns:
        a pytree that is called with tokens, shape (..., 32), or rows, shape (..., 32, 2048), and returns (..., 4). PAD
        and MASK do not count; of nothing else, "reward" says the groups' shares.

    Raises:
        ValueError: if `name` is another word.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, CLASSIFIERS))}: got {name!r}")
    from ..checkpoint import load_arrays

    path = resources.files("rnejax") / "checkpoints" / f"text_{name}.safetensors"
    # What is cached must be arrays, also where this is first called while something is traced.
    with resources.as_file(path) as file, jax.ensure_compile_time_eval():
        params, metadata = load_arrays(file)
        params = jax.tree.map(jnp.asarray, params)
    return jax.tree_util.Partial(NETWORKS[metadata["network"]], params)


@_pytree
@dataclass(frozen=True, init=False, eq=False)
class Topic:
    """scale * log p(group | sentence): at scale 1, the tilt of the model by Bayes' rule to sentences from that group.

    As far, that is, as the classifier is right. A larger scale asks for sentences that it is surer of.

    Args:
        classifier: a pytree, such as `load_text_classifier` returns.
        group: one of `GROUPS`, or its number.
        scale: a factor.

    Raises:
        ValueError: for another group, or a scale that is no finite number.
    """

    classifier: Any
    group: Array
    scale: Array

    def __init__(self, classifier: Callable[[Any], Array], group: str | int, scale: Any = 1.0):
        names = list(GROUPS)
        if isinstance(group, str) or not is_traced(group):
            known = names if isinstance(group, str) else range(len(names))
            if group not in known:
                raise ValueError(
                    f"group must be one of {', '.join(map(repr, names))}, or its number from 0: got {group!r}"
                )
        if not is_traced(scale):
            check_number("scale", scale)
        number = names.index(group) if isinstance(group, str) else group
        self.__dict__.update(classifier=classifier, group=jnp.asarray(number, jnp.int32), scale=_number(scale))

    def __call__(self, x: Any) -> Array:
        """The reward, shape (...), of tokens, shape (..., 32), or rows, shape (..., 32, 2048)."""
        return self.scale * jnp.take(self.classifier(x), self.group, axis=-1)


def pairs(params: Any, x: Any) -> Array:
    """Log-probabilities, shape (..., n), from the pieces that are there and from those that stand side by side.

    Vectors of the pieces, averaged over the known tokens and five zeros, and products of a vector of a piece and
    another one of the next, averaged over the known pairs and five zeros; then one hidden layer. All smooth (SiLU). Of
    rows, the sums are expectations over independent positions.

    Args:
        params: arrays "pieces", "first" and "second", (2048, width); "hidden" and "head", with "kernel" and "bias".
        x: tokens, shape (..., 32), or rows, shape (..., 32, 2048).
    """
    known = _known(x)
    pieces = _average(_embed(params["pieces"], x), known)
    both = _embed(params["first"], x)[..., :-1, :] * _embed(params["second"], x)[..., 1:, :]
    neighbours = _average(both, known[..., :-1] * known[..., 1:])
    hidden = jax.nn.silu(_dense(params["hidden"], jnp.concatenate([pieces, neighbours], axis=-1)))
    return jax.nn.log_softmax(_dense(params["head"], hidden))


def windows(params: Any, x: Any) -> Array:
    """Log-probabilities, shape (..., n), from the strongest response of each feature of three tokens in a row.

    A convolution over positions, ReLU, and the maximum over those that are known (Kim 2014).

    Args:
        params: arrays "pieces" (2048, width) and "head", as for `pairs`; "convolution", its kernel (3, width, features)
            and bias.
        x: as for `pairs`.
    """
    kernel = params["convolution"]["kernel"]
    vectors = _embed(params["pieces"], x)
    nothing = jnp.zeros_like(vectors[..., :1, :])
    vectors = jnp.concatenate([nothing, vectors, nothing], axis=-2)
    windows = jnp.concatenate([vectors[..., i : i + text.LENGTH, :] for i in range(3)], axis=-1)
    features = jax.nn.relu(windows @ kernel.reshape(-1, kernel.shape[-1]) + params["convolution"]["bias"])
    strongest = jnp.max(features * _known(x)[..., None], axis=-2)
    return jax.nn.log_softmax(_dense(params["head"], strongest))


NETWORKS: dict[str, Callable[[Any, Any], Array]] = {"pairs": pairs, "windows": windows}
"""By the name that a checkpoint's header gives."""


def _known(x: Any) -> Array:
    """How much of a token there is at each position, shape (..., 32): 0 for PAD and MASK."""
    x, is_rows = _sentences(x)
    if is_rows:
        return jnp.sum(x, axis=-1) - x[..., text.PAD]
    return ((x != text.PAD) & (x != text.MASK)).astype(jnp.result_type(float))


def _embed(table: Array, x: Any) -> Array:
    """The vector of the token at each position, or their mean, shape (..., 32, width): zeros for PAD and MASK."""
    x, is_rows = _sentences(x)
    table = table.at[text.PAD].set(0)
    if is_rows:
        return jnp.matmul(x, table, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table, jnp.zeros_like(table[:1])])[x]


def _average(vectors: Array, known: Array) -> Array:
    """Over positions, with `_UNKNOWN` zeros more, so that little is made of few tokens."""
    return jnp.sum(vectors, axis=-2) / (jnp.sum(known, axis=-1, keepdims=True) + _UNKNOWN)


def _dense(layer: Any, x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _sentences(x: Any) -> tuple[Array, bool]:
    """The argument of a reward as an array, and whether it is rows of probabilities; ValueError if it is neither."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.integer) and x.shape[-1:] == (text.LENGTH,):
        return x, False
    if jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-2:] == (text.LENGTH, text.VOCAB_SIZE):
        return x, True
    raise ValueError(
        f"a sentence is integer tokens, shape (..., {text.LENGTH}), or rows of token probabilities, shape (..., "
        f"{text.LENGTH}, {text.VOCAB_SIZE}): got {x.dtype}, shape {x.shape}"
    )
