"""Replay buffers: chains that come to follow the posterior, under the condition of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnejax as rj
from rnejax.processes import AnyOrder, Cosine
from rnejax.systems import GaussianMixture, TokenLaw
from rnejax.training import Examples, FineTuned, ReplayBuffer, fit, trajectory_balance_loss

KEY = jax.random.key(2)
LAW = TokenLaw.random(3, 2, 3)
REWARDS = 0.7 * np.random.default_rng(4).normal(size=(2, 8))
TOKENS = AnyOrder(2, 3)
TIMES = rj.time_grid(TOKENS, 3, t_max=3.0)


def code(x):
    return x @ jnp.asarray([4, 2, 1])


def tuned_model():
    """A table that is not the posterior, and not the prior either."""
    return rj.DiffusionModel(
        TOKENS,
        lambda params, x, t, condition: LAW.conditional(x, t) + params,
        params=0.3 * jnp.ones((3, 2)).at[:, 1].set(0),
    )


def shares(x):
    return np.bincount(np.asarray(jax.vmap(code)(x)), minlength=8) / len(x)


@pytest.mark.parametrize("conditional", [False, True])
def test_rows_come_to_have_the_law_of_the_posterior(conditional):
    size = 20_000
    posterior = tuned_model()
    label = jnp.arange(size) % 2
    rewards = jnp.asarray(REWARDS)
    if conditional:
        fn = posterior.fn
        posterior = rj.DiffusionModel(
            TOKENS, lambda params, x, t, label: fn(params, x, t, None), params=posterior.params, condition=jnp.int32(0)
        )
        buffer = ReplayBuffer(posterior, LAW.one_by_one(), TIMES, lambda x, label: rewards[label, code(x)])
        examples = buffer.start(KEY, size, condition=label)
    else:
        buffer = ReplayBuffer(posterior, LAW.one_by_one(), TIMES, lambda x: rewards[0, code(x)])
        examples = buffer.start(KEY, size)
    tuned = FineTuned(posterior.params, jnp.zeros(()))
    before = examples
    for i in range(40):
        examples = buffer.renew(jax.random.fold_in(KEY, i), tuned, examples)
    for each in (0, 1) if conditional else (0,):
        rows = np.asarray(label) == each if conditional else np.ones(size, bool)
        expected = np.exp(LAW.log_probs + REWARDS[each])
        expected /= expected.sum()
        error = np.sqrt(expected * (1 - expected) / rows.sum())
        assert np.all(np.abs(shares(examples.x[rows]) - expected) < 4 * error)
        assert np.abs(shares(before.x[rows]) - expected).max() > 10 * error.max(), "it must have had a way to go"
    if conditional:
        np.testing.assert_array_equal(examples.condition, label)


def test_a_row_is_kept_until_a_better_one_comes():
    buffer = ReplayBuffer(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.zeros(()))
    examples = buffer.start(KEY, 50)
    tuned = FineTuned(tuned_model().params, jnp.zeros(()))
    precious = examples._replace(log_weights=jnp.full(50, 100.0))
    kept = buffer.renew(KEY, tuned, precious)
    np.testing.assert_array_equal(kept.x, examples.x)
    np.testing.assert_array_equal(kept.log_weights, precious.log_weights)
    worthless = examples._replace(log_weights=jnp.full(50, -jnp.inf))
    renewed = buffer.renew(KEY, tuned, worthless)
    assert np.all(np.isfinite(renewed.log_weights))
    assert np.any(np.asarray(renewed.x) != np.asarray(examples.x))


def test_what_has_no_reward_is_replaced_by_what_has():
    buffer = ReplayBuffer(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.where(code(x) > 3, 0.0, -jnp.inf))
    examples = buffer.start(KEY, 200)
    tuned = FineTuned(tuned_model().params, jnp.zeros(()))
    for i in range(200):
        examples = buffer.renew(jax.random.fold_in(KEY, i), tuned, examples)
    assert np.all(np.asarray(jax.vmap(code)(examples.x)) > 3)


def test_it_is_what_fit_renews(tmp_path):
    """Off-policy paths alone, of a buffer that starts at the prior; a run that is stopped goes on from its rows."""
    mixture = GaussianMixture([[-1.0], [1.0]], 0.3)
    process = Cosine(t_min=0.01, t_max=1.0)
    times = rj.time_grid(process, 8)
    prior = mixture.model(process, "x0")

    def log_reward(x):
        return 2.0 * x[0]

    def fn(weights, x, t, condition):
        return prior.denoise(x, t) + weights["shift"] + 0.1 * weights["slope"] * x

    weights = {"shift": jnp.zeros(1), "slope": jnp.zeros(())}
    posterior = rj.DiffusionModel(process, fn, "x0", shape=(1,), params=weights)
    buffer = ReplayBuffer(posterior, prior, times, log_reward)
    loss = trajectory_balance_loss(posterior, prior, times, log_reward, sources={"noised": 1.0}, normalizer="batch")

    def run(num_steps, folder):
        return fit(
            KEY,
            loss,
            FineTuned(weights, jnp.zeros(())),
            buffer.start(jax.random.key(9), 64),
            optax.adam(0.05),
            num_steps=num_steps,
            batch_size=16,
            ema_decay=0.9,
            report_every=10,
            save_every=10,
            folder=folder,
            renew=buffer.renew,
            renew_every=5,
        )

    whole = run(40, tmp_path / "whole")
    run(20, tmp_path / "parts")
    parts = run(40, tmp_path / "parts")
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_array_equal(one, other)
    # 2 x is 0 on average under the prior, and 1.9 under the posterior: the buffer has gone there.
    assert abs(2 * buffer.start(jax.random.key(9), 64).x.mean()) < 1
    assert whole.metrics[-1]["log_reward"] > 1.5


def test_what_cannot_be_a_buffer_is_refused():
    buffer = ReplayBuffer(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.zeros(()))
    with pytest.raises(ValueError, match="size must be at least 1"):
        buffer.start(KEY, 0)
    with pytest.raises(ValueError, match="condition must have one for each of 5 paths"):
        buffer.start(KEY, 5, condition=jnp.zeros(4))
    empty = Examples(jnp.zeros((0, 3), jnp.int32), log_weights=jnp.zeros(0))
    loss = trajectory_balance_loss(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.zeros(()))
    with pytest.raises(ValueError, match="the arrays of data must share a leading axis of examples"):
        fit(KEY, loss, FineTuned(tuned_model().params, 0.0), empty, optax.adam(0.1), num_steps=1, batch_size=1)


def test_a_reward_that_is_no_number_is_told():
    """A row of such a weight would stay for ever."""
    buffer = ReplayBuffer(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.where(code(x) == 3, jnp.nan, 0.0))
    words = "a reward of the replay buffer's new paths is NaN"
    with pytest.raises(FloatingPointError, match=words):
        buffer.start(KEY, 50)
    examples = ReplayBuffer(tuned_model(), LAW.one_by_one(), TIMES, lambda x: jnp.zeros(())).start(KEY, 50)
    with pytest.raises(FloatingPointError, match=words):
        buffer.renew(KEY, FineTuned(tuned_model().params, jnp.zeros(())), examples)
