"""Log-weights: compensated sums, means, effective sample size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rnejax import smc

EPS = float(np.finfo(np.float32).eps)
log_weight_arrays = arrays(
    np.float32, st.sampled_from([1, 5, 40]), elements=st.floats(-30, 30, width=32) | st.just(np.float32(-np.inf))
)


@jax.jit
def summed(terms):
    """The compensated sum over the first axis, in a scan."""
    zero = smc.CompensatedSum.zeros(terms.shape[1:], terms.dtype)
    return jax.lax.scan(lambda total, term: (total.add(term), None), zero, terms)[0].value


def summed_one_by_one(terms):
    """The same, each addition compiled alone."""
    total, add = smc.CompensatedSum.zeros(terms.shape[1:], terms.dtype), jax.jit(smc.CompensatedSum.add)
    for term in terms:
        total = add(total, term)
    return total.value


@pytest.mark.parametrize("total", [summed, summed_one_by_one])
def test_compensated_sum_of_a_thousand_terms_is_rounded_once(total):
    # The sum is near 1e4, where half a unit in the last place is 4.9e-4; the plain float32 sum is off by up to 2e-2.
    # The compiled loop is tested as well: a compiler that simplified (a + b) - a to b would undo the compensation.
    terms = 10 + jax.random.normal(jax.random.key(0), (1000, 8))
    exact = np.asarray(terms, np.float64).sum(axis=0)
    assert np.max(np.abs(np.asarray(total(terms), np.float64) - exact)) <= np.spacing(np.float32(1e4)) / 2


def test_compensated_sum_survives_cancellation():
    # 1e8 swallows a float32 one; the compensation has kept it when 1e8 is taken away again.
    total = jax.jit(lambda one: smc.CompensatedSum.of(one).add(1e8 * one).add(-1e8 * one).value)
    assert total(jnp.float32(1.0)) == 1.0


@pytest.mark.parametrize("infinity", [-np.inf, np.inf])
def test_compensated_sum_treats_infinities_as_addition_does(infinity):
    assert summed(jnp.array([1.0, infinity, 2.0])) == infinity


def test_compensated_sum_of_opposite_infinities_is_nan():
    assert jnp.isnan(summed(jnp.array([jnp.inf, -jnp.inf])))


def test_compensated_sum_has_the_gradient_of_a_sum():
    terms = jnp.array([1e4, 1e-3, -3.0])
    np.testing.assert_array_equal(jax.grad(summed)(terms), jnp.ones(3))


def test_log_mean_exp_near_zero_keeps_its_digits():
    # The result is 1e-3: subtracting log n from logsumexp instead leaves an error of one rounding of log n, eps * 11.5.
    log_weights = jnp.full(100_000, 1e-3)
    assert abs(float(smc.log_mean_exp(log_weights)) - 1e-3) < 2 * EPS


def test_log_mean_exp_without_weight_is_minus_infinity():
    assert smc.log_mean_exp(jnp.full(3, -jnp.inf)) == -jnp.inf


@pytest.mark.parametrize(
    ("log_weights", "ess"),
    [
        ([0.0, 0.0, 0.0, 0.0], 4.0),
        ([500.0, 500.0], 2.0),
        ([0.0, -jnp.inf, -jnp.inf], 1.0),
        ([jnp.log(3.0), 0.0], 1.6),
        ([-jnp.inf, -jnp.inf], 0.0),
    ],
)
def test_effective_sample_size(log_weights, ess):
    np.testing.assert_allclose(smc.effective_sample_size(jnp.array(log_weights)), ess, rtol=4 * EPS)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_effective_sample_size_of_no_weights_is_nan(bad):
    assert jnp.isnan(smc.effective_sample_size(jnp.array([0.0, bad])))


@settings(deadline=None, max_examples=30)
@given(log_weight_arrays, st.floats(-50, 50), st.randoms())
def test_weights_know_neither_a_constant_nor_an_order(log_weights, constant, random):
    order = np.array(random.sample(range(len(log_weights)), len(log_weights)))
    log_weights, moved = jnp.asarray(log_weights), jnp.asarray(log_weights)[order] + constant
    # A log-weight of magnitude up to 80 is rounded to 40 eps, its weight relatively so; the ratio of two sums of
    # squares moves by at most four times that, and n sums add n eps.
    tolerance = (4 * 80 + 40) * EPS
    size = jax.jit(smc.effective_sample_size)
    np.testing.assert_allclose(size(moved), size(log_weights), rtol=tolerance, atol=0)
    np.testing.assert_allclose(
        smc.normalize(moved), smc.normalize(log_weights)[order], rtol=tolerance, atol=np.finfo(np.float32).tiny
    )
    np.testing.assert_allclose(
        smc.log_mean_exp(moved), smc.log_mean_exp(log_weights) + constant, rtol=EPS, atol=tolerance
    )


class TestEffectiveAncestors:
    def test_of_everybody_their_own_it_is_the_effective_sample_size(self):
        log_weights = jax.random.normal(jax.random.key(0), (3, 50))
        eve = jnp.tile(jnp.arange(50), (3, 1))
        found = smc.effective_ancestors(eve, log_weights)
        np.testing.assert_allclose(found, smc.effective_sample_size(log_weights), rtol=1e-5)

    def test_families_count_by_their_weight_and_not_by_their_number(self):
        """Two families of weights 3/4 and 1/4, of five members; a third has no weight left."""
        eve = jnp.asarray([7, 7, 7, 1, 1, 4, 4, 4])
        log_weights = jnp.log(jnp.asarray([1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0]))
        np.testing.assert_allclose(smc.effective_ancestors(eve, log_weights), 1 / (9 / 16 + 1 / 16), rtol=1e-6)
        assert float(smc.effective_ancestors(jnp.zeros(8, int), log_weights)) == pytest.approx(1.0)
