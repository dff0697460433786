"""The numbers that runs record, against hand-made results, and the targets that configurations stand for."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.config import DensityRun, SampleRun, SteerRun
from rnejax.runs import build, density, sample, steer
from rnejax.runs.folder import summary

PROCESS = rj.processes.VariancePreserving()


class Notes:
    """A run's folder that keeps everything in memory."""

    def __init__(self):
        self.metrics, self.saved, self.pictures_drawn = {}, {}, []

    def record(self, **metrics):
        self.metrics |= metrics

    def arrays(self, name, **arrays):
        self.saved[name] = arrays

    def picture(self, name, figure):
        self.pictures_drawn.append(name)

    def timed(self, name="seconds"):
        return nullcontext()


def output(notes):
    return SimpleNamespace(open=lambda: notes, path=None)


def conditional():
    """N(c, 1) in one dimension under the condition c, at every time as far as alpha lets it."""

    def score(params, x, t, condition):
        return -(x - PROCESS.alpha(t) * condition) * jnp.ones(())

    return rj.DiffusionModel(PROCESS, score, "score", shape=(1,), condition=jnp.asarray(0))


def steering(**keys):
    target = keys.pop("target", {"kind": "guide", "condition": 1})
    return SteerRun.model_validate({"model": "toy", "target": target, **keys})


def two_groups():
    """Two groups of two particles at 0, 1 and 2, 3, of which the second group is worth three times as much."""
    log_weights = jnp.log(jnp.asarray([[0.5, 1.5], [1.6, 0.4]]))
    info = SimpleNamespace(
        time=jnp.asarray([[0.5, 0.1], [0.5, 0.1]]),
        ess=jnp.asarray([[2.0, 1.25], [1.9, 1.5]]),
        resampled=jnp.asarray([[False, True], [True, True]]),
        unique_ancestors=jnp.asarray([[2, 2], [2, 1]]),
        num_resamplings=jnp.asarray([1, 2]),
        eve=jnp.asarray([[0, 1], [0, 0]]),
    )
    return SimpleNamespace(
        particles=jnp.arange(4.0).reshape(2, 2, 1),
        log_weights=log_weights,
        log_normalizer=jnp.log(jnp.asarray([1.0, 3.0])),
        info=info,
    )


SHARES = np.array([0.5, 1.5, 4.8, 1.2]) / 8  # of the four particles, over both groups


class TestNumbers:
    def test_groups_are_pooled_by_what_they_are_worth(self):
        x, log_weights = steer.pool(two_groups(), (1,))
        np.testing.assert_array_equal(x, np.arange(4.0)[:, None])
        np.testing.assert_allclose(np.exp(log_weights) / np.exp(log_weights).sum(), SHARES, rtol=1e-6)

    def test_quality_is_by_weight(self):
        notes = Notes()
        reward = {"kind": "function", "function": "jax.numpy:sum", "strength": 5.0}
        config = steering(target={"kind": "tilt", "reward": reward}, judge="judge", judge_label=2)
        x, log_weights = steer.pool(two_groups(), (1,))
        judge = lambda x: jnp.arange(4.0) == x[0]  # noqa: E731 - sees the class that a particle's place is
        steer.record_quality(notes, config, partial(steer.judged_classes, judge, 2), x, log_weights, "_here")
        assert notes.metrics["reward_function_here"] == pytest.approx(SHARES @ np.arange(4.0))
        np.testing.assert_allclose(notes.metrics["judged_classes_here"][:4], SHARES, rtol=1e-6)
        assert notes.metrics["judged_as_wanted_here"] == pytest.approx(SHARES[2])
        variance = SHARES @ (np.arange(4.0) - SHARES @ np.arange(4.0)) ** 2
        assert notes.metrics["diversity_here"] == pytest.approx(np.sqrt(2 * variance))

    def test_weights_are_told_for_every_group(self):
        notes = Notes()
        config = steering(num_groups=2, num_particles=2)
        steer.record_weights(notes, config, conditional(), two_groups(), np.array([0.1, 0.5, 1.0]))
        assert notes.metrics["log_normalizer_nats"] == pytest.approx(np.log(2))
        # sd of 1 and 3 over their mean, over sqrt(2)
        assert notes.metrics["log_normalizer_standard_error_nats"] == pytest.approx(np.sqrt(2) / 2 / np.sqrt(2))
        np.testing.assert_allclose(notes.metrics["effective_sample_size_final"], [1.25, 1.5])
        np.testing.assert_allclose(notes.metrics["effective_sample_size_smallest"], [1.25, 1.5])
        np.testing.assert_array_equal(notes.metrics["resamplings"], [1, 2])
        np.testing.assert_array_equal(notes.metrics["unique_ancestors"], [2, 1])
        np.testing.assert_allclose(notes.metrics["effective_ancestors"], [1.6, 1.0], rtol=1e-6)
        assert notes.metrics["t_min"] == pytest.approx(0.1)
        assert notes.metrics["models"] == 1

    def test_a_run_tells_of_euler_steps_that_are_too_long(self, capsys):
        coarse = np.array([0.1, 0.5, 1.0])  # at t = 1 the drift is beta / 2 = 10, and the step from there 0.5
        for proposal, number in (("feynman_kac", 1), ("symmetric", 0)):
            notes = Notes()
            config = steering(num_groups=2, num_particles=2, proposal=proposal)
            steer.record_weights(notes, config, conditional(), two_groups(), coarse)
            told = [message for message in notes.metrics["warnings"] if "multiplies a state by 6" in message]
            assert len(told) == number
            assert ("multiplies a state by 6" in capsys.readouterr().err) == bool(number)

    def test_the_uncorrected_run_has_no_weights_and_never_resamples(self, monkeypatch):
        given, notes = [], Notes()
        model = conditional()
        monkeypatch.setattr(build.rj, "load_model", lambda name: model)
        original = rj.steer

        def noted(*arguments, **options):
            given.append(options)
            return original(*arguments, **options)

        monkeypatch.setattr(steer.rj, "steer", noted)
        config = steering(compare_uncorrected=True, num_particles=8, ess_threshold=0.7, grid={"num_steps": 3})
        steer.run(config, output(notes))
        assert [options["ess_threshold"] for options in given] == [0.7, 0.0]
        assert [options["num_particles"] for options in given] == [8, 8]
        plain = np.asarray(notes.saved["uncorrected.npz"]["x"], np.float64)
        assert not np.array_equal(plain, notes.saved["samples.npz"]["x"])
        assert notes.metrics["diversity_uncorrected"] == pytest.approx(np.sqrt(2 * plain.var()), rel=1e-5)

    def test_the_mean_of_a_summary_has_its_error(self):
        values = np.array([1.0, 2.0, 4.0])
        assert summary(values) == pytest.approx({"mean": 7 / 3, "standard_error": values.std(ddof=1) / np.sqrt(3)})
        assert np.isnan(summary([1.0])["standard_error"])


class TestDensity:
    def run(self, tmp_path, monkeypatch, **keys):
        monkeypatch.setattr(build.rj, "load_model", lambda name: conditional())
        x = np.random.default_rng(0).normal(size=(5, 1))
        np.savez(tmp_path / "x.npz", x=x)
        notes = Notes()
        config = {"model": "toy", "data": str(tmp_path / "x.npz"), "condition": 0, "grid": {"num_steps": 4}} | keys
        density.run(DensityRun.model_validate(config), output(notes))
        return x, notes

    def test_evaluations_are_counted_over_points_paths_and_steps(self, tmp_path, monkeypatch):
        x, notes = self.run(tmp_path, monkeypatch, num_paths=3, num_points=4)
        assert notes.metrics["network_evaluations"] == 4 * 3 * 4
        saved = notes.saved["samples.npz"]
        np.testing.assert_allclose(saved["x"], x[:4], rtol=1e-6)
        exact = -0.5 * (x[:4, 0] ** 2 + np.log(2 * np.pi))
        np.testing.assert_allclose(saved["log_density"], exact, atol=1e-4)  # the data are the reference
        np.testing.assert_allclose(notes.metrics["log_density_nats"]["mean"], exact.mean(), atol=1e-4)
        assert float(np.max(np.abs(saved["standard_error"]))) < 1e-4

    @pytest.mark.parametrize(("num_probes", "divergence"), [(0, "exact"), (2, "hutchinson")])
    def test_no_probes_mean_the_exact_divergence(self, tmp_path, monkeypatch, num_probes, divergence):
        given = []
        original = rj.probability_flow_log_density

        def noted(*arguments, **options):
            given.append(options)
            return original(*arguments, **options)

        monkeypatch.setattr(density.rj, "probability_flow_log_density", noted)
        x, notes = self.run(tmp_path, monkeypatch, probability_flow=True, num_probes=num_probes)
        assert (given[0]["divergence"], given[0]["num_probes"]) == (divergence, max(1, num_probes))
        exact = -0.5 * (x[:, 0] ** 2 + np.log(2 * np.pi))
        flow = notes.metrics["log_density_probability_flow_nats"]
        assert flow["mean"] == pytest.approx(exact.mean(), abs=1e-2)  # ten times the default tolerance


def test_samples_of_conditions_take_turns_and_follow_the_seed(monkeypatch):
    monkeypatch.setattr(build.rj, "load_model", lambda name: conditional())

    def drawn(seed):
        notes = Notes()
        keys = {"model": "toy", "condition": [0, 50], "num_samples": 7, "grid": {"num_steps": 5}, "seed": seed}
        sample.run(SampleRun.model_validate(keys), output(notes))
        return np.asarray(notes.saved["samples.npz"]["x"])[:, 0]

    first, second = drawn(0), drawn(1)
    assert np.all(first[1::2] > 20)
    assert np.all(first[::2] < 20)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, drawn(0))


class TestTargets:
    MODEL = conditional()

    def test_a_tilt_is_what_its_keys_say(self):
        reward = {"kind": "function", "function": "jax.numpy:sum", "strength": 5.0}
        target = {"kind": "tilt", "reward": reward, "at": "x", "exact": False, "gradient": False}
        built = build.build_target(
            self.MODEL, steering(target=target | {"base": {"kind": "temper", "exponent": 2.0}}).target
        )
        (made,) = built.rewards
        assert (made.at, made.exact, made.gradient, made.host) == ("x", False, False, False)
        by_hand = rj.tilt(self.MODEL, jnp.sum, at="x", exact=False, gradient=False, scale=5.0).rewards[0]
        times = rj.time_grid(PROCESS, 3)
        np.testing.assert_allclose(made.strengths_at(PROCESS, times), by_hand.strengths_at(PROCESS, times))
        assert made.strengths_at(PROCESS, times)[0] == pytest.approx(5.0)
        assert float(made.values(jnp.asarray([[3.0]]))[0]) == 3.0
        assert built.exponents == (2.0,)

    def test_guidance_names_the_condition_and_the_scale(self):
        built = build.build_target(self.MODEL, steering(target={"kind": "guide", "condition": 3, "scale": 1.5}).target)
        assert built.exponents == (-0.5, 1.5)
        assert [int(model.condition) for model in built.models] == [0, 3]

    def test_products_take_their_exponents(self):
        keys = {"kind": "product", "conditions": [1, 2], "exponents": [0.5, 2.0]}
        built = build.build_target(self.MODEL, steering(target=keys).target)
        assert built.exponents == (0.5, 2.0)
        assert [int(model.condition) for model in built.models] == [1, 2]


def test_pictures_of_a_run_are_spread_over_its_particles():
    x = np.arange(10)
    np.testing.assert_array_equal(steer.spread(x, 4), [0, 3, 6, 9])
    np.testing.assert_array_equal(steer.spread(x, 40), x)
