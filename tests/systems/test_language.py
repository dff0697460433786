"""Autoregressive models of sentences, and what is rewarded and judged with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rnejax.networks import TokenTransformer, functional
from rnejax.runs.finetuning.infilling import Middle, RightSide, show_gap, with_right_side
from rnejax.systems import text
from rnejax.systems.language import load_language_model, next_token_log_probs, until_the_end


def small_network():
    apply, params = functional(
        TokenTransformer(
            text.VOCAB_SIZE, text.LENGTH, width=16, num_layers=2, num_heads=2, causal=True, rngs=nnx.Rngs(0)
        )
    )
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    return lambda tokens: apply(params, tokens, jnp.zeros(()))


SENTENCE = "in the beginning god created the heaven and the earth."


def test_a_token_is_predicted_from_those_before_it_alone():
    x = jnp.asarray(text.encode(SENTENCE))
    network = small_network()
    found = next_token_log_probs(network, x)
    changed = next_token_log_probs(network, x.at[5].set(77))
    np.testing.assert_allclose(changed[:5], found[:5], rtol=1e-5)
    assert np.abs(changed[5:] - found[5:]).max() > 1e-3
    # The tokens that come after do not matter, and what is predicted is a law.
    total = sum(
        jnp.exp(next_token_log_probs(network, x.at[3].set(token))[3]) for token in range(0, text.VOCAB_SIZE, 64)
    )
    everything = jax.vmap(lambda token: next_token_log_probs(network, x.at[3].set(token))[3])(
        jnp.arange(text.VOCAB_SIZE)
    )
    np.testing.assert_allclose(jnp.sum(jnp.exp(everything)), 1.0, rtol=1e-4)
    assert total < 1


def test_a_network_that_is_not_causal_would_see_the_token_itself():
    """If it were not for the mask, the test above would fail: the position after it sees everything."""
    apply, params = functional(
        TokenTransformer(text.VOCAB_SIZE, text.LENGTH, width=16, num_layers=2, num_heads=2, rngs=nnx.Rngs(0))
    )
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    x = jnp.asarray(text.encode(SENTENCE))
    network = lambda tokens: apply(params, tokens, jnp.zeros(()))  # noqa: E731
    found, changed = (next_token_log_probs(network, each) for each in (x, x.at[5].set(77)))
    assert np.abs(changed[:5] - found[:5]).max() > 1e-3


def test_the_end_of_a_sentence_counts_once():
    assert until_the_end(jnp.asarray([5, 7, 0, 0, 0])).tolist() == [True, True, True, False, False]
    assert until_the_end(jnp.asarray([5, 7, 3])).tolist() == [True, True, True]


def test_what_follows_is_rewarded_up_to_its_end():
    x = jnp.asarray(text.encode(SENTENCE))
    length = int((x != text.PAD).sum())
    log_probs = jax.tree_util.Partial(lambda tokens: jnp.arange(32.0) + 100.0 * (tokens == 77))
    left, middle = 3, 4
    reward = RightSide(log_probs, 2.0, left)
    filled = jnp.full(middle, 77)
    # 7, ..., length: the end of the sentence is said by the PAD after it. Neither sides before count.
    assert reward(filled, x) == pytest.approx(2.0 * sum(range(left + middle, length + 1)))
    # A PAD in the gap ends nothing.
    assert reward(jnp.full(middle, text.PAD), x) == pytest.approx(2.0 * sum(range(left + middle, length + 1)))
    real = RightSide(jax.tree_util.Partial(next_token_log_probs, small_network()), 1.0, left)
    whole = next_token_log_probs(small_network(), x)[left + middle : length + 1].sum()
    np.testing.assert_allclose(real(x[left : left + middle], x), whole, rtol=1e-5)


@pytest.mark.parametrize("sees_right", [True, False])
def test_the_middle_is_filled_in_by_a_network_for_whole_sentences(sees_right):
    seen = []

    def fn(params, tokens, t, condition):
        seen.append(np.asarray(tokens))
        return jnp.arange(32.0)[:, None] * params

    sentence = jnp.arange(32)
    logits = Middle(fn, 10, 4, sees_right)(2.0, jnp.asarray([2048, 5, 2048, 6]), 1.0, sentence)
    np.testing.assert_array_equal(logits[:, 0], 2.0 * np.arange(10, 14))
    expected = [*range(10), 2048, 5, 2048, 6, *(range(14, 32) if sees_right else [2048] * 18)]
    np.testing.assert_array_equal(seen[0], expected)


def test_sentences_without_a_right_side_are_left_out():
    rows = np.stack([text.encode(SENTENCE), text.encode("in the beginning")])
    np.testing.assert_array_equal(with_right_side(rows, 6), rows[:1])
    assert show_gap(rows[0][2:6], rows[0], 2) == "in the [beginning god created] the heaven and the earth."


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_shipped_models_know_the_language(name):
    """A sentence against the same words in another order, and against another text's end."""
    model = load_language_model(name)
    x = text.encode("and it came to pass in those days, that he went up to jerusalem.")
    length = int((x != text.PAD).sum())
    shuffled = x.copy()
    shuffled[:length] = np.random.default_rng(0).permutation(x[:length])
    said, nonsense = (float(model(jnp.asarray(each))[: length + 1].sum()) for each in (x, shuffled))
    assert said > nonsense + 20
    with pytest.raises(ValueError, match="name must be one of 'reward', 'judge'"):
        load_language_model("nobody")
