"""The loop over time: exact answers on problems with memory, bookkeeping, groups."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_space import OBSERVATIONS, Deterministic, Prescribed, kalman, state_space

from rnejax import smc
from rnejax.smc.contract import SAVEABLE

KEY = jax.random.key(2024)
NEVER = smc.Resampling(ess_threshold=0)
ALWAYS = smc.Resampling(ess_threshold=1.01)


def z_score(samples, exact):
    """Distance of the mean of independent samples from ``exact``, in standard errors."""
    samples = np.asarray(samples, np.float64)
    return (samples.mean() - exact) / (samples.std(ddof=1) / np.sqrt(samples.size))


RULES = {
    "never": NEVER,
    "half": smc.Resampling(),
    "always": ALWAYS,
    **{scheme: smc.Resampling(scheme=scheme) for scheme in ("multinomial", "stratified", "residual")},
    "partial": smc.Resampling(ess_threshold=0.7, partial=0.5),
    "every": smc.Resampling(every=2, window=(3, 7)),
    "final": smc.Resampling(final=True),
}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "final"])
def test_normalizer_and_moments_are_unbiased_against_the_kalman_filter(rule):
    with jax.enable_x64(True):
        problem = state_space(jnp.float64)
        exact, mean, variance = kalman(problem, OBSERVATIONS)
        result = smc.run(
            KEY, problem, jnp.asarray(OBSERVATIONS), num_particles=64, num_groups=500, resampling=RULES[rule]
        )
        normalizer = np.exp(np.asarray(result.log_normalizer) - exact)
        weights = normalizer[:, None] * np.exp(np.asarray(result.log_weights))
    x = np.asarray(result.particles)
    assert abs(z_score(normalizer, 1)) < 4
    assert abs(z_score((weights * x).mean(axis=1), mean)) < 4
    assert abs(z_score((weights * x**2).mean(axis=1), mean**2 + variance)) < 4


def test_separate_runs_are_as_unbiased_as_groups():
    with jax.enable_x64(True):
        problem = state_space(jnp.float64)
        exact, _, _ = kalman(problem, OBSERVATIONS)

        def log_normalizer(key):
            return smc.run(key, problem, jnp.asarray(OBSERVATIONS), num_particles=64).log_normalizer

        estimates = jax.jit(jax.vmap(log_normalizer))(jax.random.split(KEY, 500))
    assert abs(z_score(np.exp(np.asarray(estimates) - exact), 1)) < 4


def test_more_particles_and_resampling_reach_the_kalman_answer():
    # One long run: with 50,000 particles log Z has a standard deviation of about 0.01, measured over the groups.
    problem = state_space()
    exact, _, _ = kalman(problem, OBSERVATIONS)
    result = smc.run(KEY, problem, jnp.asarray(OBSERVATIONS), num_particles=5000, num_groups=10)
    estimate, error = smc.log_normalizer_with_error(result)
    assert error < 0.02
    assert abs(estimate - exact) < 4 * error


@pytest.mark.parametrize("rule", ["never", "half", "always", "partial", "final"])
def test_bookkeeping_equals_a_float64_python_loop_over_the_saved_increments(rule):
    rule, num = RULES[rule], 16
    steps = jnp.tile(jnp.asarray(OBSERVATIONS), 4)
    result = smc.run(KEY, state_space(), steps, num_particles=num, resampling=rule, save=SAVEABLE)
    info = jax.tree.map(np.asarray, result.info)
    saved = info.saved

    log_weights, eve = np.zeros(num), np.arange(num)  # unnormalised
    for k in range(len(steps)):
        ancestors = saved["ancestors"][k]
        weights = np.exp(log_weights - log_weights.max())
        ess = weights.sum() ** 2 / (weights**2).sum()
        assert info.resampled[k] == (ess < rule.ess_threshold * num)
        if not info.resampled[k]:
            np.testing.assert_array_equal(ancestors, np.arange(num))
        elif rule.partial is None:
            log_weights = np.full(num, np.log(np.mean(weights)) + log_weights.max())
        else:
            order = np.argsort(log_weights)
            half = round(rule.partial * num) // 2
            subset = np.concatenate([order[:half], order[-half:]])
            log_weights[subset] = np.log(np.mean(weights[subset])) + log_weights.max()
        eve = eve[ancestors]
        assert info.unique_ancestors[k] == len(set(eve))
        log_weights = log_weights + saved["log_increments"][k].astype(np.float64)
        log_mean = np.log(np.mean(np.exp(log_weights)))
        np.testing.assert_allclose(saved["log_weights"][k], log_weights - log_mean, atol=2e-5)
        running = np.sum(info.log_normalizer_increments[: k + 1], dtype=np.float64)
        np.testing.assert_allclose(running, log_mean, atol=2e-5)
    np.testing.assert_allclose(result.log_normalizer, log_mean, atol=2e-5)
    if not rule.final:
        np.testing.assert_allclose(result.log_weights, log_weights - log_mean, atol=2e-5)
        np.testing.assert_array_equal(info.eve, eve)
        np.testing.assert_array_equal(result.particles, saved["particles"][-1])


def test_final_resampling_returns_equal_weights_of_the_particles_there_were():
    run = smc.Resampling(ess_threshold=0, final=True)
    before = smc.run(KEY, state_space(), jnp.asarray(OBSERVATIONS), num_particles=50, resampling=NEVER)
    after = smc.run(KEY, state_space(), jnp.asarray(OBSERVATIONS), num_particles=50, resampling=run)
    np.testing.assert_array_equal(after.log_weights, 0)
    np.testing.assert_allclose(after.log_normalizer, before.log_normalizer, rtol=1e-6)
    np.testing.assert_array_equal(after.particles, before.particles[after.info.eve])


def test_final_resampling_is_of_all_particles_also_where_only_some_take_part_before():
    rule = smc.Resampling(ess_threshold=0, partial=0.5, final=True)
    result = smc.run(KEY, state_space(), jnp.asarray(OBSERVATIONS), num_particles=50, resampling=rule)
    np.testing.assert_array_equal(result.log_weights, 0)


def test_a_particle_is_gathered_whole():
    # A cache left behind would not be that of the position it is found with (pitfall 2).
    result = smc.run(KEY, state_space(), jnp.asarray(OBSERVATIONS), num_particles=64, num_groups=3, resampling=ALWAYS)
    np.testing.assert_array_equal(result.info.aux["staleness"], 0)
    offsets = 64 * np.arange(3)[:, None]
    np.testing.assert_array_equal(result.state["name"], np.asarray(result.info.eve) + offsets)
    assert len(set(np.asarray(result.info.eve[0]))) < 64


def test_a_particle_does_not_feel_the_others():
    heights, x = jnp.linspace(0, 1, 20), jnp.linspace(-2, 2, 8)
    own, others = (
        smc.run(KEY, Deterministic(start, jnp.zeros(8)), heights, num_particles=8, resampling=NEVER, save=SAVEABLE)
        for start in (x, x.at[1:].set(7.0))
    )
    np.testing.assert_array_equal(own.info.saved["log_increments"][:, 0], others.info.saved["log_increments"][:, 0])
    # Centring moves digits between the two terms; their sum, of magnitude 10, is rounded a few times.
    unnormalised = [result.log_normalizer + result.log_weights[0] for result in (own, others)]
    np.testing.assert_allclose(*unnormalised, atol=10 * 4 * np.finfo(np.float32).eps)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(8)))
def test_permuting_the_particles_permutes_the_weights(order):
    order = jnp.asarray(order)
    start, start_log_weights, heights = jnp.linspace(-2, 2, 8), jnp.linspace(0, 3, 8), jnp.linspace(0, 1, 20)
    first = smc.run(KEY, Deterministic(start, start_log_weights), heights, num_particles=8, resampling=NEVER)
    problem = Deterministic(start[order], start_log_weights[order])
    second = smc.run(KEY, problem, heights, num_particles=8, resampling=NEVER)
    tolerance = {"rtol": 0, "atol": 20 * np.finfo(np.float32).eps * 10}
    np.testing.assert_allclose(second.log_weights, first.log_weights[order], **tolerance)
    np.testing.assert_allclose(second.log_normalizer, first.log_normalizer, **tolerance)


@pytest.mark.parametrize("rule", [NEVER, ALWAYS, smc.Resampling(partial=0.5)])
def test_a_thousand_float32_steps_keep_a_thousandth_of_a_nat(rule):
    num = 32
    increments = 10 + jax.random.normal(jax.random.key(5), (1000, num)) * jnp.array(0.3)
    result = smc.run(
        KEY, Prescribed(jnp.zeros(num)), increments, num_particles=num, resampling=rule, save=("ancestors",)
    )
    log_weights = np.zeros(num)
    for k, row in enumerate(np.asarray(increments, np.float64)):
        if rule is not NEVER and result.info.resampled[k]:
            if rule.partial is None:
                log_weights[:] = np.log(np.mean(np.exp(log_weights - log_weights.max()))) + log_weights.max()
            else:
                order = np.argsort(log_weights)
                subset = np.concatenate([order[:8], order[-8:]])
                top = log_weights.max()
                log_weights[subset] = np.log(np.mean(np.exp(log_weights[subset] - top))) + top
        log_weights = log_weights + row
    exact = np.log(np.mean(np.exp(log_weights - log_weights.max()))) + log_weights.max()
    assert exact > 9e3
    assert abs(float(result.log_normalizer) - exact) < 1e-3
    # The weights keep their own digits, which are finer than those of a sum of 1e4.
    np.testing.assert_allclose(result.log_weights, log_weights - exact, atol=1e-5)


def test_initial_weights_enter_the_normalizer():
    start = jnp.log(jnp.array([1.0, 2.0, 3.0, 0.0]))
    result = smc.run(KEY, Prescribed(start), jnp.zeros((2, 4)), num_particles=4, resampling=NEVER)
    np.testing.assert_allclose(np.exp(result.log_normalizer), 1.5, rtol=1e-6)
    np.testing.assert_allclose(np.exp(result.log_weights), np.array([1, 2, 3, 0]) / 1.5, rtol=1e-6)


def test_particles_of_zero_weight_are_legal_and_leave_no_descendants():
    start = jnp.where(jnp.arange(64) % 2 == 0, 0.0, -jnp.inf)
    result = smc.run(KEY, Prescribed(start), jnp.zeros((3, 64)), num_particles=64, resampling=ALWAYS)
    assert np.all(np.asarray(result.particles) % 2 == 0)
    np.testing.assert_allclose(result.log_normalizer, np.log(0.5), rtol=1e-6)


def test_groups_are_independent_of_each_other():
    def run(increments):
        return smc.run(
            KEY,
            Prescribed(jnp.zeros(3 * 16)),
            increments,
            num_particles=16,
            num_groups=3,
            resampling=smc.Resampling("multinomial"),
            save=("ancestors",),
        )

    increments = 2 * jax.random.normal(jax.random.key(1), (6, 3 * 16))
    first, second = run(increments), run(increments.at[:, 16:32].multiply(0.05))
    for group, same in enumerate([True, False, True]):
        assert np.array_equal(first.info.resampled[group], second.info.resampled[group]) == same
        assert np.array_equal(first.info.saved["ancestors"][group], second.info.saved["ancestors"][group]) == same
        assert np.array_equal(first.log_normalizer[group], second.log_normalizer[group]) == same
    # The second group is never due in the second run, and keeps its particles while the others draw.
    assert second.info.resampled[0].any()
    assert not second.info.resampled[1].any()
    assert np.all(np.asarray(second.info.saved["ancestors"][1]) == np.arange(16))


def test_a_degenerate_start_is_resampled_before_the_first_step():
    start = jnp.log(jnp.array([1.0, 0.01, 0.01, 0.01]))  # ESS 1.06 of 4
    result = smc.run(KEY, Prescribed(start), jnp.zeros((2, 4)), num_particles=4)
    assert result.info.resampled.tolist() == [True, False]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coin:
    """Two particles with weights 3/4 and 1/4 at every step, and the coin that the step's own key would toss."""

    log_weights: jax.Array

    def init(self, key, num_particles):
        return jnp.zeros(num_particles), jnp.zeros(num_particles)

    def step(self, key, particles, step):
        coin = jax.random.uniform(jax.random.split(key, 2)[0]) >= 0.5
        return particles, jnp.tile(self.log_weights, len(particles) // 2), coin

    def position(self, particles):
        return particles


def test_resampling_and_moving_draw_from_different_keys():
    # The second of two systematic ancestors is particle 1 if and only if the uniform that was drawn is at least 1/2.
    # With one key for both, the step's coin would be that uniform: 256 matches; otherwise 128 +- 8.
    problem = Coin(jnp.log(jnp.array([1.5, 0.5])))
    result = smc.run(
        KEY, problem, jnp.zeros(257), num_particles=2, num_groups=2, resampling=ALWAYS, save=("ancestors",)
    )
    drawn = np.asarray(result.info.saved["ancestors"])[0, 1:, 1] == 1
    assert 0 < drawn.sum() < 256
    matches = (drawn == np.asarray(result.info.aux)[1:]).sum()
    assert abs(matches - 128) < 4 * 8


def test_groups_with_the_same_weights_draw_different_ancestors():
    increments = jnp.tile(jnp.linspace(0, 1, 16), (3, 3))
    result = smc.run(KEY, Prescribed(jnp.zeros(48)), increments, num_particles=16, num_groups=3, resampling=ALWAYS)
    assert len({tuple(row) for row in np.asarray(result.info.eve).tolist()}) == 3


def test_group_axis_comes_first_everywhere():
    steps = jnp.asarray(OBSERVATIONS)
    alone = smc.run(KEY, state_space(), steps, num_particles=5, save=SAVEABLE)
    groups = smc.run(KEY, state_space(), steps, num_particles=5, num_groups=2, save=SAVEABLE)
    without_aux = [result._replace(info=result.info._replace(aux=None)) for result in (alone, groups)]
    shapes = [jax.tree.map(lambda leaf: leaf.shape, result) for result in without_aux]
    expected = jax.tree.map(lambda leaf: (2, *leaf.shape), without_aux[0])
    assert shapes[1] == expected
    assert groups.info.aux["staleness"].shape == (8,)
    assert alone.info.saved["particles"].shape == (8, 5)


def test_one_particle_is_sequential_importance_sampling():
    steps = jnp.asarray(OBSERVATIONS)
    result = smc.run(KEY, state_space(), steps, num_particles=1, resampling=ALWAYS, save=("log_increments",))
    total = np.asarray(result.info.saved["log_increments"], np.float64).sum()
    np.testing.assert_allclose(result.log_normalizer, total, rtol=1e-6)
    np.testing.assert_array_equal(result.info.ess, 1)
    np.testing.assert_array_equal(result.log_weights, 0)
