"""steer() on a linear subspace: particles stay there, and every density has its dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steering_problems import QUIET, z_of_normalizer

import rnejax as rj
from rnejax.kernels import CentreOfMassFree
from rnejax.smc import log_normalizer_with_error

KEY = jax.random.key(8)
SHAPE, DIMENSION = (3, 2), 4
PROCESS = rj.processes.VariancePreserving(subspace=CentreOfMassFree())
MODEL = rj.DiffusionModel(PROCESS, lambda x, t: -x, "score", shape=SHAPE)  # N(0, I) on the subspace, at every time
# Far off the subspace: what a kernel that forgets to project would move by is larger than what counts.
SLOPE = jnp.asarray([[0.6, 0.2], [0.1, 0.9], [0.5, -0.4]]) + jnp.asarray([3.0, -2.0])


def pull(x):
    return jnp.sum(SLOPE * x)


def assert_centred(result):
    # Of numbers of size 1, in float32, over a dozen steps.
    np.testing.assert_allclose(np.asarray(result.particles).mean(axis=-2), 0, atol=1e-5)


@pytest.mark.parametrize(
    "square", [lambda m: rj.temper(m, 2.0), lambda m: rj.product([m, m])], ids=["power", "product"]
)
def test_a_square_has_the_dimension_of_the_subspace_and_constant_weights(square):
    # Three long steps, in which the noise of the exponent 2 does not fit into the reference's (rho < 1).
    result = rj.steer(KEY, square(MODEL), rj.time_grid(PROCESS, 3), 64, **QUIET)
    truth = -0.5 * DIMENSION * (np.log(2 * np.pi) + np.log(2))  # of the integral of N(0, I)^2
    np.testing.assert_allclose(result.log_normalizer, truth, atol=1e-4)
    np.testing.assert_allclose(result.log_weights, 0, atol=1e-3)
    assert_centred(result)


@pytest.mark.parametrize("exact", [True, False])
def test_only_the_part_of_a_reward_that_the_subspace_sees_counts(exact):
    target = rj.tilt(MODEL, pull, exact=exact)
    result = rj.steer(KEY, target, rj.time_grid(PROCESS, 12), 64, num_groups=64, **QUIET)
    seen = SLOPE - SLOPE.mean(axis=0)
    assert abs(z_of_normalizer(result, 0.5 * float(jnp.sum(seen**2)))) < 4
    assert_centred(result)


@pytest.mark.parametrize("second", ["full", "analytic"])
def test_a_product_of_models_that_know_their_covariances_differently(second):
    # Normal directions of a scalar covariance are none of a dense one: they cost 0.35 nats here when they counted.
    def model(std):
        def score(x, t):
            return -x / (PROCESS.alpha(t) ** 2 * std**2 + PROCESS.sigma(t) ** 2)

        return rj.DiffusionModel(PROCESS, score, "score", "full", SHAPE)

    times = rj.time_grid(PROCESS, 20)
    other = model(0.7)
    if second == "analytic":
        other = rj.calibrate(
            KEY, other, times, 0.7 * jax.vmap(PROCESS.subspace.project)(jax.random.normal(KEY, (4000, *SHAPE)))
        )
    result = rj.steer(KEY, rj.product([model(0.5), other]), times, 128, num_groups=16, **QUIET)
    alpha, sigma = float(PROCESS.alpha(times[0])), float(PROCESS.sigma(times[0]))
    total = sum(alpha**2 * std**2 + sigma**2 for std in (0.5, 0.7))
    # Gaussian data: unbiased. The table's error is that of a variance of 4,000 * DIMENSION squares, 1 % at most.
    _, error = log_normalizer_with_error(result)
    bound = 4 * float(error) + DIMENSION * np.sqrt(2 / (4000 * DIMENSION))
    assert abs(float(result.log_normalizer.mean()) + 0.5 * DIMENSION * np.log(2 * np.pi * total)) < bound
    assert_centred(result)
