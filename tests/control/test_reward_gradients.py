"""How far the proposal follows the gradient of a reward."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.control.proposals import Drift, Local
from rnejax.systems import GaussianMixture

PROCESS = rj.processes.VariancePreserving(t_min=0.02)
MIXTURE = GaussianMixture([(-1.0, 0.0), (1.0, 0.5)], 0.5)
MODEL = MIXTURE.model(PROCESS)


def moved_by(drift, exact_gradient, gradient):
    """Mean of the proposal minus the model's, in units of C times the gradient's direction; and C."""
    transition = PROCESS.transition(0.3, 0.5)
    x = jnp.ones(2)
    kernel = MODEL.reverse(x, 0.5, 0.3)
    evaluation = jax.tree.map(lambda leaf: leaf[0], MODEL.evaluate(jax.random.key(0), x[None], transition.t))
    here = Local(x, (evaluation,), jnp.ones(1), jnp.zeros(1), jnp.ones(1), exact_gradient * x, gradient * x)
    law = drift.reverse(transition, here, jnp.asarray(1.0), (kernel,))
    return np.asarray(law.mean - kernel.mean), float(law.variance)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_the_exact_scheme_follows_by_the_coefficient_and_the_other_by_half(coefficient):
    shift, variance = moved_by(Drift(reward_coefficient=coefficient), 0.3, 0.0)
    np.testing.assert_allclose(shift, coefficient * variance * 0.3, rtol=1e-4, atol=1e-6)
    shift, variance = moved_by(Drift(reward_coefficient=coefficient), 0.0, 0.3)
    np.testing.assert_allclose(shift, 0.5 * variance * 0.3, rtol=1e-4)


@pytest.mark.parametrize("trust", [0.1, 1.0])
def test_trust_bounds_how_far_a_gradient_moves_the_proposal(trust):
    shift, variance = moved_by(Drift(trust=trust), 50.0, 0.0)
    assert 0.5 * np.sum(shift**2) / variance == pytest.approx(trust, rel=1e-3)


def test_trust_bounds_the_auxiliary_kernel_of_the_low_variance_scheme_alike():
    transition, x = PROCESS.transition(0.3, 0.5), jnp.ones(2)
    evaluation = jax.tree.map(lambda leaf: leaf[0], MODEL.evaluate(jax.random.key(0), x[None], transition.s))
    here = Local(x, (evaluation,), jnp.ones(1), jnp.zeros(1), jnp.ones(1), 0 * x, 50.0 * x)
    plain = here._replace(gradient=0 * x)
    laws = [Drift(trust=0.1).forward(transition, at_s, jnp.asarray(1.0)) for at_s in (here, plain)]
    shift = np.asarray(laws[0].mean - laws[1].mean)
    assert 0.5 * np.sum(shift**2) / float(laws[0].variance) == pytest.approx(0.1, rel=1e-3)


def test_a_gradient_without_bound_has_to_be_asked_for():
    # What a real network's gradient does where there is only noise: docs/control.md, Rewards.
    shift, variance = moved_by(Drift(), 50.0, 0.0)
    assert 0.5 * np.sum(shift**2) / variance == pytest.approx(1.0, rel=1e-3)
    shift, variance = moved_by(Drift(trust=math.inf), 50.0, 0.0)
    np.testing.assert_allclose(shift, 0.5 * variance * 50.0, rtol=1e-4)


def test_half_of_the_shift_that_evens_out_one_step_makes_many_steps_more_even():
    """Where mathematics.md, section 4, shifts A by lambda v grad r in the exact scheme, log Z varies more."""
    times = rj.time_grid(PROCESS, 25)
    target = rj.tilt(MODEL, lambda x: -2.0 * jnp.sum((x - jnp.array([0.8, -0.2])) ** 2))
    variance = {}
    for coefficient in (0.5, 1.0):
        proposal = Drift(reward_coefficient=coefficient, trust=math.inf)
        result = rj.steer(
            jax.random.key(3), target, times, 128, num_groups=64, proposal=proposal, warn=False, progress=False
        )
        variance[coefficient] = np.var(np.asarray(result.log_normalizer, np.float64), ddof=1)
    # The ratio of two variances of 64 numbers has a standard deviation of about 2 / sqrt(63) in its logarithm.
    assert np.log(variance[1.0] / variance[0.5]) > 4 * 2 / np.sqrt(63)
