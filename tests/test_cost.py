"""What a run costs: network evaluations as they happen, and memory as it is planned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import VariancePreserving

KEY = jax.random.key(41)
PROCESS = VariancePreserving(data_std=0.5)
TIMES = rj.time_grid(PROCESS, 6)
X = jnp.zeros((2, 3))


def counted(covariance="reference"):
    """A model whose network reports each batch that it really evaluates."""
    batches = []

    def fn(x, t):
        jax.debug.callback(lambda x: batches.append(len(x)), x)
        return 0.25 * PROCESS.alpha(t)[:, None] / (0.25 + 0.75 * PROCESS.sigma(t)[:, None] ** 2) * x

    return rj.DiffusionModel(PROCESS, fn, "x0", covariance, shape=(3,), batched=True), batches


def run(task, model):
    """Each task with 8 particles in all."""
    never = {"ess_threshold": 0.0, "warn": False}
    return {
        "sample": lambda: rj.sample(KEY, model, TIMES, 8),
        "log_density": lambda: rj.log_density(KEY, model, X, TIMES, num_paths=4),
        "guide": lambda: rj.steer(KEY, rj.guide(model, model, scale=2.0), TIMES, 8, **never),
        "temper": lambda: rj.steer(KEY, rj.temper(model, 2.0), TIMES, 8, **never),
        "tilt": lambda: rj.steer(KEY, rj.tilt(model, lambda x: -jnp.sum(x**2)), TIMES, 8, **never),
    }[task]()


@pytest.mark.parametrize(
    ("task", "evaluations"),
    [
        ("sample", 6),
        ("log_density", 6),
        ("guide", 2 * 6),  # two models; exponents that sum to 1 need nothing at the end
        ("temper", 6 + 1),  # the auxiliary kernel looks at the last state
        ("tilt", 6),
    ],
)
def test_one_network_evaluation_per_model_particle_and_step(task, evaluations):
    model, batches = counted()
    run(task, model)
    jax.effects_barrier()
    assert batches == [8] * evaluations


@pytest.mark.parametrize("task", ["sample", "log_density"])
def test_memory_does_not_grow_with_the_number_of_steps(task):
    model = rj.DiffusionModel(PROCESS, lambda x, t: 0.5 * x, "x0", shape=(256,))

    def peak(num_steps):
        times = rj.time_grid(PROCESS, num_steps)

        def final(key, x):
            if task == "sample":
                return rj.sample(key, model, times, 1024).x
            return rj.log_density(key, model, x, times, num_paths=64).log_density

        memory = jax.jit(final).lower(KEY, jnp.zeros((16, 256))).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes

    few, many = peak(200), peak(2000)
    assert few > 1024 * 256 * 4  # the particles are counted at all
    np.testing.assert_allclose(many, few, rtol=0.05)
