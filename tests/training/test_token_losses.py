"""Bounds on -log p of tokens: tight where conditionals are exact, unbiased, and the same by every road."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems.token_law import TokenLaw
from rnejax.training import likelihood_bound, token_bound_loss, token_loss
from rnejax.training.tokens import _ends, time_at_loss

KEY = jax.random.key(0)
WORLD = TokenLaw.random(0, 3, 4)
X = jnp.asarray(WORLD.sequences)


def standardised(values, exact):
    """(mean - exact) in standard errors, per column."""
    values = np.asarray(values, np.float64)
    return (values.mean(axis=0) - exact) / (values.std(axis=0, ddof=1) / np.sqrt(len(values)))


UNIFORM = rj.processes.Uniform(3, 4)
NOTHING = rj.DiffusionModel(rj.processes.Masked(3, 4), lambda x, t: jnp.full((4, 3), -jnp.inf))


def loss_of(x, **options):
    return token_bound_loss(KEY, rj.processes.Masked(3, 4), WORLD.conditional, x, **options)


def wrong(x, t):
    """A network that is not the law's: its conditionals, blurred."""
    return 0.5 * WORLD.conditional(x)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_linear", lambda t: (1 - t) ** 2])
def test_in_continuous_time_the_bound_is_tight_for_exact_conditionals(schedule):
    """E loss = -log p(x_0) for every sequence, whatever the schedule: |z| < 4.5 over 81 sequences."""
    process = rj.processes.Masked(3, 4, schedule)
    losses = jax.lax.map(lambda key: token_bound_loss(key, process, WORLD.conditional, X), jax.random.split(KEY, 200))
    z = standardised(losses, -WORLD.log_probs)
    assert np.all(np.abs(z) < 4.5)


def test_every_road_leads_to_one_bound_of_a_network_that_is_not_exact():
    """By the number of masks, antithetically, one token per step, and as the limit of grids."""
    masked, by_one = rj.processes.Masked(3, 4), rj.processes.AnyOrder(3, 4)
    roads = {
        "continuous": lambda key: token_bound_loss(key, masked, wrong, X),
        "antithetic": lambda key: token_bound_loss(key, masked, wrong, X, antithetic=True),
        "one by one": lambda key: token_bound_loss(key, by_one, wrong, X),
        "its grid": lambda key: token_bound_loss(key, by_one, wrong, X, times=np.arange(5.0)),
    }
    means, errors = {}, {}
    for name, road in roads.items():
        values = jax.lax.map(road, jax.random.split(KEY, 400)).mean(axis=1)
        means[name], errors[name] = float(values.mean()), float(values.std() / 20)
    for name in roads:
        assert abs(means[name] - means["continuous"]) < 4 * np.hypot(errors[name], errors["continuous"])
    assert errors["antithetic"] < 0.9 * errors["continuous"]


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_the_bound_of_a_grid_is_the_mean_of_minus_the_log_density_of_single_paths(family):
    model = getattr(WORLD, family)()
    times = rj.time_grid(model.process, 6)
    bound = likelihood_bound(KEY, model, X, times=times, num_samples=400)
    if family == "uniform":
        # The density is that of noised tokens: of x_{t_min} given x_0, on average.
        marginal = jax.vmap(lambda key, x: model.process.marginal(x, times[0]).sample(key))
        repeated = marginal(jax.random.split(KEY, 81 * 50), jnp.repeat(X, 50, axis=0))
        density = rj.log_density(KEY, model, repeated, times, num_paths=1, progress=False)
        paths = np.asarray(density.per_path).reshape(81, 50)
    else:
        paths = np.asarray(rj.log_density(KEY, model, X, times, num_paths=400, progress=False).per_path)
    error = np.hypot(paths.std(axis=1, ddof=1) / np.sqrt(paths.shape[1]), np.asarray(bound.standard_error))
    z = (np.asarray(bound.bound) + paths.mean(axis=1)) / error
    assert np.all(np.abs(z) < 4.5)
    assert abs(z.mean()) < 4 / np.sqrt(81)


def test_the_bound_of_uniform_tokens_adds_up_to_the_entropy():
    """E over data of the continuous-time bound and what the ends add is the entropy of p_{t_min}."""
    model = WORLD.uniform()
    process = model.process
    entropy = -np.exp(law := WORLD.marginal(0.99).log_probs) @ law
    drawn = np.random.default_rng(0).choice(81, size=20_000, p=np.exp(WORLD.log_probs))
    losses = token_bound_loss(KEY, process, model.fn, X[drawn])
    error = float(losses.std() / np.sqrt(len(drawn)))
    found = float(losses.mean()) + _ends(process, rj.time_grid(process, 2))
    assert abs(found - entropy) < 4 * error


def test_a_concrete_score_has_the_loss_of_its_logits():
    process = rj.processes.Masked(3, 4)
    of_logits = token_bound_loss(KEY, process, WORLD.conditional, X)

    def score(x, t):  # log alpha/(1 - alpha) mu
        return jax.nn.log_softmax(WORLD.conditional(x)) + jnp.log((1 - t) / t)

    of_score = token_bound_loss(KEY, process, score, X, prediction="concrete_score")
    np.testing.assert_allclose(of_score, of_logits, rtol=1e-4)


def test_a_concrete_score_that_a_law_has_has_the_loss_of_its_logits_of_uniform_tokens_too():
    process = rj.processes.Uniform(3, 4)
    of_logits = token_bound_loss(KEY, process, WORLD.conditional, X)

    def score(x, t):
        alpha = process.alpha(t)
        own, rest = jax.nn.one_hot(x, 3), (1 - alpha) / 3
        over = jax.nn.softmax(WORLD.conditional(x)) / (alpha * own + rest)
        return jnp.log(alpha * over + rest * jnp.sum(over, axis=-1, keepdims=True))

    of_score = token_bound_loss(KEY, process, score, X, prediction="concrete_score")
    np.testing.assert_allclose(of_score, of_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("family", ["masked", "uniform", "uniform, its grid"])
def test_concrete_scores_that_no_law_has_can_be_learned_from(family, size):
    """A network's scores are inconsistent, and near t_max any are: gradients are finite nevertheless, and lead down."""
    process = rj.processes.Masked(3, 4) if family == "masked" else rj.processes.Uniform(3, 4)
    times = rj.time_grid(process, 6, t_max=0.9) if "grid" in family else None
    table = size * jax.random.normal(jax.random.key(1), (4, 3, 4, 3))

    @jax.jit
    def loss(table):
        def score(x, t):
            scores = table[jnp.arange(4), jnp.minimum(x, 2)].sum(axis=0)
            return jnp.where(
                x[:, None] == jnp.arange(3), 200.0 * scores, scores
            )  # of the token itself: may be anything

        return jnp.mean(token_bound_loss(KEY, process, score, X, prediction="concrete_score", times=times))

    value, gradient = jax.value_and_grad(loss)(table)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
    assert loss(table - 1e-3 * gradient / jnp.linalg.norm(gradient)) < value


def test_standard_errors_are_those_of_independent_samples_and_samples_share_out_the_times():
    """Of n samples, E s^2 = (v - v_mean) n / (n - 1), with v the variance of one and v_mean that of their mean."""
    model, n = WORLD.masked(), 16
    singles = np.stack([likelihood_bound(k, model, X, num_samples=1).bound for k in jax.random.split(KEY, 200)])
    several = [likelihood_bound(k, model, X, num_samples=n) for k in jax.random.split(jax.random.key(1), 200)]
    means = np.stack([each.bound for each in several])
    squares = np.stack([np.square(each.standard_error) for each in several]) * n
    v, v_mean = singles.var(axis=0, ddof=1), means.var(axis=0, ddof=1)
    # 81 sequences, whose loss at one time scatters much alike: the ratio of means, its error from the sequences.
    found = squares.mean(axis=0) * (n - 1) / n + v_mean
    ratio = found / v
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 9
    assert ratio.std() / 9 < 0.05
    assert v_mean.mean() < 0.5 * v.mean() / n


def test_the_time_that_the_network_is_given_has_the_law_of_the_number_of_masks():
    """Given t, masks are binomial: the mean of t given m of 4 masked is (m) / 5 for the linear schedule."""
    seen = []

    def record(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t)
        return jnp.zeros((len(x), 4, 3))

    token_bound_loss(KEY, rj.processes.Masked(3, 4), record, jnp.tile(X, (50, 1)), batched=True)
    jax.effects_barrier()
    x, t = seen[0]
    for m in range(1, 5):
        times = t[(x == 3).sum(axis=1) == m]
        assert abs(times.mean() - m / 5) < 4 * times.std() / np.sqrt(len(times))
    cosine = rj.processes.Masked(3, 4, "cosine")
    lost = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(1 - cosine.alpha(np.asarray(time_at_loss(cosine, jnp.asarray(lost)))), lost, atol=1e-5)


def test_antithetic_masks_are_complementary():
    """m masks and length + 1 - m others: together they cover every position, and one of them twice."""
    seen = []

    def record(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x) == 3), x)
        return jnp.zeros((len(x), 4, 3))

    token_bound_loss(KEY, rj.processes.Masked(3, 4), record, X, antithetic=True, batched=True)
    jax.effects_barrier()
    first, second = seen
    np.testing.assert_array_equal(first | second, True)
    np.testing.assert_array_equal((first & second).sum(axis=1), 1)


def test_the_loss_for_fit_is_per_token_and_gives_the_network_its_condition():
    def apply(params, x, t, condition, key):
        assert condition.shape == (81, 2)
        return jnp.broadcast_to(params, (*x.shape, 3))

    loss = token_loss(rj.processes.Masked(3, 4), apply, lambda key, batch: (batch, jnp.zeros((81, 2))), dropout=True)
    np.testing.assert_allclose(loss(KEY, jnp.zeros(3), X), np.log(3), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_bound_loss(KEY, rj.processes.Masked(3, 4), lambda x, t: jnp.zeros((4, 4)), X),
            r"one number for each of the 3 tokens .*expected shape \(81, 4, 3\), got \(81, 4, 4\)",
        ),
        (
            lambda: token_bound_loss(KEY, rj.processes.Uniform(3, 4), wrong, X, antithetic=True),
            "antithetic noise is for masked tokens",
        ),
        (lambda: likelihood_bound(KEY, WORLD.uniform(), X), "give times"),
        (lambda: likelihood_bound(KEY, WORLD.masked(), X + 1), "is MASK"),
        (lambda: likelihood_bound(KEY, WORLD.masked(), X[:0]), "x has no sequences"),
        (lambda: likelihood_bound(KEY, WORLD.masked(), X, num_samples=0), "num_samples must be at least 1"),
        (lambda: likelihood_bound(KEY, NOTHING, X[40:50]), r"bound of x\[0\] is NaN: .*no finite logit"),
        (lambda: loss_of(X + 1), r"x0\[2, 3\] is MASK"),
        (lambda: loss_of(X.at[5, 1].set(-1)), r"x0\[5, 1\] is -1, but tokens are 0, ..., 2"),
        (lambda: loss_of(X.at[5, 1].set(9), times=np.linspace(0, 1, 5)), r"x0\[5, 1\] is 9"),
        (lambda: loss_of(X[:, :3]), r"shape \(n, 4\), sequences of that length, got \(81, 3\)"),
        (lambda: loss_of(1.0 * X), "x0 must be integers"),
        (
            lambda: token_bound_loss(
                KEY, UNIFORM, WORLD.conditional, X, prediction="concrete_score", times=rj.time_grid(UNIFORM, 4)
            ),
            "alpha = 0, where a concrete_score says nothing",
        ),
        (lambda: loss_of(X, prediction="logit"), "'logits', 'concrete_score': got 'logit'"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
