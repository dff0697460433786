"""Targets compose, and what cannot be composed is refused where it is written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.control.problem import initial_law
from rnejax.control.proposals import combine_covariances, get_proposal
from rnejax.control.steer import check_exponents
from rnejax.systems import GaussianMixture

VP = rj.processes.VariancePreserving()
TIMES = rj.time_grid(VP, 5)
KEY = jax.random.key(5)


def gaussian(mean=0.0, std=1.0, process=VP, dimension=2, **options):
    return GaussianMixture([[mean] * dimension], std).model(process, **options)


def reward(x):
    return jnp.sum(x)


class TestComposition:
    def test_temper_multiplies_exponents_and_reward_strengths(self):
        target = rj.temper(rj.tilt(rj.temper(gaussian(), 2.0), reward, exact=False), 3.0)
        assert target.exponents == (6.0,)
        once = rj.tilt(gaussian(), reward, exact=False)
        np.testing.assert_allclose(target.strengths_at(TIMES), 3 * once.strengths_at(TIMES))

    def test_guide_is_a_product_with_exponents_that_sum_to_one(self):
        target = rj.guide(gaussian(), gaussian(1.0), scale=2.5)
        np.testing.assert_allclose(target.exponents_at(TIMES), [[-1.5, 2.5]] * len(TIMES))

    def test_guide_with_a_scheduled_scale_sums_to_one_at_every_time(self):
        target = rj.guide(gaussian(), gaussian(1.0), scale=lambda t: 1 + t)
        exponents = target.exponents_at(TIMES)
        np.testing.assert_allclose(exponents.sum(axis=1), 1)
        np.testing.assert_allclose(exponents[:, 1], 1 + TIMES)

    def test_product_of_targets_keeps_all_models_and_rewards(self):
        tilted = rj.tilt(gaussian(), reward, exact=False)
        target = rj.product([rj.temper(gaussian(), 0.5), tilted], exponents=[2.0, 3.0])
        assert target.exponents == (1.0, 3.0)
        assert len(target.rewards) == 1

    def test_schedules_multiply(self):
        target = rj.temper(rj.temper(gaussian(), lambda t: 1 + t), lambda t: 2 - t)
        np.testing.assert_allclose(target.exponents_at(TIMES)[:, 0], (1 + TIMES) * (2 - TIMES))

    def test_default_reward_schedule_is_the_share_of_signal_and_one_at_the_end(self):
        process = rj.processes.VariancePreserving(data_std=0.5)
        alpha, sigma = process.alpha(TIMES), process.sigma(TIMES)
        variance = alpha**2 * 0.25 + sigma**2
        for at, size in (("x0", 1.0), ("x", np.minimum(1, 0.25 / variance))):
            strengths = rj.tilt(gaussian(process=process), reward, at=at).strengths_at(TIMES)[:, 0]
            expected = alpha**2 / variance * size
            np.testing.assert_allclose(strengths, expected / expected[0])
            assert strengths[0] == 1


class TestRefusals:
    def test_exponents_must_match_models(self):
        with pytest.raises(ValueError, match="got 3 exponents for 2 models"):
            rj.product([gaussian(), gaussian()], exponents=[1, 2, 3])

    def test_empty_product(self):
        with pytest.raises(ValueError, match="at least one model"):
            rj.product([])

    def test_models_on_different_processes(self):
        with pytest.raises(ValueError, match="share one process"):
            rj.product([gaussian(), gaussian(process=rj.processes.Cosine())])

    def test_models_of_different_shapes(self):
        with pytest.raises(ValueError, match=r"share one shape: model 0 has \(2,\), model 1 has \(3,\)"):
            rj.product([gaussian(), gaussian(dimension=3)])

    @pytest.mark.parametrize("betas", [(1.0, -1.0), (1.0, -2.0)])
    def test_exponents_without_a_positive_sum(self, betas):
        target = rj.product([gaussian(), gaussian(1.0)], exponents=betas)
        with pytest.raises(ValueError, match="positive sum at all times"):
            rj.steer(KEY, target, TIMES, 4)

    def test_schedule_whose_sum_is_not_positive_names_the_time(self):
        exponents = rj.temper(gaussian(), lambda t: t - TIMES[2]).exponents_at(TIMES)
        with pytest.raises(ValueError, match=f"at t = {TIMES[0]:g}"):
            check_exponents(exponents, TIMES)

    def test_schedule_that_is_not_finite(self):
        with pytest.raises(ValueError, match="exponent of model 0"):
            rj.steer(KEY, rj.temper(gaussian(), lambda t: np.nan if t < TIMES[2] else 1.0), TIMES, 4)

    @pytest.mark.parametrize("make", [lambda m: rj.temper(m, 2.0), lambda m: rj.product([m, m])])
    def test_exact_tilt_needs_one_model_with_exponent_one(self, make):
        with pytest.raises(ValueError, match="exact for one model with exponent 1"):
            rj.tilt(make(gaussian()), reward, exact=True)

    def test_exact_tilt_cannot_be_tempered_afterwards(self):
        with pytest.raises(ValueError, match="exact=False"):
            rj.temper(rj.tilt(gaussian(), reward), 2.0)

    def test_reward_schedule_must_end_at_one(self):
        with pytest.raises(ValueError, match=r"1 at t_min = 0.001"):
            rj.steer(KEY, rj.tilt(gaussian(), reward, schedule=lambda t: 0.5), TIMES, 4)

    def test_reward_that_cannot_be_called(self):
        with pytest.raises(ValueError, match="must be a function"):
            rj.tilt(gaussian(), 3.0)

    def test_reward_that_returns_an_array(self):
        with pytest.raises(ValueError, match=r"must return a scalar, got shape \(2,\)"):
            rj.steer(KEY, rj.tilt(gaussian(), lambda x: x), TIMES, 4)

    def test_unknown_place_for_a_reward(self):
        with pytest.raises(ValueError, match="at must be 'x'"):
            rj.tilt(gaussian(), reward, at="x1")

    def test_gradient_of_a_host_reward(self):
        with pytest.raises(ValueError, match="host reward has no gradient"):
            rj.tilt(gaussian(), reward, host=True, gradient=True)

    def test_something_that_is_no_target(self):
        with pytest.raises(TypeError, match="must be a DiffusionModel or a Target, got str"):
            rj.temper("model", 2.0)

    @pytest.mark.parametrize(
        ("proposal", "message"),
        [
            ("symetric", "unknown proposal 'symetric'"),
            ((1.0,), "has two numbers, got 1"),
            (object(), r"lacks \['needs_auxiliary', 'reverse', 'forward'\]"),
        ],
    )
    def test_proposals_that_are_none(self, proposal, message):
        with pytest.raises(ValueError, match=message):
            get_proposal(proposal)

    def test_window_without_a_step(self):
        with pytest.raises(ValueError, match="no step begins at a time in the window"):
            rj.steer(KEY, rj.temper(gaussian(), 2.0), TIMES, 4, window=(2.0, 3.0))

    def test_score_prediction_where_there_is_no_signal(self):
        flow = rj.processes.RectifiedFlow(t_max=1.0)
        with pytest.raises(ValueError, match="alpha = 0"):
            rj.steer(KEY, rj.temper(gaussian(process=flow), 2.0), rj.time_grid(flow, 5), 4)


class TestInitialLaw:
    """pi_init is proportional to prod prior_i^beta_i, for priors that are Gaussians of the reference's kind."""

    def test_isotropic_and_diagonal_priors(self):
        first = rj.kernels.Gaussian(jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.float32(0.5))
        second = rj.kernels.Gaussian(jnp.zeros(2), jnp.array([-1.0, 0.0]), jnp.float32(1.0), jnp.array([1.0, 3.0]))
        models = (gaussian(prior=first), gaussian(prior=second))
        betas = np.array([1.5, -0.25])
        law = initial_law(models, VP.level(1.0), betas)
        points = jax.random.normal(KEY, (5, 2))
        wanted = 1.5 * jax.vmap(first.log_prob)(points) - 0.25 * jax.vmap(second.log_prob)(points)
        ratio = np.asarray(wanted - jax.vmap(law.log_prob)(points))
        # Proportional: the ratio is one constant. Rounding of sums of numbers of size 10.
        np.testing.assert_allclose(ratio, ratio[0], atol=2e-5)

    def test_product_without_positive_precision_is_refused(self):
        narrow = rj.kernels.Gaussian(jnp.zeros(2), jnp.zeros(2), jnp.float32(0.1))
        models = (gaussian(prior=narrow), gaussian())
        with pytest.raises(ValueError, match="no positive precision"):
            initial_law(models, VP.level(1.0), np.array([-0.5, 1.5]))


class TestCombinedCovariance:
    """sum beta_i C_i / bar, clipped between the smallest and the largest C_i."""

    @staticmethod
    def kernel(excess, basis=None):
        return rj.kernels.Gaussian(jnp.zeros(2), jnp.zeros(2), jnp.float32(1.0), jnp.asarray(excess), basis)

    def test_negative_exponents_do_not_leave_the_range(self):
        kernels = (self.kernel(0.5), self.kernel(-0.5))
        assert combine_covariances(kernels, jnp.array([0.5, 0.5]))[0] == 0
        assert combine_covariances(kernels, jnp.array([-1.0, 2.0]))[0] == -0.5
        assert combine_covariances(kernels, jnp.array([2.0, -1.0]))[0] == 0.5

    def test_dense_and_isotropic(self):
        basis = jnp.array([[0.6, -0.8], [0.8, 0.6]])
        kernels = (self.kernel([0.4, -0.2], basis), self.kernel(0.1))
        eigenvalues, combined = combine_covariances(kernels, jnp.array([0.5, 0.5]))
        matrix = (combined * eigenvalues) @ combined.T
        wanted = 0.5 * (basis * jnp.array([0.4, -0.2])) @ basis.T + 0.05 * jnp.eye(2)
        np.testing.assert_allclose(matrix, wanted, atol=1e-6)
