"""The analytic covariance: the denoising loss, measured on data or on a pilot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN

import rnejax as rj
from rnejax.processes import RectifiedFlow, VariancePreserving

KEY = jax.random.key(23)
TIMES = np.array([0.1, 0.4, 0.9])
PROCESS = RectifiedFlow(data_std=0.7)
MODEL = GAUSSIAN.model(PROCESS)


def exact_ratio(times=TIMES):
    """tr Cov[x_0 | x_t] / d over the reference's, at increasing log-SNR: for a Gaussian it depends on t alone."""
    ratios = []
    for t in times[::-1]:
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        prior = np.linalg.eigvalsh(GAUSSIAN.covariances[0])
        posterior = np.mean(prior * sigma**2 / (alpha**2 * prior + sigma**2))
        ratios.append(posterior / (0.49 * sigma**2 / (0.49 * alpha**2 + sigma**2)))
    return np.array(ratios)


def check(table, num):
    # A mean of num * d squares of Gaussians, of unequal variances: at most sqrt(2 / num) relative error, and as the
    # three are of the same points, the bound is for each alone.
    np.testing.assert_allclose(table.ratio, exact_ratio(), rtol=4 * np.sqrt(2 / num))
    np.testing.assert_allclose(table.log_snr, PROCESS.level(TIMES[::-1].copy()).log_snr, rtol=1e-6)


def test_the_table_is_the_denoising_loss_on_data():
    data = GAUSSIAN.sample(KEY, 2000)
    check(rj.calibrate(KEY, MODEL, TIMES, data).covariance, 2000)


def test_repeats_noise_every_point_again():
    data = GAUSSIAN.sample(KEY, 500)
    check(rj.calibrate(KEY, MODEL, TIMES, data, repeats=8).covariance, 500)


def test_data_are_in_the_users_coordinates():
    transform = rj.transforms.Affine(scale=10.0, shift=-3.0)
    model = GAUSSIAN.model(PROCESS, transform=transform)
    data = jax.vmap(transform.to_data)(GAUSSIAN.sample(KEY, 2000))
    check(rj.calibrate(KEY, model, TIMES, data).covariance, 2000)


def test_without_data_a_pilot_run_makes_them():
    # With full covariance the pilot run has exactly the law of the data, noised to t_min = 1e-3.
    times = np.array([1e-3, 0.4, 0.9])
    table = rj.calibrate(KEY, MODEL.with_covariance("full"), times, num_samples=2000).covariance
    np.testing.assert_allclose(table.ratio, exact_ratio(times), rtol=4 * np.sqrt(2 / 2000))


def test_the_pilot_run_of_an_euler_model_has_the_covariance_of_the_reference():
    tables = [rj.calibrate(KEY, MODEL.with_covariance(name), TIMES, num_samples=8) for name in ("euler", "reference")]
    np.testing.assert_array_equal(tables[0].covariance.ratio, tables[1].covariance.ratio)


def test_on_a_subspace_the_loss_is_per_dimension_of_it():
    # Data that are the reference: the ratio is 1, and would be 2/3 per coordinate of three atoms.
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())
    model = rj.DiffusionModel(process, lambda x, t: process.alpha(t) * x, "x0", shape=(3, 2))
    data = jax.vmap(process.subspace.project)(jax.random.normal(KEY, (2000, 3, 2)))
    table = rj.calibrate(KEY, model, [0.1, 0.5], data).covariance
    np.testing.assert_allclose(table.ratio, 1, rtol=4 * np.sqrt(2 / (2000 * 4)))


def test_a_network_that_fails_is_named_with_its_time():
    model = rj.DiffusionModel(PROCESS, lambda x, t: jnp.where(t > 0.3, jnp.nan, x), "x0", shape=(2,))
    with pytest.raises(ValueError, match=r"NaN or infinity at t = 0.4 while its errors were measured"):
        rj.calibrate(KEY, model, TIMES, jnp.ones((5, 2)))


def test_unsuitable_data_and_times_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(n, 3\), got \(4, 2\)"):
        rj.calibrate(KEY, MODEL, TIMES, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="reverse them"):
        rj.calibrate(KEY, MODEL, TIMES[::-1], jnp.ones((4, 3)))
