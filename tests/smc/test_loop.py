"""The loop over time: exact answers on problems with memory, bookkeeping, groups, faults, bad input."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_space import OBSERVATIONS, Deterministic, Prescribed, StateSpace, kalman, state_space

from rnejax import smc
from rnejax.smc.contract import SAVEABLE
from rnejax.smc.progress import piece_length

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
            KEY, Prescribed(jnp.zeros(3 * 16)), increments, num_particles=16, num_groups=3, save=("ancestors",)
        )

    increments = 2 * jax.random.normal(jax.random.key(1), (6, 3 * 16))
    first, second = run(increments), run(increments.at[:, 16:32].set(0.0))
    for group, same in enumerate([True, False, True]):
        assert np.array_equal(first.info.resampled[group], second.info.resampled[group]) == same
        assert np.array_equal(first.info.saved["ancestors"][group], second.info.saved["ancestors"][group]) == same
        assert np.array_equal(first.log_normalizer[group], second.log_normalizer[group]) == same


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


def test_a_bar_changes_nothing_but_the_bar(capsys):
    # 121 steps are pieces of three, the last of which has one step and two that do nothing.
    def run(key, progress):
        return smc.run(key, state_space(), jnp.sin(jnp.arange(121)), num_particles=16, progress=progress, save=SAVEABLE)

    with_bar, without = run(KEY, True), jax.jit(lambda key: run(key, True))(KEY)
    # The two programs are compiled differently, and a float32 chain of 121 steps forgets their rounding errors.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), with_bar, without)
    assert capsys.readouterr().err.count("121/121") == 1


def test_there_is_no_bar_where_there_is_no_terminal(capsys):
    smc.run(KEY, state_space(), jnp.asarray(OBSERVATIONS), num_particles=4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_nothing_is_promoted_implicitly(scheme):
    # In 64-bit mode as well: float32 particles and weights stay float32.
    rule = smc.Resampling(scheme=scheme, ess_threshold=1.01, partial=0.5, final=True)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        result = smc.run(
            KEY,
            Prescribed(jnp.zeros(32, jnp.float32)),
            jnp.zeros((3, 32), jnp.float32),
            num_particles=16,
            num_groups=2,
            resampling=rule,
            save=SAVEABLE,
        )
        smc.log_normalizer_with_error(result)
    assert result.log_weights.dtype == result.log_normalizer.dtype == result.info.ess.dtype == jnp.float32


def test_jit_equals_no_jit():
    def run(key):
        return smc.run(key, state_space(), jnp.asarray(OBSERVATIONS[:2]), num_particles=4, resampling=ALWAYS)

    with jax.disable_jit():
        eager = run(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), eager, jax.jit(run)(KEY))


TRACES = []


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traced(StateSpace):
    """Notes each time that Python runs its step."""

    def step(self, key, particles, observation):
        TRACES.append(None)
        return super().step(key, particles, observation)


@pytest.mark.parametrize(("progress", "num_steps"), [(False, 120), (True, 120), (True, 121)])
def test_another_problem_of_the_same_shape_compiles_nothing(progress, num_steps):
    TRACES.clear()
    problem = Traced(jnp.float32(0.5), jnp.float32(0.3), jnp.float32(1.0))
    for memory in (0.5, 0.6):
        steps = memory * jnp.ones(num_steps)
        smc.run(
            jax.random.key(int(10 * memory)),
            replace(problem, memory=jnp.float32(memory)),
            steps,
            num_particles=7,
            progress=progress,
        )
    assert len(TRACES) == 1


def test_memory_does_not_grow_with_the_number_of_steps():
    def temporary_bytes(num_steps):
        run = jax.jit(lambda key, steps: smc.run(key, state_space(), steps, num_particles=20_000))
        return run.lower(KEY, jnp.zeros(num_steps)).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2000) <= 1.05 * temporary_bytes(200)


def test_gradients_pass_through_the_loop():
    # d log Z / d c with every increment shifted by c is the number of steps.
    def log_normalizer(shift):
        increments = shift + jnp.sin(jnp.arange(5 * 8.0)).reshape(5, 8)
        return smc.run(KEY, Prescribed(jnp.zeros(8)), increments, num_particles=8, resampling=NEVER).log_normalizer

    np.testing.assert_allclose(jax.grad(log_normalizer)(0.3), 5, rtol=1e-5)


def faulty(value, num_particles, step=3):
    """Four groups of eight; in the third, ``num_particles`` get ``value`` at ``step``."""
    return jnp.zeros((6, 32)).at[step, 16 : 16 + num_particles].set(value)


FAULTS = [
    (jnp.nan, 2, smc.FaultCode.NAN, "2 of 8 particles in group 2 .* became NaN at step 3 of 6"),
    (jnp.inf, 1, smc.FaultCode.PLUS_INFINITY, r"1 of 8 particles in group 2 .* became \+inf at step 3 of 6"),
    (-jnp.inf, 8, smc.FaultCode.NO_WEIGHT, "8 of 8 particles in group 2 .* no particle is left at step 3 of 6"),
]


@pytest.mark.parametrize(("value", "num", "code", "message"), FAULTS)
def test_a_fault_is_raised_with_the_step_and_what_to_look_at(value, num, code, message):
    with pytest.raises(smc.SMCError, match=message) as error:
        smc.run(KEY, Prescribed(jnp.zeros(32)), faulty(value, num), num_particles=8, num_groups=4)
    fault = error.value.result.info.fault
    np.testing.assert_array_equal(fault.code, [0, 0, code, 0])
    np.testing.assert_array_equal(fault.step, [-1, -1, 3, -1])
    np.testing.assert_array_equal(fault.num_particles, [0, 0, num, 0])


@pytest.mark.parametrize(("value", "num", "code", "message"), FAULTS)
def test_a_fault_under_jit_is_recorded_and_leaves_other_groups_alone(value, num, code, message):
    @jax.jit
    def run(increments):
        return smc.run(
            KEY,
            Prescribed(jnp.zeros(32)),
            increments,
            num_particles=8,
            num_groups=4,
            resampling=smc.Resampling(every=1),
        )

    bad, good = run(faulty(value, num)), run(jnp.zeros((6, 32)))
    np.testing.assert_array_equal(bad.info.fault.code, [0, 0, code, 0])
    np.testing.assert_array_equal(jnp.isfinite(bad.log_normalizer), [True, True, False, True])
    assert not jnp.any(bad.info.resampled[2, 4:])
    healthy = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(bad.log_normalizer[healthy], good.log_normalizer[healthy])
    np.testing.assert_array_equal(bad.particles[healthy], good.particles[healthy])


def test_a_fault_can_be_described_and_unchecked():
    problem, steps = Prescribed(jnp.zeros(32)), faulty(jnp.nan, 1)
    with pytest.raises(smc.SMCError, match=re.escape("step 3 of 6 (t = 0.4)")):
        smc.run(KEY, problem, steps, num_particles=32, describe=lambda step: f"t = {1 - 0.2 * step:.1f}")
    result = smc.run(KEY, problem, steps, num_particles=32, check=False)
    assert result.info.fault.step == 3


def test_the_first_fault_is_the_one_that_is_told():
    steps = faulty(jnp.nan, 1, step=1).at[4].set(jnp.inf)
    result = smc.run(KEY, Prescribed(jnp.zeros(32)), steps, num_particles=32, check=False)
    assert (result.info.fault.step, result.info.fault.code) == (1, smc.FaultCode.NAN)


def test_initial_weights_at_fault():
    with pytest.raises(smc.SMCError, match=r"4 of 4 particles .* before the first step"):
        smc.run(KEY, Prescribed(jnp.full(4, -jnp.inf)), jnp.zeros((2, 4)), num_particles=4)


def test_a_run_with_a_bar_stops_at_the_piece_that_went_wrong():
    steps = jnp.zeros((200, 4)).at[100].set(jnp.nan)
    with pytest.raises(smc.SMCError, match="at step 100 of 200") as error:
        smc.run(KEY, Prescribed(jnp.zeros(4)), steps, num_particles=4, progress=True)
    assert error.value.result.info.ess.shape == (104,)


def test_an_interrupted_run_says_what_was_finished(monkeypatch):
    finished = []

    def advance(bar, steps):
        finished.append(steps)
        if len(finished) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", advance)
    with pytest.raises(KeyboardInterrupt, match="12 of 200 steps were finished"):
        smc.run(KEY, Prescribed(jnp.zeros(4)), jnp.zeros((200, 4)), num_particles=4, progress=True)


def test_one_particle_is_sequential_importance_sampling():
    steps = jnp.asarray(OBSERVATIONS)
    result = smc.run(KEY, state_space(), steps, num_particles=1, resampling=ALWAYS, save=("log_increments",))
    total = np.asarray(result.info.saved["log_increments"], np.float64).sum()
    np.testing.assert_allclose(result.log_normalizer, total, rtol=1e-6)
    np.testing.assert_array_equal(result.info.ess, 1)
    np.testing.assert_array_equal(result.log_weights, 0)


@dataclass(frozen=True)
class Unregistered:
    pass


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles must be at least 1, got 0"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"save": ("weights",)}, ValueError, "save may name ancestors, .*; got 'weights'"),
        ({"steps": jnp.zeros((0, 4))}, ValueError, "number of steps, of at least 1"),
        ({"steps": (jnp.zeros((3, 4)), jnp.zeros((2, 4)))}, ValueError, "one common leading axis"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "typed key"),
        ({"problem": Unregistered()}, TypeError, "register Unregistered with jax.tree_util.register_dataclass"),
        (
            {"problem": Prescribed(jnp.zeros(5))},
            ValueError,
            r"log-weights of shape \(4,\), one per particle; got \(5,\)",
        ),
        ({"problem": Prescribed(jnp.zeros(4, int))}, TypeError, "log-weights of a floating-point dtype, got int32"),
        ({"steps": jnp.zeros((3, 2))}, ValueError, r"problem.step must return log-increments of shape \(4,\)"),
        ({"problem": Deterministic(jnp.zeros(()), jnp.zeros(4))}, ValueError, "must have the leading axis 4"),
        ({"problem": Deterministic(jnp.zeros(3), jnp.zeros(4))}, ValueError, r"returned particles of shape \(3,\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"key": KEY, "problem": Prescribed(jnp.zeros(4)), "steps": jnp.zeros((3, 4)), "num_particles": 4}
    arguments |= changes
    with pytest.raises(error, match=message):
        smc.run(**arguments)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reshaping(Prescribed):
    """Changes its particles' dtype or structure on the way."""

    def step(self, key, particles, log_increments):
        return {"x": particles} if log_increments.dtype == jnp.float16 else particles * 0.5, log_increments, None


@pytest.mark.parametrize(
    ("dtype", "message"), [(jnp.float32, r"went from int32\[4\] to float32\[4\]"), (jnp.float16, "structure")]
)
def test_particles_must_keep_their_layout(dtype, message):
    with pytest.raises(ValueError, match=message):
        smc.run(KEY, Reshaping(jnp.zeros(4)), jnp.zeros((3, 4), dtype), num_particles=4)


@pytest.mark.parametrize(("num_steps", "length"), [(1, 1), (50, 1), (51, 2), (1000, 20)])
def test_the_bar_moves_about_fifty_times(num_steps, length):
    assert piece_length(num_steps) == length
