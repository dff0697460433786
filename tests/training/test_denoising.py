"""The held-out error by noise level, against the closed form of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.training import denoising_evaluator, denoising_loss

STD = 0.5
PROCESS = rj.processes.Cosine(data_std=STD)
N = 4000
X0 = STD * jax.random.normal(jax.random.key(0), (N, 3))


def exact_v(params, x, t, condition=None):
    level = PROCESS.level(t)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
    return (alpha / sigma) * x - (alpha**2 / sigma + sigma) * x0


def test_the_bound_is_tight_for_the_exact_network():
    errors = denoising_evaluator(PROCESS, exact_v, prediction="v", batch_size=N)(jax.random.key(1), None, X0)
    level = PROCESS.level(PROCESS.t_min)
    variance = float(level.alpha**2 * STD**2 + level.sigma**2)
    entropy = 0.5 * np.log(2 * np.pi * np.e * variance)
    width = errors.edges[-1] - errors.edges[0]
    spread = np.sqrt(np.mean(errors.standard_error**2) / len(errors.standard_error))
    assert abs(errors.bound - entropy) < 4 * 0.5 * width * spread + 1e-3


def test_the_error_by_noise_level_is_the_posterior_variance():
    errors = denoising_evaluator(PROCESS, exact_v, prediction="v", num_bins=6)(jax.random.key(1), None, X0)
    log_snr = np.linspace(errors.edges[0], errors.edges[-1], 60_001)
    snr = np.exp(log_snr)
    expected = (STD**2 * snr / (1 + STD**2 * snr))[:-1].reshape(6, -1).mean(axis=1)
    assert np.all(np.abs(errors.epsilon_error - expected) < 4 * errors.standard_error + 1e-4)


def test_the_same_key_gives_the_same_errors():
    evaluate = denoising_evaluator(PROCESS, exact_v, prediction="v", repeats=2)
    first, second = (evaluate(jax.random.key(1), None, X0[:500]) for _ in range(2))
    assert first.bound == second.bound


def test_a_wrong_network_has_a_larger_bound():
    def wrong(params, x, t, condition=None):
        return 0.5 * exact_v(params, x, t)

    bounds = [
        denoising_evaluator(PROCESS, apply, prediction="v")(jax.random.key(1), None, X0).bound
        for apply in (exact_v, wrong)
    ]
    assert bounds[1] > bounds[0] + 0.01


def test_dropped_labels_and_dropout_keys_reach_the_network():
    seen = {}

    def apply(params, x, t, label, *, key):
        seen["labels"] = label
        seen["key"] = key
        return x

    loss = denoising_loss(
        PROCESS, apply, lambda key, batch: batch, prediction="v", label_dropout=1.0, null_label=10, dropout=True
    )
    losses = loss(jax.random.key(0), None, (X0[:5], jnp.arange(5)))
    assert losses.shape == (5,)
    assert seen["labels"].tolist() == [10] * 5
    assert jnp.issubdtype(seen["key"].dtype, jax.dtypes.prng_key)


def test_label_dropout_without_a_null_label_is_an_error():
    with pytest.raises(ValueError, match=r"label_dropout = 0.1 needs a null_label"):
        denoising_loss(PROCESS, exact_v, lambda key, batch: batch, prediction="v", label_dropout=0.1)
