"""Mistakes found in public code, one test each: those that the core could make (the numbers are pitfalls.md's).

Weights, caches and resampling (1, 2, 13) are in tests/smc and tests/control, the reference's score at (x_t, t) (4) in
test_increments, memory and repeated network calls (15) in test_cost.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN

import rnejax as rj
from rnejax.processes import RectifiedFlow, VarianceExploding, VariancePreserving

KEY = jax.random.key(47)


def test_6_the_prior_of_exploding_noise_has_the_standard_deviation_of_that_noise():
    process = VarianceExploding(sigma_max=10.0, data_std=2.0)
    model = rj.DiffusionModel(process, lambda x, t: x, "x0", shape=(4000,))
    draw = model.prior_at(process.level(10.0)).sample(KEY)
    np.testing.assert_allclose(np.std(draw), np.sqrt(104.0), rtol=4 / np.sqrt(2 * 4000))


def test_7_a_point_does_not_see_the_other_points():
    process = VariancePreserving()
    model = GAUSSIAN.model(process, covariance="hutchinson")
    x = jax.random.normal(KEY, (3, 3))
    times = rj.time_grid(process, 3)
    alone = rj.log_density(KEY, model, x, times, num_paths=2).per_path[1]
    among_others = rj.log_density(KEY, model, x.at[jnp.array([0, 2])].set(50.0), times, num_paths=2).per_path[1]
    np.testing.assert_allclose(alone, among_others, rtol=1e-6)


def test_8_the_reverse_mean_scales_x0_with_alpha_at_s():
    # Given x_0, the reverse kernel with no posterior covariance is the bridge; at s = 0 it ends in x_0 itself.
    process = RectifiedFlow()
    step = process.transition(0.0, 0.6)
    x_t, x0 = jnp.asarray([0.9]), jnp.asarray([-0.3])
    level = process.level(0.6)
    kernel = step.reverse(x_t, x0 - level.reference_gain * x_t, -1.0)
    np.testing.assert_allclose(kernel.mean, x0, atol=1e-6)
    np.testing.assert_allclose(kernel.covariance_times(jnp.ones(1)), 0, atol=1e-6)


def test_9_clean_data_are_a_start_without_noise_not_of_little_noise():
    # times[0] = 0: the first forward kernel starts from the data themselves, and the density is that of the data.
    process = RectifiedFlow()
    model = GAUSSIAN.model(process, covariance="full")
    x = GAUSSIAN.sample(KEY, 4)
    found = rj.log_density(KEY, model, x, [0.0, 0.5, 0.999], num_paths=2)
    exact = jax.vmap(lambda x: GAUSSIAN.log_density(process, x, 0.0))(x)
    np.testing.assert_allclose(found.log_density, exact, atol=1e-3)


def test_9_reversed_times_are_an_error():
    process = RectifiedFlow()
    with pytest.raises(ValueError, match="from data to noise: reverse them"):
        rj.sample(KEY, GAUSSIAN.model(process), rj.time_grid(process, 4)[::-1])


def test_12_nothing_in_the_library_repairs_numbers_silently():
    sources = Path(rj.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "nan_to_num" in path.read_text()] == []


def test_15_no_test_seeds_itself_from_the_clock():
    suspects = ["time" + ".time()", "datetime" + ".now", "date" + ".today", "default_rng" + "()"]
    tests = Path(__file__).parent.rglob("test_*.py")
    assert [path.name for path in tests if any(word in path.read_text() for word in suspects)] == []
