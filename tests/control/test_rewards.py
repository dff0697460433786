"""Rewards that forbid, fail, or live on the host; networks that fail; what the error says."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import PROCESSES
from scipy.stats import norm
from steering_problems import z_of_normalizer

import rnejax as rj
from rnejax.smc import log_mean_exp
from rnejax.systems import GaussianMixture

KEY = jax.random.key(77)
VP = rj.processes.VariancePreserving(t_min=0.02)
TIMES = rj.time_grid(VP, 8)
QUIET = {"warn": False, "progress": False}


def network(params, x, t, condition):
    """The score of unit Gaussian data, which is -x at every time; NaN at times up to params."""
    return jnp.where(t <= params, jnp.nan, -x)


MODEL = rj.DiffusionModel(VP, network, shape=(2,), params=jnp.float32(-1.0))


def half_plane(edge, x):
    """Forbids the points to the left of the edge; NaN where the edge is."""
    return jnp.where(x[0] < edge, -jnp.inf, 0.0 * edge)


def only_at_the_end(t):
    return 1.0 if t < TIMES[1] else 0.0


def late(t):
    return 1.0 if t < TIMES[3] else 0.0


def steer_within(edge, schedule=only_at_the_end, model=MODEL, **options):
    reward = jax.tree_util.Partial(half_plane, jnp.float32(edge))
    # A constraint has no gradient that would help.
    target = rj.tilt(model, reward, schedule=schedule, gradient=False)
    return rj.steer(KEY, target, TIMES, 128, num_groups=32, **options, **QUIET)


class TestForbiddenRegions:
    def test_forbidden_particles_lose_their_weight_and_the_run_goes_on(self):
        result = steer_within(0.5)
        weights = np.exp(np.asarray(result.log_weights))
        inside = np.asarray(result.particles)[..., 0] >= 0.5
        assert np.all(np.isfinite(result.log_normalizer))
        assert np.all(weights[~inside] == 0)
        assert np.any(weights == 0)
        np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-5)

    def test_normalizer_is_the_mass_of_what_is_allowed(self):
        result = steer_within(0.5)
        truth = np.log(norm.sf(0.5))  # the law is the unit Gaussian at every time
        assert abs(float(log_mean_exp(result.log_normalizer)) - truth) < 4 * float(result.standard_error)

    def test_what_is_forbidden_before_the_end_is_the_whole_path(self):
        """Nothing brings a particle of zero weight back, so paths that ever were outside are missing from log Z."""
        result = steer_within(0.5, late)
        rng = np.random.default_rng(0)
        x = rng.standard_normal(10**6)
        allowed = x >= 0.5
        for s, t in pairwise(TIMES[:3]):  # the same chain, towards noise
            decay = float(VP.alpha(t) / VP.alpha(s))
            x = decay * x + np.sqrt(1 - decay**2) * rng.standard_normal(x.size)
            allowed &= x >= 0.5
        share = allowed.mean()
        error = np.hypot(float(result.standard_error), np.sqrt((1 - share) / share / x.size))
        assert abs(float(log_mean_exp(result.log_normalizer)) - np.log(share)) < 4 * error
        assert share < 0.9 * norm.sf(0.5)

    def test_nothing_allowed_is_an_error_that_names_the_reward_and_the_time(self):
        with pytest.raises(rj.smc.SMCError, match=f"(?s)(?=.*t = {TIMES[2]:.6g})(?=.*reward)"):
            steer_within(np.inf, late)

    def test_forbidden_by_a_reward_without_strength_does_not_count(self):
        target = rj.tilt(MODEL, jax.tree_util.Partial(half_plane, jnp.float32(np.inf)), gradient=False, scale=0.0)
        result = rj.steer(KEY, target, TIMES, 128, num_groups=32, **QUIET)
        # exact kernels and no tilt: every weight is exactly one, up to rounding
        np.testing.assert_allclose(result.log_normalizer, 0, atol=1e-4)


class TestCulprits:
    def test_reward_that_returns_nan_is_named(self):
        with pytest.raises(rj.smc.SMCError, match=r"a reward returned NaN"):
            steer_within(np.nan)

    def test_network_that_returns_nan_is_named_with_the_time(self):
        # The first time at which it fails, in order of execution, is the third from the data.
        with pytest.raises(rj.smc.SMCError, match=f"(?s)(?=.*t = {TIMES[2]:.6g})(?=.*model 0 returned NaN)"):
            steer_within(-9.0, model=MODEL.with_params(jnp.float32(TIMES[2] * 1.001)))

    def test_unchecked_result_tells_by_its_fault(self):
        result = steer_within(np.nan, check=False)
        assert np.all(np.asarray(result.info.fault.code) != 0)


class TestHost:
    def test_host_reward_is_the_jax_reward(self):
        calls = []

        def on_host(batch):
            calls.append(batch.shape)
            return -np.sum((batch - 0.4) ** 2, axis=-1)

        jax_reward = jax.jit(lambda x: -jnp.sum((x - 0.4) ** 2))
        of = lambda reward, **options: rj.steer(  # noqa: E731
            KEY, rj.tilt(MODEL, reward, gradient=False, **options), TIMES, 16, num_groups=2, **QUIET
        )
        ours, theirs = of(on_host, host=True), of(jax_reward)
        np.testing.assert_allclose(ours.log_normalizer, theirs.log_normalizer, atol=1e-5)
        np.testing.assert_allclose(ours.particles, theirs.particles, atol=1e-5)
        # One call per time for all particles together, not one per particle.
        assert calls == [(32, 2)] * len(TIMES)

    def test_host_reward_of_another_shape_is_refused(self):
        target = rj.tilt(MODEL, lambda batch: batch, host=True)
        with pytest.raises(Exception, match=r"one number per example"):
            rj.steer(KEY, target, TIMES, 16, num_groups=2, **QUIET)


def test_weights_of_a_reward_are_data():
    traces = []

    def reward(weights, x):
        traces.append(1)
        return jnp.sum(weights * x)

    normalizers = []
    for slope in (0.0, 1.0):
        target = rj.tilt(MODEL, jax.tree_util.Partial(reward, jnp.full(2, slope)), gradient=False)
        before = len(traces)
        normalizers.append(rj.steer(KEY, target, TIMES, 16, num_groups=2, **QUIET).log_normalizer)
    assert len(traces) == before
    assert not np.allclose(*normalizers, atol=1e-3)


def test_a_reward_sees_the_predicted_clean_state_of_all_models_in_the_users_units():
    """Before the end sum_i beta_i D_i / sum_i beta_i with the exponents of that time; at the end the state itself."""
    transform = rj.transforms.Affine(2.0, jnp.asarray([1.0, -1.0]))
    models = [GaussianMixture([mean], 0.5).model(VP, transform=transform) for mean in ([0.8, 0.1], [-0.3, 0.6])]
    seen = []

    def on_host(batch):
        seen.append(np.array(batch))
        return np.zeros(len(batch))

    target = rj.tilt(rj.product(models, [lambda t: 2.0 - t, 0.5]), on_host, exact=False, at="x0", host=True)
    result = rj.steer(KEY, target, TIMES, 8, save=("particles",), **QUIET)
    states = np.asarray(result.info.saved["particles"])
    assert len(seen) == len(TIMES)
    for k, t in enumerate(TIMES[::-1][1:]):
        x = jax.vmap(transform.to_model)(jnp.asarray(states[k]))
        first, second = (jax.vmap(lambda x, m=m, t=t: m.denoise(x, t))(x) for m in models)
        predicted = ((2.0 - t) * first + 0.5 * second) / (2.5 - t)
        wanted = jax.vmap(transform.to_data)(x if t == TIMES[0] else predicted)
        np.testing.assert_allclose(seen[k + 1], wanted, rtol=1e-4, atol=1e-4)


def test_a_reward_at_full_strength_from_the_start_counts_once():
    # N(0, I) at every time: E e^{b x} = e^{|b|^2 / 2}, whatever the schedule: weights telescope from the first look on.
    slope = jnp.asarray([0.5, -0.3])
    target = rj.tilt(MODEL, lambda x: slope @ x, schedule=lambda t: 1.0)
    result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
    assert abs(z_of_normalizer(result, 0.5 * float(slope @ slope))) < 4


# -- what a reward on the host may do wrong ----------------------------------------------------------------------------


def divides_by_zero(x):
    raise ZeroDivisionError("no ink")


def two_numbers_each(x):
    return np.zeros((len(x), 2))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (divides_by_zero, "test_rewards:divides_by_zero failed on a batch of states: ZeroDivisionError: no ink"),
        (two_numbers_each, r"one number per example: expected shape \(4,\), got \(4, 2\)"),
    ],
)
def test_what_a_host_reward_does_wrong_is_told_in_its_own_words(reward, words):
    target = rj.tilt(MODEL, reward, host=True)
    for _ in range(2):  # compiled, and from the cache
        with pytest.raises(rj.control.RewardError, match=words):
            rj.steer(jax.random.key(0), target, TIMES, 4, **QUIET)


def test_what_was_told_is_not_told_again_of_a_run_that_went_well():
    broken = [True]

    def sometimes(x):
        return divides_by_zero(x) if broken else x[:, 0]

    target = rj.tilt(MODEL, sometimes, host=True)
    with pytest.raises(rj.control.RewardError, match="no ink"):
        rj.steer(jax.random.key(0), target, TIMES, 4, **QUIET)
    broken.clear()
    rj.steer(jax.random.key(0), target, TIMES, 4, **QUIET)


def test_in_the_users_own_jit_a_host_reward_that_raises_is_not_silent():
    def run(key):
        return rj.steer(key, rj.tilt(MODEL, divides_by_zero, host=True), TIMES, 4, **QUIET).log_normalizer

    with pytest.raises(Exception, match="no ink"):
        jax.block_until_ready(jax.jit(run)(jax.random.key(0)))


# -- the default strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_the_default_strength_leaves_nothing_of_a_quadratic_reward_at_the_largest_time(process):
    # E|x_t|^2 / E|x_0|^2 = V_t / data_std^2 is what the reward of a noisy state grows by. What its strength leaves of
    # it is at most the share of the signal; 2 % for what is noise already at t_min.
    times = rj.time_grid(process, 20)
    level = process.level(times)
    variance = np.asarray(level.reference_variance) / process.data_std**2
    signal = np.asarray(level.alpha) ** 2 / variance
    model = rj.DiffusionModel(process, lambda x, t: 0 * x, "x0", shape=(2,))
    for at, size in (("x", variance), ("x0", 1.0)):
        strength = rj.tilt(model, lambda x: -jnp.sum(x**2), at=at).strengths_at(times)[:, 0]
        assert strength[0] == 1
        assert np.all(np.diff(strength) < 0)
        assert np.all(strength * size <= 1.02 * signal)
