"""Warnings in plain words: each where it is due, none where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import OBSERVATIONS, Prescribed, state_space

from rnejax import smc

KEY = jax.random.key(11)
NEVER = smc.Resampling(ess_threshold=0)


def weighted_once(log_weights, num_groups=None, **settings):
    """A run of one step whose final weights are these."""
    total = log_weights.size
    return smc.run(
        KEY,
        Prescribed(jnp.zeros(total)),
        log_weights.reshape(1, total),
        num_particles=log_weights.shape[-1],
        num_groups=num_groups,
        **({"resampling": NEVER} | settings),
    )


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_pareto_k_finds_the_exponent_of_a_power_law(k):
    # P(w > x) = x^(-1/k). The Zhang-Stephens estimate from a tail of M = 3 sqrt(n) = 1,500 weights has a standard
    # deviation of about (1 + k) / sqrt(M) (the information bound of a generalised Pareto law).
    n = 250_000
    log_weights = -k * jnp.log1p(-jax.random.uniform(KEY, (n,)))
    assert abs(float(smc.pareto_k(log_weights)) - k) < 4 * (1 + k) / np.sqrt(3 * np.sqrt(n))


def test_pareto_k_of_groups_is_that_of_each():
    log_weights = jnp.arange(2)[:, None] * jax.random.normal(KEY, (2, 400))
    result = smc.pareto_k(log_weights)
    assert result.shape == (2,)
    np.testing.assert_allclose(result[1], smc.pareto_k(log_weights[1]), rtol=1e-5)


def test_a_good_run_is_not_warned_of():
    steps = jnp.asarray(OBSERVATIONS)
    assert smc.diagnose(smc.run(KEY, state_space(), steps, num_particles=1000, num_groups=4)) == []


def test_equal_weights_are_not_warned_of():
    assert smc.diagnose(weighted_once(jnp.zeros(100))) == []


def test_heavy_tails_are_warned_of():
    messages = smc.diagnose(weighted_once(-1.2 * jnp.log1p(-jax.random.uniform(KEY, (4000,)))), min_ess_fraction=0)
    assert [message for message in messages if "k-hat" in message] == messages
    assert len(messages) == 1


def test_a_small_effective_sample_size_is_warned_of():
    (message,) = smc.diagnose(weighted_once(jnp.full(100, -20.0).at[0].set(0.0)), max_pareto_k=np.inf)
    assert "effective sample size fell to 1.0 of 100 particles at step 0" in message


@pytest.mark.parametrize(("num", "words"), [(1, "a single particle"), (4, "only 4 particles")])
def test_so_few_particles_are_warned_of(num, words):
    (message,) = smc.diagnose(weighted_once(jnp.zeros(num)))
    assert words in message


def test_a_large_share_of_few_particles_is_few_particles():
    log_weights = jnp.where(jnp.arange(20) < 4, 0.0, -20.0)  # a fifth of them, which is 4
    (message,) = smc.diagnose(weighted_once(log_weights))
    assert "fell to 4.0 of 20 particles" in message
    assert smc.diagnose(weighted_once(log_weights), min_ess=3.0) == []


def test_few_ancestors_are_warned_of():
    steps = jnp.zeros(2000)
    result = smc.run(KEY, state_space(), steps, num_particles=100, resampling=smc.Resampling(ess_threshold=1.01))
    (message,) = smc.diagnose(result)
    assert "all 100 particles descend from only" in message


def test_of_groups_the_one_with_fewest_ancestors_is_told():
    result = weighted_once(jnp.zeros((2, 100)), num_groups=2)
    eve = jnp.stack([jnp.arange(100), jnp.arange(100) // 50])
    (message,) = smc.diagnose(result._replace(info=result.info._replace(eve=eve)))
    assert "all 100 particles descend from only 2 initial ones" in message


def test_many_particles_of_zero_weight_are_warned_of():
    (message,) = smc.diagnose(weighted_once(jnp.where(jnp.arange(100) < 60, -jnp.inf, 0.0)))
    assert "60% of the final particles have weight zero" in message


def test_of_groups_the_one_with_most_particles_of_zero_weight_is_told():
    log_weights = jnp.where(jnp.arange(100) < jnp.array([[0], [70]]), -jnp.inf, 0.0)
    messages = smc.diagnose(weighted_once(log_weights, num_groups=2))
    assert any("70% of the final particles have weight zero" in message for message in messages)


def test_groups_that_disagree_are_warned_of():
    log_weights = jnp.array([[0.0] * 100, [4.0] * 100])
    (message,) = smc.diagnose(weighted_once(log_weights, num_groups=2))
    assert "independent groups disagree: their log Z range from 0.00 to 4.00" in message


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_faulty_result_is_only_said_to_be_faulty(value):
    (message,) = smc.diagnose(weighted_once(jnp.full(100, value), check=False))
    assert "nothing in this result means anything" in message


def test_thresholds_are_arguments():
    result = weighted_once(jnp.where(jnp.arange(100) < 60, -jnp.inf, 0.0))
    assert smc.diagnose(result, max_zero_fraction=0.7) == []
