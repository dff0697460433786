"""Mode coverage."""

import jax
import numpy as np
import pytest

from rnejax.systems.modes import mode_selection
from rnejax.training import mode_coverage

EXPECTED = [0.5, 0.3, 0.2, 0.0]


def test_coverage_of_shares_by_hand():
    modes = np.repeat([0, 1, 2, 3], [60, 30, 5, 5])
    found = mode_coverage(modes, EXPECTED)
    np.testing.assert_allclose(found.shares, [0.6, 0.3, 0.05, 0.05])
    assert found.total_variation == pytest.approx(0.15)
    assert found.kl_divergence == pytest.approx(0.5 * np.log(0.5 / 0.6) + 0.2 * np.log(0.2 / 0.05))
    assert (found.num_found, found.num_expected) == (2, 3)
    assert mode_coverage(modes, EXPECTED, found_above=0.2).num_found == 3
    missing = mode_coverage(modes[modes != 2], np.multiply(7, EXPECTED))
    assert missing.kl_divergence == np.inf
    assert missing.num_found == 2


def test_weights_count():
    modes = np.array([0, 1, 2, 3])
    with np.errstate(divide="ignore"):
        found = mode_coverage(modes, EXPECTED, np.log(EXPECTED) + 3.0)
    np.testing.assert_allclose(found.shares, EXPECTED)
    assert found.total_variation == pytest.approx(0)
    assert found.kl_divergence == pytest.approx(0, abs=1e-12)


def test_the_floor_is_that_of_independent_draws():
    random = np.random.default_rng(0)
    draws = [mode_coverage(random.choice(4, 500, p=EXPECTED), EXPECTED) for _ in range(2000)]
    mean = np.mean([each.total_variation for each in draws])
    assert draws[0].floor == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros(0, int), EXPECTED), "modes must be integers"),
        ((np.zeros(3), EXPECTED), "modes must be integers"),
        ((np.array([0, 4]), EXPECTED), "numbers from 0 to 3, got 0 to 4"),
        ((np.array([0, -1]), EXPECTED), "numbers from 0 to 3, got -1 to 0"),
        ((np.array([0]), [0.0, 0.0]), "non-negative shares with a positive sum"),
        ((np.array([0]), [-1.0, 2.0]), "non-negative shares with a positive sum"),
        ((np.array([0, 1]), EXPECTED, [0.0]), "log_weights must be one per sample"),
        ((np.array([0, 1]), EXPECTED, [0.0, np.nan]), "log_weights must be one per sample"),
        ((np.array([0, 1]), EXPECTED, [-np.inf, -np.inf]), "log_weights must be one per sample"),
    ],
)
def test_what_has_no_shares_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        mode_coverage(*arguments)


def test_nine_modes_of_25():
    """What the source and mathematics.md, section 7, say of them."""
    problem = mode_selection()
    shares = problem.shares
    assert (shares > 0).sum() == 9
    assert shares.max() == pytest.approx(15 / 61)
    assert tuple(problem.prior.means[shares.argmax()]) == (5, 0)
    x = jax.vmap(problem.posterior.sample)(jax.random.split(jax.random.key(0), 100_000))
    log_rewards = np.asarray(jax.vmap(problem.log_reward)(x), np.float64)
    assert abs(log_rewards.mean() - 1.156) < 4 * log_rewards.std() / np.sqrt(len(x)) + 5e-4  # KL to three digits
    from_prior = jax.vmap(problem.prior.sample)(jax.random.split(jax.random.key(1), 100_000))
    weights = np.exp(np.asarray(jax.vmap(problem.log_reward)(from_prior), np.float64))
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(len(weights))
    assert weights.sum() ** 2 / (weights**2).sum() / len(weights) == pytest.approx(0.276, abs=0.005)
    assert mode_coverage(problem.modes(x), shares).total_variation < 4 * mode_coverage(problem.modes(x), shares).floor
