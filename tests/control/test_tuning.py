"""tune_proposal: a drift found by pilots makes weights more even, and leaves them exact whatever it is."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steering_problems import FIRST, QUIET, SECOND, gaussian

import rnejax as rj
from rnejax.control import Drift, Transport
from rnejax.control.proposals import transport_effects
from rnejax.control.steer import prepare
from rnejax.control.tuning import fit_coefficients, normal_equations, weights_before
from rnejax.smc import Resampling, run
from rnejax.systems import GaussianMixture

KEY = jax.random.key(3)
PROCESS = rj.processes.VariancePreserving(t_min=0.01)
TIMES = rj.time_grid(PROCESS, 60)
# A narrow core in a wide cloud: what is cooled contracts, and no Gaussian contracts like it.
UNEVEN = GaussianMixture(np.zeros((4, 12)), [0.3, 0.45, 0.65, 1.0], weights=[0.1, 0.2, 0.3, 0.4])
BETA = 2.0


def some_transport(num_fields, size=0.3):
    """Of no use, and large enough to matter."""
    values = size * jax.random.normal(jax.random.key(9), (4, num_fields))
    return Transport(jnp.asarray([-6.0, -1.0, 2.0, 6.0]), values)


@pytest.fixture(scope="module")
def uneven():
    return rj.temper(UNEVEN.model(PROCESS, covariance="full"), BETA)


@pytest.fixture(scope="module")
def tuned(uneven):
    return rj.tune_proposal(KEY, uneven, TIMES, 400)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["temper", "product"])
def test_weights_are_exact_whatever_the_transport(kind, threshold):
    """The model is wrong and the transport is arbitrary: reweighted to another law, the integral is unbiased."""
    wanted = GaussianMixture([[0.4, 0.1]], 0.4)
    models = [each.model(PROCESS) for each in (FIRST, SECOND)]
    target = rj.temper(models[0], 1.4) if kind == "temper" else rj.product(models, [0.5, 0.7])
    drift = Drift(transport=some_transport(len(target.models) + 1, 0.1))
    times = rj.time_grid(PROCESS, 12)
    groups = {"num_particles": 128, "num_groups": 200, "ess_threshold": threshold, **QUIET}
    result = rj.steer(KEY, target, times, proposal=drift, **groups)
    values = np.exp(np.asarray(rj.reweight(result, target, wanted.log_prob).log_normalizer, np.float64))
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert error < 0.05, "the check must be able to fail"
    assert abs(values.mean() - 1) < 4 * error
    plain = rj.steer(KEY, target, times, **groups)
    assert not np.allclose(plain.particles, result.particles, atol=0.01), "the transport moves particles"


@pytest.mark.parametrize(
    ("covariance", "with_reward"), [("full", False), ("diagonal", False), ("hutchinson", False), ("full", True)]
)
def test_effects_are_what_a_transport_does_to_the_mean_weight(covariance, with_reward):
    """In one short step from many copies of one state, by common random numbers, to leading order in the step."""
    # Isotropic components far apart from each other: the trace is right for every choice of covariance.
    mixture = GaussianMixture([[0.5, 0.3], [-0.6, 0.1]], 0.4)
    target = rj.temper(mixture.model(PROCESS, covariance=covariance), BETA)
    if with_reward:
        target = rj.tilt(target, lambda x: 4.0 * x[0] - x[1], lambda t: 1.0, exact=False)
    t, count = 0.3, 40_000
    times = np.asarray([t * 0.998, t])
    x = jnp.broadcast_to(jnp.asarray([0.1, 0.7]), (count, 2))

    def increments(coefficients):
        drift = Drift(transport=Transport(jnp.asarray([-20.0, 20.0]), jnp.tile(jnp.asarray(coefficients), (2, 1))))
        problem, steps, _ = prepare(KEY, target, times, drift, warn=False)
        particles, _ = problem.init(KEY, count)
        first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], steps) for k in (0, 1))
        looked, _, _ = problem.step(jax.random.key(1), particles._replace(x=x), first)
        _, increment, aux = replace(problem, effects=True).step(jax.random.key(2), looked, second)
        return np.asarray(increment, np.float64), np.asarray(aux["effects"], np.float64)

    _, effects = increments([0.0, 0.0])
    for j in range(2):
        size = np.eye(2)[j] * 0.2
        up, down = (increments(sign * size)[0] for sign in (1.0, -1.0))
        slopes = (up - down) / 0.4
        error = slopes.std() / np.sqrt(count)
        wanted = effects[:, j].mean()
        # What is left out is of relative order v / sigma^2, the size of the step.
        assert abs(slopes.mean() - wanted) < 4 * error + 0.02 * abs(wanted)
        assert abs(wanted) > 20 * error, "the check must be able to fail"


def test_effects_count_the_dimensions_of_a_subspace():
    """Of particles without a centre of mass, for Gaussian data: div score_ref = -d / V with d = 3 (n - 1)."""
    process = rj.processes.VariancePreserving(data_std=0.7, subspace=rj.kernels.CentreOfMassFree())
    model = rj.DiffusionModel(process, lambda x, t: -x / process.level(t).reference_variance, shape=(4, 3))
    target = rj.temper(model, BETA)
    problem, steps, _ = prepare(KEY, target, rj.time_grid(process, 5), "symmetric", warn=False)
    particles, _ = problem.init(KEY, 6)
    step = jax.tree.map(lambda leaf: leaf[2], steps)
    variance = float(step.transition.t.reference_variance)
    found = jax.vmap(lambda p: transport_effects(step.transition, problem._left(step, p), BETA))(particles)
    square = (np.asarray(particles.x) ** 2).sum(axis=(1, 2)) / variance
    wanted = float(step.transition.variance) * BETA / variance * (BETA * square - 9)
    np.testing.assert_allclose(found[:, 1], wanted, rtol=1e-4)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-5)


def test_a_tuned_proposal_has_more_even_weights(uneven, tuned):
    """Where a cloud contracts, pilots find a drift that evens out the weights of whole paths, and the same log Z."""
    assert tuned.variances.shape == (2,)
    assert tuned.variances[1] < 0.85 * tuned.variances[0]  # 0.78 was measured, with 400 particles
    groups = {"num_particles": 128, "num_groups": 32, "ess_threshold": 0.0, **QUIET}
    plain, better = (
        rj.steer(jax.random.key(5), uneven, TIMES, proposal=each, **groups) for each in ("symmetric", tuned.proposal)
    )
    # The standard deviation over 32 groups is known to one part in eight.
    assert float(better.standard_error) < 0.6 * float(plain.standard_error)
    difference = rj.smc.log_normalizer_with_error(plain)[0] - rj.smc.log_normalizer_with_error(better)[0]
    assert abs(difference) < 4 * np.hypot(float(plain.standard_error), float(better.standard_error))


def test_nothing_is_to_be_gained_where_weights_are_constant():
    """Gaussian data: the symmetric proposal is optimal, and its weights stay within rounding of constant."""
    target = rj.temper(gaussian(), BETA)
    found = rj.tune_proposal(KEY, target, rj.time_grid(gaussian().process, 12), 64)
    assert found.variances[0] < 1e-6
    assert found.variances.min() <= found.variances[0]


def test_the_best_that_was_measured_is_returned(uneven):
    """A fit that is no better than what was given is not believed: with an overwhelming ridge nothing is fitted."""
    first = rj.tune_proposal(KEY, uneven, TIMES, 64, ridge=1e9)
    best = int(np.argmin(first.variances))
    assert (first.proposal.transport is None) == (best == 0)
    worse = Drift(transport=Transport(jnp.asarray([-1.0, 1.0]), jnp.asarray([[0.2, 0.0]] * 2)))
    again = rj.tune_proposal(KEY, uneven, TIMES, 400, rounds=2, proposal=worse)
    assert again.variances.min() < 0.5 * again.variances[0]
    assert again.proposal is not worse


@pytest.mark.parametrize(("coefficient", "finite"), [(-0.5, True), (np.nan, False)])
def test_a_fit_that_makes_things_worse_is_not_returned(uneven, monkeypatch, coefficient, finite):
    given = Drift(coefficients=(0.75, 0.25))
    monkeypatch.setattr("rnejax.control.tuning.fit_coefficients", lambda gram, *_: np.full(gram.shape[:2], coefficient))
    found = rj.tune_proposal(KEY, uneven, TIMES, 64, rounds=2, proposal=given)
    assert found.proposal is given
    assert found.variances[1] > 2 * found.variances[0]
    assert np.isfinite(found.variances[1]) == finite
    assert len(found.variances) == (3 if finite else 2)


def test_pilots_and_runs_of_other_transports_compile_once(uneven):
    traces = []

    def fn(x, t):
        traces.append(1)
        return -x

    target = rj.temper(rj.DiffusionModel(PROCESS, fn, shape=(2,)), BETA)
    times = rj.time_grid(PROCESS, 8)
    results = []
    for size in (0.1, 0.2):
        before = len(traces)
        results.append(rj.steer(KEY, target, times, 16, proposal=Drift(transport=some_transport(2, size)), **QUIET))
    assert len(traces) == before
    assert not np.allclose(results[0].particles, results[1].particles)


def test_a_tuned_proposal_works_inside_jit(uneven, tuned):
    def log_normalizer(key, proposal):
        return rj.steer(key, uneven, TIMES, 32, proposal=proposal, **QUIET).log_normalizer

    inside = jax.jit(log_normalizer)(KEY, tuned.proposal)
    np.testing.assert_allclose(inside, log_normalizer(KEY, tuned.proposal), rtol=1e-4, atol=1e-4)


def test_with_rewards_their_gradient_is_part_of_the_targets_score():
    """A reward of the low-variance scheme tunes; its effects are those of the tilted target's score."""
    model = FIRST.model(PROCESS, covariance="full")
    target = rj.tilt(rj.temper(model, 1.5), lambda x: -jnp.sum((x - 0.5) ** 2), exact=False)
    found = rj.tune_proposal(KEY, target, TIMES, 300)
    assert np.isfinite(found.variances).all()
    assert found.variances.min() <= found.variances[0]


class TestRegression:
    def test_least_squares_finds_the_coefficients(self):
        rng = np.random.default_rng(0)
        effects = rng.normal(size=(7, 500, 2)) @ np.asarray([[1.0, 0.8], [0.0, 0.6]]) * np.asarray([1.0, 30.0])
        wanted = np.asarray([0.5, -0.02])
        weights = rng.dirichlet(np.ones(500), size=7)
        increments = 3.0 + effects @ wanted
        gram, slope, variance = normal_equations(weights, increments, effects)
        np.testing.assert_allclose(fit_coefficients(gram, slope, 2.0, 1e-9), np.tile(wanted, (7, 1)), rtol=1e-6)
        mean = (weights * increments).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(variance, (weights * (increments - mean) ** 2).sum(axis=1))

    def test_a_ridge_shrinks_what_cannot_be_told_apart(self):
        """Two equal fields share one effect; without a ridge the equations are singular."""
        effects = np.random.default_rng(1).normal(size=(3, 200, 1)).repeat(2, axis=2)
        gram, slope, _ = normal_equations(np.full((3, 200), 1 / 200), effects[..., 0] * 2.0, effects)
        np.testing.assert_allclose(fit_coefficients(gram, slope, 1.0, 1e-3), 1.0, rtol=1e-3)

    def test_neighbours_are_pooled(self):
        """A step of its own opinion is overruled by the width of the window, and followed without one."""
        gram = np.ones((9, 1, 1))
        slope = np.zeros((9, 1))
        slope[4] = 1.0
        assert fit_coefficients(gram, slope, 0.01, 1e-9)[4, 0] == pytest.approx(1.0)
        assert fit_coefficients(gram, slope, 3.0, 1e-9)[4, 0] < 0.2

    def test_particles_without_weight_and_fields_without_effect_do_not_count(self):
        weights = np.asarray([[0.5, 0.5, 0.0]])
        effects = np.asarray([[[1.0, 0.0], [-1.0, 0.0], [np.nan, 0.0]]])
        gram, slope, variance = normal_equations(weights, np.asarray([[2.0, -2.0, -np.inf]]), effects)
        np.testing.assert_allclose(fit_coefficients(gram, slope, 1.0, 1e-9), [[2.0, 0.0]], rtol=1e-6)
        assert variance == pytest.approx(4.0)


class TestRefusals:
    tune = staticmethod(partial(rj.tune_proposal, KEY))

    def test_what_is_no_drift(self, uneven):
        with pytest.raises(ValueError, match="tunes a Drift"):
            self.tune(uneven, TIMES, proposal="feynman_kac")

    def test_a_reward_of_the_exact_scheme(self):
        target = rj.tilt(FIRST.model(PROCESS), lambda x: x[0])
        with pytest.raises(ValueError, match="auxiliary kernel"):
            self.tune(target, TIMES)
        with pytest.raises(ValueError, match="noising kernel"):
            rj.steer(KEY, target, TIMES, 8, proposal=Drift(transport=some_transport(2)), **QUIET)

    def test_inside_jit(self, uneven):
        with pytest.raises(ValueError, match=r"outside jax\.jit"):
            jax.jit(lambda key: rj.tune_proposal(key, uneven, TIMES, 8).variances)(KEY)

    def test_what_a_host_reward_and_a_network_do_wrong_is_told_as_steer_tells_it(self):
        def fails(x):
            raise RuntimeError("no such pocket")

        target = rj.tilt(FIRST.model(PROCESS), fails, exact=False, host=True)
        with pytest.raises(rj.control.RewardError, match="no such pocket"):
            self.tune(target, rj.time_grid(PROCESS, 5), 8)
        broken = rj.DiffusionModel(PROCESS, lambda x, t: x * jnp.where(t < 0.5, jnp.nan, -1.0), shape=(2,))
        with pytest.raises(rj.smc.SMCError, match=r"t = 0\.\d+: model 0 returned NaN"):
            self.tune(rj.temper(broken, BETA), rj.time_grid(PROCESS, 5), 8)

    def test_numbers_that_are_none(self, uneven):
        for wrong in ({"num_particles": 0}, {"rounds": 0}, {"smoothing": 0.0}, {"ridge": -1.0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                self.tune(uneven, TIMES, **wrong)

    def test_a_transport_of_another_number_of_models(self, uneven):
        with pytest.raises(ValueError, match="makes 2 models"):
            rj.steer(KEY, uneven, TIMES, 8, proposal=Drift(transport=some_transport(3)), **QUIET)


def test_steps_are_run_from_noise_to_data_as_the_table_is(uneven, tuned):
    """The table's log-SNR increases, and is that of the beginning of every step."""
    log_snr = np.asarray(tuned.proposal.transport.log_snr)
    np.testing.assert_allclose(log_snr, PROCESS.level(TIMES[:0:-1]).log_snr, rtol=1e-5)
    assert (np.diff(log_snr) > 0).all()
    problem, steps, _ = prepare(KEY, uneven, TIMES, tuned.proposal, warn=False)
    result = run(
        KEY,
        replace(problem, effects=True),
        steps,
        num_particles=16,
        resampling=Resampling(every=7),
        save=("log_weights", "log_increments"),
        progress=False,
    )
    assert result.info.aux["effects"].shape == (len(TIMES), 16, 2)
    # Increments belong to the particles as they were resampled: right after it, weights are equal.
    saved = (np.asarray(result.info.saved[name], np.float64) for name in ("log_weights", "log_increments"))
    weights = weights_before(*saved)
    resampled = np.asarray(result.info.resampled)
    assert resampled.sum() >= 5
    np.testing.assert_allclose(weights[resampled], 1 / 16, rtol=1e-4)
    assert np.ptp(weights[~resampled][20:], axis=1).min() > 1e-3
