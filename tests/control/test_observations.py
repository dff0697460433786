"""Posterior sampling for an observation, against conjugate Gaussian answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import rnejax as rj
from rnejax.control.observations import LikelihoodStrength, ModelCovariance, log_likelihood
from rnejax.covariance import Analytic

DATA_STD = 0.7
PROCESS = rj.processes.VariancePreserving(data_std=DATA_STD)


def gaussian_model():
    def score(x, t):
        return -x / (PROCESS.alpha(t) ** 2 * DATA_STD**2 + PROCESS.sigma(t) ** 2)

    return rj.DiffusionModel(PROCESS, score, "score", "reference", (2,))


MODEL = gaussian_model()


LINEAR = [
    rj.processes.NonReversible(np.diag([2.0, 1.0]), [[0.0, 1.5], [-1.5, 0.0]], data_covariance=DATA_STD**2, t_min=0.01),
    rj.processes.CriticallyDamped(data_std=DATA_STD, t_min=0.05),
]


@pytest.mark.parametrize("process", LINEAR, ids=lambda process: type(process).__name__)
def test_a_linear_sde_is_observed_like_any_other(process):
    y, noise_std = jnp.asarray([0.8]), 0.4
    data = rj.systems.GaussianMixture([(0.0, 0.0)], DATA_STD)
    model = data.model(process, "score")
    shape = model.shape

    def operator(x):
        return x.reshape(-1)[:1]  # of a phase space, the first position

    target = rj.observe(model, operator, y, noise_std)
    strengths = target.strengths_at(rj.time_grid(process, 20))[:, 0]
    assert strengths[0] == 1
    assert np.all(np.diff(strengths) < 0)
    result = rj.steer(jax.random.key(0), target, rj.time_grid(process, 60), 256, num_groups=16, warn=False)
    law = process.reference(process.t_min, shape)
    first = jnp.zeros(shape).at[(0,) * len(shape)].set(1.0)
    prior = float(jnp.vdot(first, law.covariance_times(first)))  # of what is observed, at t_min
    total = prior + noise_std**2
    evidence = -0.5 * float(y[0]) ** 2 / total - 0.5 * np.log(2 * np.pi * total)
    log_mean = jax.scipy.special.logsumexp(result.log_normalizer) - np.log(16)
    assert abs(log_mean - evidence) < 4 * result.standard_error
    mean, error = rj.weighted_mean(operator, result)
    assert np.all(np.abs(mean - prior / total * y) < 4 * error)


@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_posterior_and_evidence_are_those_of_the_conjugate_gaussian(noise_std):
    y = jnp.asarray([0.8])
    target = rj.observe(MODEL, lambda x: x[:1], y, noise_std)
    result = rj.steer(jax.random.key(0), target, rj.time_grid(PROCESS, 100), 256, num_groups=16, warn=False)
    prior = float(PROCESS.reference(PROCESS.t_min).variance)
    shrink = prior / (prior + noise_std**2)
    evidence = -0.5 * float(y[0]) ** 2 / (prior + noise_std**2) - 0.5 * np.log(2 * np.pi * (prior + noise_std**2))
    log_mean = jax.scipy.special.logsumexp(result.log_normalizer) - np.log(16)
    assert abs(log_mean - evidence) < 4 * result.standard_error
    (mean, square), (mean_error, square_error) = rj.weighted_mean(lambda x: (x, x**2), result)
    assert np.all(np.abs(mean - np.array([shrink * y[0], 0.0])) < 4 * mean_error)
    expected = np.array([shrink * noise_std**2 + (shrink * y[0]) ** 2, prior])
    assert np.all(np.abs(square - expected) < 4 * square_error)


def test_another_observation_recompiles_nothing():
    traces = []

    def operator(x):
        traces.append(1)
        return x[:1]

    times = rj.time_grid(PROCESS, 5)
    for value in (0.1, 0.9):
        posterior = rj.observe(MODEL, operator, jnp.asarray([value]), 0.5)  # looks at the operator's shape
        before = len(traces)
        rj.steer(jax.random.key(0), posterior, times, 4, warn=False)
    assert before > 0
    assert len(traces) == before


def test_strength_grows_to_one_and_knows_the_models_covariance():
    times = rj.time_grid(PROCESS, 10)
    plain = LikelihoodStrength(0.01, ModelCovariance((), (), 1.0)).strengths(PROCESS, times)
    assert plain[0] == 1
    assert np.all(np.diff(plain) < 0)
    sharp = LikelihoodStrength(0.01, ModelCovariance((-20.0, 20.0), (0.1, 0.1), 1.0)).strengths(PROCESS, times)
    assert np.all(sharp[1:] > plain[1:])


def test_bad_observations_say_what_is_wrong():
    with pytest.raises(ValueError, match="noise_std must be positive"):
        rj.observe(MODEL, lambda x: x, jnp.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"returns shape \(2,\).*y has \(3,\)"):
        rj.observe(MODEL, lambda x: x, jnp.zeros(3), 0.1)


def test_the_reward_is_the_log_likelihood_of_every_number_observed():
    y, x, noise_std = np.array([0.3, -0.2, 0.9]), np.array([0.1, 0.4, 0.5]), 0.2
    found = log_likelihood(lambda x: 2 * x, jnp.asarray(y), jnp.asarray(noise_std), jnp.asarray(x))
    np.testing.assert_allclose(found, norm.logpdf(y, 2 * x, noise_std).sum(), rtol=1e-5)


def test_the_strength_weighs_the_noise_against_what_the_model_does_not_know():
    """s^2 / (s^2 + c_t) over its value at t_min, with the model's c_t = Cov[x_0 | x_t] in the user's units."""
    ratio, scale, noise_std = 0.3, 2.0, 0.4
    table = Analytic(jnp.asarray([-20.0, 20.0]), jnp.asarray([ratio, ratio]))
    model = rj.DiffusionModel(PROCESS, MODEL.fn, "score", table, (2,), transform=rj.transforms.Affine(scale, 1.0))
    target = rj.observe(model, lambda x: x[:1], jnp.asarray([0.8]), noise_std)
    times = rj.time_grid(PROCESS, 6)
    alpha, sigma = PROCESS.alpha(times), PROCESS.sigma(times)
    variance = DATA_STD**2 * sigma**2 / (alpha**2 * DATA_STD**2 + sigma**2) * ratio * scale**2
    expected = noise_std**2 / (noise_std**2 + variance)
    np.testing.assert_allclose(target.strengths_at(times)[:, 0], expected / expected[0], rtol=1e-5)


def test_observations_are_of_the_predicted_clean_state_in_the_scheme_that_is_asked_for():
    for exact in (True, False):
        (reward,) = rj.observe(MODEL, lambda x: x[:1], jnp.asarray([0.8]), 0.5, exact=exact).rewards
        assert reward.exact is exact
        assert reward.at == "x0"
        assert reward.gradient


class TestPredictionError:
    """Gaussian data of known covariance, of which the posterior's and its traces are known at every noise level."""

    VARIANCES = np.array([2.0, 0.5, 0.1, 0.1])
    PROCESS = rj.processes.VariancePreserving()
    SCALE = 3.0

    def model(self):
        def x0(x, t):
            alpha, sigma = self.PROCESS.alpha(t), self.PROCESS.sigma(t)
            return alpha * self.VARIANCES / (alpha**2 * self.VARIANCES + sigma**2) * x

        return rj.DiffusionModel(self.PROCESS, x0, "x0", shape=(4,), transform=rj.transforms.Affine(self.SCALE))

    def variances(self, t, keep=slice(None)):
        alpha, sigma = self.PROCESS.alpha(t), self.PROCESS.sigma(t)
        posterior = self.SCALE**2 * (self.VARIANCES * sigma**2 / (alpha**2 * self.VARIANCES + sigma**2))[keep]
        return np.sum(posterior**2) / np.sum(posterior)

    @pytest.mark.parametrize("keep", [slice(None), slice(1, 3)])
    def test_it_is_the_variance_that_the_residual_sees(self, keep):
        times = rj.time_grid(self.PROCESS, 8)
        data = self.SCALE * np.sqrt(self.VARIANCES) * np.random.default_rng(0).normal(size=(2000, 4))
        found = rj.control.prediction_error(jax.random.key(1), self.model(), lambda x: x[keep], times, data)
        expected = [self.variances(t, keep) for t in times]
        # Traces from 2,000 points have relative errors of about sqrt(2 / 2000) each; four of two of them.
        np.testing.assert_allclose(found.variance(self.PROCESS, times), expected, rtol=4 * np.sqrt(4 / 2000))

    def test_a_point_is_no_pair_with_itself(self):
        # A network that predicts nothing errs by the points themselves: orthogonal ones have nothing in common.
        nothing = rj.DiffusionModel(self.PROCESS, lambda x, t: 0 * x, "x0", shape=(4,))
        times = rj.time_grid(self.PROCESS, 2)
        found = rj.control.prediction_error(jax.random.key(1), nothing, lambda x: x, times, 3 * np.eye(4))
        np.testing.assert_allclose(found.variances, 0, atol=1e-6)

    def test_equal_errors_are_one_direction(self):
        # C = e e^T, so that tr(C^2) / tr(C) = |e|^2, from as few as two points.
        nothing = rj.DiffusionModel(self.PROCESS, lambda x, t: 0 * x, "x0", shape=(4,))
        times = rj.time_grid(self.PROCESS, 2)
        found = rj.control.prediction_error(jax.random.key(1), nothing, lambda x: x, times, np.full((2, 4), 1.5))
        np.testing.assert_allclose(found.variances, 9.0, rtol=1e-5)

    def test_the_strength_of_the_likelihood_follows_it(self):
        times = rj.time_grid(self.PROCESS, 8)
        error = rj.control.prediction_error(jax.random.key(1), self.model(), lambda x: x, times, num_samples=64)
        target = rj.observe(self.model(), lambda x: x, jnp.zeros(4), 0.5, error=error)
        expected = 0.25 / (0.25 + error.variance(self.PROCESS, times))
        np.testing.assert_allclose(target.strengths_at(times)[:, 0], expected / expected[0], rtol=1e-6)

    def test_between_the_times_of_the_table_it_is_interpolated(self):
        error = rj.control.PredictionError((-2.0, 2.0), (4.0, 0.25))
        process = rj.processes.VarianceExploding()
        level = np.array([np.exp(-2.0), 1.0, np.exp(2.0)])  # log-SNR 4, 0, -4
        np.testing.assert_allclose(error.variance(process, level), [0.25, 1.0, 4.0], rtol=1e-6)

    def test_one_point_is_refused(self):
        with pytest.raises(ValueError, match="measured on pairs of points"):
            rj.control.prediction_error(
                jax.random.key(1), self.model(), lambda x: x, rj.time_grid(self.PROCESS, 2), np.zeros((1, 4))
            )
