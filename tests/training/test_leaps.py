"""Posteriors that differ from the prior above a time only: noised paths may leap over what is below."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.networks import UNet, functional
from rnejax.processes import AnyOrder, Cosine
from rnejax.training import FineTuned, trajectory_balance_loss, trajectory_balance_residual
from rnejax.training.paths import make_walk, path_log_ratio

KEY = jax.random.key(5)
PROCESS = Cosine(t_min=0.01, t_max=1.0)
TIMES = rj.time_grid(PROCESS, 8, "uniform")
ABOVE = float(TIMES[4])
X = jnp.asarray([[0.3, 1.0], [1.0, -0.5]])


def log_reward(x):
    return 0.7 * x[0]


def gated(params, x, t, condition):
    """Two numbers that count above a time only."""
    return jnp.where(t > ABOVE, jnp.tanh(x * params["a"] + params["b"]), jnp.tanh(0.3 * x))


PRIOR = rj.DiffusionModel(PROCESS, lambda x, t: jnp.tanh(0.3 * x), "x0", shape=(2,))
POSTERIOR = rj.DiffusionModel(
    PROCESS, gated, "x0", shape=(2,), params={"a": jnp.asarray(0.8), "b": jnp.asarray([0.4, -0.2])}
)


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("chosen", [None, 2])
def test_leaps_change_no_law_of_ratios_and_gradients(averaged, chosen):
    def found(key, above):
        walk = make_walk(key, POSTERIOR, PRIOR, TIMES, 1, X, 1.0, chosen, averaged=averaged, above=above)
        ratios, pull = jax.vjp(lambda params: path_log_ratio(params, walk)[1], POSTERIOR.params)
        gradient = pull(jnp.asarray([0.7, -1.3]))[0]
        return jnp.concatenate([ratios, flat(gradient)]), jnp.concatenate([ratios, flat(gradient)]) ** 2

    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 4000)
        moments = []
        for above in (None, ABOVE):
            first, second = jax.jit(jax.vmap(partial(found, above=above)))(keys)
            moments += [(np.asarray(each).mean(0), np.asarray(each).var(0) / len(keys)) for each in (first, second)]
    for (one, error), (other, other_error) in zip(moments[:2], moments[2:], strict=True):
        if chosen is not None and one is moments[1][0]:
            continue  # of fewer steps to choose from, the same number says more: less variance
        z = (one - other) / np.sqrt(error + other_error)
        assert np.abs(z).max() < 4.5, z
    assert np.abs(moments[0][0]).min() > 1e-3


def test_of_generated_paths_steps_are_chosen_where_models_differ():
    """Fewer of them count for all that have a gradient, and their mean is that of all steps."""

    def gradient(key, chosen, above):
        walk = make_walk(key, POSTERIOR, PRIOR, TIMES, 2, None, 1.5, chosen, above=above)
        # Away from the posterior's own kernels the mean is not zero.
        _, pull = jax.vjp(lambda params: path_log_ratio(params, walk)[1], POSTERIOR.params)
        return flat(pull(1.0 + walk.start[:, 0])[0])

    with jax.enable_x64(True):
        walk = make_walk(KEY, POSTERIOR, PRIOR, TIMES, 2, None, 1.5, 3, above=ABOVE)
        assert int(walk.chosen.max()) < 4, "the first of the path, which are those of the largest times"
        keys = jax.random.split(KEY, 6000)
        every, some = (
            np.asarray(jax.jit(jax.vmap(partial(gradient, chosen=chosen, above=above)))(keys))
            for chosen, above in ((None, None), (3, ABOVE))
        )
    error = np.sqrt((every.var(axis=0) + some.var(axis=0)) / len(keys))
    assert np.abs((every.mean(axis=0) - some.mean(axis=0)) / error).max() < 4.5
    # A step that counted twice as much would show in the spread, if not in the mean.
    np.testing.assert_allclose(some.std(axis=0), every.std(axis=0) * np.sqrt(4 / 3), rtol=0.1)


def test_a_leap_ends_where_models_begin_to_differ():
    walk = make_walk(KEY, POSTERIOR, PRIOR, TIMES, 1, X, 1.0, None, above=ABOVE)
    assert len(jax.tree.leaves(walk.steps)[0]) == 4
    between = 0.5 * (TIMES[3] + TIMES[4])  # models differ at TIMES[4], where the step from TIMES[3] asks them
    walk = make_walk(KEY, POSTERIOR, PRIOR, TIMES, 1, X, 1.0, None, above=between)
    assert len(jax.tree.leaves(walk.steps)[0]) == 5
    nothing = make_walk(KEY, POSTERIOR, PRIOR, TIMES, 1, X, 1.0, None, above=0.0)
    assert len(jax.tree.leaves(nothing.steps)[0]) == 8
    np.testing.assert_array_equal(nothing.start, nothing.origin)


def test_the_reward_is_that_of_the_data():
    paths = trajectory_balance_residual(KEY, POSTERIOR, PRIOR, TIMES, log_reward, x=X, above=ABOVE)
    np.testing.assert_allclose(paths.x, X, rtol=1e-6)
    np.testing.assert_allclose(paths.log_reward, 0.7 * X[:, 0], rtol=1e-6)
    loss = trajectory_balance_loss(POSTERIOR, PRIOR, TIMES, log_reward, sources={"noised": 1.0}, above=ABOVE)
    _, report = loss(KEY, FineTuned(POSTERIOR.params, jnp.zeros(())), X)
    np.testing.assert_allclose(report["log_reward"], 0.7 * X[:, 0].mean(), rtol=1e-6)


def test_tokens_leap_as_well():
    process = AnyOrder(3, 4)
    times = rj.time_grid(process, 4, t_max=4.0)
    model = rj.DiffusionModel(process, lambda w, x, t, c: jnp.zeros((4, 3)) + w, params=jnp.zeros(()))
    x = jnp.asarray([[0, 1, 2, 0]] * 50)
    walk = make_walk(KEY, model, model, times, 1, x, 1.0, None, above=2.0)
    masked = np.asarray(walk.start) == 3
    np.testing.assert_array_equal(masked.sum(axis=1), 2)
    assert np.all(masked.any(axis=0))
    np.testing.assert_array_equal(walk.origin, x)


@pytest.mark.parametrize("above", [1.0, 2.0, float("nan")])
def test_a_time_above_which_there_is_nothing_is_refused(above):
    with pytest.raises(ValueError, match="above must be"):
        trajectory_balance_residual(KEY, POSTERIOR, PRIOR, TIMES, log_reward, x=X, above=above)


def test_classes_of_a_network_count_above_a_time_only():
    from flax import nnx

    arguments = {"image_shape": (8, 8, 1), "num_classes": 3, "channels": (8, 8), "embedding": 16, "wavelengths": ()}
    plain, params = functional(UNet(**arguments, rngs=nnx.Rngs(0)))
    late, same = functional(UNet(**arguments, classes_above=0.4, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(params) == jax.tree.structure(same)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    times, label, none = jnp.asarray([0.4, 0.41]), jnp.asarray([1, 1]), jnp.asarray([3, 3])
    found = late(params, x, times, label)
    np.testing.assert_allclose(found[0], plain(params, x, times, none)[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], plain(params, x, times, label)[1], rtol=1e-6)
    assert np.abs(found[1] - plain(params, x, times, none)[1]).max() > 1e-4
