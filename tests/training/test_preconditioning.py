"""A network on top of the reference's denoiser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import LINEAR, Q, U

import rnejax as rj
from rnejax.processes import Masked, NonReversible, VarianceExploding
from rnejax.training import Preconditioned, score_matching_loss


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_for_exploding_variance_it_is_karras_et_al():
    process = VarianceExploding(0.01, 10.0, data_std=0.5)
    network = Preconditioned(process, lambda params, x, t: jnp.sin(3 * x) + params)
    x, sigma, data = jnp.array([0.3, -2.0]), 0.7, 0.5
    total = sigma**2 + data**2
    expected = (data**2 / total) * x + sigma * data / np.sqrt(total) * (jnp.sin(3 * x / np.sqrt(total)) + 0.1)
    np.testing.assert_allclose(network(0.1, x, process.level(sigma)), expected, rtol=1e-12)
    np.testing.assert_allclose(network.at_time(0.1, x, sigma), expected, rtol=1e-12)


@pytest.mark.parametrize("process", LINEAR, ids=lambda process: type(process).__name__)
def test_the_reference_alone_is_off_by_its_own_root_mean_square(process):
    # In units of which every level weighs one: the loss of F = 0 on the reference's own data, and no other constant.
    count, size = 4000, process.system.data.shape[-1] * len(process.system.data)
    data = np.linalg.cholesky(process.system.data)
    noise = np.random.default_rng(0).normal(size=(count, len(data), data.shape[-1]))
    x0 = jnp.asarray(np.einsum("bij,nbj->nib", data, noise).reshape(count, size))
    network = Preconditioned(process, lambda params, x, t: jnp.zeros(size))
    for t in (0.1, 0.8):
        losses = score_matching_loss(
            jax.random.key(1),
            process,
            partial(network.at_time, None),
            x0,
            prediction="x0",
            weighting="posterior",
            times=jnp.full(count, t),
        )
        assert abs(losses.mean() - 1) < 4 * losses.std() / np.sqrt(count)


def test_a_model_of_it_says_what_it_said_in_training():
    process = NonReversible(U, Q, t_max=3.0)
    network = Preconditioned(process, lambda params, x, t: params * jnp.tanh(x) + t)
    model = rj.DiffusionModel(process, network, "x0", shape=(len(U),), params=0.3, noise_level="level")
    times, _ = process._table
    x = jax.random.normal(jax.random.key(0), (2, len(U)))
    level = process.level(times[40])
    said = model.evaluate(jax.random.key(0), x, level).excess
    in_training = jax.jit(jax.vmap(partial(network.at_time, 0.3)))(x, jnp.full(2, times[40]))
    denoised = jax.vmap(level.denoised)(x, said)
    np.testing.assert_allclose(denoised, in_training, rtol=1e-9)


def test_every_quantity_that_is_predicted_can_be_weighed_by_the_reference():
    process = rj.processes.Cosine(data_std=0.5)
    x0, t = jax.random.normal(jax.random.key(2), (5, 3)), jnp.linspace(0.1, 0.9, 5)
    level = process.level(t)

    def denoise(x, t):
        return 0.2 * x + t

    def as_velocity(x, t):
        level = process.level(t)
        noise = (x - level.alpha * denoise(x, t)) / level.sigma
        return level.alpha * noise - level.sigma * denoise(x, t)

    arguments = {"weighting": "posterior", "times": t}
    key = jax.random.key(3)
    plain = score_matching_loss(key, process, denoise, x0, prediction="x0", times=t)
    one = score_matching_loss(key, process, denoise, x0, prediction="x0", **arguments)
    other = score_matching_loss(key, process, as_velocity, x0, prediction="v", **arguments)
    np.testing.assert_allclose(one, plain / level.reference_posterior_variance, rtol=1e-10)
    np.testing.assert_allclose(other, one, rtol=1e-8)


def test_tokens_have_no_reference_denoiser():
    with pytest.raises(ValueError, match="Masked is a process of tokens and has no reference denoiser"):
        Preconditioned(Masked(5, 4), lambda params, x, t: x)


def test_a_linear_process_weighs_a_score_by_no_number():
    process = NonReversible(U, Q)
    with pytest.raises(ValueError, match="in another quantity"):
        score_matching_loss(
            jax.random.key(0), process, lambda x, t: x, jnp.ones((2, len(U))), prediction="score", weighting="posterior"
        )
