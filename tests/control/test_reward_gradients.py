"""How far the proposal follows the gradient of a reward."""

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


def test_half_of_the_shift_that_evens_out_one_step_makes_many_steps_more_even():
    """Where mathematics.md, section 4, shifts A by lambda v grad r in the exact scheme, log Z varies more."""
    times = rj.time_grid(PROCESS, 25)
    target = rj.tilt(MODEL, lambda x: -2.0 * jnp.sum((x - jnp.array([0.8, -0.2])) ** 2))
    variance = {}
    for coefficient in (0.5, 1.0):
        result = rj.steer(
            jax.random.key(3), target, times, 128, num_groups=64, proposal=Drift(reward_coefficient=coefficient),
            warn=False, progress=False,
        )  # fmt: skip
        variance[coefficient] = np.var(np.asarray(result.log_normalizer, np.float64), ddof=1)
    # The ratio of two variances of 64 numbers has a standard deviation of about 2 / sqrt(63) in its logarithm.
    assert np.log(variance[1.0] / variance[0.5]) > 4 * 2 / np.sqrt(63)
