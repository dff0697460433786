"""A reward tilt of the exact scheme under a wrong model, against brute force that shares no code with the library.

The problem, the independent chain and the comparison are those of ``scripts/benchmark_exactness.py``, whose table has
every combination of gradient and threshold.
"""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rnejax as rj

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_exactness.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def times(script):
    return rj.time_grid(script.process(), 8)


@pytest.fixture(scope="module")
def truth(script, times):
    return script.brute_force(seed=3, times=times, num_samples=10**6)


@pytest.mark.parametrize(("gradient", "threshold"), [(True, 0.0), (True, 0.5), (True, 1.01), (False, 0.5)], ids=str)
def test_exact_tilt_is_unbiased_under_a_wrong_model(script, times, truth, gradient, threshold):
    setting = script.Setting(exact=True, gradient=gradient, ess_threshold=threshold)
    values = script.estimates(jax.random.key(17), setting, times, num_particles=128, num_groups=200)
    assert np.all(np.abs(script.z_scores(values, *truth)) < 4)


def test_low_variance_tilt_is_biased_there(script, times, truth):
    # If it were not, the test above would show nothing.
    setting = script.Setting(exact=False, gradient=True, ess_threshold=0.5)
    values = script.estimates(jax.random.key(17), setting, times, num_particles=128, num_groups=200)
    assert abs(script.z_scores(values, *truth)[0]) > 8


def test_random_covariance_is_the_same_draw_in_model_and_proposal(script, times):
    """With one Rademacher probe per state; another draw in the proposal would be another law than the generated one."""
    model = rj.DiffusionModel(script.process(), script.wrong_score, covariance="hutchinson", shape=(2,))
    target = rj.tilt(model, script.reward)
    result = rj.steer(jax.random.key(4), target, times, 128, num_groups=200, warn=False, progress=False)
    values = np.exp(np.asarray(result.log_normalizer, np.float64))[None]
    generated = np.asarray(rj.sample(jax.random.key(5), model, times, 200_000, progress=False).x, np.float64)
    rewards = np.exp(script.reward(generated))
    truth, error = rewards.mean(), rewards.std() / np.sqrt(rewards.size)
    assert np.all(np.abs(script.z_scores(values, truth, error)) < 4)
