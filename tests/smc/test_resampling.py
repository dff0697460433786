"""Drawing ancestors: unbiased, never of zero weight, the schemes' own promises, partial resampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_space import Prescribed

from rnejax import smc
from rnejax.smc import resampling
from rnejax.smc.resampling import SCHEMES, draw_ancestors

EPS = float(np.finfo(np.float32).eps)
schemes = pytest.mark.parametrize("scheme", list(SCHEMES))
WEIGHTS = jnp.array([0.0, 0.05, 0.4, 0.0, 0.02, 0.13, 0.25, 0.15, 0.0])


def counts(ancestors, num):
    return jax.nn.one_hot(ancestors, num).sum(-2)


@schemes
def test_expected_number_of_descendants_is_proportional_to_the_weight(scheme):
    draws, num = 4000, 7
    draw = jax.jit(jax.vmap(lambda key: SCHEMES[scheme](key, WEIGHTS, num)))
    ancestors = draw(jax.random.split(jax.random.key(1), draws))
    descendants = np.asarray(counts(ancestors, WEIGHTS.size), np.float64)
    error = descendants.std(axis=0, ddof=1) / np.sqrt(draws)
    difference = descendants.mean(axis=0) - num * np.asarray(WEIGHTS)
    assert np.all(np.abs(difference) <= 4 * error + 4 * EPS)


def test_any_slice_of_what_resample_returns_is_a_fair_sample():
    # The systematic scheme itself returns ancestors in increasing order.
    draws = 4000
    problem = Prescribed(jnp.log(WEIGHTS))
    result = smc.run(jax.random.key(0), problem, jnp.zeros((1, 9)), num_particles=9, resampling=smc.Resampling(every=9))
    first = jax.jit(jax.vmap(lambda key: smc.resample(key, result, 5)[0]))
    frequencies = np.bincount(np.asarray(first(jax.random.split(jax.random.key(2), draws))), minlength=9) / draws
    weights = np.asarray(WEIGHTS, np.float64)
    assert np.all(np.abs(frequencies - weights) <= 4 * np.sqrt(weights * (1 - weights) / draws))


@schemes
def test_no_particle_of_zero_weight_among_a_million_in_float32(scheme):
    # Without the guard about one draw in ten picks the last particle (pitfall 13).
    num = 1_000_000
    draw = jax.jit(SCHEMES[scheme], static_argnums=2)
    log_weights = jax.random.normal(jax.random.key(3), (num,)).at[jnp.array([0, num - 1])].set(-jnp.inf)
    weights = smc.normalize(log_weights)
    for seed in range(2 if scheme == "residual" else 6):
        ancestors = draw(jax.random.key(seed), weights, num)
        assert jnp.all(weights[ancestors] > 0)


@schemes
def test_whatever_index_is_found_a_particle_of_positive_weight_is_returned(scheme, monkeypatch):
    found = jnp.arange(WEIGHTS.size)
    monkeypatch.setattr(resampling._of_blackjax(), scheme, lambda key, weights, num_samples: found)
    ancestors = SCHEMES[scheme](jax.random.key(0), WEIGHTS, WEIGHTS.size)
    # Each index of zero weight goes to the last one before it of positive weight; before the first, to the first.
    np.testing.assert_array_equal(ancestors, [1, 1, 2, 2, 4, 5, 6, 7, 7])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 25]), st.sampled_from(["systematic", "residual", "stratified"]))
def test_number_of_descendants_is_as_close_to_its_mean_as_the_scheme_promises(seed, num, scheme):
    # systematic: within one; residual: at least the integer part; stratified: within two.
    key_weights, key_draw = jax.random.split(jax.random.key(seed))
    weights = smc.normalize(2 * jax.random.normal(key_weights, (num,)))
    draw = jax.jit(SCHEMES[scheme], static_argnums=2)
    excess = np.asarray(counts(draw(key_draw, weights, num), num) - num * weights)
    rounding = num * num * np.finfo(np.float32).eps
    lower, upper = {"systematic": (-1, 1), "residual": (-1, np.inf), "stratified": (-2, 2)}[scheme]
    assert np.all((excess > lower - rounding) & (excess < upper + rounding))


@schemes
def test_one_particle_is_its_own_ancestor(scheme):
    assert SCHEMES[scheme](jax.random.key(0), jnp.ones(1), 1).tolist() == [0]


@pytest.mark.parametrize("partial", [None, 0.3])
@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_drawing_preserves_the_expected_weight_of_every_particles_descendants(scheme, partial):
    draws = 4000
    log_weights = jnp.log(WEIGHTS) + 0.3

    def mass(key):
        ancestors, new = draw_ancestors(key, log_weights, smc.Resampling(scheme=scheme, partial=partial))
        return jnp.zeros(WEIGHTS.size).at[ancestors].add(jnp.exp(new))

    masses = np.asarray(jax.jit(jax.vmap(mass))(jax.random.split(jax.random.key(4), draws)), np.float64)
    error = masses.std(axis=0, ddof=1) / np.sqrt(draws)
    assert np.all(np.abs(masses.mean(axis=0) - np.exp(0.3) * np.asarray(WEIGHTS)) <= 4 * error + 4 * EPS)


def test_partial_resampling_leaves_the_middle_alone():
    log_weights = jnp.log(jnp.arange(1.0, 11.0))
    ancestors, new = draw_ancestors(jax.random.key(0), log_weights, smc.Resampling(partial=0.4))
    np.testing.assert_array_equal(ancestors[2:8], jnp.arange(2, 8))
    np.testing.assert_array_equal(new[2:8], log_weights[2:8])
    # The four that take part, of weights 1, 2, 9 and 10, share their mean weight.
    np.testing.assert_allclose(jnp.exp(new[jnp.array([0, 1, 8, 9])]), 5.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"scheme": "sistematic"}, "multinomial, stratified, systematic, residual; got 'sistematic'"),
        ({"ess_threshold": -0.1}, "ess_threshold .* got -0.1"),
        ({"ess_threshold": float("nan")}, "ess_threshold .* got nan"),
        ({"every": 0}, "every.* got 0"),
        ({"window": (3, 3)}, r"window .* got \(3, 3\)"),
        ({"partial": 0.0}, r"partial .* got 0.0"),
        ({"partial": 1.5}, r"partial .* got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings_, message):
    with pytest.raises(ValueError, match=message):
        smc.Resampling(**settings_)


@pytest.mark.parametrize(
    ("settings_", "steps"),
    [
        ({"ess_threshold": 0}, []),
        ({"ess_threshold": 1.01}, [0, 1, 2, 3, 4, 5]),
        ({"every": 2}, [2, 4]),
        ({"every": 1, "window": (1, 4)}, [1, 2, 3]),
        ({"ess_threshold": 1.01, "window": (1, 100)}, [1, 2, 3, 4, 5]),
    ],
)
def test_resampling_happens_at_the_start_of_the_steps_that_were_asked_for(settings_, steps):
    result = smc.run(
        jax.random.key(0),
        Prescribed(jnp.zeros(4)),
        jnp.zeros((6, 4)),
        num_particles=4,
        resampling=smc.Resampling(**settings_),
    )
    assert np.flatnonzero(result.info.resampled).tolist() == steps


def test_equal_weights_are_not_below_a_threshold_of_one():
    due = smc.Resampling(ess_threshold=1.0).is_due(jnp.int32(1), jnp.asarray([4.0, 3.9]), 4)
    assert due.tolist() == [False, True]
