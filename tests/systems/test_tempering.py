"""Parallel tempering against quadrature, and against laws that are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.kernels import CentreOfMassFree
from rnejax.systems.tempering import convergence, parallel_tempering, quench

KEY = jax.random.key(12)
SETTINGS = {"num_chains": 16, "num_samples": 400, "burn_in": 500, "progress": False}


@dataclasses.dataclass(frozen=True)
class Springs:
    """Three particles in the plane, each pair on a spring: N(0, kT / 3 I) in the four coordinates beside the centre."""

    shape = (3, 2)
    subspace = CentreOfMassFree()

    def energy(self, x):
        return 0.5 * sum(jnp.sum((x[i] - x[j]) ** 2) for i in range(3) for j in range(i))

    def thermal_energy(self, temperature):
        return float(temperature)


def quadrature(system, temperature, f):
    """E f under exp(-energy / T) of a system in the plane."""
    axes = np.linspace(-5, 4, 1200), np.linspace(-4, 5, 1200)
    grid = jnp.asarray(np.stack(np.meshgrid(*axes), -1).reshape(-1, 2))
    energy = np.asarray(jax.vmap(system.energy)(grid), np.float64)
    weights = np.exp(-(energy - energy.min()) / temperature)
    return np.sum(weights * f(np.asarray(grid), energy)) / weights.sum()


@pytest.fixture(scope="module")
def three_wells():
    system = rj.systems.MullerBrown()
    return system, parallel_tempering(KEY, system, [15.0, 30.0, 60.0, 120.0], jnp.asarray([-0.5, 1.4]), **SETTINGS)


def test_populations_and_energies_are_those_of_quadrature(three_wells):
    system, reference = three_wells
    for k, temperature in enumerate(reference.temperatures):
        energy = np.asarray(reference.energy[k], np.float64)
        error = energy.std() / np.sqrt(reference.effective_sample_size[k])
        assert abs(energy.mean() - quadrature(system, temperature, lambda x, u: u)) < 4 * error
        right = np.asarray(reference.x[k, ..., 0] > 0.2, np.float64)  # the well that takes a barrier to find
        error = right.std() / np.sqrt(convergence(right[None])[0][0])
        assert abs(right.mean() - quadrature(system, temperature, lambda x, u: x[:, 0] > 0.2)) < 4 * error


def test_half_of_the_chains_start_quenched_and_half_of_them_hot():
    """Far too short a run to cross a barrier of a hundred kT: the first half is in the well it was quenched to."""
    reference = parallel_tempering(
        KEY, rj.systems.MullerBrown(), [1.0, 5000.0], jnp.asarray([-0.5, 1.4]),
        num_chains=32, num_samples=4, rounds_between=1, burn_in=30, progress=False,
    )  # fmt: skip
    elsewhere = np.linalg.norm(np.asarray(reference.x[0, :, 0]) - [-0.558, 1.442], axis=-1) > 0.5
    assert not elsewhere[:16].any()
    assert elsewhere[16:].sum() >= 4


def test_what_is_told_of_a_good_run_is_good(three_wells):
    _, reference = three_wells
    assert reference.x.shape == (4, 16, 400, 2)
    assert np.all(np.abs(reference.acceptance - 0.8) < 0.1)
    assert np.all(reference.swap_rate > 0.2)
    assert np.all(reference.rhat < 1.05)
    assert np.all(np.abs(reference.halves_z) < 4)


def test_springs_have_the_energy_of_four_degrees_of_freedom_at_every_temperature():
    reference = parallel_tempering(KEY, Springs(), [4.0, 2.0, 1.0], jnp.ones((3, 2)), **SETTINGS)
    energy = np.asarray(reference.energy, np.float64)
    errors = energy.std(axis=(1, 2)) / np.sqrt(reference.effective_sample_size)
    assert np.all(np.abs(energy.mean(axis=(1, 2)) - 2 * reference.temperatures) < 4 * errors)
    np.testing.assert_allclose(reference.x.mean(axis=-2), 0, atol=1e-5)
    # Swaps between Gamma laws of shape 2 whose scales are as 2 to 1: P = E min(1, ratio), by quadrature of both.
    u = np.linspace(1e-3, 80, 2000)
    cold, hot = (u * np.exp(-u / t) for t in (1.0, 2.0))
    joint = np.outer(cold, hot) / (cold.sum() * hot.sum())
    expected = np.sum(joint * np.minimum(1.0, np.exp((1 - 0.5) * (u[:, None] - u[None, :]))))
    assert np.all(np.abs(reference.swap_rate - expected) < 4 * 0.5 / np.sqrt(16 * 400))


def test_moving_some_at_a_time_changes_rounding_only():
    """In double precision, where rounding has no time to grow: 12 configurations, all at once and five at a time."""
    settings = SETTINGS | {"num_chains": 4, "num_samples": 3, "burn_in": 20, "rounds_between": 2}
    with jax.enable_x64(True):
        at_once, in_parts = (
            parallel_tempering(KEY, Springs(), [4.0, 2.0, 1.0], jnp.ones((3, 2)), batch_size=size, **settings)
            for size in (None, 5)
        )
        np.testing.assert_allclose(in_parts.x, at_once.x, atol=1e-9)
    assert np.unique(at_once.energy).size > 20


def test_a_run_that_never_met_is_told():
    # Chains that stay in one of two wells each: their energies tell them apart.
    energy = jax.random.normal(KEY, (1, 8, 200)) + jnp.where(jnp.arange(8) < 4, 0.0, 1.0)[:, None]
    _, rhat, halves_z = convergence(energy)
    assert rhat[0] > 1.1
    assert abs(halves_z[0]) > 10


def test_quenching_ends_in_a_minimum():
    system = rj.systems.LennardJones(13)
    x = quench(system, 1.2 * jax.random.normal(KEY, system.shape))
    assert float(jnp.linalg.norm(jax.grad(system.energy)(x))) < 1e-2
    assert float(system.energy(x)) < -50


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperatures": [1.0, 0.0]}, "temperature must be positive, got 0"),
        ({"temperatures": [1.0, 3.0, 2.0]}, "strictly increasing or decreasing"),
        ({"start": jnp.zeros((12, 3))}, "has shape|one configuration of shape"),
        ({"start": jnp.zeros((13, 3))}, "of finite energy"),
        ({"num_chains": 3}, "must be even"),
        ({"burn_in": 0}, "burn_in must be at least 1"),
        ({"num_samples": 2.5}, "num_samples must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(wrong, words):
    system = rj.systems.LennardJones(13)
    arguments = {"temperatures": [1.0, 2.0], "start": jnp.ones((13, 3)), "num_chains": 4} | wrong
    temperatures, start = arguments.pop("temperatures"), arguments.pop("start")
    with pytest.raises(ValueError, match=words):
        parallel_tempering(KEY, system, temperatures, start, **arguments)
