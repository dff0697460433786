"""What is measured on pictures of a written digit, not differentiated: how thick its strokes are, and how they lean."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

THRESHOLD = 128
"""The lowest grey level that is ink."""

SPECK = 0.1
"""Pieces of ink smaller than this share of the largest do not belong to the digit.

In the training images smaller pieces have up to 8 pixels; from 13 pixels on they are strokes.
"""

STEM_ANGLES = np.arange(-40.0, 41.0, 2.0)
"""Degrees between which `stem_slant` decides."""


class Attributes(NamedTuple):
    """What is measured on images: width of the strokes in pixels; slant in degrees, positive to the right."""

    width: np.ndarray
    slant: np.ndarray


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


def stroke_thickness(images: Any, threshold: float = 0.0) -> np.ndarray:
    """Four times the mean depth of the ink, in pixels.

    The depth of an inked pixel is the distance from its centre to the nearest pixel without ink, less half a pixel. In
    a long bar of width w depths run from 1/2 to w/2 and back, with a mean of w/4 for even w and (w + 1/w)/4 for odd w.

    A numpy function of a batch on the host, as a black box would be; for ``rnejax.tilt(..., host=True)``.

    Args:
      images: (n, height, width, 1), ink above ``threshold``.
      threshold: between ink and paper; 0 is the middle of model coordinates [-1, 1].

    Returns:
      (n,); 0 for an image without ink.

    Raises:
      ValueError: for arrays of another rank.
    """
    from scipy.ndimage import distance_transform_edt

    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 1:
        raise ValueError(f"images must have shape (n, height, width, 1), got {images.shape}")
    thickness = np.zeros(len(images))
    for i, ink in enumerate(images[..., 0] > threshold):
        if ink.any():
            # A frame of paper: strokes that touch the border of the image end there.
            depth = distance_transform_edt(np.pad(ink, 1))[1:-1, 1:-1][ink] - 0.5
            thickness[i] = 4.0 * depth.mean()
    return thickness


def measure(images: Any) -> Attributes:
    r"""Width of the strokes and slant of images, made binary by `binarise`, without specks (`SPECK`).

    **Width** is that of the round pen w that would leave as much ink A with as long an outline P. For strokes of length
    L along which such a pen is drawn (Steiner's formula, with the Euler number chi = pieces - holes for the round ends)

        P = 2 L + chi pi w,   A = w L + chi pi w^2 / 4,   so   chi pi w^2 / 4 - P w / 2 + A = 0,

    where w is the smaller root, for an open stroke as for a ring and a disc (where there is no root, as in several
    blots, that of the disc, 4 A / P). The outline is counted by Cauchy and Crofton: how often lines in eight directions
    cross it.
    Length and ends of the strokes drop out. Bars and rings of 2 to 4 pixels come out right to a tenth of a pixel, in
    the mean over their positions; where strokes cross, up to 5 % too wide. `stroke_thickness`, four times
    the mean depth of the ink, is 2 or more for whatever there is, while a quarter of the training images has a width
    below 2.3.

    **Slant** is the angle of the shear that makes the second moments of the ink symmetric. About its centroid, with x
    to the right and y *upwards*,

        tan(slant) = mu_xy / mu_yy,   mu_xy = mean of x y,   mu_yy = mean of y^2:   positive = top to the right, as
                                                                                               italics lean.

    A shear by an angle a, x -> x + y tan(a), adds tan(a) to tan(slant). It is 0 for an image that is its own mirror
    image, and for ink in a single row, but not for every digit that stands upright; see `digit_tokens.upright_slants`.

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

    Each image is sheared back by the angles `STEM_ANGLES`; the one where the sum of the squares of the ink in
    each column is largest is taken. So letters are straightened to be read by machines (Vinciarelli and Luettin 2001,
    who count columns with a single stroke only). Unlike the slant of `measure` it sees no bars and bowls, but it
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


def _range(values: np.ndarray) -> str:
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        return "no real numbers"
    return f"from {values.min():g} to {values.max():g}"
