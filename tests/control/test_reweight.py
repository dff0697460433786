"""From the models' target to a law whose density is known: exact, however wrong the models are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems import GaussianMixture

KEY = jax.random.key(0)
PROCESS = rj.processes.VariancePreserving()
WRONG = GaussianMixture(jnp.asarray([[1.0, 0.0], [-1.0, 0.5]]), 0.5)
WANTED = GaussianMixture(jnp.asarray([[0.8, 0.2], [-1.2, 0.3]]), 0.35, jnp.asarray([0.3, 0.7]))
TIMES = rj.time_grid(PROCESS, 12)


def log_density(x):
    return WANTED.log_prob(x) + 3.0  # its integral is e^3


def steered(target, **options):
    return rj.steer(KEY, target, TIMES, num_particles=128, num_groups=200, warn=False, **options)


@pytest.mark.parametrize("kind", ["model", "temper", "product"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_integral_is_unbiased_whatever_the_model_and_the_grid(kind, threshold):
    model = WRONG.model(PROCESS)
    target = {"model": model, "temper": rj.temper(model, 1.4), "product": rj.product([model, model], [0.5, 0.7])}[kind]
    result = steered(target, ess_threshold=threshold)
    found = rj.reweight(result, target, log_density)
    values = np.exp(np.asarray(found.log_normalizer, np.float64) - 3.0)
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(len(values))
    assert values.std() / np.sqrt(len(values)) < 0.05, "the check must be able to fail"
    before = np.exp(np.asarray(result.log_normalizer, np.float64) - 3.0)
    assert abs(before.mean() - 1) > 0.3
    # Means follow the law that was wanted.
    mean, error = rj.weighted_mean(lambda x: x, found)
    assert np.all(np.abs(mean - WANTED.mean) < 4.5 * error + 1e-3)
    np.testing.assert_allclose(jax.nn.logsumexp(found.log_weights, axis=-1), np.log(128), atol=1e-4)
    np.testing.assert_allclose(found.standard_error, values.std(ddof=1) / np.sqrt(200) / values.mean(), rtol=0.02)


def test_a_user_s_coordinates_are_those_of_the_density():
    """A model whose transform doubles: the integral over the user's volume."""
    model = WRONG.model(PROCESS, transform=rj.transforms.Affine(2.0))
    found = rj.reweight(steered(rj.temper(model, 1.3)), rj.temper(model, 1.3), lambda x: WANTED.log_prob(x / 2))
    values = np.exp(np.asarray(found.log_normalizer, np.float64)) / 4
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(len(values))


def test_particles_without_density_lose_their_weight_and_stay_counted():
    model = WRONG.model(PROCESS)
    result = rj.steer(KEY, model, TIMES, num_particles=256, warn=False)
    found = rj.reweight(result, model, lambda x: jnp.where(x[0] > 0, WANTED.log_prob(x), -jnp.inf))
    left = np.asarray(result.particles[:, 0] <= 0)
    assert 0 < left.sum() < 256
    assert np.all(np.asarray(found.log_weights)[left] == -np.inf)
    assert np.all(np.isfinite(np.asarray(found.log_weights)[~left]))
    half = np.log(0.3) + np.log(0.98)
    assert abs(float(found.log_normalizer) - half) < 0.5


def test_what_cannot_be_is_refused():
    model = WRONG.model(PROCESS)
    result = rj.steer(KEY, model, TIMES, num_particles=16, warn=False)
    corrected = rj.steer(KEY, rj.temper(model, 1.2), TIMES, num_particles=16, proposal="feynman_kac", warn=False)
    with pytest.raises(ValueError, match=r"feynman_kac.* no ratios of kernels"):
        rj.reweight(corrected, rj.temper(model, 1.2), log_density)
    with pytest.raises(ValueError, match="without rewards"):
        rj.reweight(result, rj.tilt(model, lambda x: x[0]), log_density)
    with pytest.raises(ValueError, match="densities of 1 models, the target has 2"):
        rj.reweight(result, rj.product([model, model]), log_density)
    with pytest.raises(ValueError, match=r"NaN or \+inf for 16 of 16"):
        rj.reweight(result, model, lambda x: jnp.nan * x[0])
    with pytest.raises(ValueError, match="nothing is left"):
        rj.reweight(result, model, lambda x: -jnp.inf * jnp.ones(()))
