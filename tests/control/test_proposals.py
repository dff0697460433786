"""Proposals: the noise of one step, the limit of small steps, exponents that vary, proposals of the user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steering_problems import FIRST, QUIET, TIMES, VP, gaussian, variance_at_end, z_of_normalizer

import rnejax as rj
from rnejax.control.proposals import Drift
from rnejax.smc import log_mean_exp
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)


class TestProposals:
    @pytest.mark.parametrize(
        ("proposal", "order"),
        [(Drift(None, matched=False), 1.5), ((1.0, 0.0), 1.0), ((1.0, 1.0), 0.5)],
        ids=["symmetric", "sum 1", "sum 2"],
    )
    def test_order_of_the_noise_of_one_step(self, proposal, order):
        """Gaussian data narrower than the reference: noise of order 1/2 in the step is absent iff c_a + c_b = 1.

        The covariance is the true one: the reference's is wrong by a share of order 1 in the step, and so are weights.
        """
        mixture, t = GaussianMixture([[0.0, 0.0]], 0.3), 0.2
        variance = mixture.noised(VP.level(t)).variances[0, 0]
        prior = rj.kernels.Gaussian(jnp.zeros(2), jnp.zeros(2), variance)
        model = mixture.model(VP, covariance="diagonal", prior=prior)
        noise = []
        for step in (0.002, 0.0005):
            times = np.array([t - step, t])
            result = rj.steer(
                KEY, rj.temper(model, 2.0), times, 4096, proposal=proposal, save=("log_increments",), **QUIET
            )
            noise.append(float(np.std(result.info.saved["log_increments"][0])))
        # The ratio of noises at steps 4 : 1 is 4^order: up to the next order, step^(1/2) = 0.04 of it, and the error of
        # two standard deviations.
        assert np.log(noise[0] / noise[1]) / np.log(4) == pytest.approx(order, abs=0.1)

    def test_proposal_of_the_users_own_is_unbiased_however_poor(self):
        result = rj.steer(KEY, rj.temper(gaussian(), 1.5), TIMES, 512, num_groups=64, proposal=Sluggish(), **QUIET)
        variance = variance_at_end(VP, TIMES)
        truth = (1 - 1.5) * np.log(2 * np.pi * variance) - np.log(1.5)
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_feynman_kac_correctors_converge_with_the_steps(self):
        beta, times = 1.3, rj.time_grid(VP, 400)
        truth = (1 - beta) * np.log(2 * np.pi * variance_at_end(VP, times)) - np.log(beta)  # two dimensions
        target = rj.temper(gaussian(), beta)
        result = rj.steer(KEY, target, times, 256, proposal="feynman_kac", num_groups=16, **QUIET)
        assert float(result.standard_error) < 0.05
        assert abs(float(log_mean_exp(result.log_normalizer)) - truth) < 0.2  # four of these; what is left of the steps

    def test_scheduled_exponent_reaches_the_same_normalizer(self):
        target = rj.temper(gaussian(), lambda t: 2.0 - (t - TIMES[0]))
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        truth = -np.log(2 * np.pi * variance_at_end(VP, TIMES)) - np.log(2)
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_constant_schedule_is_the_constant(self):
        number = rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 64, num_groups=64, **QUIET)
        schedule = rj.steer(KEY, rj.temper(FIRST.model(VP), lambda t: 2.0), TIMES, 64, num_groups=64, **QUIET)
        assert np.array_equal(number.log_normalizer, schedule.log_normalizer)
        assert np.array_equal(number.particles, schedule.particles)


@jax.tree_util.register_static
class Sluggish:
    """Moves with the model's kernel shifted off to one side and a third wider; looks at no model on the way back."""

    def needs_auxiliary(self, total_exponents):
        return False

    def reverse(self, transition, at_t, exponent, kernels):
        (kernel,) = kernels
        shift = kernel.shift + 0.1 * jnp.sqrt(kernel.variance)
        return rj.kernels.Gaussian(kernel.anchor, shift, 1.3 * kernel.variance, kernel.excess)

    def forward(self, transition, at_s, exponent):
        return transition.forward(at_s.x)
