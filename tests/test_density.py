"""Log-densities along samples and at given points: exact, unbiased, convergent, honest about their error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, LINEAR, MIXTURE, PROCESSES, Mixture

import rnejax as rj
from rnejax.density import Noise
from rnejax.processes import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving
from rnejax.smc.faults import SMCError

KEY = jax.random.key(11)
PROCESS = VariancePreserving(t_max=0.9)


def truth(data, process, x, t):
    return jax.jit(jax.vmap(lambda x: data.log_density(process, x, t)))(x)


# --------------------------------------------------------------------------- exact where the reverse kernels are exact


def assert_exact(process, num_steps, tolerance, prediction="x0"):
    """At given points: every path of each gives the density, so that there is no spread either."""
    model = GAUSSIAN.model(process, prediction, "full")
    times = rj.time_grid(process, num_steps, "uniform")
    points = jnp.asarray([[0.7, -0.4, 0.2], [-0.5, 0.1, 1.4], [1.9, 0.3, -0.6]])
    if len(model.shape) == 2:  # positions, with velocities of about the size that they start with
        points = jnp.stack([points, 0.1 * points[:, ::-1]], axis=1)
    exact = truth(GAUSSIAN, process, points, times[0])
    given = rj.log_density(KEY, model, points, times, num_paths=2)
    np.testing.assert_allclose(given.per_path, np.stack([exact, exact], axis=1), atol=tolerance)
    np.testing.assert_allclose(given.standard_error, 0, atol=2 * tolerance)


TO_PURE_NOISE = [Cosine(data_std=0.6, t_max=1.0), RectifiedFlow(t_max=1.0)]  # where the Jacobian says nothing
every_process = pytest.mark.parametrize(
    "process", [*PROCESSES, *TO_PURE_NOISE, *LINEAR], ids=lambda process: f"{type(process).__name__}-{process.t_max:g}"
)


@every_process
def test_gaussian_data_have_exact_densities_in_single_precision(process):
    assert_exact(process, 3, 1e-4)


@pytest.mark.parametrize("prediction", ["score", "epsilon"])
@pytest.mark.parametrize("process", LINEAR, ids=lambda process: f"{type(process).__name__}-{process.t_max:g}")
def test_what_linear_sdes_are_asked_for_costs_no_digits(process, prediction):
    assert_exact(process, 3, 1e-4, prediction)


@every_process
def test_gaussian_data_have_exact_densities_in_double_precision(process):
    jax.clear_caches()  # what was traced in single precision keeps its constants
    with jax.enable_x64(True):
        assert_exact(process, 3, 1e-9)


@pytest.mark.parametrize("num_steps", [1, 20])
def test_the_number_of_steps_does_not_matter_to_gaussian_data(num_steps):
    with jax.enable_x64(True):
        assert_exact(RectifiedFlow(), num_steps, 1e-9)


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-4), (True, 1e-9)], ids=["single", "double"])
def test_samples_of_gaussian_data_come_with_their_exact_density(double, tolerance):
    with jax.enable_x64(double):
        process = Cosine(data_std=0.6)
        times = rj.time_grid(process, 3)
        samples = rj.sample(KEY, GAUSSIAN.model(process, covariance="full"), times, 5)
        exact = truth(GAUSSIAN, process, samples.x, times[0])
        np.testing.assert_allclose(samples.log_density, exact, atol=tolerance)


def test_without_a_centre_of_mass_the_density_has_the_dimension_of_the_subspace():
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())

    def variance(t):
        return process.alpha(t) ** 2 * 0.25 + process.sigma(t) ** 2

    def denoise(x, t):  # a network need not stay in the subspace
        return process.alpha(t) * 0.25 / variance(t) * (x - 5.0)

    times = rj.time_grid(process, 4)
    prior = rj.kernels.Gaussian(jnp.zeros((3, 2)), jnp.zeros((3, 2)), variance(1.0), subspace=process.subspace)
    for covariance in ("full", "hutchinson"):
        model = rj.DiffusionModel(process, denoise, "x0", covariance, shape=(3, 2), prior=prior)
        x, found, _ = rj.sample(KEY, model, times, 6)
        np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-6)
        exact = -0.5 * jnp.sum(x**2, axis=(1, 2)) / variance(1e-3) - 2 * jnp.log(2 * jnp.pi * variance(1e-3))
        # The Jacobian is a multiple of the projection: full covariance is exact. One projected probe u gives its
        # trace up to |u|^2 / 4, which is not 1: the other choice is only close.
        assert covariance == "hutchinson" or np.allclose(found, exact, atol=1e-3)


# ---------------------------------------------------------------------------------------------- samples of a known law


def test_samples_have_the_law_and_come_with_its_density():
    process = VarianceExploding()
    model = GAUSSIAN.model(process, covariance="full")
    n = 20_000
    samples = rj.sample(KEY, model, rj.time_grid(process, 3, "uniform"), n)
    mean, covariance = (np.asarray(v[0]) for v in GAUSSIAN.noised(1.0, 1e-3))
    z = (np.mean(samples.x, axis=0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert np.abs(z).max() < 4
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / n)
    assert (np.abs(np.cov(samples.x.T) - covariance) / error).max() < 4
    # Entropy: the mean of -log p over samples is 1/2 log det(2 pi e C), with variance d / 2 per sample.
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert abs(-np.mean(samples.log_density) - entropy) < 4 * np.sqrt(1.5 / n)


# --------------------------------------------------------------------- unbiased for the generated law of a wrong model

WRONG_SHIFT, WRONG_SLOPE = 0.1, 0.92


def wrong_denoiser(x, t):
    """No data have this posterior mean: linear, so that what the chain generates is a Gaussian known in closed form."""
    return WRONG_SHIFT + WRONG_SLOPE * PROCESS.alpha(t) * x


def generated_law(times):
    """Mean and variance of the reverse chain, by the formulas of mathematics.md, section 2, in float64."""
    mean, variance = 0.0, float(PROCESS.alpha(times[-1])) ** 2 + float(PROCESS.sigma(times[-1])) ** 2
    for s, t in zip(times[-2::-1], times[:0:-1], strict=True):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ((float(PROCESS.alpha(u)), float(PROCESS.sigma(u))) for u in (s, t))
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        gain = alpha_s * v / sigma_t**2
        posterior = sigma_t**2 / (alpha_t**2 + sigma_t**2)
        slope = a * sigma_s**2 / sigma_t**2 + gain * WRONG_SLOPE * alpha_t
        noise = v * sigma_s**2 / sigma_t**2 + gain**2 * posterior
        mean, variance = slope * mean + gain * WRONG_SHIFT, slope**2 * variance + noise
    return mean, variance


def test_the_density_of_given_points_is_that_of_the_generated_law_without_bias():
    times = rj.time_grid(PROCESS, 4)
    mean, variance = generated_law(times)
    model = rj.DiffusionModel(PROCESS, wrong_denoiser, "x0", shape=(1,))
    # Points within a standard deviation and a half, where the ratio has light tails and its error is known well.
    x = mean + np.sqrt(variance) * np.linspace(-1.5, 1.5, 4)[:, None]
    exact = -0.5 * (x[:, 0] - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
    found = rj.log_density(KEY, model, jnp.asarray(x, jnp.float32), times, num_paths=20_000)
    ratio = np.exp(np.asarray(found.per_path, np.float64) - exact[:, None])
    error = ratio.std(axis=1, ddof=1) / np.sqrt(ratio.shape[1])
    assert error.max() < 0.02
    assert np.abs((ratio.mean(axis=1) - 1) / error).max() < 4
    # The estimate and its error are those of these paths.
    np.testing.assert_allclose(found.log_density, exact + np.log(ratio.mean(axis=1)), atol=1e-5)
    np.testing.assert_allclose(found.standard_error, error / ratio.mean(axis=1), rtol=1e-3)
    # And the samples are that law's.
    drawn = np.asarray(rj.sample(KEY, model, times, 20_000).x[:, 0], np.float64)
    assert abs(drawn.mean() - mean) < 4 * np.sqrt(variance / drawn.size)
    assert abs(drawn.var() / variance - 1) < 4 * np.sqrt(2 / drawn.size)


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    repeats, times = 500, rj.time_grid(PROCESS, 4)
    model = rj.DiffusionModel(PROCESS, wrong_denoiser, "x0", shape=(1,))
    found = rj.log_density(KEY, model, jnp.full((repeats, 1), 0.5), times, num_paths=64)
    spread = np.std(found.log_density, ddof=1)
    # A standard deviation over n repeats is known to 1 / sqrt(2 n); the delta method to about 1 / num_paths.
    np.testing.assert_allclose(
        np.sqrt(np.mean(found.standard_error**2)) / spread, 1, atol=4 / np.sqrt(2 * repeats) + 1 / 64
    )


def test_one_path_has_no_standard_error():
    found = rj.log_density(KEY, MIXTURE.model(PROCESS), jnp.zeros((3, 2)), rj.time_grid(PROCESS, 2), num_paths=1)
    assert np.all(np.isnan(found.standard_error))
    assert np.all(np.isfinite(found.log_density))
    assert found.per_path.shape == (3, 1)


# ------------------------------------------------------------------------------ convergence, in the order of the table


@pytest.fixture(scope="module")
def notebook():
    """The 10-D mixture of 40 components of mathematics.md, section 2, with fewer samples."""
    means = np.random.default_rng(0).uniform(-1, 1, (40, 10))
    return Mixture(np.full(40, 1 / 40), means, np.tile(0.0298**2 * np.eye(10), (40, 1, 1)))


def isotropic_score(data):
    """The score of a mixture of equal isotropic components: cheaper than the general one of closed_forms."""
    means, variance = jnp.asarray(data.means, jnp.float32), float(data.covariances[0, 0, 0])

    def score(x, t):
        total = variance + t**2
        responsibilities = jax.nn.softmax(-0.5 * jnp.sum((x - means) ** 2, axis=-1) / total)
        return (responsibilities @ means - x) / total

    return score


def mean_squared_error(data, num_steps, covariance, estimator=None):
    process = VarianceExploding()
    times = rj.time_grid(process, num_steps)
    model = rj.DiffusionModel(process, isotropic_score(data), shape=(10,), covariance="euler")
    if covariance == "analytic":
        model = rj.calibrate(KEY, model, times, data.sample(KEY, 200), repeats=4)
    else:
        model = model.with_covariance(covariance)
    x, found, _ = rj.sample(jax.random.key(7), model, times, 400, estimator=estimator)
    means, variance = data.means, 0.0298**2 + 1e-6
    squares = np.sum((np.asarray(x)[:, None] - means) ** 2, axis=-1) / variance
    exact = np.logaddexp.reduce(-0.5 * squares, axis=1) - np.log(40) - 5 * np.log(2 * np.pi * variance)
    return np.mean((np.asarray(found) - exact) ** 2)


def test_the_forms_come_in_the_order_of_the_table(notebook):
    # Their errors in the table, at 100 steps: 166, 26.7, 11.9, 0.68, 0.099. Each is a factor 2 or more from the next,
    # and the mean of 400 squares of a Gaussian is known to 7 %.
    errors = [
        mean_squared_error(notebook, 100, covariance, estimator)
        for covariance, estimator in [
            ("euler", "plain"),
            ("euler", "ito"),
            ("euler", "reference"),
            ("analytic", None),
            ("full", None),
        ]
    ]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_allclose(np.log(errors), np.log([166, 26.7, 11.9, 0.68, 0.099]), atol=np.log(1.6))


@pytest.mark.parametrize(("covariance", "gain"), [("reference", 1.5), ("full", 2.5)])
def test_more_steps_help(notebook, covariance, gain):
    # Twice the steps: the table has a factor of about 2.5 for isotropic covariances, 4 for the full one.
    assert mean_squared_error(notebook, 50, covariance) > gain * mean_squared_error(notebook, 100, covariance)


def test_the_sum_over_a_thousand_steps_keeps_a_thousandth_of_a_nat():
    # Data N(0, 4) under a unit reference in 10^4 dimensions, a path from noising that is kept, and the sum of its
    # increments again in float64: log N(x_s; (base + extra) x_t, C) - log N(x_s; base x_t, C), with one C for both.
    d, n, c2, process = 10_000, 1000, 4.0, VarianceExploding(data_std=1.0)
    # A score keeps its digits near the data, where an x0 prediction is rounded in the eighth digit of x: here it is the
    # sum that is tested, not the network.
    model = rj.DiffusionModel(process, lambda x, t: -x / (c2 + t**2), shape=(d,))
    times = rj.time_grid(process, n)
    start = jnp.sqrt(c2) * jax.random.normal(KEY, (1, d))
    problem = Noise(model, start, process.level(times[-1]), "exact")
    steps = rj.increments.transitions(process, times, towards_noise=True)
    never = rj.smc.Resampling(ess_threshold=0.0)
    result = rj.smc.run(KEY, problem, steps, num_particles=1, resampling=never, save=("particles",))
    path = np.concatenate([np.asarray(start), np.asarray(result.info.saved["particles"])[:, 0]]).astype(np.float64)
    squares, products = np.sum(path**2, axis=1), np.sum(path[1:] * path[:-1], axis=1)
    s, t = times[:-1], times[1:]
    base, gain, covariance = (1 + s**2) / (1 + t**2), 1 - s**2 / t**2, (1 + s**2) * (t**2 - s**2) / (1 + t**2)
    extra = gain * (c2 / (c2 + t**2) - 1 / (1 + t**2))
    increments = extra * (products - (base + extra / 2) * squares[1:]) / covariance
    assert np.sum(increments) > 4096  # where float32 has steps of 5e-4
    np.testing.assert_allclose(result.state.excess_log_density.value[0], np.sum(increments), atol=1e-3)


# ---------------------------------------------------------------------------------------------- the user's coordinates


def test_a_transform_moves_points_and_shifts_densities_by_its_log_jacobian():
    transform = rj.transforms.Affine(scale=np.array([3.0, 0.5, -2.0]), shift=np.array([1.0, 0.0, -4.0]))
    process = RectifiedFlow()
    times = rj.time_grid(process, 3)
    model = GAUSSIAN.model(process, covariance="full", transform=transform)
    samples = rj.sample(KEY, model, times, 4)
    exact = truth(GAUSSIAN, process, jax.vmap(transform.to_model)(samples.x), times[0]) - np.log(3.0)
    np.testing.assert_allclose(samples.log_density, exact, atol=1e-3)
    given = rj.log_density(KEY, model, samples.x, times, num_paths=2)
    np.testing.assert_allclose(given.log_density, exact, atol=1e-3)


def test_saved_particles_end_in_the_samples():
    samples = rj.sample(KEY, MIXTURE.model(PROCESS), rj.time_grid(PROCESS, 5), 3, save=("particles",))
    assert samples.info.saved["particles"].shape == (5, 3, 2)
    np.testing.assert_array_equal(samples.info.saved["particles"][-1], samples.x)


# ----------------------------------------------------------------------------------------------------------- bad input


def broken(after):
    """A network that fails once the noise has fallen below (or risen above) a time."""
    return lambda x, t: jnp.where(after(t), jnp.nan, x)


def test_a_network_that_fails_while_sampling_is_named_with_step_and_time():
    process = RectifiedFlow()
    model = rj.DiffusionModel(process, broken(lambda t: t < 0.55), "x0", shape=(2,))
    # At 0.5 begins the third of the steps 0.9 -> 0.7 -> 0.5 -> 0.3 -> 0.1.
    with pytest.raises(SMCError, match=r"step 2 of 4 \(the network returned NaN or infinity at t = 0.5\)"):
        rj.sample(KEY, model, [0.1, 0.3, 0.5, 0.7, 0.9], 3)


def test_a_network_that_fails_at_given_points_is_named_with_step_and_time():
    process = RectifiedFlow()
    model = rj.DiffusionModel(process, broken(lambda t: t > 0.45), "x0", shape=(2,))
    with pytest.raises(SMCError, match=r"6 of 6 particles became NaN at step 1 of 4 \(the network .* at t = 0.5\)"):
        rj.log_density(KEY, model, jnp.zeros((3, 2)), [0.1, 0.3, 0.5, 0.7, 0.9], num_paths=2)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (jnp.zeros(2), r"x must have shape \(n, 2\), got \(2,\); add a batch axis: x\[None\]"),
        (jnp.zeros((4, 3)), r"x must have shape \(n, 2\), got \(4, 3\)"),
        (jnp.zeros((0, 2)), "no points"),
        (jnp.zeros((4, 2), jnp.int32), "floating, got int32; dequantise"),
    ],
)
def test_points_that_do_not_fit_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        rj.log_density(KEY, MIXTURE.model(PROCESS), x, rj.time_grid(PROCESS, 2))


def test_points_in_single_precision_do_in_double_mode():
    points = np.zeros((2, 2), np.float32)
    with jax.enable_x64(True):
        process = RectifiedFlow()
        model = rj.DiffusionModel(process, lambda x, t: 0 * x, "x0", shape=(2,))
        found = rj.log_density(jax.random.key(1), model, points, [0.1, 0.5, 0.9], num_paths=2)
        same = rj.log_density(jax.random.key(1), model, points.astype(np.float64), [0.1, 0.5, 0.9], num_paths=2)
        assert found.log_density.dtype == jnp.float64
        np.testing.assert_array_equal(found.per_path, same.per_path)


def test_no_paths_are_refused():
    with pytest.raises(ValueError, match="num_paths must be at least 1, got 0"):
        rj.log_density(KEY, MIXTURE.model(PROCESS), jnp.zeros((1, 2)), rj.time_grid(PROCESS, 2), num_paths=0)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rj.sample(KEY, MIXTURE.model(PROCESS), rj.time_grid(PROCESS, 2), 0)


@pytest.mark.parametrize("prediction", ["score", "epsilon", "energy"])
def test_predictions_that_say_nothing_of_pure_noise_are_refused_there(prediction):
    model = MIXTURE.model(RectifiedFlow(), prediction)
    with pytest.raises(
        ValueError, match=rf"t = 1 RectifiedFlow has alpha = 0, where a {prediction} says nothing.*0.999"
    ):
        rj.sample(KEY, model, [0.1, 0.5, 1.0], 2)


def test_euler_kernels_are_refused_where_the_drift_is_infinite():
    model = MIXTURE.model(RectifiedFlow(), "velocity", "euler")
    with pytest.raises(ValueError, match="drift that euler freezes is infinite: end the grid earlier"):
        rj.log_density(KEY, model, jnp.zeros((1, 2)), [0.1, 0.5, 1.0])


@pytest.mark.parametrize("function", [rj.sample, partial(rj.log_density, x=jnp.zeros((1, 2)))])
def test_times_that_are_no_grid_are_refused(function):
    with pytest.raises(ValueError, match="reverse them"):
        function(KEY, MIXTURE.model(PROCESS), times=[0.9, 0.1])


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="unknown estimator 'rne'"):
        rj.sample(KEY, MIXTURE.model(PROCESS), [0.1, 0.5], estimator="rne")


def test_densities_of_many_weights_at_once_are_those_of_each():
    def fn(params, x, t, condition):
        return -params * x

    model = rj.DiffusionModel(PROCESS, fn, "score", shape=(2,), params=jnp.float32(1.0))
    times, x = rj.time_grid(PROCESS, 3), jnp.ones((2, 2))

    def estimate(params):
        return rj.log_density(KEY, model.with_params(params), x, times, 2).log_density

    many = jnp.asarray([1.0, 0.8])
    each = jnp.stack([estimate(params) for params in many])
    np.testing.assert_allclose(jax.vmap(estimate)(many), each, rtol=1e-5, atol=1e-5)


def test_densities_under_many_keys_at_once_are_those_of_each():
    model = rj.DiffusionModel(PROCESS, lambda x, t: -x, "score", shape=(2,))
    times, keys = rj.time_grid(PROCESS, 3), jax.random.split(KEY, 3)

    def estimate(key):
        return rj.log_density(key, model, jnp.ones((2, 2)), times, 2).log_density

    np.testing.assert_allclose(jax.vmap(estimate)(keys), [estimate(key) for key in keys], rtol=1e-5)
