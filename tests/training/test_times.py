"""Which noise levels are looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.training import low_discrepancy_uniforms, time_law

PROCESSES = [
    rj.processes.VariancePreserving(),
    rj.processes.Cosine(),
    rj.processes.VarianceExploding(),
    rj.processes.RectifiedFlow(),
]


def log_snr(process, t):
    t = np.asarray(t, np.float64)
    return 2 * np.log(process.alpha(t) / process.sigma(t))


def test_low_discrepancy_numbers_hit_every_interval_once():
    u = low_discrepancy_uniforms(jax.random.key(0), 100)
    assert np.bincount(np.floor(np.asarray(u) * 100).astype(int), minlength=100).max() <= 2  # float32 at the edges
    assert np.ptp(np.diff(np.sort(u))) < 1e-5


def test_each_low_discrepancy_number_is_uniform():
    keys = jax.random.split(jax.random.key(0), 20_000)
    first = jax.vmap(lambda key: low_discrepancy_uniforms(key, 7))(keys)[:, 3]
    assert abs(float(first.mean()) - 0.5) < 4 * 0.289 / np.sqrt(20_000)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_share_one_is_uniform_in_log_snr(process):
    u = np.linspace(0, 1, 1001)
    t = time_law(process, log_snr_share=1.0)(jnp.asarray(u, jnp.float32))
    high, low = log_snr(process, process.t_min), log_snr(process, process.t_max)
    # The table has 4,097 nodes; between them and in float32 the error stays below a thousandth of the range.
    np.testing.assert_allclose((high - log_snr(process, t)) / (high - low), u, atol=1e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_share_zero_is_uniform_in_t(process):
    u = np.linspace(0, 1, 1001)
    t = time_law(process, log_snr_share=0.0)(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose((t - process.t_min) / (process.t_max - process.t_min), u, atol=1e-3)


def test_a_mixture_mixes_the_probabilities():
    process = rj.processes.Cosine()
    t = time_law(process, log_snr_share=0.25, log_snr_range=(-2.0, 12.0))(jnp.linspace(0, 1, 100_001))
    share = float(jnp.mean(log_snr(process, t) > 5.0))
    t_of_5 = 2 / np.pi * np.arctan(np.exp(-2.5))
    by_time = (t_of_5 - process.t_min) / (process.t_max - process.t_min)
    assert share == pytest.approx(0.25 * 7 / 14 + 0.75 * by_time, abs=1e-3)


def test_times_stay_in_the_range_of_the_process():
    process = rj.processes.Cosine()
    t = time_law(process)(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(t, [process.t_min, process.t_max], rtol=1e-6)


def test_the_law_is_data_that_passes_through_jit():
    law = time_law(rj.processes.Cosine())
    np.testing.assert_allclose(jax.jit(lambda law, u: law(u))(law, 0.3), law(0.3), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_snr_share": 1.2}, r"log_snr_share must be in \[0, 1\]: got 1.2"),
        ({"log_snr_range": (3.0, -3.0)}, r"log_snr_range must be \(low, high\)"),
        ({"log_snr_range": (-3.0, 30.0)}, r"got \(-3, 30\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_law(rj.processes.Cosine(), **arguments)


def test_a_range_of_log_snr_bounds_the_times_that_are_looked_at():
    process = rj.processes.Cosine()
    t = time_law(process, log_snr_share=0.25, log_snr_range=(-2.0, 6.0))(jnp.linspace(0, 1, 100_001))
    for level, inside in [(8.0, 0.0), (6.0, 0.0), (2.0, 0.5), (-2.0, 1.0), (-5.0, 1.0)]:
        cleaner = 2 / np.pi * np.arctan(np.exp(-level / 2))  # times below this one
        by_time = (cleaner - process.t_min) / (process.t_max - process.t_min)
        assert float(jnp.mean(log_snr(process, t) > level)) == pytest.approx(0.25 * inside + 0.75 * by_time, abs=1e-3)
