"""How the loop runs: bars, precision, jit, compilation, memory, gradients."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import OBSERVATIONS, Prescribed, StateSpace, state_space

from rnejax import smc
from rnejax.smc.contract import SAVEABLE
from rnejax.smc.progress import piece_length

KEY = jax.random.key(2024)
NEVER = smc.Resampling(ess_threshold=0)
ALWAYS = smc.Resampling(ess_threshold=1.01)


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


@pytest.mark.parametrize(("num_steps", "length"), [(1, 1), (50, 1), (51, 2), (1000, 20)])
def test_the_bar_moves_about_fifty_times(num_steps, length):
    assert piece_length(num_steps) == length
