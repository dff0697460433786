"""Log-densities of tokens, against sums over all sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems.token_law import TokenLaw

KEY = jax.random.key(0)
WORLD = TokenLaw.random(0, 4, 4)
X = WORLD.sequences


def test_one_token_per_step_the_density_is_exact_on_every_path():
    """Generated or given: 1e-5 nats, for the order of the tokens says nothing about their law."""
    model = WORLD.one_by_one()
    times = rj.time_grid(model.process, 4)
    samples = rj.sample(KEY, model, times, 2000, progress=False)
    np.testing.assert_allclose(samples.log_density, WORLD.log_prob(samples.x), atol=1e-5)
    density = rj.log_density(KEY, model, X, times, num_paths=3, progress=False)
    np.testing.assert_allclose(density.per_path, np.repeat(WORLD.log_probs[:, None], 3, axis=1), atol=1e-5)
    np.testing.assert_allclose(density.log_density, WORLD.log_probs, atol=1e-5)
    assert WORLD.total_variation(WORLD.log_probs, samples.x) < 0.5 * np.sqrt(256 / 2000)


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_with_more_steps_the_density_on_a_path_and_the_law_of_samples_come_closer(family):
    """In mean square like 1/n, so that four times the steps leave a quarter, up to a factor of 1.7."""
    model = getattr(WORLD, family)()
    end = WORLD if family == "masked" else WORLD.marginal(0.99)
    errors = []
    for num_steps in (32, 128):
        samples = rj.sample(KEY, model, rj.time_grid(model.process, num_steps), 4000, progress=False)
        errors.append(np.mean((np.asarray(samples.log_density) - end.log_prob(samples.x)) ** 2))
    assert 4 / 1.7 < errors[0] / errors[1] < 4 * 1.7


def test_given_points_have_the_density_of_the_generated_law_without_bias():
    """exp of it, averaged over noisings, is the law that five steps generate: |z| < 4.5 for every sequence."""
    world = TokenLaw.random(1, 3, 3)
    model = world.masked()
    times = rj.time_grid(model.process, 5)
    num, draws = 2000, 50_000
    density = rj.log_density(KEY, model, world.sequences, times, num_paths=num, progress=False)
    samples = rj.sample(jax.random.key(1), model, times, draws, progress=False)
    counts = np.bincount(world.index(samples.x), minlength=27) / draws
    found = np.exp(np.asarray(density.per_path, np.float64))
    error = np.hypot(found.std(axis=1) / np.sqrt(num), np.sqrt(counts * (1 - counts) / draws))
    z = (found.mean(axis=1) - counts) / error
    assert np.all(np.abs(z) < 4.5)
    assert np.abs(counts - np.exp(world.log_probs)).max() > 10 * error.max()  # and is not the law of the data
    spread = np.sqrt((found.std(axis=1) ** 2).sum() / num)
    assert found.mean(axis=1).sum() == pytest.approx(1, abs=4 * spread)


def test_the_density_of_partly_masked_states_is_that_of_the_noised_law():
    """A grid may end before everything is revealed: then MASK is part of the state, and of its law."""
    model = WORLD.one_by_one()
    times = np.arange(2.0, 5.0)  # two tokens stay masked
    samples = rj.sample(KEY, model, times, 500, progress=False)
    x = np.asarray(samples.x)
    assert np.all((x == 4).sum(axis=1) == 2)
    fits = np.all((x[:, None] == 4) | (x[:, None] == X[None]), axis=2)
    exact = np.log(fits @ np.exp(WORLD.log_probs)) - np.log(6)  # six pairs of positions
    np.testing.assert_allclose(samples.log_density, exact, atol=1e-5)


def test_sequences_that_a_model_excludes_have_log_density_minus_infinity():
    some = np.where(X[:, 1] != 2, WORLD.log_probs, -np.inf)
    world = TokenLaw(4, 4, some - np.logaddexp.reduce(some))

    def fn(x, t):  # an answer for states that are impossible, too
        logits = world.conditional(x)
        return jnp.where(jnp.any(logits > -jnp.inf, axis=1, keepdims=True), logits, 0.0)

    model = rj.DiffusionModel(rj.processes.AnyOrder(4, 4), fn)
    density = rj.log_density(KEY, model, X, rj.time_grid(model.process, 4), num_paths=2, progress=False)
    np.testing.assert_array_equal(np.asarray(density.log_density) == -np.inf, X[:, 1] == 2)
    np.testing.assert_allclose(
        density.log_density[X[:, 1] != 2], some[X[:, 1] != 2] - np.logaddexp.reduce(some), atol=1e-5
    )


def test_increments_are_those_of_the_density():
    model = WORLD.one_by_one()
    x_t = jnp.asarray([4, 1, 4, 0])
    found = rj.increment(model, x_t.at[0].set(3), x_t, 1.0, 2.0)
    fits = [np.all((np.asarray(x) == 4) | (np.asarray(x) == X), axis=1) for x in (x_t.at[0].set(3), x_t)]
    masses = [np.log(np.exp(WORLD.log_probs)[each].sum()) for each in fits]
    assert float(found) == pytest.approx(masses[0] - np.log(4) - masses[1] + np.log(6), abs=1e-5)
