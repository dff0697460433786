"""The thickness of strokes."""

import numpy as np
import pytest

from rnejax.systems.ink import stroke_thickness


@pytest.mark.parametrize(("width", "thickness"), [(2, 2.0), (4, 4.0), (3, 3 + 1 / 3)])
def test_the_thickness_of_a_bar_is_its_width(width, thickness):
    images = -np.ones((1, 28, 28, 1))
    images[0, :, 10 : 10 + width] = 1.0
    # At its two ends a bar of length L is less deep; that takes less than width^2 / (2 L) off.
    assert stroke_thickness(images)[0] == pytest.approx(thickness, abs=width**2 / 56)


def test_an_image_without_ink_has_thickness_zero():
    np.testing.assert_array_equal(stroke_thickness(-np.ones((2, 8, 8, 1))), [0.0, 0.0])
