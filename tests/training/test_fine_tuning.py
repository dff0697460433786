"""The loss of relative trajectory balance: its settings are those of its paths, which are of what is tuned."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.density import SignalAtEndWarning
from rnejax.processes import Cosine
from rnejax.systems import GaussianMixture
from rnejax.training import (
    Examples,
    FineTuned,
    ReplayBuffer,
    Trajectories,
    assess,
    back_and_forth_residual,
    batch_log_normalizer,
    trajectory_balance_loss,
    trajectory_balance_residual,
)
from rnejax.training.fine_tuning import SOURCES
from rnejax.transforms import Affine

KEY = jax.random.key(3)
PROCESS = Cosine(t_min=0.01, t_max=1.0)
TIMES = rj.time_grid(PROCESS, 6, "uniform")
X = jnp.asarray([[0.3, 1.0], [1.0, -0.5], [0.0, 0.1], [2.0, 0.2]])


def log_reward(x):
    return 0.7 * x[0]


def model(shift):
    """A denoiser that says the same of all states: samples are near it."""
    return rj.DiffusionModel(PROCESS, lambda w, x, t, c: w + 0.0 * x, "x0", shape=(2,), params=jnp.full(2, shift))


PRIOR = model(0.0)
TUNED = FineTuned(jnp.full(2, 30.0), jnp.zeros(()))  # far from the weights that all models below begin with


def key_of(source):
    return jax.random.split(KEY, len(SOURCES))[SOURCES.index(source)]


def test_own_samples_are_those_of_the_tuned_weights():
    loss = trajectory_balance_loss(model(0.0), PRIOR, TIMES, log_reward, sources={"renoised": 1.0})
    _, report = loss(KEY, TUNED, jnp.zeros((8, 2)))
    assert abs(report["log_reward"][0] - 0.7 * 30) < 1


def test_a_buffer_proposes_by_the_tuned_weights():
    buffer = ReplayBuffer(model(0.0), PRIOR, TIMES, log_reward)
    started = buffer.start(KEY, 50)
    assert np.abs(started.x).max() < 5
    renewed = buffer.renew(KEY, TUNED, started._replace(log_weights=jnp.full(50, -jnp.inf)))
    assert np.abs(renewed.x - 30).max() < 5


def test_a_row_without_a_number_for_a_weight_never_enters_a_buffer():
    for wrong in (jnp.nan, jnp.inf):
        buffer = ReplayBuffer(PRIOR, PRIOR, TIMES, lambda x, wrong=wrong: jnp.where(x[0] > 0, wrong, 0.0))
        with pytest.raises(FloatingPointError, match=r"NaN or \+inf: look at log_reward"):
            buffer.start(KEY, 16)
    buffer = ReplayBuffer(PRIOR, PRIOR, TIMES, log_reward)
    with pytest.raises(ValueError, match=r"begin with those of ReplayBuffer.start"):
        buffer.renew(KEY, TUNED, Examples(X))


@pytest.mark.parametrize(("turn", "steps"), [(0.5, 3), (1.0, 6), (0.01, 1)])
def test_paths_turn_round_where_they_are_told_to(turn, steps):
    sources = {"back_and_forth": 1.0}
    loss = trajectory_balance_loss(model(0.0), PRIOR, TIMES, log_reward, sources=sources, turn=turn)
    tuned = FineTuned(jnp.full(2, 0.4), jnp.zeros(()))
    values, _ = loss(KEY, tuned, X)
    part = TIMES[: steps + 1]
    found, _ = back_and_forth_residual(
        key_of("back_and_forth"), model(0.4), PRIOR, part, log_reward, X, condition=None, num_steps=None
    )
    np.testing.assert_allclose(values, 0.5 * found**2, rtol=1e-5)


@pytest.mark.parametrize("source", ["noised", "generated"])
def test_the_loss_leaps_below_a_time(source):
    above = float(TIMES[3])
    loss = trajectory_balance_loss(model(0.0), PRIOR, TIMES, log_reward, sources={source: 1.0}, above=above)
    tuned = FineTuned(jnp.full(2, 0.4), jnp.zeros(()))
    values, _ = loss(KEY, tuned, X)
    made = {"x": X} if source == "noised" else {"num_paths": 4}

    def squared(**options):
        found = trajectory_balance_residual(
            key_of(source), model(0.4), PRIOR, TIMES, log_reward, 0.0, **made, **options
        )
        return 0.5 * found.residual**2

    np.testing.assert_allclose(values, squared(above=above), rtol=1e-5)
    if source == "noised":  # generated paths have all steps in any case
        assert np.abs(np.asarray(values) - squared()).max() > 1e-2


def test_inflation_is_of_the_variance():
    """Of one step, from the same draws: the distance from the mean grows by the square root."""
    times = rj.time_grid(PROCESS, 1)

    def ends(inflation):
        return trajectory_balance_residual(
            KEY, model(0.5), PRIOR, times, log_reward, num_paths=50, inflation=inflation
        ).x

    centre = ends(1e-8)
    np.testing.assert_allclose(ends(4.0) - centre, 2 * (ends(1.0) - centre), rtol=1e-3, atol=1e-4)
    assert np.abs(ends(1.0) - centre).max() > 1e-2


def test_a_reward_is_one_number():
    """A vector of one would be broadcast to a residual of every pair of paths."""
    for log_reward in (lambda x: x[:1], lambda x: x):
        with pytest.raises(ValueError, match="log_reward of one example must return one number"):
            trajectory_balance_residual(KEY, model(0.1), PRIOR, TIMES, log_reward, num_paths=4)


def test_prior_and_posterior_have_one_transform():
    """Rewards are of the prior's coordinates; samples of the tuned model are in its own."""
    other = model(0.1)._replace(transform=Affine(2.0, 0.0))
    with pytest.raises(ValueError, match="must have one transform"):
        trajectory_balance_residual(KEY, other, PRIOR, TIMES, log_reward, num_paths=2)


def test_a_start_that_depends_on_the_data_is_told_whatever_the_prior():
    """A law of its own makes samples right; the tilt of that law is missing from residuals all the same."""
    mixture = GaussianMixture([[-1.0], [1.0]], 0.3)
    exact = mixture.model(PROCESS, "x0")
    times = TIMES[TIMES <= 0.55]
    posterior = rj.DiffusionModel(PROCESS, lambda w, x, t, c: w + 0.0 * x, "x0", shape=(1,), params=jnp.zeros(1))
    own = exact.with_prior(exact.prior_at(PROCESS.level(times[-1])))
    assert own.has_prior
    for prior in (exact, own):
        with pytest.warns(SignalAtEndWarning, match="the tilt of that law is missing: end it near t_max = 1"):
            trajectory_balance_residual(KEY, posterior, prior, times, log_reward, num_paths=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SignalAtEndWarning)
        rj.sample(KEY, own, times, 2)
        back_and_forth_residual(KEY, posterior, own, times, log_reward, jnp.zeros((2, 1)))


@pytest.mark.parametrize("bound", [0.5, 2.0, 5.0])
def test_the_bounded_normaliser_is_right_where_many_paths_have_no_reward(bound):
    random = np.random.default_rng(1)
    values = jnp.asarray(np.concatenate([random.normal(0.0, 1.0, 70), np.full(58, -100.0)]), jnp.float32)
    paths = Trajectories(jnp.zeros((128, 1)), jnp.zeros(128), values, -values)
    found = batch_log_normalizer(paths, bound=bound)
    # The slope of the loss there is zero, to what a float32 of a range of 100 can say.
    assert abs(np.clip(np.asarray(values) - float(found), -bound, bound).mean()) < 2e-5
    # An impossible one counts no more than one of very little reward.
    impossible = paths._replace(log_reward=jnp.where(values == -100, -jnp.inf, values))
    np.testing.assert_allclose(batch_log_normalizer(impossible, bound=bound), found, atol=1e-4)


def test_a_path_without_reward_is_of_its_own_condition_only():
    values = jnp.asarray([1.0, 3.0, -jnp.inf, 5.0])
    paths = Trajectories(jnp.zeros((4, 1)), jnp.zeros(4), values, -values)
    condition = jnp.asarray([0, 0, 1, 1])
    np.testing.assert_allclose(batch_log_normalizer(paths, condition), [2.0, 2.0, -np.inf, -np.inf])
    np.testing.assert_allclose(batch_log_normalizer(paths, condition, bound=0.5), [2.0, 2.0, 4.5, 4.5], atol=1e-5)
    wrong = paths._replace(log_reward=values.at[0].set(jnp.nan))
    np.testing.assert_array_equal(
        np.isnan(batch_log_normalizer(wrong, condition, bound=0.5)), [True, True, False, False]
    )
    with pytest.raises(ValueError, match="1 of 4 paths have a reward or ratio that is NaN"):
        assess(paths._replace(log_reward=values.at[0].set(jnp.nan)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bound": None}, "bound must be positive, math.inf for none"),
        ({"bound": "3"}, "bound must be positive, math.inf for none"),
        ({"sources": "noised"}, "sources must be names with their shares"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"above": 2.0}, "above must be below the largest time"),
    ],
)
def test_settings_that_are_none_are_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        trajectory_balance_loss(model(0.1), PRIOR, TIMES, log_reward, **options)


def test_what_is_learned_must_be_fine_tuned():
    loss = trajectory_balance_loss(model(0.1), PRIOR, TIMES, log_reward)
    with pytest.raises(TypeError, match="fit learns FineTuned"):
        loss(KEY, {"weights": jnp.zeros(2)}, X)
