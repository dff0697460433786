"""How thick the strokes of a written digit are: a property of images that is measured, not differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np


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
