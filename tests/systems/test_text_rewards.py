"""Rewards of sentences: of tokens against reading the text, of rows against sums over all that they may become."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import Masked
from rnejax.systems import text, text_rewards
from rnejax.systems.text_rewards import ContainsWord, Length, Topic, load_text_classifier

VALIDATION = text.load("validation")
PIECES = np.asarray(text.pieces())


def one_hot(tokens):
    """Zeros for MASK, as `rnejax.control` has it."""
    return jax.nn.one_hot(tokens, text.VOCAB_SIZE, dtype=jnp.result_type(float))


def partly_masked(tokens, seed=0):
    is_masked = np.random.default_rng(seed).random(tokens.shape) < 0.3
    return np.where(is_masked, text.MASK, tokens)


def smooth_rows(seed=0, sharpness=3.0):
    """Probabilities at every position, one token of which is much more probable than the others."""
    logits = sharpness * np.random.default_rng(seed).normal(size=(text.LENGTH, text.VOCAB_SIZE))
    return jax.nn.softmax(jnp.asarray(logits), axis=-1)


def rewards():
    return {
        "word": ContainsWord("the lord"),
        "hard word": ContainsWord("jesus", math.inf),
        "length": Length(12.0, 3.0),
        "topic": Topic(load_text_classifier("reward"), "prophets", 2.0),
    }


@pytest.fixture(params=list(rewards()))
def reward(request):
    return rewards()[request.param]


# ----- what all of them do


def test_leading_axes_are_so_many_sentences(reward):
    tokens = jnp.asarray(VALIDATION[:6])
    np.testing.assert_allclose(reward(tokens.reshape(2, 3, -1)).ravel(), jax.vmap(reward)(tokens), rtol=1e-5)
    rows = one_hot(tokens)
    np.testing.assert_allclose(reward(rows.reshape(2, 3, *rows.shape[1:])).ravel(), jax.vmap(reward)(rows), rtol=1e-5)
    assert reward(VALIDATION[0]).shape == ()


def test_a_reward_is_data_to_a_compiled_function(reward):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(reward))
    compiled = jax.jit(lambda reward, x: reward(x))
    np.testing.assert_allclose(compiled(reward, VALIDATION[:50]), reward(VALIDATION[:50]), rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: ContainsWord("the lord", 5.0), lambda: ContainsWord("the king", math.inf)),
        (lambda: Length(12, 3.0), lambda: Length(20.5, 1)),
        (
            lambda: Topic(load_text_classifier("reward"), "poetry"),
            lambda: Topic(load_text_classifier("reward"), "history", 3),
        ),
    ],
)
def test_other_words_and_numbers_compile_nothing_again(first, second):
    traced = []

    @jax.jit
    def compiled(reward, x):
        traced.append(reward)
        return reward(x)

    first, second = first(), second()
    assert not np.array_equal(compiled(first, VALIDATION), compiled(second, VALIDATION))
    np.testing.assert_allclose(compiled(second, VALIDATION), second(VALIDATION), rtol=1e-5)
    assert len(traced) == 1


def test_numbers_may_be_traced():
    values = jax.vmap(lambda target: Length(target, 2.0)(VALIDATION[0]))(jnp.arange(3.0))
    np.testing.assert_allclose(values, [Length(target, 2.0)(VALIDATION[0]) for target in range(3)])


def test_gradients_are_those_of_differences():
    with jax.enable_x64(True):
        for name, reward in rewards().items():
            rows = smooth_rows()
            assert rows.dtype == jnp.float64
            direction = jnp.asarray(np.random.default_rng(1).normal(size=rows.shape)) * rows
            gradient = jnp.sum(jax.grad(reward)(rows) * direction)
            step = 1e-4
            difference = (reward(rows + step * direction) - reward(rows - step * direction)) / (2 * step)
            assert float(gradient) == pytest.approx(float(difference), rel=1e-5), name
            assert abs(float(gradient)) > 1e-6, name


def test_gradients_are_finite_at_tokens_too(reward):
    for tokens in (VALIDATION[:20], partly_masked(VALIDATION[:20]), np.full((1, text.LENGTH), text.MASK)):
        assert jnp.all(jnp.isfinite(jax.vmap(jax.grad(reward))(one_hot(tokens))))


def test_models_can_be_tilted_by_them(reward):
    model = rj.DiffusionModel(
        Masked(text.VOCAB_SIZE, text.LENGTH), lambda x, t: jnp.zeros((text.LENGTH, text.VOCAB_SIZE))
    )
    for options in ({"at": "x"}, {"at": "x0", "draws": 8}, {"at": "x0", "gradient": True}):
        rj.tilt(model, reward, **options)  # which tries them on one example


@pytest.mark.parametrize("shape", [(31,), (32, 1), (32, 2048), ()])
def test_tokens_of_another_shape_are_an_error(reward, shape):
    with pytest.raises(ValueError, match=r"integer tokens, shape \(\.\.\., 32\), or rows of .* got int32, shape"):
        reward(jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("shape", [(32,), (32, 2049), (2048, 32)])
def test_rows_of_another_shape_are_an_error(reward, shape):
    with pytest.raises(ValueError, match=r"rows of token probabilities, shape \(\.\.\., 32, 2048\): got float"):
        reward(jnp.zeros(shape))


# ----- words


@pytest.mark.parametrize("word", ["lord", "the", "Jerusalem", "hand", "the lord", "house of israel"])
def test_a_word_is_rewarded_where_a_reader_finds_it(word):
    values = np.asarray(ContainsWord(word, 7.0)(VALIDATION))
    sentences = [text.decode(row) for row in VALIDATION]
    has_it = np.array([bool(re.search(rf"(?:^| ){word.lower()}(?![a-z])", sentence)) for sentence in sentences])
    np.testing.assert_array_equal(values, np.where(has_it, 0.0, -7.0))
    assert 0 < has_it.mean() < 1


@pytest.mark.parametrize(
    ("sentence", "is_there"),
    [
        ("lord, hear", True),
        ("hear me, o lord", True),
        ("the lord's house", True),
        ("the lord-king", True),
        ("the lords", False),
        ("lords and kings", False),
        ("the landlord", False),
        ("hear me", False),
        ("lords and the lord", True),
    ],
)
def test_only_the_whole_word_counts(sentence, is_there):
    assert float(ContainsWord("lord")(text.encode(sentence))) == (0.0 if is_there else -10.0)


def test_the_last_position_ends_a_word():
    sentence = " ".join(["the"] * (text.LENGTH - 1) + ["lord"])
    assert not np.any(text.encode(sentence) == text.PAD)
    assert float(ContainsWord("lord")(text.encode(sentence))) == 0.0
    assert float(ContainsWord("the lord")(text.encode(sentence))) == 0.0


def test_a_word_of_as_many_pieces_as_a_sentence_fits():
    word = " ".join(["the"] * text.LENGTH)
    assert float(ContainsWord(word)(text.encode(word))) == 0.0


def test_a_mask_is_no_piece_of_a_word_and_ends_it():
    (pieces,) = text.word_token_sequences("elisabeth")
    reward, row = ContainsWord("elisabeth"), np.full(text.LENGTH, text.MASK)
    assert float(reward(row)) == -10.0
    row[3 : 3 + len(pieces)] = pieces
    assert float(reward(row)) == 0.0
    row[4] = text.MASK
    assert float(reward(row)) == -10.0


@pytest.mark.parametrize("mark", ["?", ".", ";", "'s", "; and"])
def test_a_mark_is_found_where_it_stands_behind_a_word(mark):
    tokens = text.load("train")[:3000]
    has_it = [bool(re.search(rf"\S{re.escape(mark)}(?![a-z])", text.decode(row))) for row in tokens]
    np.testing.assert_array_equal(np.asarray(ContainsWord(mark, 7.0)(tokens)) == 0, has_it)
    assert any(has_it)


def test_a_change_is_worth_no_more_than_the_word_where_two_of_them_overlap():
    # "the _ the": to fill the blank makes two of them, of 0.3 each, or so a tangent has it: 0.51 + 0.98.
    the, lord = (list(PIECES).index(piece) for piece in (" the", " lord"))
    rows = np.array(one_hot(np.full(text.LENGTH, lord)))
    rows[[3, 5]] = one_hot(np.asarray(the))
    rows[4] = 0.3 * one_hot(np.asarray(the)) + 0.7 * one_hot(np.asarray(lord))
    reward = ContainsWord("the the", math.inf)
    assert float(reward(rows)) == pytest.approx(math.log(0.51), rel=1e-5)
    assert float(reward.changes(jnp.asarray(rows))[4, the]) == pytest.approx(-math.log(0.51), rel=1e-5)


def test_a_word_can_be_read_off():
    assert ContainsWord("House of Israel").word == "house of israel"


@pytest.mark.parametrize("penalty", [0.5, 10.0, 80.0, math.inf])
@pytest.mark.parametrize("word", ["the", "the lord", "elisabeth"])
def test_rows_of_tokens_are_worth_exactly_what_the_tokens_are(word, penalty):
    reward = ContainsWord(word, penalty)
    tokens = np.concatenate([VALIDATION[:300], partly_masked(VALIDATION[:300]), text.encode(word)[None]])
    values = np.asarray(reward(tokens))
    assert set(values.tolist()) == {0.0, -penalty}
    np.testing.assert_array_equal(np.asarray(reward(one_hot(tokens))), values)
    np.testing.assert_array_equal(np.asarray(jax.jit(reward)(one_hot(tokens))), values)


def possible_rows():
    """Rows of which nine positions are open, and all sentences they may become, with their probabilities.

    " elisabeth" is written el-is-ab-eth here or there, with a piece after it that goes on with a word or not.
    """
    (pieces,) = text.word_token_sequences("elisabeth")
    assert len(pieces) == 4
    letter, comma, the = (list(PIECES).index(piece) for piece in ("s", ",", " the"))
    options = {i: (piece, the, 0.3 + 0.1 * i) for i, piece in enumerate(pieces)}
    options |= {10 + i: (piece, comma, 0.8 - 0.1 * i) for i, piece in enumerate(pieces)}
    options |= {4: (letter, comma, 0.7), 14: (the, letter, 0.6)}
    closed = np.full(text.LENGTH, the)
    closed[20:] = text.PAD
    rows = np.array(one_hot(closed), np.float64)
    for i, (first, second, probability) in options.items():
        rows[i] = 0
        rows[i, first], rows[i, second] = probability, 1 - probability
    sentences, probabilities = [], []
    for choices in itertools.product((0, 1), repeat=len(options)):
        sentence, p = closed.copy(), 1.0
        for choice, (i, option) in zip(choices, options.items()):
            sentence[i] = option[choice]
            p *= abs(choice - option[2])
        sentences.append(sentence)
        probabilities.append(p)
    return rows, np.stack(sentences), np.asarray(probabilities)


@pytest.mark.parametrize("penalty", [1.0, 10.0, 80.0, math.inf])
def test_rows_are_worth_the_log_of_the_mean_over_what_they_may_become(penalty):
    rows, sentences, probabilities = possible_rows()
    assert probabilities.sum() == pytest.approx(1)
    reward = ContainsWord("elisabeth", penalty)
    exact = np.log(np.sum(probabilities * np.exp(np.asarray(reward(sentences), np.float64))))
    assert exact < -0.5
    assert float(reward(rows)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("probability", [1e-12, 1e-6, 0.3, 0.7, 1 - 1e-3])
def test_small_and_large_probabilities_keep_their_digits(probability):
    (piece,) = text.word_token_sequences("lord")[0]
    rows = np.zeros((text.LENGTH, text.VOCAB_SIZE))
    rows[:, text.PAD] = 1
    rows[5, [piece, text.PAD]] = probability, 1 - probability
    assert float(ContainsWord("lord", math.inf)(rows)) == pytest.approx(math.log(probability), rel=1e-4)
    floor = math.exp(-20)
    exact = math.log(floor + (1 - floor) * probability)
    assert float(ContainsWord("lord", 20.0)(rows)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("penalty", [0, -1.0, math.nan, -math.inf, 81.0, "ten"])
def test_a_penalty_that_is_none_is_an_error(penalty):
    with pytest.raises(ValueError, match="penalty must be"):
        ContainsWord("lord", penalty)


def test_a_word_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="no character 'ö'"):
        ContainsWord("gött")
    with pytest.raises(ValueError, match="the word is empty"):
        ContainsWord("")
    with pytest.raises(TypeError, match="a sentence is a string: got None"):
        ContainsWord(None)


@pytest.mark.parametrize("penalty", [5.0, 40.0, math.inf])
def test_changes_of_a_word_are_the_differences_that_single_tokens_make(penalty):
    rows, reward = np.asarray(smooth_rows()), ContainsWord("elisabeth", penalty)
    (pieces,) = text.word_token_sequences("elisabeth")
    changes = np.asarray(reward.changes(jnp.asarray(rows)))
    assert changes.shape == rows.shape
    for i, k in [
        (0, pieces[0]),
        (7, pieces[0]),
        (8, pieces[1]),
        (20, pieces[3]),
        (text.LENGTH - 1, pieces[3]),
        (5, text.PAD),
        (9, 100),
    ]:
        changed = rows.copy()
        changed[i] = np.eye(text.VOCAB_SIZE)[k]
        difference = float(reward(changed)) - float(reward(rows))
        # Two possible words that share a position are counted as if they were independent.
        assert changes[i, k] == pytest.approx(difference, rel=1e-2, abs=1e-4)
    if penalty >= 40:  # below, float32 does not tell what the word is worth in these rows
        assert changes.max() > 1


def test_changes_of_a_word_that_is_impossible_are_finite():
    the = list(PIECES).index(" the")
    for penalty in (10.0, math.inf):
        changes = np.asarray(ContainsWord("elisabeth", penalty).changes(one_hot(np.full(text.LENGTH, the))))
        np.testing.assert_array_equal(changes, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["base", "locally_optimal"])
def test_steering_by_rows_has_the_weights_that_tokens_ask_for(proposal):
    # Independent positions, so that all is known: log E exp(reward) is the reward of the model's rows.
    lord, the = (text.word_token_sequences(word)[0][0] for word in ("lord", "the"))
    probabilities = jnp.zeros((text.LENGTH, text.VOCAB_SIZE)).at[:, [lord, the]].set(jnp.array([0.002, 0.998]))
    model = rj.DiffusionModel(Masked(text.VOCAB_SIZE, text.LENGTH), lambda x, t: jnp.log(probabilities))
    reward, with_it = ContainsWord("lord", 5.0), 1 - 0.998**text.LENGTH
    exact = with_it + (1 - with_it) * np.exp(-5)
    assert float(reward(probabilities)) == pytest.approx(np.log(exact), rel=1e-5)
    result = rj.steer(
        jax.random.key(0), rj.tilt(model, reward, at="x0", gradient=True), rj.time_grid(model.process, 8), 16,
        proposal=proposal, num_groups=8, warn=False, progress=False,
    )  # fmt: skip
    has_it = jnp.any(result.particles == lord, axis=-1)
    normalizers = jnp.exp(result.log_normalizer)
    parts = normalizers * jnp.mean(jnp.exp(result.log_weights) * has_it, axis=-1)
    for estimates, expected in ((normalizers, exact), (parts, with_it)):
        assert abs(float(jnp.mean(estimates)) - expected) < 4 * float(jnp.std(estimates, ddof=1)) / np.sqrt(8)
    assert jnp.mean(has_it) > 2 * with_it


# ----- lengths


def test_a_length_is_the_number_of_tokens_before_the_end():
    lengths = [len(np.trim_zeros(row, "b")) for row in VALIDATION]
    np.testing.assert_allclose(Length(20, 4.0)(VALIDATION), [-((n - 20) ** 2) / 32 for n in lengths], rtol=1e-6)


def test_an_expected_length_is_that_of_the_rows():
    rows = np.asarray(smooth_rows())
    expected = np.sum(1 - rows[:, text.PAD].astype(np.float64))
    assert float(Length(30.0, 2.0)(rows)) == pytest.approx(-((expected - 30) ** 2) / 8, rel=1e-4)


def test_lengths_of_tokens_and_of_their_rows_are_the_same():
    reward = Length(17.5, 3.0)
    holes = np.where(np.random.default_rng(0).random(VALIDATION.shape) < 0.2, text.PAD, VALIDATION)
    for tokens in (VALIDATION, partly_masked(VALIDATION), holes):
        np.testing.assert_array_equal(np.asarray(reward(one_hot(tokens[:200]))), np.asarray(reward(tokens[:200])))


def test_pad_inside_does_not_end_a_sentence_and_masks_are_tokens():
    reward = Length(0, math.sqrt(0.5))  # minus the square of the length
    row = text.encode("the lord is my")
    assert float(reward(row)) == pytest.approx(-16)
    row[1] = text.PAD
    assert float(reward(row)) == pytest.approx(-9)
    row[2] = text.MASK
    assert float(reward(row)) == pytest.approx(-9)


def test_lengths_that_are_none_are_errors():
    with pytest.raises(ValueError, match="target must be finite"):
        Length(math.inf, 1.0)
    with pytest.raises(ValueError, match="from 0 to 32: got 100"):
        Length(100, 1.0)
    with pytest.raises(ValueError, match="spread must be positive, got 0"):
        Length(20, 0)


# ----- groups


def labels(split):
    return text_rewards.group_labels(text.load_with_books(split).books)


def test_every_book_has_its_group():
    # Esther and Job, the Song of Solomon and Isaiah, Malachi and Matthew, Revelation.
    assert text_rewards.group_labels([1, 17, 18, 22, 23, 39, 40, 66]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="from 1 to 66: got 67"):
        text_rewards.group_labels([[1, 67]])
    with pytest.raises(ValueError, match="from 1 to 66: got 0"):
        text_rewards.group_labels(0)


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_classifiers_are_right_about_as_many_sentences_as_their_cards_say(name):
    log_probabilities = load_text_classifier(name)(text.load("test"))
    is_right = np.argmax(log_probabilities, axis=-1) == labels("test")
    # The cards say 73 % or more; 1,748 sentences have a standard error of 1.1 % there. The largest group is 43 %.
    assert is_right.mean() > 0.73 - 3 * 0.011


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_classifiers_are_right_as_often_as_they_think(name):
    log_probabilities = np.asarray(load_text_classifier(name)(text.load("test")), np.float64)
    certainty = np.exp(np.max(log_probabilities, axis=-1))
    is_right = np.argmax(log_probabilities, axis=-1) == labels("test")
    for low, high in ((0.3, 0.6), (0.6, 0.9), (0.9, 1.0)):
        members = (certainty > low) & (certainty <= high)
        error = np.sqrt(np.mean(certainty[members] * (1 - certainty[members])) / members.sum())
        assert abs(np.mean(is_right[members] - certainty[members])) < 3 * error + 0.05


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_classifiers_return_normalised_log_probabilities(name):
    classify = load_text_classifier(name)
    for x in (VALIDATION[:5].reshape(5, 1, -1), one_hot(partly_masked(VALIDATION[:5]))[:, None]):
        log_probabilities = classify(x)
        assert log_probabilities.shape == (5, 1, len(text_rewards.GROUPS))
        np.testing.assert_allclose(jax.nn.logsumexp(log_probabilities, axis=-1), 0, atol=1e-5)


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_classifiers_say_the_same_of_tokens_and_of_their_rows(name):
    classify = load_text_classifier(name)
    for tokens in (VALIDATION[:100], partly_masked(VALIDATION[:100])):
        np.testing.assert_allclose(classify(one_hot(tokens)), classify(tokens), atol=1e-4)


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_what_is_masked_counts_no_more_than_what_is_not_there(name):
    classify = load_text_classifier(name)
    short = VALIDATION[np.sum(VALIDATION != text.PAD, axis=1) < 24][:100]
    np.testing.assert_allclose(
        classify(np.where(short == text.PAD, text.MASK, short)), classify(short), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(classify(partly_masked(short)), classify(short), atol=0.1)


def test_of_a_sentence_that_is_all_masked_the_reward_classifier_says_the_groups_shares():
    log_probabilities = load_text_classifier("reward")(np.full(text.LENGTH, text.MASK))
    shares = np.bincount(labels("train")) / len(labels("train"))
    np.testing.assert_allclose(np.exp(log_probabilities), shares, atol=0.03)


@pytest.mark.parametrize("name", text_rewards.CLASSIFIERS)
def test_classifiers_are_not_sure_of_what_is_not_known(name):
    # What a model predicts before it has decided on anything: the frequencies at each position.
    train = text.load("train")
    rows = np.stack([np.bincount(column, minlength=text.VOCAB_SIZE) for column in train.T]) / len(train)
    shares = np.bincount(labels("train")) / len(labels("train"))
    found = np.asarray(load_text_classifier(name)(rows), np.float64)
    # Against knowing nothing, less than a fifth of what a whole sentence tells it, in nats.
    of_sentences = np.take_along_axis(load_text_classifier(name)(VALIDATION), labels("validation")[:, None], axis=1)
    told = np.mean(of_sentences[:, 0] - np.log(shares)[labels("validation")])
    assert np.sum(shares * (np.log(shares) - found)) < told / 5


def test_a_classifier_may_be_loaded_while_something_is_traced():
    load_text_classifier.cache_clear()
    jax.jit(lambda x: load_text_classifier("reward")(x))(VALIDATION[:2])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(load_text_classifier("reward")))
    assert np.all(np.isfinite(load_text_classifier("reward")(VALIDATION[:2])))


def test_an_unknown_classifier_is_named_in_the_error():
    with pytest.raises(ValueError, match="'reward', 'judge': got 'jury'"):
        load_text_classifier("jury")


def test_bags_are_averages_over_tokens_and_neighbours():
    # Two tokens, and one vector of length 1 for each: (1 + 2) / (2 + 5), (1 * 4) / (1 + 5), and no nonlinearity seen.
    first, second = 30, 40
    table = jnp.zeros((text.VOCAB_SIZE, 1))
    params = {
        "pieces": table.at[first].set(1.0).at[second].set(2.0),
        "first": table.at[first].set(1.0),
        "second": table.at[second].set(4.0).at[text.PAD].set(100.0),
        "hidden": {"kernel": jnp.eye(2), "bias": jnp.full(2, 50.0)},  # where silu(x) = x
        "head": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)},
    }
    row = np.full(text.LENGTH, text.PAD)
    row[:2] = first, second
    log_probabilities = text_rewards.pairs(params, row)
    assert float(log_probabilities[0] - log_probabilities[1]) == pytest.approx(3 / 7 - 4 / 6, abs=1e-4)


def test_windows_take_the_strongest_three_tokens():
    # One feature: 1 for a token, 10 for what follows it, 100 for what follows that; from the tokens a (1), b (2).
    a, b = 30, 40
    params = {
        "pieces": jnp.zeros((text.VOCAB_SIZE, 1)).at[a].set(1.0).at[b].set(2.0),
        "convolution": {"kernel": jnp.asarray([1.0, 10.0, 100.0]).reshape(3, 1, 1), "bias": jnp.zeros(1)},
        "head": {"kernel": jnp.asarray([[1.0, 0.0]]), "bias": jnp.zeros(2)},
    }

    def strongest(*tokens):
        row = np.full(text.LENGTH, text.PAD)
        row[: len(tokens)] = tokens
        log_probabilities = text_rewards.windows(params, row)
        return float(log_probabilities[0] - log_probabilities[1])

    assert strongest(a) == pytest.approx(10)  # not 100: nothing is at the place before it
    assert strongest(a, b) == pytest.approx(10 + 200)
    assert strongest(b, a, a, b) == pytest.approx(1 + 10 + 200)
    assert strongest(a, text.MASK, b) == pytest.approx(20)


def test_a_topic_is_the_log_probability_of_its_group_times_its_scale():
    classify = load_text_classifier("reward")
    expected = 1.5 * np.asarray(classify(VALIDATION[:10]))[:, 2]
    np.testing.assert_allclose(Topic(classify, "prophets", 1.5)(VALIDATION[:10]), expected, rtol=1e-5)
    np.testing.assert_allclose(Topic(classify, 2, 1.5)(VALIDATION[:10]), expected, rtol=1e-5)


def test_of_sentences_from_a_group_its_topic_is_worth_most():
    classify = load_text_classifier("judge")
    for i, group in enumerate(text_rewards.GROUPS):
        values = np.asarray(Topic(classify, group)(VALIDATION))
        inside, outside = values[labels("validation") == i], values[labels("validation") != i]
        assert inside.mean() > outside.mean() + 1


@pytest.mark.parametrize("group", ["law", 4, -1, 1.5])
def test_an_unknown_group_is_named_in_the_error(group):
    with pytest.raises(ValueError, match=r"'history', 'poetry', 'prophets', 'gospels', or its number from 0: got"):
        Topic(load_text_classifier("reward"), group)
