"""steer() against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steering_problems import QUIET, STD, TIMES, VP, gaussian, variance_at_end, z_of_normalizer

import rnejax as rj
from rnejax.smc import log_mean_exp
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)


class TestConstantWeights:
    """The reference-matched symmetric proposal has no noise at all where the data are the reference."""

    @pytest.mark.parametrize(
        "process",
        [
            VP,
            rj.processes.Cosine(data_std=STD, t_max=1.0),
            rj.processes.VarianceExploding(data_std=STD),
            rj.processes.RectifiedFlow(data_std=STD, t_max=1.0),
        ],
        ids=lambda process: type(process).__name__,
    )
    def test_tempered_gaussian_on_every_process(self, process):
        kind = "uniform" if process.t_max == 1.0 else None
        times = rj.time_grid(process, 7, kind)
        target = rj.temper(gaussian(process=process, prediction="x0"), 2.0)
        result = rj.steer(KEY, target, times, 32, num_groups=4, **QUIET)
        variance = variance_at_end(process, times)
        truth = 2 * 0.5 * ((1 - 2) * np.log(2 * np.pi * variance) - np.log(2))  # two dimensions, beta = 2
        # Seven steps of sums of a few terms of size 10 at most, each rounded to 6e-8 of itself: 1e-5 with room.
        np.testing.assert_allclose(result.log_normalizer, truth, atol=1e-4)
        np.testing.assert_allclose(result.log_weights, 0, atol=1e-4)
        assert not np.any(result.info.resampled)


class TestClosedForms:
    """exp(log Z) is unbiased where kernels are exact, however few the steps; 64 groups of 64 particles, |z| < 4."""

    MEANS = ((0.5, -0.2), (-0.3, 0.4))

    @pytest.mark.parametrize(
        "make",
        [
            lambda a, b: rj.product([a, b]),
            lambda a, b: rj.guide(a, b, 2.0),
            lambda a, b: rj.product([a, b], [1.4, -0.6]),
        ],
    )
    def test_products_of_gaussians_of_one_width(self, make):
        target = make(*(gaussian(mean) for mean in self.MEANS))
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        betas, variance = np.array(target.exponents), variance_at_end(VP, TIMES)
        means = float(VP.alpha(TIMES[0])) * np.array(self.MEANS)
        total, centre = betas.sum(), betas @ means / betas.sum()
        misfit = (betas * (means**2).sum(-1)).sum() - total * (centre**2).sum()
        truth = -0.5 * misfit / variance + (1 - total) * np.log(2 * np.pi * variance) - np.log(total)
        # The models start from N(0, V) instead of N(alpha m, V): alpha^2 |m - m'|^2 / V at t_max, or 3e-4. Where the
        # exponents sum to 1 nothing else is left, for weights are then constant.
        found = float(log_mean_exp(result.log_normalizer))
        assert abs(found - truth) < 4 * float(result.standard_error) + 5e-4
        mean, error = rj.weighted_mean(lambda x: x, result)
        assert np.all(np.abs(mean - centre) < 4 * error + 5e-4)

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize(("slope", "curvature"), [(0.8, 0.0), (-0.5, 2.0)])
    def test_linear_and_quadratic_rewards(self, exact, slope, curvature):
        reward = jax.tree_util.Partial(
            lambda p, x: jnp.sum(p[0] * x - 0.5 * p[1] * x**2), jnp.array([slope, curvature])
        )
        result = rj.steer(KEY, rj.tilt(gaussian(), reward, exact=exact), TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        narrowed = variance / (1 + curvature * variance)
        truth = slope**2 * narrowed - np.log(1 + curvature * variance)  # two dimensions
        assert abs(z_of_normalizer(result, truth)) < 4
        mean, error = rj.weighted_mean(lambda x: x, result)
        assert np.all(np.abs(mean - slope * narrowed) < 4 * error)

    def test_reward_at_predicted_x0_ends_at_the_state_itself(self):
        # At t_min = 0.02 the predicted x0 differs from the state enough (by a fifth of its variance) to be seen.
        reward = lambda x: -2.0 * jnp.sum((x - 0.5) ** 2)  # noqa: E731
        result = rj.steer(KEY, rj.tilt(gaussian(), reward, at="x0"), TIMES, 64, num_groups=64, **QUIET)
        widened = 1 + 4 * variance_at_end(VP, TIMES)
        truth = -np.log(widened) - 2 * 2 * 0.25 / widened
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_temper_and_tilt_together(self):
        target = rj.tilt(rj.temper(gaussian(), 2.0), lambda x: -jnp.sum(x**2), exact=False)
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        truth = -2 * np.log(2 * np.pi * variance) + np.log(2 * np.pi / (2 / variance + 2))
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_a_prior_that_is_no_gaussian_is_corrected_by_the_initial_weights(self):
        # The grid ends where the modes are still apart, so that the reference's square is a poor start.
        mixture = GaussianMixture([[-1.5, 0.0], [1.0, 0.5]], STD, weights=[1, 3])
        times = rj.time_grid(VP, 12, t_max=0.3)
        prior = mixture.noised(VP.level(times[-1]))
        model = mixture.model(VP, covariance="full", prior=prior)
        result = rj.steer(KEY, rj.temper(model, 2.0), times, 256, num_groups=32, **QUIET)
        truth = mixture.noised(VP.level(times[0])).log_normalizer(2)
        # The kernels are Gaussians and the true ones are not: 12 steps leave a bias of a few hundredths.
        assert abs(float(log_mean_exp(result.log_normalizer)) - truth) < 4 * float(result.standard_error) + 0.05


class TestEulerKernels:
    """Euler-Maruyama kernels approximate the reversal to first order; their own density estimator makes up for it."""

    MIXTURE = GaussianMixture([[0.8, 0.0], [-0.8, 0.4]], 0.4, weights=[1, 2])
    PROCESS = rj.processes.VariancePreserving()
    TIMES = rj.time_grid(PROCESS, 50)
    MODEL = MIXTURE.model(PROCESS, covariance="euler")

    def test_a_power_and_the_densities_beside_it_are_those_of_the_paper_s_estimator(self):
        result = rj.steer(KEY, rj.temper(self.MODEL, 2.0), self.TIMES, 512, num_groups=8, **QUIET)
        noised = self.MIXTURE.noised(self.PROCESS.level(self.TIMES[0]))
        # With the increment of exact kernels the error at 50 steps is +18; with that of Euler-Maruyama kernels, -0.04.
        estimate, _ = rj.smc.log_normalizer_with_error(result)
        assert abs(float(estimate) - noised.log_normalizer(2)) < 0.2
        error = result.log_densities[..., 0] - jax.vmap(jax.vmap(noised.log_prob))(result.particles)
        assert abs(float(error.mean())) < 0.5

    def test_the_law_that_such_a_chain_generates_is_tilted_exactly(self):
        plain = rj.steer(KEY, self.MODEL, self.TIMES, 64, **QUIET)
        np.testing.assert_allclose(plain.log_weights, 0, atol=1e-4)
        target = rj.tilt(self.MODEL, lambda x: x[0], gradient=False)
        result = rj.steer(KEY, target, self.TIMES, 64, ess_threshold=0.0, **QUIET)
        # Moved by the model's own kernels, a particle's weight is exp(r) of where it ends, whatever these kernels are.
        rewards = result.particles[:, 0]
        np.testing.assert_allclose(result.log_weights + result.log_normalizer, rewards, atol=1e-3)
