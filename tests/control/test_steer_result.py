"""What steer() returns, what its options do, and what is compiled again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steering_problems import FIRST, QUIET, STD, TIMES, VP, gaussian, log_normal, variance_at_end

import rnejax as rj
from rnejax.control.steer import steps_in_window
from rnejax.smc import log_mean_exp
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)


@pytest.fixture(scope="module")
def plain():
    return rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 64, num_groups=64, **QUIET)


@pytest.fixture(scope="module")
def with_options():
    window = (float(TIMES[3]), float(TIMES[6]))
    names = ("ancestors", "log_weights", "log_increments", "particles")
    target = rj.temper(FIRST.model(VP), 2.0)
    options = {"ess_threshold": 1.01, "window": window, "save": names, "final_resampling": True, "num_groups": 3}
    return window, rj.steer(KEY, target, TIMES, 32, **options, **QUIET)


class TestResult:
    def test_standard_error_is_that_of_the_mean_over_groups(self, plain):
        normalizers = np.exp(np.asarray(plain.log_normalizer, np.float64))
        wanted = normalizers.std(ddof=1) / np.sqrt(normalizers.size) / normalizers.mean()
        assert float(plain.standard_error) == pytest.approx(wanted, rel=1e-4)

    def test_standard_error_agrees_with_the_spread_of_halves(self, plain):
        halves = np.asarray(log_mean_exp(plain.log_normalizer.reshape(2, 32)))
        assert abs(halves[0] - halves[1]) < 4 * np.sqrt(2) * np.sqrt(2) * float(plain.standard_error)

    def test_mean_weight_is_one(self, plain):
        np.testing.assert_allclose(np.exp(np.asarray(plain.log_weights)).mean(axis=1), 1, rtol=1e-5)

    def test_increments_and_initial_weights_make_the_normalizer(self, plain):
        # log Z is the log-mean of the initial weights plus all increments; here the initial law is the normalised
        # square of the reference, whose constant is known.
        total = np.asarray(plain.info.log_normalizer_increments, np.float64).sum(axis=1)
        variance = float(VP.reference(TIMES[-1], (2,)).variance)
        start = -np.log(2 * np.pi * variance) - np.log(2)
        np.testing.assert_allclose(plain.log_normalizer, start + total, atol=1e-4)

    def test_info_runs_from_noise_to_data(self, plain):
        np.testing.assert_allclose(plain.info.time, TIMES[::-1][1:], rtol=1e-6)
        assert plain.info.ess.shape == plain.info.resampled.shape == (64, len(TIMES) - 1)

    def test_log_densities_are_those_of_the_model(self):
        # Exact kernels: the density along the path is the density of the state.
        result = rj.steer(KEY, rj.temper(gaussian(), 2.0), TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        x = np.asarray(result.particles, np.float64)
        np.testing.assert_allclose(result.log_densities[..., 0], log_normal(x, 0.0, variance), atol=1e-3)

    def test_log_densities_start_from_a_prior_of_the_models_own(self):
        mixture, times = GaussianMixture([(0.7, -0.4)], 0.4), rj.time_grid(VP, 12, t_max=0.5)
        model = mixture.model(VP, covariance="diagonal", prior=mixture.noised(VP.level(times[-1])))
        result = rj.steer(KEY, rj.temper(model, 2.0), times, 64, num_groups=4, **QUIET)
        truth = jax.vmap(jax.vmap(mixture.noised(VP.level(times[0])).log_prob))(result.particles)
        np.testing.assert_allclose(result.log_densities[..., 0], truth, atol=1e-3)

    def test_without_groups_there_is_no_standard_error(self):
        result = rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 1, **QUIET)
        assert result.particles.shape == (1, 2)
        assert result.log_normalizer.shape == ()
        assert np.isnan(result.standard_error)

    def test_zero_particles_are_refused(self):
        with pytest.raises(ValueError, match="num_particles"):
            rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 0)


class TestOptions:
    def test_resampling_happens_in_steps_that_begin_inside_the_window(self, with_options):
        (low, high), result = with_options
        begins = TIMES[::-1][:-1]
        inside = (begins >= low) & (begins <= high)
        assert np.array_equal(result.info.resampled, np.broadcast_to(inside, (3, len(inside))))

    def test_final_resampling_leaves_equal_weights(self, with_options):
        _, result = with_options
        np.testing.assert_allclose(result.log_weights, 0, atol=1e-6)

    def test_saved_are_one_per_step_and_only_what_was_asked_for(self, with_options, plain):
        _, result = with_options
        shapes = {name: value.shape for name, value in result.info.saved.items()}
        steps = len(TIMES) - 1
        assert shapes.pop("particles") == (3, steps, 32, 2)
        assert shapes == dict.fromkeys(("ancestors", "log_weights", "log_increments"), (3, steps, 32))
        assert plain.info.saved == {}

    def test_last_saved_particles_are_those_before_the_final_resampling(self, with_options):
        _, result = with_options
        last, final = np.asarray(result.info.saved["particles"])[:, -1], np.asarray(result.particles)
        assert all(set(map(tuple, final[g])) <= set(map(tuple, last[g])) for g in range(3))

    def test_result_under_jit_is_the_result(self, plain):
        @jax.jit
        def compiled(key, model):
            return rj.steer(key, rj.temper(model, 2.0), TIMES, 64, num_groups=64)

        result = compiled(KEY, FIRST.model(VP))
        # Fusion may round differently; after twelve steps without chaos that stays at 1e-5.
        np.testing.assert_allclose(result.log_normalizer, plain.log_normalizer, atol=1e-3)
        assert int(np.max(result.info.fault.code)) == 0


def test_other_conditions_weights_and_exponents_recompile_nothing():
    traces = []

    def fn(params, x, t, condition):
        traces.append(1)
        return -(x - params * condition) / (VP.alpha(t) ** 2 * STD**2 + VP.sigma(t) ** 2)

    model = rj.DiffusionModel(VP, fn, shape=(2,), params=jnp.float32(1.0), condition=jnp.zeros(2))
    results = []
    for other, beta in (
        (model, 2.0),
        (model.with_condition(jnp.ones(2)), 2.0),
        (model.with_params(jnp.float32(3.0)), 1.5),
    ):
        before = len(traces)
        results.append(rj.steer(KEY, rj.temper(other, beta), TIMES, 8, **QUIET).log_normalizer)
    assert len(traces) == before
    assert results[0] != results[1]


def test_without_a_window_every_step_but_the_first_iteration_may_resample():
    assert steps_in_window(None, TIMES) == (1, len(TIMES))  # iterations 1, ..., n: the first only looks
