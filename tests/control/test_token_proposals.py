"""What proposals, rewards and remasking of tokens do. Weights stay exact whatever they do, so that unbiased results do
not show it: here it is read off the weights of single steps, whose formulas are short, and off the parts themselves.
"""

import math
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.control.looking import predicted_rows, reward_of_tokens
from rnejax.control.rewards import Reward
from rnejax.systems.token_law import TokenLaw

KEY = jax.random.key(0)
QUIET = {"warn": False, "progress": False, "ess_threshold": 0.0}
LOGITS = np.random.default_rng(0).normal(size=(4, 3))
LOG_MU = LOGITS - np.logaddexp.reduce(LOGITS, axis=1, keepdims=True)
WORTH = np.asarray([[0.7, -0.4, 0.2], [1.5, 0.0, -1.0], [0.0, 0.3, 0.6], [-0.2, 0.1, 0.9]])


def law():
    """Tokens that know nothing of each other, for which one step is as good as many."""
    return TokenLaw(3, 4, LOG_MU[np.arange(4), TokenLaw.random(0, 3, 4).sequences].sum(axis=1))


def masked(*times):
    model = law().masked()
    return model, np.asarray(times) if times else rj.time_grid(model.process, 1)


def linear(rows):
    return jnp.sum(rows * WORTH)


def at(table, x):
    return table[np.arange(4), np.asarray(x)].sum(axis=-1)


def assert_constant(values, exact=None):
    """To the rounding of a dozen float32 numbers below 10."""
    values = np.asarray(values, np.float64)
    np.testing.assert_allclose(values, values.mean() if exact is None else exact, atol=2e-5)


def weights(target, times, **options):
    result = rj.steer(KEY, target, times, 64, **options, **QUIET)
    assert len(np.unique(np.asarray(result.particles), axis=0)) > 5
    return np.asarray(result.particles), np.asarray(result.log_weights + result.log_normalizer, np.float64)


# ----- the gradient


@pytest.mark.parametrize("kind", ["masked", "one_by_one"])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_of_linear_rewards_and_independent_tokens_a_gradient_knows_all(kind, exponent):
    """Every particle has the weight Z = prod_i sum_k mu_ik^beta exp(r_ik)."""
    model = getattr(law(), kind)()
    target = rj.tilt(
        rj.temper(model, exponent), linear, schedule=lambda t: 1.0 + 0 * t, gradient=True, exact=exponent == 1
    )
    _, log_weights = weights(target, rj.time_grid(model.process, 4))
    assert_constant(log_weights, np.logaddexp.reduce(exponent * LOG_MU + WORTH, axis=1).sum())


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.5])
def test_what_the_proposal_does_not_follow_of_a_gradient_is_in_the_weights(coefficient):
    model, times = masked()
    target = rj.tilt(model, linear, gradient=True)
    x, log_weights = weights(target, times, proposal=rj.control.TokenProposal(coefficient))
    assert_constant(
        log_weights - (1 - coefficient) * at(WORTH, x), np.logaddexp.reduce(LOG_MU + coefficient * WORTH, axis=1).sum()
    )


def test_gradients_count_with_the_strength_where_the_step_ends():
    """Which is 0 where it starts: from there, one step leads to the data."""
    model, times = masked()
    target = rj.tilt(model, linear, schedule=lambda t: 1.0 - t / model.process.t_max, gradient=True)
    assert float(target.strengths_at(times)[-1, 0]) == 0
    assert_constant(weights(target, times)[1])


@pytest.mark.parametrize("trust", [0.01, 0.1, math.inf])
def test_trust_bounds_the_divergence_by_half_the_variance_of_the_tilt(trust):
    model, times = masked()
    mu = np.exp(LOG_MU)
    mean = np.sum(mu * WORTH, axis=1, keepdims=True)
    divergence = 0.5 * np.sum(mu * (WORTH - mean) ** 2)
    assert divergence > 0.1
    share = min(1.0, math.sqrt(trust / divergence))
    target = rj.tilt(model, linear, gradient=True)
    x, log_weights = weights(target, times, proposal=rj.control.TokenProposal(trust=trust))
    assert_constant(log_weights - (1 - share) * at(WORTH, x))


def test_gradients_at_x0_are_those_of_the_predicted_rows():
    """Of a reward that is not linear, at the only state from which a single step starts: all are masked."""
    model, times = masked()

    def square(rows):
        return jnp.sum(rows * WORTH) ** 2

    mu = np.exp(LOG_MU)
    slope = 2 * np.sum(mu * WORTH) * WORTH
    x, log_weights = weights(rj.tilt(model, square, at="x0", gradient=True), times)
    # Relative to where it starts, a tilt counts its own value there, too.
    assert_constant(log_weights - at(WORTH, x) ** 2 + at(slope, x))


class Known:
    """The square of a linear reward, which knows what changes do to it."""

    def __call__(self, rows):
        return jnp.sum(rows * WORTH) ** 2

    def changes(self, rows):
        own = jnp.sum(rows * WORTH, axis=-1, keepdims=True)
        return (jnp.sum(own) - own + jnp.asarray(WORTH)) ** 2 - jnp.sum(own) ** 2


def test_a_reward_that_knows_its_changes_is_asked_for_them():
    model, times = masked()
    mu = np.exp(LOG_MU)
    own = np.sum(mu * WORTH, axis=1, keepdims=True)
    changes = (own.sum() - own + WORTH) ** 2 - own.sum() ** 2
    x, log_weights = weights(rj.tilt(model, Known(), at="x0", gradient=True), times)
    assert_constant(log_weights - at(WORTH, x) ** 2 + at(changes, x))


def test_changes_of_another_shape_are_refused():
    class Wrong(Known):
        def changes(self, rows):
            return jnp.zeros(4)

    with pytest.raises(ValueError, match=r"changes\(rows\) must have the shape of the rows, got \(4,\)"):
        rj.tilt(masked()[0], Wrong(), gradient=True)


# ----- base, candidates, draws


def test_base_draws_from_the_model_whatever_the_exponent():
    model, times = masked()
    x, log_weights = weights(rj.temper(model, 3.0), times, proposal="base")
    assert_constant(log_weights - 2.0 * at(LOG_MU, x))


def test_the_more_candidates_the_more_even_the_weights():
    """Of one step, the weight is the mean of exp(reward) over the candidates: its variance falls like one over them."""
    model, times = masked()

    def reward(x):
        return jnp.asarray(WORTH)[jnp.arange(4), x % 3].sum() * jnp.all(x < 3)

    def spread(count):
        target = rj.tilt(model, reward)
        proposal = rj.control.Candidates(count)
        result = rj.steer(KEY, target, times, 4096, proposal=proposal, **QUIET)
        values = np.exp(np.asarray(result.log_weights + result.log_normalizer, np.float64))
        exact = np.exp(np.logaddexp.reduce(LOG_MU + WORTH, axis=1).sum())
        assert abs(values.mean() - exact) < 4 * values.std() / 64
        return values.var()

    # Variances of 4,096 draws of a law with a heavy right tail: to a fifth.
    assert spread(1) / spread(16) == pytest.approx(16, rel=0.2)


def reward_at_x0(function, draws):
    return Reward.of(
        function, schedule=None, exact=True, at="x0", gradient=False, host=False, factors=(1.0,), draws=draws
    ).without_schedule()


@pytest.mark.parametrize("draws", [1, 8])
def test_a_reward_at_x0_is_the_log_of_a_mean_over_as_many_draws(draws):
    rows = jnp.broadcast_to(jnp.exp(jnp.asarray(LOG_MU)), (20_000, 4, 3))
    x = jnp.full((20_000, 4), 3)
    reward = reward_at_x0(lambda x: jnp.sum(jnp.asarray(WORTH)[jnp.arange(4), x]), draws)
    values = np.exp(np.asarray(reward_of_tokens(KEY, reward, x, rows), np.float64))
    mean = np.exp(np.logaddexp.reduce(LOG_MU + WORTH, axis=1).sum())
    variance = (np.exp(np.logaddexp.reduce(LOG_MU + 2 * WORTH, axis=1).sum()) - mean**2) / draws
    assert abs(values.mean() - mean) < 4 * np.sqrt(variance / len(values))
    squares = (values - mean) ** 2
    assert abs(squares.mean() - variance) < 4 * squares.std() / np.sqrt(len(values))


def test_what_several_models_predict_is_mixed_by_their_exponents():
    model = law().masked()
    level = model.process.level(0.5)
    x = jnp.asarray([[3, 1, 3, 3]])
    other = np.roll(LOG_MU, 1, axis=0)
    evaluations = [
        SimpleNamespace(excess=jnp.asarray(table + np.log(3), jnp.float32)[None]) for table in (LOG_MU, other)
    ]
    rows = np.asarray(predicted_rows(level, x, evaluations, jnp.asarray([3.0, -1.0])))[0]
    mixed = 1.5 * LOG_MU - 0.5 * other  # the exponents, divided by their sum
    expected = np.exp(mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True))
    expected[1] = np.eye(3)[1]
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


# ----- remasking


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_linear"])
def test_remask_loses_each_token_with_its_probability(schedule):
    process = rj.processes.Masked(3, 4, schedule=schedule)
    times = rj.time_grid(process, 10)
    alpha = np.asarray(process.alpha(times))
    tops = rj.control.Remask(0.2).tops(process, times)
    # Never above the last time. Survivals are decreasing: found by bisection, to rounding.
    np.testing.assert_allclose(process.alpha(tops), np.maximum(0.8 * alpha, alpha[-1]), atol=1e-6)
    assert np.sum(tops < times[-1]) > 5


def test_remask_stays_in_its_window():
    process = rj.processes.Masked(3, 4)
    times = rj.time_grid(process, 10)
    tops = rj.control.Remask(0.2, window=(float(times[3]), float(times[6]))).tops(process, times)
    np.testing.assert_array_equal(tops > times, (np.arange(11) >= 3) & (np.arange(11) <= 6))


@pytest.mark.parametrize("proposal", ["locally_optimal", "base", rj.control.Candidates(3)])
def test_particles_that_are_remasked_to_where_nothing_goes_on_weigh_nothing(proposal):
    """A product of laws that exclude each other's sequences in part; several tokens per step run into dead ends. The
    run goes on, and the others still count as much as without remasking, to what steps of several tokens do not know.
    """
    x = law().sequences
    allowed = (x.sum(axis=1) % 2 == 0, (x.sum(axis=1) != 2) & (x[:, 0] != x[:, 3]))  # what the last token decides
    laws = []
    for seed, some in enumerate(allowed):
        log_probs = np.where(some, TokenLaw.random(seed, 3, 4).log_probs, -np.inf)
        laws.append(TokenLaw(3, 4, log_probs - np.logaddexp.reduce(log_probs)))

    def finite(conditional):
        """In states that the law excludes a network says something, too."""
        return lambda x, t: jnp.where(
            jnp.any(conditional(x, t) > -jnp.inf, axis=-1, keepdims=True), conditional(x, t), 0.0
        )

    models = [rj.DiffusionModel(rj.processes.Masked(3, 4), finite(each.conditional)) for each in laws]
    times = rj.time_grid(models[0].process, 32)
    exact = np.exp(np.logaddexp.reduce(laws[0].log_probs + laws[1].log_probs))

    def estimates(renoise):
        result = rj.steer(
            KEY, rj.product(models), times, 64, proposal=proposal, renoise=renoise, num_groups=100, warn=False,
            progress=False,
        )  # fmt: skip
        assert np.any(np.asarray(result.log_weights) == -np.inf)
        assert not np.any(np.isnan(np.asarray(result.log_densities)))
        return np.exp(np.asarray(result.log_normalizer, np.float64)) / exact

    often = estimates(rj.control.Remask(0.2))  # far off: steps reveal a fifth of the tokens at once, however many steps
    assert np.all(np.isfinite(often))
    plain, remasked = estimates(None), estimates(rj.control.Remask(0.02))
    assert abs(remasked.mean() - plain.mean()) < 4 * np.sqrt((plain.var(ddof=1) + remasked.var(ddof=1)) / 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rj.control.TokenProposal(trust=math.nan), "trust must be finite"),
        (lambda: rj.control.TokenProposal(trust=-1.0), "trust must be positive"),
        (lambda: rj.control.TokenProposal("much"), "reward_coefficient must be a number"),
        (lambda: rj.control.Candidates(2, rj.control.Candidates(3)), "candidates of candidates"),
        (lambda: rj.control.Candidates(2, "base"), r"an object to draw them, such as TokenProposal\(\).*got 'base'"),
        (lambda: rj.control.Candidates(2, 3), "int lacks"),
        (lambda: rj.control.Remask(0.1, window="ab"), r"two times \(low, high\).*got 'ab'"),
        (lambda: rj.control.Remask(0.1, window=0.5), r"two times \(low, high\).*got 0.5"),
        (lambda: rj.control.Remask(0.1, window=(0.5, 0.2)), "low <= high"),
    ],
)
def test_what_makes_no_proposal_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reward_of_tokens_that_is_given_rows_is_warned_of():
    model = law().one_by_one()
    with pytest.warns(UserWarning, match=r"rows of token probabilities, \(\d, \d\), .* does not change with them"):
        rj.tilt(model, lambda x: 1.0 * jnp.sum(x == 2), at="x0", gradient=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rj.tilt(model, lambda x: 1.0 * jnp.sum(x == 2), at="x0")
        rj.tilt(model, lambda rows: jnp.sum(rows[:, 2]), at="x0", gradient=True)


def test_a_reward_of_rows_may_be_made_in_compiled_code():
    model = law().one_by_one()
    times = rj.time_grid(model.process, 4)

    @jax.jit
    def log_normalizer(scale):
        target = rj.tilt(model, lambda rows: scale * jnp.sum(rows[:, 2]), at="x0", gradient=True)
        return rj.steer(KEY, target, times, 16, **QUIET).log_normalizer

    assert float(log_normalizer(0.0)) == pytest.approx(0, abs=1e-5)
    assert float(log_normalizer(1.0)) > 0.1
