"""The probability-flow density: against closed forms, against RNE, its cost, its failures."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, MIXTURE

import rnejax as rj
from rnejax.processes import RectifiedFlow, VarianceExploding, VariancePreserving
from rnejax.smc.faults import SMCError
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)
ENDS = (1e-3, 0.999)
POINTS = MIXTURE.sample(jax.random.key(5), 6)
PROCESS = VariancePreserving(data_std=0.8, t_max=0.999)
MODEL = MIXTURE.model(PROCESS)
# Of one step: a step's error is at most atol + rtol |value|, with values (nats) below 10, and 40 steps are plenty.
TOLERANCE, STEPS = 1e-5, 40
BOUND = STEPS * TOLERANCE * (1 + 10)


@pytest.fixture(scope="module")
def flowed():
    return rj.probability_flow_log_density(KEY, MODEL, POINTS, ENDS, rtol=TOLERANCE, atol=TOLERANCE)


def true_log_density(process, data, points, t):
    return jax.vmap(lambda x: data.log_density(process, x, t))(points)


def test_with_the_exact_score_of_a_mixture_it_is_the_density(flowed):
    exact = true_log_density(PROCESS, MIXTURE, POINTS, ENDS[0])
    np.testing.assert_allclose(flowed.log_density, exact, atol=BOUND)
    np.testing.assert_array_equal(flowed.standard_error, 0)


def test_it_agrees_with_rne_where_rne_is_exact():
    # Gaussian data, full covariance: RNE is exact with any number of steps.
    process = VarianceExploding()
    model = GAUSSIAN.model(process, covariance="full")
    points = GAUSSIAN.sample(KEY, 3)
    times = rj.time_grid(process, 2, "uniform")
    rne = rj.log_density(KEY, model, points, times, num_paths=2)
    flow = rj.probability_flow_log_density(KEY, model, points, times)
    np.testing.assert_allclose(flow.log_density, rne.log_density, atol=BOUND)
    assert flow.num_evaluations < 250  # from noise 10 to 1e-3 without effort


def test_on_images_with_a_closed_form_it_agrees_with_rne_in_bits_per_dimension():
    # Ten classes of 14 x 14 pixels, as `scripts/benchmark_digits.py --parts closed_form` has them of 28 x 28.
    dimension, process = 196, rj.processes.Cosine(data_std=0.6)
    means = np.random.default_rng(0).uniform(-1, 1, (10, dimension))
    mixture = GaussianMixture(means, 0.4)
    key_points, key_table, key_noise = jax.random.split(KEY, 3)
    points = jax.vmap(mixture.sample)(jax.random.split(key_points, 20))
    times = rj.time_grid(process, 100, "log_snr")
    model = rj.calibrate(
        key_table, mixture.model(process, "x0"), times, data=jax.vmap(mixture.sample)(jax.random.split(key_table, 256))
    )
    rne = rj.log_density(key_noise, model, points, times).log_density
    flow = rj.probability_flow_log_density(KEY, model, points, times, rtol=1e-4, atol=1e-4).log_density
    truth = jax.vmap(mixture.noised(process.level(times[0])).log_prob)(points)
    for one, other in ((rne, flow), (rne, truth), (flow, truth)):
        assert abs(np.mean(np.asarray(one, np.float64) - other)) / (dimension * np.log(2)) < 0.002


def test_it_reaches_pure_noise():
    # alpha = 0 at t = 1: half of the flow's equations in t are infinite there, those in the angle are not.
    process = RectifiedFlow(t_max=1.0)
    flow = rj.probability_flow_log_density(KEY, MIXTURE.model(process, "velocity"), POINTS, (1e-3, 1.0))
    np.testing.assert_allclose(flow.log_density, true_log_density(process, MIXTURE, POINTS, 1e-3), atol=BOUND)


def test_data_that_are_the_reference_stay_at_rest():
    process = VarianceExploding(data_std=2.0)
    model = rj.DiffusionModel(process, lambda x, t: 4 / (4 + t**2) * x, "x0", shape=(2,))
    x = jnp.asarray([[1.0, -3.0]])
    flow = rj.probability_flow_log_density(KEY, model, x, (1e-3, 10.0), solver=None)
    np.testing.assert_allclose(flow.log_density[0], process.reference(1e-3).log_prob(x[0]), rtol=1e-6)


def test_probes_estimate_without_bias_and_say_how_well(flowed):
    hutchinson = rj.probability_flow_log_density(KEY, MODEL, POINTS, ENDS, divergence="hutchinson", num_probes=64)
    z = (hutchinson.log_density - flowed.log_density) / hutchinson.standard_error
    assert np.all(np.abs(z) < 4)
    assert np.all(hutchinson.standard_error > BOUND)  # else the solver's error is what was tested
    # One probe: no spread, no error bar; the same path, so about the same cost.
    one = rj.probability_flow_log_density(KEY, MODEL, POINTS, ENDS, divergence="hutchinson")
    assert np.all(np.isnan(one.standard_error))
    assert np.all(np.isfinite(one.log_density))


def test_a_point_does_not_depend_on_its_company(flowed):
    alone = rj.probability_flow_log_density(KEY, MODEL, POINTS[2:3], ENDS)
    np.testing.assert_allclose(alone.log_density[0], flowed.log_density[2], atol=BOUND)


def test_a_transform_shifts_the_density_by_its_log_jacobian(flowed):
    transform = rj.transforms.Affine(scale=np.array([3.0, 0.5]), shift=1.0)
    model = MIXTURE.model(PROCESS, transform=transform)
    there = rj.probability_flow_log_density(KEY, model, jax.vmap(transform.to_data)(POINTS), ENDS)
    np.testing.assert_allclose(there.log_density, flowed.log_density - np.log(1.5), atol=BOUND)


def test_without_a_centre_of_mass_the_dimension_is_that_of_the_subspace():
    # x_0 ~ N(0, c^2) on the subspace, so x_t ~ N(0, alpha^2 c^2 + sigma^2) in its 2 (3 - 1) = 4 dimensions.
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())

    def variance(t):
        return process.alpha(t) ** 2 * 0.25 + process.sigma(t) ** 2

    def fn(x, t):
        return -(x + 7.0) / variance(t)  # a network need not stay in the subspace

    model = rj.DiffusionModel(process, fn, shape=(3, 2))
    x = jax.random.normal(KEY, (2, 3, 2))
    x -= x.mean(axis=1, keepdims=True)
    flow = rj.probability_flow_log_density(KEY, model, x, (1e-3, 1.0))
    exact = -0.5 * jnp.sum(x**2, axis=(1, 2)) / variance(1e-3) - 2 * jnp.log(2 * jnp.pi * variance(1e-3))
    # The prior's variance is off by alpha(1)^2 (1 - 0.25) = 3e-5, which is less than the solver's error.
    np.testing.assert_allclose(flow.log_density, exact, atol=BOUND)


def test_the_standard_error_of_a_few_probes_is_that_of_their_mean():
    # Points draw their own probes, so equal points are repetitions: the mean of SE^2 is the variance of the mean.
    num, probes = 2000, 2
    flow = rj.probability_flow_log_density(
        KEY, MODEL, jnp.repeat(POINTS[:1], num, axis=0), ENDS, divergence="hutchinson", num_probes=probes, rtol=1e-3
    )
    variance, found = float(jnp.var(flow.log_density, ddof=1)), float(jnp.mean(flow.standard_error**2))
    # Both are means over 2,000: the first of squares, relative error at most sqrt((kurtosis - 1) / num).
    z = flow.log_density - jnp.mean(flow.log_density)
    kurtosis = float(jnp.mean(z**4) / jnp.mean(z**2) ** 2)
    spread = float(jnp.std(flow.standard_error**2) / found)
    assert abs(found / variance - 1) < 4 * np.sqrt((kurtosis - 1 + spread**2) / num)


def test_network_evaluations_are_counted_as_they_happen():
    count = []

    def fn(x, t):
        jax.debug.callback(lambda: count.append(1))
        return jax.vmap(MIXTURE.output(PROCESS, "x0"))(x, t)

    model = MIXTURE.model(PROCESS)
    model = rj.DiffusionModel(PROCESS, fn, "x0", shape=(2,), batched=True, prior=model.prior_at(None))
    flow = rj.probability_flow_log_density(KEY, model, POINTS, ENDS, rtol=1e-2, atol=1e-2)
    jax.effects_barrier()
    assert len(count) == int(flow.num_evaluations)


def test_a_network_that_fails_is_named_with_its_time():
    model = rj.DiffusionModel(PROCESS, lambda x, t: jnp.where(t > 0.5, jnp.nan, x), "x0", shape=(2,))
    with pytest.raises(SMCError, match=r"NaN or infinity at t = 0\.(5|4999)"):
        rj.probability_flow_log_density(KEY, model, POINTS, ENDS)


def test_too_few_steps_are_an_error_that_says_what_to_change():
    with pytest.raises(RuntimeError, match=r"max_steps = 3 at t = .*loosen them or raise max_steps"):
        rj.probability_flow_log_density(KEY, MODEL, POINTS, ENDS, max_steps=3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"divergence": "skilling"}, "unknown divergence 'skilling'.*exact, hutchinson"),
        ({"num_probes": 0}, "num_probes.*at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"rtol": 0.0}, "rtol must be positive, got 0"),
        ({"solver": "Tsit5"}, "solver must be an explicit Runge-Kutta method.*'Tsit5'"),
        ({"times": (0.0, 0.9)}, "sigma = 0, at t = 0"),
        ({"times": (0.9, 0.1)}, "increase strictly"),
        ({"x": jnp.zeros(2)}, r"add a batch axis"),
    ],
)
def test_bad_arguments_are_named(wrong, words):
    arguments = {"x": POINTS, "times": ENDS, **wrong}
    with pytest.raises(ValueError, match=words):
        rj.probability_flow_log_density(KEY, MODEL, arguments.pop("x"), arguments.pop("times"), **arguments)


def test_without_diffrax_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install diffrax .*extra .flow."):
        rj.probability_flow_log_density(KEY, MODEL, POINTS, ENDS)
