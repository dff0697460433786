"""Grids that end at t = 0, where sigma = 0: no noise is left, and no score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import Cosine, DiscreteVariancePreserving, RectifiedFlow, VarianceExploding, VariancePreserving
from rnejax.smc import log_normalizer_with_error

KEY = jax.random.key(5)
STD = 0.6
DIMENSION = 2
SLOPE = jnp.asarray([0.8, -0.5])
QUIET = {"progress": False, "warn": False}
PROCESSES = [
    VariancePreserving(t_min=0.0),
    Cosine(t_min=0.0),
    RectifiedFlow(t_min=0.0),
    VarianceExploding(sigma_min=0.0),
    DiscreteVariancePreserving(np.linspace(1e-4, 0.2, 100), t_min=0),
]


def gaussian(process, **options):
    """N(0, STD^2 I), whose law at t_max is its prior: nothing but the end of the grid can go wrong."""

    def denoised(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x

    top = process.level(process.t_max)
    zeros = jnp.zeros(DIMENSION)
    prior = rj.kernels.Gaussian(zeros, zeros, jnp.asarray(top.alpha**2 * STD**2 + top.sigma**2, jnp.float32))
    options = {"covariance": "full", "prior": prior} | options
    return rj.DiffusionModel(process, denoised, "x0", shape=(DIMENSION,), **options)


def grid(process, num_steps=40):
    times = rj.time_grid(process, num_steps, "uniform")
    assert float(process.sigma(times[0])) == 0
    return times


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_densities_are_those_of_clean_data(process):
    model, times = gaussian(process), grid(process)
    samples = rj.sample(KEY, model, times, 50, progress=False)
    exact = jax.scipy.stats.norm.logpdf(samples.x, scale=STD).sum(axis=1)
    np.testing.assert_allclose(samples.log_density, exact, atol=1e-3)
    given = rj.log_density(KEY, model, samples.x, times, 2, progress=False)
    np.testing.assert_allclose(given.log_density, exact, atol=1e-3)


# A schedule whose alpha vanishes at the other end, and a table of betas.
@pytest.mark.parametrize("process", [PROCESSES[2], PROCESSES[4]], ids=lambda process: type(process).__name__)
class TestNoNoiseAtTheEnd:
    def test_the_model_itself_is_its_own_target(self, process):
        result = rj.steer(KEY, gaussian(process), grid(process), 64, **QUIET)
        assert abs(float(result.log_normalizer)) < 1e-3

    def test_an_exact_tilt(self, process):
        target = rj.tilt(gaussian(process), lambda x: x @ SLOPE)
        result = rj.steer(KEY, target, grid(process), 256, num_groups=16, **QUIET)
        log_z, error = log_normalizer_with_error(result)
        assert abs(float(log_z) - 0.5 * STD**2 * float(SLOPE @ SLOPE)) < 4 * float(error)

    def test_a_low_variance_tilt_follows_its_gradient_to_the_end(self, process):
        target = rj.tilt(gaussian(process), lambda x: x @ SLOPE, exact=False)
        result = rj.steer(KEY, target, grid(process), 256, num_groups=16, **QUIET)
        log_z, error = log_normalizer_with_error(result)
        assert abs(float(log_z) - 0.5 * STD**2 * float(SLOPE @ SLOPE)) < 4 * float(error)

    def test_a_target_that_needs_the_score_there_is_refused(self, process):
        with pytest.raises(ValueError, match=r"at t = 0 sigma = 0 and there is none: start the times later"):
            rj.steer(KEY, rj.temper(gaussian(process), 2.0), grid(process), 4, **QUIET)

    def test_the_other_proposal_needs_none(self, process):
        target = rj.temper(gaussian(process), 2.0)
        result = rj.steer(KEY, target, grid(process), 256, proposal=(1.0, 0.0), num_groups=16, **QUIET)
        log_z, error = log_normalizer_with_error(result)
        # The integral of N(0, STD^2 I)^2, without bias: of Gaussian data the marginals and their kernels are exact.
        assert abs(float(log_z) + 0.5 * DIMENSION * np.log(4 * np.pi * STD**2)) < 4 * float(error)

    def test_calibration_leaves_the_clean_end_out(self, process):
        times = grid(process)
        data = STD * jax.random.normal(KEY, (4000, DIMENSION))
        table = rj.calibrate(KEY, gaussian(process), times, data).covariance
        inside = [t for t in times[::-1] if process.sigma(t) > 0 and process.alpha(t) > 0]
        assert len(table.ratio) == len(inside)
        alpha, sigma = np.asarray([process.alpha(t) for t in inside]), np.asarray([process.sigma(t) for t in inside])

        def posterior_variance(std):
            return std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)

        exact = posterior_variance(STD) / posterior_variance(process.data_std)
        np.testing.assert_allclose(table.ratio, exact, rtol=5 * np.sqrt(2 / (4000 * DIMENSION)))


def test_a_grid_of_ends_only_has_nothing_to_measure():
    process = RectifiedFlow(t_min=0.0)
    with pytest.raises(ValueError, match="no time of the grid has both signal and noise, between 0 and 1"):
        rj.calibrate(KEY, gaussian(process), np.asarray([0.0, 1.0]), jnp.zeros((4, DIMENSION)))
