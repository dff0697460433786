"""Gradients that are averaged over the draw of each step, given where the path ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import AnyOrder, Cosine, Masked
from rnejax.systems import GaussianMixture
from rnejax.training import Examples, FineTuned, trajectory_balance_loss, trajectory_balance_residual
from rnejax.training.fine_tuning import SOURCES
from rnejax.training.paths import _averaged, make_walk, path_log_ratio

KEY = jax.random.key(8)
D = 40


def network(process, weight):
    """A denoiser with one number to learn for every place."""

    def fn(params, x, t, condition):
        return 0.3 * jnp.tanh(x) + params

    return rj.DiffusionModel(process, fn, "x0", shape=(D,), params=weight)


def test_own_samples_noised_again_are_paths_of_their_own_kind():
    """The reward is that of the model's own samples, under each path's condition, whatever the batch holds."""
    process = Cosine(t_min=0.01, t_max=1.0)
    times = rj.time_grid(process, 6)
    fn = lambda shift, x, t, condition: shift + condition + 0 * x  # noqa: E731
    model = rj.DiffusionModel(process, fn, "x0", shape=(2,), params=jnp.zeros(2), condition=jnp.zeros(()))
    conditions = jnp.asarray([0.0, 40.0, -40.0, 80.0])
    seen = []

    def log_reward(x, condition):
        jax.debug.callback(lambda x, c: seen.append((float(x), float(c))), x[0], condition)
        return x[0]

    loss = trajectory_balance_loss(model, model, times, log_reward, sources={"renoised": 1.0}, averaged=True)
    examples = Examples(jnp.full((4, 2), 1e6), conditions, conditions)
    loss(KEY, FineTuned(model.params, jnp.zeros(())), examples)
    jax.effects_barrier()
    assert len(seen) == 4
    for x, condition in seen:
        assert abs(x - condition) < 2.0  # samples are where the condition says


def test_no_gradient_passes_through_own_samples():
    process = Cosine(t_min=0.01, t_max=1.0)
    prior, times = network(process, jnp.zeros(D)), rj.time_grid(process, 6)
    posterior = network(process, jnp.full(D, 0.1))
    loss = trajectory_balance_loss(posterior, prior, times, lambda x: x[0], sources={"renoised": 1.0}, averaged=True)
    batch = jnp.zeros((4, D))
    found = jax.grad(lambda w: jnp.mean(loss(KEY, FineTuned(w, jnp.zeros(())), batch)[0]))(posterior.params)

    # The same paths with their data given.
    key, own = jax.random.split(jax.random.split(KEY, len(SOURCES))[SOURCES.index("renoised")])
    x = rj.sample(own, posterior, times, 4, progress=False).x

    def given(weights):
        paths = trajectory_balance_residual(
            key, posterior.with_params(weights), prior, times, lambda x: x[0], x=x, averaged=True
        )
        return 0.5 * jnp.mean(paths.residual**2)

    np.testing.assert_allclose(found, jax.grad(given)(posterior.params), rtol=1e-4, atol=1e-5)


def test_averaged_gradients_are_those_of_the_loss_at_the_prior_and_not_in_between():
    """There residuals know nothing of the draws; elsewhere what both owe to the same draw is left out."""
    mixture = GaussianMixture([[0.0]], 1.0)
    process = Cosine(t_max=1.0, data_std=mixture.std)
    prior, times = mixture.model(process, "x0", "diagonal"), rj.time_grid(process, 8, kind="uniform")

    def fn(shift, x, t, condition):
        return prior.denoise(x, t) + shift

    posterior = rj.DiffusionModel(process, fn, "x0", "diagonal", shape=(1,), params=jnp.zeros(1))
    x = 1.0 + jax.random.normal(jax.random.key(1), (20_000, 1))  # of the posterior under r = e^x, whose log Z is 1/2

    @partial(jax.jit, static_argnums=2)
    def gradient(key, shift, averaged):
        def squared(shift):
            model = posterior.with_params(shift)
            options = {"x": x, "averaged": averaged}
            paths = trajectory_balance_residual(key, model, prior, times, lambda x: x[0], 0.5, **options)
            return 0.5 * jnp.mean(paths.residual**2)

        return jax.grad(squared)(jnp.full(1, shift))[0]

    keys = jax.random.split(KEY, 8)
    scores = []
    for shift in (0.0, 0.3):
        plain, averaged = (np.array([gradient(key, shift, each) for key in keys]) for each in (False, True))
        error = np.sqrt((plain.var(ddof=1) + averaged.var(ddof=1)) / len(keys))
        scores.append(abs(plain.mean() - averaged.mean()) / error)
    assert scores[0] < 5 < 15 < scores[1]


# ------------------------------------------------------------------------------------------------ tokens, one by one


TOKENS = AnyOrder(3, 4)
TOKEN_TIMES = rj.time_grid(TOKENS, 4)
TABLE = 0.5 * jax.random.normal(jax.random.key(1), (2, 4, 3))


def of_table(table):
    """Logits that depend on how many tokens of a kind are there already."""
    fn = lambda table, x, t, condition: table[0] + table[1] * jnp.sum(x == 0)  # noqa: E731
    return rj.DiffusionModel(TOKENS, fn, params=table)


def test_every_masked_token_may_be_the_next():
    x0 = jnp.asarray([[0, 1, 2, 0], [2, 2, 1, 0]])
    walk = make_walk(KEY, of_table(TABLE), of_table(TABLE), TOKEN_TIMES, 1, x0, 1.0, None, averaged=True)
    x_t = jnp.asarray([[0, 3, 2, 3], [3, 3, 3, 3]])
    states, weights = _averaged(walk, 0, x_t)
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    found = {tuple(map(int, states[i, 0])): float(weights[i, 0]) for i in range(4) if weights[i, 0] > 0}
    assert found == {(0, 1, 2, 3): 0.5, (0, 3, 2, 0): 0.5}
    found = {tuple(map(int, states[i, 1])): float(weights[i, 1]) for i in range(4) if weights[i, 1] > 0}
    assert found == {(2, 3, 3, 3): 0.25, (3, 2, 3, 3): 0.25, (3, 3, 1, 3): 0.25, (3, 3, 3, 0): 0.25}


@pytest.mark.parametrize("chosen", [None, 2])
def test_the_order_of_tokens_is_averaged_without_a_change_of_the_mean(chosen):
    x0 = jnp.asarray([[0, 1, 2, 0], [2, 0, 1, 0]])
    posterior, prior = of_table(TABLE), of_table(0.0 * TABLE)

    def gradient(key, averaged):
        walk = make_walk(key, posterior, prior, TOKEN_TIMES, 2, x0, 1.0, chosen, averaged=averaged)
        return jax.grad(lambda table: path_log_ratio(table, walk)[1] @ jnp.asarray([0.7, -1.3]))(TABLE)

    keys = jax.random.split(KEY, 3000)
    sides = [np.asarray(jax.jit(jax.vmap(partial(gradient, averaged=each)))(keys)) for each in (False, True)]
    plain, averaged = sides
    error = np.sqrt((plain.var(axis=0) + averaged.var(axis=0)) / len(keys))
    known = error > 1e-6
    z = (plain.mean(axis=0) - averaged.mean(axis=0))[known] / error[known]
    assert np.abs(z).max() < 4.5, z
    if chosen:  # of all steps every token appears once, which is less noise still
        assert averaged.var(axis=0).sum() < 0.9 * plain.var(axis=0).sum()


def test_tokens_of_which_several_appear_at_once_are_refused():
    process = Masked(3, 4)
    model = rj.DiffusionModel(process, lambda w, x, t, c: jnp.zeros((4, 3)) + w, params=jnp.zeros(()))
    x = jnp.zeros((2, 4), int)
    with pytest.raises(ValueError, match="or over which token is next"):
        trajectory_balance_residual(KEY, model, model, rj.time_grid(process, 4), lambda x: 0.0, x=x, averaged=True)
