"""Weighted means, log Z and resampling of a result, with their standard errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import OBSERVATIONS, kalman, state_space

from rnejax import smc

KEY = jax.random.key(7)


class Info(NamedTuple):
    eve: Any
    num_resamplings: Any


class Result(NamedTuple):
    """The least that the estimators ask for."""

    particles: Any
    log_weights: Any
    log_normalizer: Any
    info: Info


def weighted(weights, particles, eve=None, resamplings=0, log_normalizer=0.0):
    weights = jnp.asarray(weights, float)
    eve = jnp.broadcast_to(jnp.arange(weights.shape[-1]), weights.shape) if eve is None else jnp.asarray(eve)
    return Result(particles, jnp.log(weights), jnp.asarray(log_normalizer), Info(eve, jnp.int32(resamplings)))


def test_weighted_mean_of_a_pytree_of_functions():
    result = weighted([1.0, 3.0], {"x": jnp.array([[0.0, 1.0], [4.0, 5.0]])})
    mean, error = smc.weighted_mean(lambda particle: {"x": particle["x"], "first": particle["x"][0] ** 2}, result)
    np.testing.assert_allclose(mean["x"], [3.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(mean["first"], 12.0, rtol=1e-6)
    assert error["x"].shape == (2,)
    assert error["first"].shape == ()


def test_error_without_resampling_is_that_of_importance_sampling():
    weights, x = np.array([0.2, 0.5, 0.3, 0.0]), np.array([1.0, 2.0, 4.0, 100.0])
    _, error = smc.weighted_mean(lambda x: x, weighted(weights, jnp.asarray(x)))
    expected = np.sqrt(4 / 3 * np.sum((weights * (x - weights @ x)) ** 2))
    np.testing.assert_allclose(error, expected, rtol=1e-5)


def test_members_of_a_family_are_one_observation():
    # Two families, {0, 1} and {2}: deviations are summed within a family before they are squared.
    x = jnp.array([0.0, 3.0, 6.0])
    _, error = smc.weighted_mean(lambda x: x, weighted([1.0, 1.0, 1.0], x, eve=[1, 1, 2], resamplings=1))
    np.testing.assert_allclose(error, np.sqrt((3 / 2) ** 2 * 2) * 1.0, rtol=1e-6)


def test_one_family_knows_no_error():
    mean, error = smc.weighted_mean(lambda x: x, weighted([1.0, 1.0], jnp.array([1.0, 2.0]), eve=[1, 1], resamplings=1))
    assert mean == 1.5
    assert jnp.isnan(error)


def test_one_particle_knows_no_error():
    mean, error = smc.weighted_mean(lambda x: x, weighted([1.0], jnp.array([2.0])))
    assert mean == 2
    assert jnp.isnan(error)


def test_particles_of_zero_weight_do_not_enter():
    mean, error = smc.weighted_mean(jnp.log, weighted([1.0, 0.0, 1.0], jnp.array([1.0, -1.0, 1.0])))
    assert mean == 0
    assert error == 0


def test_a_function_that_is_nan_at_a_particle_that_counts_gives_nan():
    mean, _ = smc.weighted_mean(jnp.log, weighted([1.0, 0.5], jnp.array([1.0, -1.0])))
    assert jnp.isnan(mean)


def test_groups_are_pooled_by_their_normalizers():
    # Z = 1 and 3: the second group counts three times.
    result = weighted(
        [[1.0, 1.0], [1.0, 1.0]], jnp.array([[0.0, 2.0], [4.0, 6.0]]), log_normalizer=jnp.log(jnp.array([1.0, 3.0]))
    )
    mean, error = smc.weighted_mean(lambda x: x, result)
    np.testing.assert_allclose(mean, 4.0, rtol=1e-6)
    # z = (1/4, 3/4), m = (1, 5): sqrt(2 ((3/4)^2 + (3/4)^2)) = 1.5
    np.testing.assert_allclose(error, 1.5, rtol=1e-6)


def test_error_of_log_z_over_groups_is_that_of_the_mean_of_z():
    z = np.array([1.0, 2.0, 6.0])
    result = weighted(np.ones((3, 2)), jnp.zeros((3, 2)), log_normalizer=jnp.log(jnp.asarray(z)))
    estimate, error = smc.log_normalizer_with_error(result)
    np.testing.assert_allclose(estimate, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(error, z.std(ddof=1) / np.sqrt(3) / 3, rtol=1e-6)


def test_error_of_log_z_without_groups_needs_independent_particles():
    weights = np.array([1.0, 2.0, 6.0])
    estimate, error = smc.log_normalizer_with_error(weighted(weights, jnp.zeros(3), log_normalizer=2.0))
    assert estimate == 2
    np.testing.assert_allclose(error, weights.std(ddof=1) / np.sqrt(3) / 3, rtol=1e-6)
    _, error = smc.log_normalizer_with_error(weighted(weights, jnp.zeros(3), resamplings=1))
    assert jnp.isnan(error)


@pytest.mark.parametrize("final", [False, True])
def test_a_final_resampling_is_one(final):
    # Weights that are resampled only at the end come out equal, and know nothing of their spread any more.
    result = smc.run(
        KEY,
        state_space(),
        jnp.asarray(OBSERVATIONS[:3]),
        num_particles=64,
        resampling=smc.Resampling(ess_threshold=0.0, final=final),
    )
    assert result.info.num_resamplings == final
    _, error = smc.log_normalizer_with_error(result)
    assert bool(jnp.isnan(error)) == final
    plain = weighted(jnp.exp(result.log_weights), result.particles, result.info.eve, int(final))
    expected = smc.weighted_mean(lambda x: x, plain)[1]
    np.testing.assert_allclose(smc.weighted_mean(lambda x: x, result)[1], expected, rtol=1e-5)


@pytest.mark.parametrize(("scheme", "at_most"), [("multinomial", 1.25), ("systematic", 3.0)])
def test_genealogy_gives_the_error_that_repeated_runs_have(scheme, at_most):
    # Each of 1,000 groups is taken for a run of its own. A variance from 1,000 samples has a relative standard error of
    # sqrt(2 / 999) = 4.5 %; four of them, and the O(1/N) bias of the estimator, make the bounds for multinomial
    # resampling. With lower-variance schemes the estimate is conservative, never below.
    groups = smc.run(
        KEY,
        state_space(),
        jnp.asarray(OBSERVATIONS),
        num_particles=256,
        num_groups=1000,
        resampling=smc.Resampling(scheme=scheme),
    )
    assert jnp.any(groups.info.resampled)
    runs = groups._replace(info=groups.info._replace(aux=None))
    means, errors = jax.jit(jax.vmap(lambda result: smc.weighted_mean(lambda x: x, result)))(runs)
    ratio = np.mean(np.asarray(errors, np.float64) ** 2) / np.var(np.asarray(means, np.float64), ddof=1)
    assert 0.8 < ratio < at_most
    _, mean, _ = kalman(state_space(), OBSERVATIONS)
    pooled, error = smc.weighted_mean(lambda x: x, groups)
    assert abs(pooled - mean) < 4 * error


def test_resample_returns_equally_weighted_particles_of_all_groups():
    # The second group carries three quarters of the weight, of which its last particle has none.
    result = weighted(
        [[1.0, 1.0], [2.0, 0.0]],
        {"x": jnp.array([[0.0, 1.0], [2.0, 3.0]])},
        log_normalizer=jnp.log(jnp.array([1.0, 3.0])),
    )
    x = smc.resample(KEY, result, 8000)["x"]
    np.testing.assert_array_equal(np.bincount(np.asarray(x, int), minlength=4), [1000, 1000, 6000, 0])
    assert smc.resample(KEY, result)["x"].shape == (4,)


def test_resample_names_what_it_cannot_do():
    result = weighted([1.0, 1.0], jnp.zeros(2))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        smc.resample(KEY, result, 0)
    with pytest.raises(ValueError, match="one of multinomial, stratified, systematic, residual; got 'best'"):
        smc.resample(KEY, result, scheme="best")
