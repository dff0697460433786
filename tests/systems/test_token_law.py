"""The small worlds that tests of tokens are judged by: checked by counting, in another way than they count."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems.token_law import TokenLaw, path_sum

LAW = TokenLaw.random(0, 3, 3)


def test_probabilities_of_sequences_stand_where_the_index_says():
    assert np.exp(LAW.log_probs).sum() == pytest.approx(1)
    for i, x in enumerate(itertools.product(range(3), repeat=3)):
        assert LAW.index(x) == i
        assert LAW.log_prob(x) == LAW.log_probs[i]
        np.testing.assert_array_equal(LAW.sequences[i], x)


def test_conditionals_are_shares_of_the_sequences_that_fit():
    x = (3, 1, 3)
    found = np.exp(np.asarray(LAW.masked().fn(jnp.asarray(x), 0.5)))
    probs = np.exp(LAW.log_probs)
    fits = LAW.sequences[:, 1] == 1
    for position, token in ((0, 2), (2, 0)):
        share = probs[fits & (LAW.sequences[:, position] == token)].sum()
        assert found[position, token] == pytest.approx(share, rel=1e-5)


def test_the_posterior_of_uniform_tokens_is_bayes_rule():
    model = LAW.uniform()
    x, alpha = np.asarray([2, 0, 0]), 0.4
    likelihood = np.prod(np.where(LAW.sequences == x, alpha + 0.2, 0.2), axis=1)
    joint = np.exp(LAW.log_probs) * likelihood
    found = np.asarray(model.denoise(jnp.asarray(x), 0.6))
    for position, token in ((0, 2), (1, 1)):
        exact = joint[LAW.sequences[:, position] == token].sum() / joint.sum()
        assert found[position, token] == pytest.approx(exact, rel=1e-5)
    assert np.exp(LAW.marginal(alpha).log_prob(x)) == pytest.approx(joint.sum(), rel=1e-9)


def test_a_path_sum_of_one_model_is_the_law_that_it_generates():
    model = LAW.masked()
    times = rj.time_grid(model.process, 3)
    samples = rj.sample(jax.random.key(0), model, times, 50_000, progress=False)
    generated = np.exp(path_sum([model], [1.0], times))
    assert generated.sum() == pytest.approx(1, abs=1e-5)
    counts = np.bincount(LAW.index(samples.x), minlength=27) / 50_000
    assert np.all(np.abs(counts - generated) < 4.5 * np.sqrt(generated / 50_000))
    assert np.abs(generated - np.exp(LAW.log_probs)).max() > 0.01


def test_total_variation_is_half_the_sum_of_differences():
    target = np.log(np.full(27, 1 / 27))
    x = np.repeat(LAW.sequences[:1], 4, axis=0)
    assert LAW.total_variation(target, x) == pytest.approx(26 / 27)
    assert LAW.total_variation(target, LAW.sequences) == pytest.approx(0, abs=1e-12)
    weights = np.where(np.arange(27) < 9, 0.0, -np.inf)
    assert LAW.total_variation(target, LAW.sequences, weights) == pytest.approx(2 / 3)


def test_tables_that_are_no_law_are_refused():
    with pytest.raises(ValueError, match="shape"):
        TokenLaw(3, 2, np.zeros(8))
    with pytest.raises(ValueError, match="sum to 1"):
        TokenLaw(3, 2, np.zeros(9))
