"""DiffusionModel: every way to say the same thing gives the same kernels; what cannot be is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, MIXTURE, PROCESSES
from flax import linen, nnx

import rnejax as rj
from rnejax.processes import DiscreteVariancePreserving, RectifiedFlow, VariancePreserving

PREDICTIONS = ("score", "x0", "epsilon", "v", "velocity", "energy")
PROCESS = VariancePreserving()
KEY = jax.random.key(3)
X = jnp.asarray([0.4, -0.7])


# ---------------------------------------------------------------------------------------------------- prediction types


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_every_prediction_type_gives_the_same_denoiser_score_and_kernel(process):
    low, high = np.log(process.t_min), np.log(process.t_max)
    s, t = (float(np.exp(low + f * (high - low))) for f in (0.5, 0.8))
    with jax.enable_x64(True):
        x = jnp.asarray([0.3, -0.8, 1.1])

        @jax.jit
        def everything(x):
            kernels = {}
            for prediction in PREDICTIONS:
                model = GAUSSIAN.model(process, prediction)
                kernels[prediction] = model.denoise(x, t), model.score(x, t), model.reverse(x, t, s).mean
            return (
                kernels,
                GAUSSIAN.posterior(process, x, t)[0],
                jax.grad(lambda x: GAUSSIAN.log_density(process, x, t))(x),
            )

        kernels, denoised, score = everything(x)
        # The mean of mathematics.md, section 2, from the definitions.
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ((process.alpha(u), process.sigma(u)) for u in (s, t))
        v = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        mean = (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2 * x + alpha_s * v / sigma_t**2 * denoised
        for prediction, (d, g, m) in kernels.items():
            np.testing.assert_allclose(d, denoised, rtol=1e-8, atol=1e-10, err_msg=prediction)
            np.testing.assert_allclose(g, score, rtol=1e-8, atol=1e-10, err_msg=prediction)
            np.testing.assert_allclose(m, mean, rtol=1e-8, atol=1e-10, err_msg=prediction)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_these_predictions_reach_pure_noise(prediction):
    process = RectifiedFlow(t_max=1.0)
    model = MIXTURE.model(process, prediction)
    mean = MIXTURE.weights @ MIXTURE.means
    np.testing.assert_allclose(jax.jit(lambda x: model.denoise(x, 1.0))(X), mean, rtol=1e-5)


def test_the_reverse_kernel_with_full_covariance_is_that_of_conditioning():
    # For Gaussian data x_s | x_t is Gaussian with the covariance of mathematics.md, section 2.
    process, s, t = RectifiedFlow(), 0.3, 0.7
    with jax.enable_x64(True):
        model = GAUSSIAN.model(process, "x0", "full")
        kernel = jax.jit(lambda x: model.reverse(x, t, s))(jnp.asarray([0.3, -0.8, 1.1]))
        covariance = np.stack([np.asarray(kernel.covariance_times(row)) for row in np.eye(3)])
    prior = process.alpha(s) ** 2 * GAUSSIAN.covariances[0] + process.sigma(s) ** 2 * np.eye(3)
    a = process.alpha(t) / process.alpha(s)
    v = process.sigma(t) ** 2 - a**2 * process.sigma(s) ** 2
    gain = a * prior @ np.linalg.inv(a**2 * prior + v * np.eye(3))
    np.testing.assert_allclose(covariance, prior - a * gain @ prior, rtol=1e-9, atol=1e-12)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown prediction 'noise' for VariancePreserving; one of score, x0, epsilon"
    ):
        rj.DiffusionModel(PROCESS, lambda x, t: x, "noise", shape=(2,))


# ----------------------------------------------------------------------------------------------- what fn may look like


class Linear(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.asarray(0.5))

    def __call__(self, x, t, condition=0.0):
        return self.weight[...] * x + t + condition


class LinenLinear(linen.Module):
    @linen.compact
    def __call__(self, x, t, condition=0.0):
        return self.param("weight", lambda key: jnp.asarray(0.5)) * x + t + condition


def plain(x, t):
    return 0.5 * x + t


def with_arguments(params, x, t, condition):
    return params * x + t + (0.0 if condition is None else condition)


def as_batch(x, t):
    assert x.shape[1:] == (2,)
    assert t.shape == x.shape[:1]
    return 0.5 * x + t[:, None]


def as_batch_with_arguments(params, x, t, condition):
    assert condition.shape == t.shape == x.shape[:1]
    return params * x + t[:, None] + condition[:, None]


def model_of(fn, **options):
    return rj.DiffusionModel(PROCESS, fn, "x0", shape=(2,), **options)


@pytest.mark.parametrize(
    ("make", "condition"),
    [
        (lambda: model_of(plain), 0.0),
        (lambda: model_of(with_arguments, params=jnp.asarray(0.5)), 0.0),
        (lambda: model_of(with_arguments, params=jnp.asarray(0.5), condition=jnp.asarray(2.0)), 2.0),
        (lambda: model_of(as_batch, batched=True), 0.0),
        (
            lambda: model_of(
                as_batch_with_arguments, params=jnp.asarray(0.5), condition=jnp.asarray(2.0), batched=True
            ),
            2.0,
        ),
        (lambda: model_of(Linear()), 0.0),
        (lambda: model_of(Linear(), condition=jnp.asarray(2.0)), 2.0),
        (lambda: model_of(LinenLinear(), params={"params": {"weight": jnp.asarray(0.5)}}), 0.0),
    ],
    ids=["plain", "params", "condition", "batch", "batch-condition", "nnx", "nnx-condition", "linen"],
)
def test_every_kind_of_network_is_called_with_what_it_takes(make, condition):
    np.testing.assert_allclose(make().denoise(X, 0.3), 0.5 * X + 0.3 + condition, rtol=1e-6)


def test_a_batched_network_sees_all_particles_at_once():
    shapes = []

    def fn(x, t):
        shapes.append((x.shape, t.shape))
        return x

    rj.sample(KEY, model_of(fn, batched=True), [0.1, 0.5, 0.9], 7)
    assert shapes[-1] == ((7, 2), (7,))


def test_a_linen_module_without_variables_is_refused():
    with pytest.raises(ValueError, match=r"linen module needs its variables.*params=variables"):
        model_of(LinenLinear())


# -------------------------------------------------------------------------------------- conventions of the noise level


@pytest.mark.parametrize(
    ("process", "convention", "value"),
    [
        (PROCESS, "t", 0.3),
        (PROCESS, "sigma", float(PROCESS.sigma(0.3))),
        (PROCESS, "log_snr", float(2 * np.log(PROCESS.alpha(0.3) / PROCESS.sigma(0.3)))),
        (PROCESS, lambda level: 1000 * level.t, 300.0),
    ],
)
def test_the_network_gets_the_noise_level_in_its_convention(process, convention, value):
    model = rj.DiffusionModel(process, lambda x, t: 0 * x + t, "x0", shape=(2,), noise_level=convention)
    np.testing.assert_allclose(model.denoise(X, 0.3), value, rtol=1e-5)


def test_step_t_of_a_table_has_index_t_minus_one():
    process = DiscreteVariancePreserving([0.1, 0.2, 0.3])
    seen = rj.DiffusionModel(process, lambda x, t: 0 * x + t, "x0", shape=(2,), noise_level="index")
    np.testing.assert_array_equal([seen.denoise(X, float(t))[0] for t in (1, 2, 3)], [0, 1, 2])
    table = jnp.asarray([0.5, 0.25, 0.125])
    looked_up = rj.DiffusionModel(process, lambda x, t: 0 * x + table[t], "x0", shape=(2,), noise_level="index")
    np.testing.assert_array_equal([looked_up.denoise(X, float(t))[0] for t in (1, 2, 3)], table)


def test_an_unknown_noise_level_is_refused():
    with pytest.raises(ValueError, match=r"unknown noise_level 'snr'; one of t, sigma, log_snr, index"):
        model_of(plain, noise_level="snr")


# --------------------------------------------------------------------------------------------------- dynamic arguments


def test_another_condition_or_other_weights_recompile_nothing():
    traces = []

    def fn(params, x, t, condition):
        traces.append(1)
        return params * x + condition

    model = model_of(fn, params=jnp.asarray(0.5), condition=jnp.asarray(1.0))
    times = [0.1, 0.5, 0.9]
    first = rj.sample(KEY, model, times, 4).x
    so_far = len(traces)
    other = rj.sample(KEY, model.with_condition(jnp.asarray(2.0)), times, 4).x
    rj.sample(KEY, model.with_params(jnp.asarray(0.1)), times, 4)
    assert len(traces) == so_far
    assert not np.allclose(first, other)


def test_an_equal_model_of_an_equal_module_recompiles_nothing():
    traces = []

    @jax.jit
    def denoise(model, x):
        traces.append(1)
        return model.denoise(x, 0.3)

    denoise(model_of(Linear()), X)
    denoise(model_of(Linear()), X)
    assert len(traces) == 1


def test_variations_leave_the_original_alone():
    model = model_of(with_arguments, params=jnp.asarray(0.5))
    other = model.with_params(jnp.asarray(1.0)).with_covariance("full")
    assert (float(model.params), float(other.params)) == (0.5, 1.0)
    assert type(model.covariance) is not type(other.covariance)


def test_a_model_is_a_pytree_of_its_arrays():
    prior = rj.kernels.Gaussian(jnp.zeros(2), jnp.zeros(2), jnp.asarray(2.0))
    model = model_of(with_arguments, params=jnp.asarray(0.5), condition=jnp.asarray(1.0), prior=prior)
    leaves, structure = jax.tree.flatten(model)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.denoise(X, 0.3), model.denoise(X, 0.3))
    assert len(leaves) == 2 + len(jax.tree.leaves(prior))


def test_the_default_prior_is_the_reference_at_the_largest_time():
    level = PROCESS.level(0.9)
    np.testing.assert_allclose(model_of(plain).prior_at(level).log_prob(X), PROCESS.reference(0.9).log_prob(X))


def test_a_prior_of_the_users_own_is_used():
    model = MIXTURE.model(RectifiedFlow(t_max=0.5))
    assert model.prior_at(RectifiedFlow().level(0.5)).data is MIXTURE


# ------------------------------------------------------------------------------------------------ subspaces, bad input


def test_on_a_subspace_a_network_may_point_out_of_it():
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())
    x = jnp.asarray([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    straight = rj.DiffusionModel(process, lambda x, t: 0.5 * x, "x0", shape=(3, 2))
    crooked = rj.DiffusionModel(process, lambda x, t: 0.5 * x + 3.0, "x0", shape=(3, 2))
    np.testing.assert_allclose(crooked.denoise(x, 0.3), straight.denoise(x, 0.3), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: model_of(lambda x, t: x[:1]), r"must return shape \(2,\) for one state.*\(2, 1\) instead of \(2, 2\)"),
        (
            partial(model_of, lambda x, t: jnp.sum(x)),
            r"Is shape= right\? Does fn take a batch \(batched=True, now False",
        ),
        (
            lambda: rj.DiffusionModel(PROCESS, lambda x, t: x, "energy", shape=(2,)),
            r"prediction='energy' must return a scalar.*\(2, 2\) instead of \(2,\)",
        ),
        (lambda: model_of(lambda x: x), r"fn must accept fn\(x, t\), but too many positional arguments"),
        (
            lambda: model_of(plain, params=jnp.zeros(())),
            r"fn must accept fn\(params, x, t, condition\), but too many positional arguments",
        ),
        (lambda: model_of("unet"), "fn must be a function, a flax nnx module or a flax linen module, got str"),
        (lambda: model_of(plain, covariance="fisher"), "unknown covariance 'fisher'; choose one of euler, reference"),
        (lambda: model_of(plain, covariance="analytic"), "has to be measured: model = rnejax.calibrate"),
    ],
    ids=["shape", "scalar", "energy", "signature", "arguments", "string", "covariance", "analytic"],
)
def test_what_cannot_be_a_model_is_refused_when_it_is_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_condition_may_be_a_list_of_numbers():
    model = model_of(lambda params, x, t, condition: x + jnp.sum(condition), params=0.0, condition=jnp.asarray([1, 2]))
    told = model.with_condition([3, 4])
    assert told.condition.dtype == model.condition.dtype
    np.testing.assert_array_equal(told.condition, [3, 4])


def test_a_prompt_is_no_condition_and_the_error_says_what_is():
    model = model_of(lambda params, x, t, condition: x + jnp.sum(condition), params=0.0, condition=jnp.asarray([1, 2]))
    with pytest.raises(ValueError, match=r"got 'a bold seven'; what a prompt says is digit_tokens\.parse\(prompt\)"):
        model.with_condition("a bold seven")
