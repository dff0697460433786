"""Handwritten digits of 8 x 8 pixels: the 1,797 images (some 180 of each digit) that scikit-learn ships.

Small enough for matrices between all pixels: what a linear SDE with a dense drift does to real data.
Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (its test part), UCI repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IMAGE_SHAPE = (8, 8)
LEVELS = 16
"""the largest grey level"""


class SmallDigits(NamedTuple):
    """Images and their digits.

    Attributes:
      images: grey levels from 0 to 16 over 16, (n, 64), float64.
      labels: digits, (n,).
    """

    images: np.ndarray
    labels: np.ndarray


def load(digits: Sequence[int] = range(10)) -> SmallDigits:
    """All images of some digits, in the order in which they were collected.

    Raises:
      ValueError: for what is no digit, one that is named twice, or none.
      ImportError: if ``scikit-learn`` is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the small digits come with the package scikit-learn, which is not installed: pip install scikit-learn "
            "(rnejax's extra 'digits')"
        ) from error
    wanted = list(digits)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(10)):
        raise ValueError(f"digits must be different whole numbers from 0 to 9, at least one: got {wanted}")
    found = load_digits()
    members = np.isin(found.target, wanted)
    images = found.images.reshape(len(found.images), -1)[members] / LEVELS
    return SmallDigits(images.astype(np.float64), found.target[members].astype(np.int64))
