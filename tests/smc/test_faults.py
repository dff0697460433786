"""Weights that are none, interruptions and arguments that do not fit: what is said, and when."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import Deterministic, Prescribed

from rnejax import smc

KEY = jax.random.key(2024)
NEVER = smc.Resampling(ess_threshold=0)
ALWAYS = smc.Resampling(ess_threshold=1.01)


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
