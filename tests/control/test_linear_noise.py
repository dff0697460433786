"""Steering and calibration where noise is a linear SDE: the same calls, the same exactness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import A, Q, U
from steering_problems import QUIET, z_of_normalizer

import rnejax as rj
from rnejax.processes import CriticallyDamped, LinearSDE, NonReversible
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)
CORRELATED = np.array([[0.50, 0.20, -0.10], [0.20, 0.30, 0.05], [-0.10, 0.05, 0.80]])
PROCESSES = [
    LinearSDE(A, 1.3, data_covariance=CORRELATED, t_min=0.02),
    NonReversible(U, Q, t_min=0.02),
    NonReversible(np.diag(U), data_covariance=0.5, t_min=0.02),
    CriticallyDamped(data_std=0.8, t_min=0.05),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
STEPS = 8


def reference_covariance(process):
    """Of the data that the process takes for its reference."""
    blocks = process.system.data
    if blocks.shape[-1] == 3:
        return blocks[0]
    return np.diag(np.broadcast_to(blocks[:, 0, 0], 3))


def covariance_at(process, t):
    """Of the reference at time t, of the flattened state."""
    law = process.reference(t, process.state_shape((3,)))
    units = jnp.eye(law.mean.size).reshape(-1, *law.mean.shape)
    return np.asarray(jax.vmap(law.covariance_times)(units), np.float64).reshape(len(units), -1)


def data(process, mean=(0.0, 0.0, 0.0)):
    """Gaussian data with the covariance of the process's reference: its reverse kernels are exact."""
    return GaussianMixture([mean], covariances=reference_covariance(process)[None])


def mean_at(process, mean, t):
    return np.asarray(process.marginal(jnp.asarray(mean), t).mean, np.float64).reshape(-1)


@every_process
@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_weights_are_constant_where_the_data_are_the_reference(process, exponent):
    times = rj.time_grid(process, STEPS)
    # The score keeps its digits where there is little noise.
    target = rj.temper(data(process).model(process, "score"), exponent)
    result = rj.steer(KEY, target, times, 32, num_groups=4, **QUIET)
    covariance = covariance_at(process, times[0])
    d = len(covariance)
    log_det = np.linalg.slogdet(covariance)[1]
    truth = 0.5 * (1 - exponent) * (d * np.log(2 * np.pi) + log_det) - 0.5 * d * np.log(exponent)
    np.testing.assert_allclose(result.log_normalizer, truth, atol=1e-4)
    np.testing.assert_allclose(result.log_weights, 0, atol=1e-4)
    assert not np.any(result.info.resampled)


@every_process
@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: rj.product([a, b]),
        lambda a, b: rj.guide(a, b, 2.0),
        lambda a, b: rj.product([a, b], [1.4, -0.6]),
    ],
    ids=["product", "guide", "negative"],
)
def test_products_of_gaussians_of_one_covariance_are_unbiased(process, make):
    means = [(0.5, -0.2, 0.1), (-0.3, 0.4, 0.2)]
    times = rj.time_grid(process, 16)
    target = make(*(data(process, mean).model(process) for mean in means))
    result = rj.steer(KEY, target, times, 64, num_groups=64, **QUIET)
    betas, covariance = np.array(target.exponents), covariance_at(process, times[0])
    at = np.stack([mean_at(process, mean, times[0]) for mean in means])
    d, bar = len(covariance), betas.sum()
    centre = betas @ at / bar
    quadratic = sum(b * (m - centre) @ np.linalg.solve(covariance, m - centre) for b, m in zip(betas, at, strict=True))
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    truth = 0.5 * (1 - bar) * log_det - 0.5 * d * np.log(bar) - 0.5 * quadratic
    assert abs(z_of_normalizer(result, truth)) < 4
    assert np.std(result.log_normalizer) < 1


@every_process
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "low_variance"])
def test_a_linear_reward_tilts_without_bias(process, exact):
    mean, slope = (0.3, -0.2, 0.4), np.array([0.8, -0.5, 0.3])
    times = rj.time_grid(process, 16)
    size = covariance_at(process, times[0]).shape[0]
    slopes = np.concatenate([slope, 0.2 * slope])[:size].reshape(process.state_shape((3,)))
    target = rj.tilt(data(process, mean).model(process), lambda x: jnp.sum(jnp.asarray(slopes) * x), exact=exact)
    result = rj.steer(KEY, target, times, 64, num_groups=64, **QUIET)
    flat = slopes.reshape(-1)
    truth = flat @ mean_at(process, mean, times[0]) + 0.5 * flat @ covariance_at(process, times[0]) @ flat
    assert abs(z_of_normalizer(result, truth)) < 4


@every_process
def test_temper_and_tilt_together(process):
    times = rj.time_grid(process, 16)
    target = rj.tilt(rj.temper(data(process).model(process), 2.0), lambda x: jnp.sum(x), exact=False)
    result = rj.steer(KEY, target, times, 64, num_groups=64, **QUIET)
    covariance = covariance_at(process, times[0])
    d, ones = len(covariance), np.ones(len(covariance))
    log_z = -0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1] - 0.5 * d * np.log(2)
    assert abs(z_of_normalizer(result, log_z + 0.25 * ones @ covariance @ ones)) < 4


MIXTURE = GaussianMixture([[-0.9, 0.3], [0.8, -0.5]], covariances=[[[0.2, 0.05], [0.05, 0.1]]] * 2, weights=[1, 2])
PLANE = [
    NonReversible([[1.5, 0.3], [0.3, 0.5]], [[0.0, 2.0], [-2.0, 0.0]], t_min=0.02),
    LinearSDE(A[:2, :2], 1.3, data_covariance=0.6, t_min=0.02),
]


def log_integral_of_power(law, exponent, half_width=6.0, num=800):
    """By the midpoint rule: errors fall faster than any power where nothing is left at the edges."""
    grid = (np.arange(num) + 0.5) * (2 * half_width / num) - half_width
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    values = exponent * np.asarray(jax.vmap(law.log_prob)(jnp.asarray(points, jnp.float32)), np.float64)
    return np.log(np.exp(values).sum() * (2 * half_width / num) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("process", PLANE, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("covariance", ["full", "hutchinson", "analytic", "reference"])
def test_a_power_of_a_mixture_gets_better_with_the_steps(process, covariance):
    errors = []
    for num_steps in (20, 80):
        times = rj.time_grid(process, num_steps)
        model = MIXTURE.model(process, covariance="reference" if covariance == "analytic" else covariance)
        if covariance == "analytic":
            points = jax.vmap(MIXTURE.sample)(jax.random.split(KEY, 500))
            model = rj.calibrate(KEY, model, times, points)
        result = rj.steer(KEY, rj.temper(model, 2.0), times, 512, num_groups=8, **QUIET)
        truth = log_integral_of_power(MIXTURE.noised(process.level(times[0])), 2.0)
        errors.append(abs(float(np.mean(result.log_normalizer)) - truth))
    error = float(np.std(result.log_normalizer, ddof=1)) / np.sqrt(8)
    assert errors[1] < 0.5 * errors[0] + 4 * error
    assert errors[1] < 0.1 + 4 * error


def test_the_analytic_covariance_of_gaussian_data_is_that_of_the_reference():
    process = NonReversible(U, Q, t_min=0.02)
    times = rj.time_grid(process, 6)
    points = jax.vmap(data(process).sample)(jax.random.split(KEY, 4000))
    model = rj.calibrate(KEY, data(process).model(process), times, points)
    # A mean of 12,000 squares of unit variance.
    np.testing.assert_allclose(model.covariance.ratio, 1, atol=4 * np.sqrt(2 / 12_000))


@pytest.mark.parametrize("noise_level", ["sigma", "index"])
def test_a_noise_level_that_is_no_number_is_refused(noise_level):
    with pytest.raises(ValueError, match=r"has a sigma for every direction and no table of betas: .* 'log_snr'"):
        rj.DiffusionModel(PLANE[0], lambda x, t: x, "x0", shape=(2,), noise_level=noise_level)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, times: rj.steer(KEY, rj.temper(model, 2.0), times, 8, proposal="feynman_kac"), "'feynman_kac'"),
        (
            lambda model, times: rj.steer(
                KEY, rj.temper(model, 2.0), times, 8, proposal=rj.control.Drift(matched=False)
            ),
            "matched=False",
        ),
        (lambda model, times: rj.tune_proposal(KEY, rj.temper(model, 2.0), times), "a drift to be tuned"),
        (
            lambda model, times: rj.probability_flow_log_density(KEY, model, jnp.zeros((1, 2)), times),
            "the probability flow",
        ),
        (lambda model, times: model.with_covariance("euler"), "covariance='euler', an Euler-Maruyama kernel,"),
        (
            lambda model, times: MIXTURE.model(rj.processes.Cosine(), covariance="euler").with_process(model.process),
            "an Euler-Maruyama kernel,",
        ),
        (lambda model, times: MIXTURE.model(model.process, covariance="euler"), "an Euler-Maruyama kernel,"),
    ],
)
def test_what_exists_for_scalar_noise_only_says_so(call, words):
    process = PLANE[0]
    with pytest.raises(ValueError, match=f"{words} exists for scalar .* only; NonReversible is a linear SDE"):
        call(MIXTURE.model(process), rj.time_grid(process, 4))
