"""Relative trajectory balance: exact posteriors have no residual, and the gradient is that of the written-out sum."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_forms import Q, U
from flax import nnx

import rnejax as rj
from rnejax.networks import MLP, functional
from rnejax.processes import AnyOrder, Cosine, NonReversible
from rnejax.systems import GaussianMixture, TokenLaw
from rnejax.training import (
    FineTuned,
    Trajectories,
    assess,
    back_and_forth_residual,
    batch_log_normalizer,
    fit,
    trajectory_balance_loss,
    trajectory_balance_residual,
)
from rnejax.training.fine_tuning import _split_batch
from rnejax.training.paths import make_walk, path_log_ratio, walk_once

KEY = jax.random.key(21)
MEAN = np.array([0.4, -0.3, 0.2])
TILT = np.array([0.8, -0.5, 0.3])  # r(x) = exp(b . x)
COVARIANCE = np.array([[0.50, 0.20, -0.10], [0.20, 0.30, 0.05], [-0.10, 0.05, 0.80]])
PROCESSES = [
    Cosine(t_min=0.01, t_max=1.0),  # no signal is left at the end
    NonReversible(U, Q, data_covariance=COVARIANCE, t_min=0.01, t_max=80.0),
    NonReversible(np.diag(U), data_covariance=0.5, t_min=0.01, t_max=60.0),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=["scalar", "circulating", "diagonal"])


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def log_reward(x):
    return x @ jnp.asarray(TILT, x.dtype)


def gaussian(process, shift=(0.0, 0.0, 0.0)):
    """The exact model of Gaussian data, whose mean is a weight."""
    return GaussianMixture([MEAN + np.asarray(shift)], covariances=COVARIANCE[None]).model(process, "x0", "full")


def at_t_min(process):
    """The map x_0 -> E[x_{t_min} | x_0], and mean and covariance of the noised data there."""
    if isinstance(process, NonReversible):
        moments = process.moments(process.t_min)
        signal, noise = (
            each[0] if len(each) == 1 else np.diag(each[:, 0, 0]) for each in (moments.signal, moments.noise)
        )
    else:
        signal = float(process.alpha(process.t_min)) * np.eye(3)
        noise = float(process.sigma(process.t_min)) ** 2 * np.eye(3)
    return signal, signal @ MEAN, signal @ COVARIANCE @ signal.T + noise


def exact_answer(process):
    """By how much the data's mean moves where x_{t_min} is tilted by r, and log Z = b . m + b . C b / 2."""
    signal, mean, covariance = at_t_min(process)
    return np.linalg.solve(signal, covariance @ TILT), float(TILT @ mean + 0.5 * TILT @ covariance @ TILT)


@every_process
@pytest.mark.parametrize("up", [False, True], ids=["generated", "noised"])
def test_the_exact_posterior_has_no_residual_on_any_path(process, up, double_precision):
    shift, log_normalizer = exact_answer(process)
    times = rj.time_grid(process, 6)
    data = {"x": jnp.asarray([[0.3, 1.0, -2.0], [4.0, 0.0, 0.1]])} if up else {"num_paths": 8, "inflation": 1.7}
    paths = trajectory_balance_residual(
        KEY, gaussian(process, shift), gaussian(process), times, log_reward, log_normalizer, **data
    )
    np.testing.assert_allclose(paths.residual, 0, atol=1e-8)
    assert np.std(paths.log_ratio) > 0.1, "there must be something that cancels"
    if up:
        np.testing.assert_allclose(paths.x, data["x"])


@every_process
def test_training_finds_the_posterior_and_its_normaliser(process):
    shift, log_normalizer = exact_answer(process)
    prior, times = gaussian(process), rj.time_grid(process, 6)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 400))

    def loss(params, key):
        posterior = prior.with_params(params[0])
        return 0.5 * jnp.mean(
            trajectory_balance_residual(key, posterior, prior, times, log_reward, params[1], num_paths=64).residual ** 2
        )

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss, allow_int=True)(params, key)
            # Of the mixture, the mean alone is tuned.
            only = jax.tree.map(jnp.zeros_like, params)
            only = (replace_means(only[0], gradient[0].means), gradient[1])
            updates, state = optimizer.update(only, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 400))

    (params, _), values = train((prior.params, jnp.zeros(())))
    assert values[0] > 0.1
    assert values[-1] < 1e-6
    assert abs(params[1] - log_normalizer) < 1e-3
    np.testing.assert_allclose(params[0].means[0], MEAN + shift, atol=1e-3)


def replace_means(mixture, means):
    leaves, tree = jax.tree.flatten(mixture)
    index = next(i for i, leaf in enumerate(leaves) if leaf is mixture.means)
    return jax.tree.unflatten(tree, [means if i == index else leaf for i, leaf in enumerate(leaves)])


def networks(process, seed=0):
    """A prior and a posterior that are networks, and differ."""
    apply, _ = functional(MLP((3,), 8, 1, time_scale="log", rngs=nnx.Rngs(0)))
    fn = apply.as_prediction()
    models = []
    for rngs in (seed, seed + 1):
        _, params = functional(MLP((3,), 8, 1, time_scale="log", rngs=nnx.Rngs(rngs)))
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
        models.append(rj.DiffusionModel(process, fn, "x0", shape=(3,), params=params, batched=True))
    return models


def a_walk(prior, posterior, times, up=False, num_steps=None):
    x = jnp.asarray([[0.3, 1.0, -2.0], [1.0, 0.0, 0.1]]) if up else None
    return make_walk(KEY, posterior, prior, times, 2, x, 1.5, num_steps)


def close(found, expected, rtol):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * max(1e-3, float(jnp.abs(other).max())))


@pytest.mark.parametrize("up", [False, True], ids=["generated", "noised"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("process", PROCESSES[:2], ids=["scalar", "circulating"])
def test_two_passes_are_the_direct_gradient(process, up, double):
    with jax.enable_x64(double):
        prior, posterior = networks(process)
        times = rj.time_grid(process, 7)
        walk = a_walk(prior, posterior, times, up)
        weights = jnp.asarray([0.7, -1.3])
        two = jax.grad(lambda params: path_log_ratio(params, walk)[1] @ weights)(posterior.params)
        one = jax.grad(lambda params: walk_once(params, walk)[1] @ weights)(posterior.params)
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one)) > 1e-2
        close(two, one, 1e-10 if double else 1e-5)
    jax.clear_caches()


def test_the_gradient_is_the_sum_over_steps_of_log_kernels(double_precision):
    process = PROCESSES[0]
    prior, posterior = networks(process)
    times = rj.time_grid(process, 4)
    walk = a_walk(prior, posterior, times, up=True)
    # The same path, by hand: the walk's own keys, and everything else from public functions.
    states = [walk.start]
    for i in range(4):
        keys = jax.random.split(jax.random.split(jax.random.fold_in(walk.key, i))[1], 2)
        states.append(
            jax.vmap(lambda key, x, i=i: process.forward(x, times[i], times[i + 1]).sample(key))(keys, states[-1])
        )

    def by_hand(params):
        model, total = posterior.with_params(params), 0.0
        for i in range(4):
            for n, weight in enumerate((0.7, -1.3)):
                x_s, x_t = states[i][n], states[i + 1][n]
                ours, theirs = (each.reverse(x_t, times[i + 1], times[i]) for each in (model, prior))
                total = total + weight * (ours.log_prob(x_s) - theirs.log_prob(x_s))
        return total

    value, gradient = jax.value_and_grad(lambda params: path_log_ratio(params, walk)[1] @ jnp.asarray([0.7, -1.3]))(
        posterior.params
    )
    np.testing.assert_allclose(value, by_hand(posterior.params), rtol=1e-9)
    close(gradient, jax.grad(by_hand)(posterior.params), 1e-8)


@pytest.mark.parametrize("up", [False, True], ids=["generated", "noised"])
def test_single_steps_add_up_to_the_gradient(up, double_precision):
    process = PROCESSES[0]
    prior, posterior = networks(process)
    walk = a_walk(prior, posterior, rj.time_grid(process, 5), up)

    def gradient(walk):
        return jax.grad(lambda params: path_log_ratio(params, walk)[1] @ jnp.asarray([0.7, -1.3]))(posterior.params)

    parts = [gradient(replace(walk, chosen=jnp.asarray([i]))) for i in range(5)]
    close(jax.tree.map(lambda *leaves: sum(leaves) / 5, *parts), gradient(walk), 1e-9)
    pair = gradient(replace(walk, chosen=jnp.asarray([3, 1])))
    close(pair, jax.tree.map(lambda one, other: (one + other) / 2, parts[1], parts[3]), 1e-9)


def test_a_constant_reward_asks_for_nothing():
    process = PROCESSES[0]
    prior, _ = networks(process)
    times = rj.time_grid(process, 5)

    def loss(params, log_normalizer):
        paths = trajectory_balance_residual(
            KEY, prior.with_params(params), prior, times, lambda x: jnp.asarray(0.7), log_normalizer, num_paths=3
        )
        return 0.5 * jnp.sum(paths.residual**2), paths

    (_, paths), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(prior.params, 0.2)
    np.testing.assert_allclose(paths.residual, 0.2 - 0.7, rtol=1e-5)
    np.testing.assert_allclose(gradients[1], 3 * (0.2 - 0.7), rtol=1e-5)
    gradient = jax.grad(lambda params: loss(params, 0.7)[0])(prior.params)
    # Of residuals that are zero to 1e-7, through three networks' gradients of order 1e2.
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-4


def test_the_batch_knows_its_normaliser(double_precision):
    process = PROCESSES[0]
    shift, log_normalizer = exact_answer(process)
    times = rj.time_grid(process, 6)
    make = partial(trajectory_balance_residual, KEY, prior=gaussian(process), times=times, log_reward=log_reward)
    exact = make(gaussian(process, shift), num_paths=5)
    np.testing.assert_allclose(batch_log_normalizer(exact), log_normalizer, rtol=1e-8)
    # Of another model, what it says makes the residuals' mean zero: their square is their variance.
    other = make(gaussian(process, 0.5 * shift), num_paths=5)
    residual = batch_log_normalizer(other) + other.log_ratio - other.log_reward
    np.testing.assert_allclose(residual.mean(), 0, atol=1e-10)
    assert np.std(residual) > 0.05


LAW = TokenLaw.random(3, 2, 3)
REWARDS = np.random.default_rng(4).normal(size=8)
TILTED = LAW.log_probs + REWARDS
TOKENS = AnyOrder(2, 3)


def reward_of_tokens(x):
    return jnp.asarray(REWARDS)[x @ jnp.asarray([4, 2, 1])]


def test_exact_posteriors_of_tokens_have_no_residual(double_precision):
    log_normalizer = np.logaddexp.reduce(TILTED)
    posterior = TokenLaw(2, 3, TILTED - log_normalizer)
    model = rj.DiffusionModel(
        TOKENS, lambda params, x, t, condition: params + posterior.conditional(x, t), params=jnp.zeros(())
    )
    paths = trajectory_balance_residual(
        KEY, model, LAW.one_by_one(), rj.time_grid(TOKENS, 3, t_max=3.0), reward_of_tokens, log_normalizer, num_paths=16
    )
    np.testing.assert_allclose(paths.residual, 0, atol=1e-9)
    assert np.std(paths.log_reward) > 0.1


def test_a_table_of_tokens_learns_its_posterior():
    """One row of logits for each state, MASK being 2; probabilities of sequences by summing over orders."""
    prior = LAW.one_by_one()
    times = rj.time_grid(TOKENS, 3, t_max=3.0)

    def fn(table, x, t, condition):
        return LAW.conditional(x, t) + table[x @ jnp.asarray([9, 3, 1])]

    posterior = rj.DiffusionModel(TOKENS, fn, params=jnp.zeros((27, 3, 2)))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1000))

    def loss(params, key):
        paths = trajectory_balance_residual(
            key, posterior.with_params(params[0]), prior, times, reward_of_tokens, params[1], num_paths=64
        )
        return 0.5 * jnp.mean(paths.residual**2)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    start = (posterior.params, jnp.zeros(()))
    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(KEY, 1000))[0][0])
    table, log_normalizer = run(start)
    assert abs(log_normalizer - np.logaddexp.reduce(TILTED)) < 1e-3

    def probability(x, known=()):
        left = [i for i in range(3) if i not in known]
        if not left:
            return 1.0
        state = jnp.asarray([x[i] if i in known else 2 for i in range(3)])
        chances = np.asarray(jax.nn.softmax(fn(table, state, None, None), axis=-1))
        return np.mean([chances[i, x[i]] * probability(x, (*known, i)) for i in left])

    found = np.array([probability(x) for x in LAW.sequences])
    expected = np.exp(TILTED - np.logaddexp.reduce(TILTED))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert 0.5 * np.abs(found - expected).sum() < 2e-3
    assert 0.5 * np.abs(np.exp(LAW.log_probs) - expected).sum() > 0.1


def test_memory_does_not_grow_with_the_steps():
    process = Cosine(t_min=0.01, t_max=1.0)
    apply, params = functional(MLP((64,), 256, 2, rngs=nnx.Rngs(0)))
    prior = rj.DiffusionModel(process, apply.as_prediction(), "x0", shape=(64,), params=params, batched=True)

    def peak(num_steps, direct=False):
        walk = make_walk(KEY, prior, prior, rj.time_grid(process, num_steps), 64, None, 1.0, None)
        ratio = (
            (lambda params: walk_once(params, walk)[1]) if direct else (lambda params: path_log_ratio(params, walk)[1])
        )
        gradient = jax.jit(jax.grad(lambda params: jnp.sum(ratio(params) ** 2)))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert peak(1000) < 1.1 * peak(50)
    assert peak(50, direct=True) > 3 * peak(50)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inflation": -1.0}, "inflation must be"),
        ({"inflation": jnp.ones(2)}, r"inflation must be a number or of shape \(3,\), got \(2,\)"),
        ({"num_paths": 0}, "num_paths must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"x": jnp.ones((2, 4))}, "x must have shape"),
    ],
)
def test_what_makes_no_path_is_refused(change, words):
    prior, posterior = networks(PROCESSES[0])
    with pytest.raises(ValueError, match=words):
        trajectory_balance_residual(
            KEY, posterior, prior, rj.time_grid(PROCESSES[0], 3), log_reward, **({"num_paths": 3} | change)
        )


def test_models_that_do_not_belong_together_are_refused():
    prior, posterior = networks(PROCESSES[0])
    times = rj.time_grid(PROCESSES[0], 3)
    other = posterior.with_process(Cosine(t_min=0.02, t_max=1.0))
    with pytest.raises(ValueError, match="must be models of one process and shape"):
        trajectory_balance_residual(KEY, other, prior, times, log_reward)
    fixed = rj.DiffusionModel(PROCESSES[0], lambda x, t: 0.5 * x, "x0", shape=(3,))
    with pytest.raises(ValueError, match="posterior has no weights to tune"):
        trajectory_balance_residual(KEY, fixed, prior, times, log_reward)


# ------------------------------------------------------------------------------------------------------ the loss of fit


def the_loss(process, posterior, **options):
    times = rj.time_grid(process, 6)
    return trajectory_balance_loss(posterior, gaussian(process), times, log_reward, **options)


ALL = {"generated": 2, "inflated": 1, "noised": 1, "back_and_forth": 1, "renoised": 1}


@every_process
def test_every_source_has_no_residual_on_the_exact_posterior(process, double_precision):
    shift, log_normalizer = exact_answer(process)
    posterior = gaussian(process, shift)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)))
    for normalizer, known in (("learned", log_normalizer), ("batch", 17.0)):
        values, report = the_loss(process, posterior, sources=ALL, normalizer=normalizer)(
            KEY, FineTuned(posterior.params, jnp.asarray(known)), x
        )
        assert values.shape == (10,)
        np.testing.assert_allclose(values, 0, atol=1e-15)
        np.testing.assert_allclose(report["log_normalizer"], log_normalizer, rtol=1e-7)


def test_going_back_and_forth_knows_nothing_of_the_normaliser(double_precision):
    """The difference of both residuals, from their definitions."""
    process = PROCESSES[0]
    prior, posterior = networks(process)
    times = rj.time_grid(process, 6)[:4]
    x = jnp.asarray([[0.3, 1.0, -2.0], [1.0, 0.0, 0.1]])
    difference, back = back_and_forth_residual(KEY, posterior, prior, times, log_reward, x)
    key_up, key_down = jax.random.split(KEY)
    up = make_walk(key_up, posterior, prior, times, 1, x, 1.0, None)
    top, ratio_up = path_log_ratio(posterior.params, up)
    down = make_walk(key_down, posterior, prior, times, 2, None, 1.0, None, top)
    end, ratio_down = path_log_ratio(posterior.params, down)
    np.testing.assert_allclose(back.x, end)
    expected = (ratio_down - log_reward(end)) - (ratio_up - log_reward(x))
    np.testing.assert_allclose(difference, expected, rtol=1e-9)
    assert np.abs(difference).min() > 1e-3


def test_shares_of_the_batch_are_whole_numbers():
    assert _split_batch({"generated": 0.5, "noised": 0.5}, 7) == {
        "generated": 4, "inflated": 0, "noised": 3, "back_and_forth": 0, "renoised": 0,
    }  # fmt: skip
    for count in range(1, 12):
        assert (
            sum(_split_batch({"generated": 0.4, "inflated": 0.3, "noised": 0.2, "back_and_forth": 0.1}, count).values())
            == count
        )


def test_a_reward_of_zero_teaches_avoidance():
    process = PROCESSES[0]
    prior, posterior = networks(process)

    def half_a_line(x):
        return jnp.where(x[0] > 0, 0.0, -jnp.inf)

    loss = trajectory_balance_loss(
        posterior, prior, rj.time_grid(process, 5), half_a_line, bound=3.0, least_log_reward=-20.0
    )
    tuned = FineTuned(posterior.params, jnp.zeros(()))
    (_, report), gradient = jax.value_and_grad(
        lambda tuned: (lambda values, report: (values.mean(), report))(*loss(KEY, tuned, jnp.zeros((32, 3)))),
        has_aux=True,
    )(tuned)
    assert 0 < report["beyond_bound"][0] < 1
    assert report["log_reward"][0] < -2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert gradient.log_normalizer > 0  # residuals of such paths are positive: log Z has to fall


def test_a_reward_that_is_no_number_is_named():
    """fit stops, and says which part of the loss it was."""
    process = PROCESSES[0]
    prior, posterior = networks(process)
    loss = trajectory_balance_loss(
        posterior, prior, rj.time_grid(process, 3), lambda x: jnp.where(x[0] > 0, jnp.nan, 0.0)
    )
    tuned = FineTuned(posterior.params, jnp.zeros(()))
    with pytest.raises(FloatingPointError, match=r"at step 0 \(.*log_reward nan"):
        fit(KEY, loss, tuned, jnp.zeros((16, 3)), optax.adam(1e-3), num_steps=2, batch_size=16)


def test_the_bound_is_hubers(double_precision):
    process = PROCESSES[0]
    prior, posterior = networks(process)
    tuned = FineTuned(posterior.params, jnp.asarray(0.5))
    values = {}
    for bound in (np.inf, 0.7):
        loss = trajectory_balance_loss(posterior, prior, rj.time_grid(process, 5), log_reward, bound=bound)
        values[bound], report = loss(KEY, tuned, jnp.zeros((64, 3)))
    size = np.sqrt(2 * values[np.inf])
    assert 0.1 < np.mean(size > 0.7) < 0.9
    np.testing.assert_allclose(values[0.7], np.where(size < 0.7, 0.5 * size**2, 0.7 * (size - 0.35)), rtol=1e-9)
    np.testing.assert_allclose(report["beyond_bound"], np.mean(size > 0.7))


def test_the_batchs_normaliser_has_the_gradient_of_half_the_variance(double_precision):
    process = PROCESSES[0]
    prior, posterior = networks(process)
    loss = trajectory_balance_loss(posterior, prior, rj.time_grid(process, 5), log_reward, normalizer="batch")

    def mean(weights):
        return loss(KEY, FineTuned(weights, jnp.zeros(())), jnp.zeros((8, 3)))[0].mean()

    walk_key = jax.random.split(KEY, 4)[0]

    def half_variance(weights):
        paths = trajectory_balance_residual(
            walk_key, posterior.with_params(weights), prior, rj.time_grid(process, 5), log_reward, num_paths=8
        )
        return 0.5 * jnp.var(paths.residual)

    np.testing.assert_allclose(mean(posterior.params), half_variance(posterior.params), rtol=1e-10)
    close(jax.grad(mean)(posterior.params), jax.grad(half_variance)(posterior.params), 1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sources": {"dreamt": 1.0}},
            "sources must be among generated, inflated, noised, back_and_forth, renoised: got dreamt",
        ),
        ({"sources": {}}, "one must be positive"),
        ({"sources": {"noised": -1.0, "generated": 2.0}}, "must not be negative"),
        ({"normalizer": "guessed"}, "normalizer must be 'learned', 'batch' or a function, got 'guessed'"),
        ({"bound": 0.0}, "bound must be positive"),
        ({"turn": 0.0}, "turn must be a share of the steps"),
        ({"inflation": 0.0}, "inflation must be positive"),
    ],
)
def test_what_is_no_loss_is_refused(options, words):
    prior, posterior = networks(PROCESSES[0])
    with pytest.raises(ValueError, match=words):
        trajectory_balance_loss(posterior, prior, rj.time_grid(PROCESSES[0], 5), log_reward, **options)


# ---------------------------------------------------------------------------------------------------------- assessment


def test_the_exact_posterior_has_no_gap(double_precision):
    process = PROCESSES[0]
    shift, log_normalizer = exact_answer(process)
    make = partial(
        trajectory_balance_residual,
        KEY,
        gaussian(process, shift),
        gaussian(process),
        rj.time_grid(process, 6),
        log_reward,
    )
    found = assess(make(num_paths=50), make(x=jnp.ones((3, 3))))
    for value in (found.lower_bound[0], found.log_normalizer, found.upper_bound[0]):
        assert value == pytest.approx(log_normalizer, abs=1e-7)
    assert found.effective_sample_size == pytest.approx(50)
    assert found.residual_variance < 1e-12


def test_bounds_are_on_either_side_and_importance_sampling_between(double_precision):
    """Of a model half-way: log Z -+ the KL divergences of Gaussian paths, which are those of their means here."""
    process = PROCESSES[0]
    shift, log_normalizer = exact_answer(process)
    make = partial(
        trajectory_balance_residual,
        prior=gaussian(process),
        posterior=gaussian(process, 0.5 * shift),
        times=rj.time_grid(process, 6),
        log_reward=log_reward,
    )
    _, _, covariance = at_t_min(process)
    # Both are the same Markov chains but for their means; x_{t_min} says all of them.
    gap = 0.5 * 0.25 * TILT @ covariance @ TILT
    posterior = GaussianMixture([MEAN + shift], covariances=COVARIANCE[None])
    clean = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(1), 4000))
    alpha, sigma = process.alpha(process.t_min), process.sigma(process.t_min)
    x = alpha * clean + sigma * jax.random.normal(jax.random.key(2), clean.shape)
    found = assess(make(KEY, num_paths=4000), make(jax.random.key(3), x=x))
    lower, error = found.lower_bound
    assert abs(lower - (log_normalizer - gap)) < 4 * error
    upper, error = found.upper_bound
    assert abs(upper - (log_normalizer + gap)) < 4 * error
    assert abs(found.log_normalizer - log_normalizer) < 4 * found.standard_error
    assert found.residual_variance == pytest.approx(2 * gap, rel=0.2)
    # exp of a normal number of variance 2 gap: the sample size is the share exp(-2 gap) of all.
    assert found.effective_sample_size / 4000 == pytest.approx(np.exp(-2 * gap), rel=0.1)


def test_paths_without_reward_are_told():
    paths = Trajectories(jnp.zeros((3, 1)), jnp.zeros(3), jnp.asarray([0.0, 1.0, -jnp.inf]), jnp.zeros(3))
    found = assess(paths)
    assert found.lower_bound[0] == -np.inf
    assert found.residual_variance == np.inf
    assert found.log_normalizer == pytest.approx(np.log((1 + np.e) / 3))
    with pytest.raises(ValueError, match="two paths or more"):
        assess(paths._replace(log_reward=jnp.full(3, -jnp.inf)))


def test_the_batchs_normaliser_minimises_the_bounded_loss(double_precision):
    """Huber's estimate of location: residuals, cut off at the bound, have a mean of zero; outliers move it little."""
    random = np.random.default_rng(0)
    values = jnp.asarray(np.concatenate([random.normal(1.0, 1.0, 60), random.uniform(-90, -80, 4)]))
    paths = Trajectories(jnp.zeros((64, 1)), jnp.zeros(64), values, -values)
    found = batch_log_normalizer(paths, bound=2.0)
    assert abs(np.clip(values - found, -2.0, 2.0).mean()) < 1e-9
    assert abs(found - 1) < 0.5 < 5 < abs(batch_log_normalizer(paths) - 1)
    np.testing.assert_allclose(batch_log_normalizer(paths), values.mean(), rtol=1e-12)
    # By condition: each as if it were alone.
    condition = jnp.asarray(random.integers(0, 3, 64))
    grouped = batch_log_normalizer(paths, condition, bound=2.0)
    for label in range(3):
        rows = np.asarray(condition) == label
        alone = batch_log_normalizer(jax.tree.map(lambda leaf, rows=rows: leaf[rows], paths), bound=2.0)
        np.testing.assert_allclose(grouped[rows], alone, rtol=1e-9)


def test_the_loss_takes_the_normaliser_of_its_bound(double_precision):
    process = PROCESSES[0]
    prior, posterior = networks(process)
    times = rj.time_grid(process, 5)
    loss = trajectory_balance_loss(posterior, prior, times, log_reward, normalizer="batch", bound=0.3)
    tuned = FineTuned(posterior.params, jnp.zeros(()))
    values, report = loss(KEY, tuned, jnp.zeros((64, 3)))
    paths = trajectory_balance_residual(jax.random.split(KEY, 4)[0], posterior, prior, times, log_reward, num_paths=64)
    candidates = np.linspace(-1, 1, 201) + float(report["log_normalizer"][0])
    losses = [optax.huber_loss(z + paths.residual, delta=0.3).mean() for z in candidates]
    assert np.argmin(losses) == 100
    np.testing.assert_allclose(values.mean(), losses[100], rtol=1e-9)
    assert np.mean(values) < optax.huber_loss(paths.residual - paths.residual.mean(), delta=0.3).mean() - 1e-6


# ----------------------------------------------------------------------------------------- gradients that are averaged


@pytest.mark.parametrize("chosen", [None, 2], ids=["all steps", "some steps"])
def test_averaged_gradients_have_the_mean_of_plain_ones_and_less_noise(chosen, double_precision):
    """Over draws of the noise above x, of weights that do not depend on it."""
    process = PROCESSES[0]
    prior, posterior = networks(process)
    times = rj.time_grid(process, 5)
    x = jnp.asarray([[0.3, 1.0, -2.0], [1.0, 0.0, 0.1]])

    def gradient(key, averaged):
        walk = make_walk(key, posterior, prior, times, 1, x, 1.0, chosen, averaged=averaged)
        found = jax.grad(lambda params: path_log_ratio(params, walk)[1] @ jnp.asarray([0.7, -1.3]))(posterior.params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    keys = jax.random.split(KEY, 4000)
    plain, averaged = (np.asarray(jax.jit(jax.vmap(partial(gradient, averaged=each)))(keys)) for each in (False, True))
    error = np.sqrt((plain.var(axis=0) + averaged.var(axis=0)) / len(keys))
    known = error > 1e-12
    z = (plain.mean(axis=0) - averaged.mean(axis=0))[known] / error[known]
    assert np.abs(z).max() < 5  # of some 200 numbers
    # Of networks that know nothing, most of the noise is that of the states; in 784 dimensions it is the draws'.
    assert averaged.var(axis=0).sum() < plain.var(axis=0).sum()
    # The paths themselves are the same.
    values = [
        path_log_ratio(posterior.params, make_walk(KEY, posterior, prior, times, 1, x, 1.0, chosen, averaged=each))[1]
        for each in (False, True)
    ]
    np.testing.assert_array_equal(*values)


def test_averaged_gradients_vanish_at_the_posterior_and_are_of_scalar_noise(double_precision):
    process = PROCESSES[0]
    shift, log_normalizer = exact_answer(process)
    posterior, prior, times = gaussian(process, shift), gaussian(process), rj.time_grid(process, 6)
    x = jnp.asarray([[0.3, 1.0, -2.0], [1.0, 0.0, 0.1]])

    def loss(means):
        model = posterior.with_params(replace_means(posterior.params, means))
        paths = trajectory_balance_residual(KEY, model, prior, times, log_reward, log_normalizer, x=x, averaged=True)
        return jnp.sum(paths.residual**2)

    assert np.abs(jax.grad(loss)(posterior.params.means)).max() < 1e-6
    assert np.abs(jax.grad(loss)(prior.params.means)).max() > 1e-2
    other = gaussian(PROCESSES[1])
    with pytest.raises(ValueError, match="averaged over draws of scalar Gaussian noise"):
        trajectory_balance_residual(KEY, other, other, rj.time_grid(PROCESSES[1], 4), log_reward, x=x, averaged=True)
