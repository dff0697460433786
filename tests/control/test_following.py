"""A model as the proposal: exact posteriors leave nothing to weigh, any other is corrected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import AnyOrder, Cosine, NonReversible, RectifiedFlow
from rnejax.systems import GaussianMixture, TokenLaw

KEY = jax.random.key(3)
MEAN = np.array([0.4, -0.3])
TILT = np.array([0.8, -0.5])
# The reference of each process has the data's covariance, so that kernels are exact without a decomposition.
SCALAR = Cosine(t_min=0.01, t_max=1.0, data_std=0.6)
CIRCULATING = NonReversible(
    np.diag([1.0, 2.0]),
    np.array([[0.0, 1.5], [-1.5, 0.0]]),
    data_covariance=[[0.5, 0.2], [0.2, 0.3]],
    t_min=0.01,
    t_max=40.0,
)
PROCESSES = pytest.mark.parametrize("process", [SCALAR, CIRCULATING], ids=["scalar", "circulating"])
LAW = TokenLaw.random(3, 2, 3)
REWARDS = np.random.default_rng(4).normal(size=8)
TILTED = LAW.log_probs + REWARDS
TOKENS = AnyOrder(2, 3)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def reward(x):
    return x @ jnp.asarray(TILT)


def reward_of_tokens(x):
    return jnp.asarray(REWARDS)[x @ jnp.asarray([4, 2, 1])]


def gaussian(process, shift=(0.0, 0.0)):
    return GaussianMixture([MEAN + np.asarray(shift)], covariances=covariance_of(process)[None]).model(process, "x0")


def covariance_of(process):
    return np.array([[0.5, 0.2], [0.2, 0.3]]) if process is CIRCULATING else 0.36 * np.eye(2)


def at_t_min(process):
    """The map x_0 -> E[x_{t_min} | x_0], and the covariance of the noised data there."""
    if isinstance(process, NonReversible):
        moments = process.moments(process.t_min)
        signal, noise = moments.signal[0], moments.noise[0]
    else:
        signal = float(process.alpha(process.t_min)) * np.eye(2)
        noise = float(process.sigma(process.t_min)) ** 2 * np.eye(2)
    return signal, signal @ covariance_of(process) @ signal.T + noise


def exact_answer(process):
    """By how much the data's mean moves under exp(b . x_{t_min}), and log Z."""
    signal, covariance = at_t_min(process)
    return np.linalg.solve(signal, covariance @ TILT), float(TILT @ signal @ MEAN + 0.5 * TILT @ covariance @ TILT)


def only_at_the_end(t):
    return 1.0 if t <= 0.01 else 0.0


@PROCESSES
def test_the_exact_posterior_proposes_what_needs_no_weight(process):
    shift, log_normalizer = exact_answer(process)
    target = rj.tilt(gaussian(process), reward, schedule=only_at_the_end)
    times = rj.time_grid(process, 8)
    result = rj.steer(KEY, target, times, 64, ess_threshold=0.0, proposal=gaussian(process, shift))
    np.testing.assert_allclose(result.log_normalizer, log_normalizer, atol=1e-8)
    np.testing.assert_allclose(result.log_weights, 0, atol=1e-8)
    assert result.log_densities.shape == (64, 1), "densities are those of the target's models"
    plain = rj.steer(KEY, target, times, 64, ess_threshold=0.0, proposal=gaussian(process))
    assert np.std(plain.log_weights) > 0.1


@pytest.mark.parametrize("threshold", [0.0, 0.99, 1.01])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "low_variance"])
@PROCESSES
def test_any_other_model_is_corrected(process, exact, threshold):
    """Half-way to the posterior, or off to the side: what is estimated stays the same."""
    shift, log_normalizer = exact_answer(process)
    target = rj.tilt(gaussian(process), reward, exact=exact)
    proposal = gaussian(process, 0.5 * shift + np.array([0.1, 0.2]))
    result = rj.steer(
        KEY, target, rj.time_grid(process, 8), 64, threshold, proposal, num_groups=300, progress=False, warn=False
    )
    ratios = np.exp(np.asarray(result.log_normalizer) - log_normalizer)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(300)
    # The tilted mean, times Z: unbiased as well.
    weighted = np.exp(np.asarray(result.log_weights))[..., None] * np.asarray(result.particles)
    means = ratios[:, None] * weighted.mean(axis=1)
    expected = at_t_min(process)[0] @ (MEAN + shift)
    assert np.all(np.abs(means.mean(axis=0) - expected) < 4 * means.std(axis=0) / np.sqrt(300))
    if threshold == 0.99:
        assert 0 < np.asarray(result.info.resampled).mean() < 1


def table(log_probs):
    return TokenLaw(2, 3, log_probs - np.logaddexp.reduce(log_probs)).one_by_one()


def test_tokens_have_proposals_of_their_own():
    times = rj.time_grid(TOKENS, 3, t_max=3.0)
    expected = np.logaddexp.reduce(TILTED)
    target = rj.tilt(table(LAW.log_probs), reward_of_tokens, gradient=False, schedule=lambda t: float(t == 0))
    exact = rj.steer(KEY, target, times, 64, ess_threshold=0.0, proposal=table(TILTED))
    np.testing.assert_allclose(exact.log_normalizer, expected, atol=1e-9)
    np.testing.assert_allclose(exact.log_weights, 0, atol=1e-9)
    target = rj.tilt(table(LAW.log_probs), reward_of_tokens, gradient=False)
    for threshold in (0.0, 0.5, 1.01):
        other = rj.steer(
            KEY, target, times, 16, threshold, table(0.5 * TILTED), num_groups=400, progress=False, warn=False
        )
        ratios = np.exp(np.asarray(other.log_normalizer) - expected)
        assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(400)


def test_gradients_of_rewards_are_not_asked_for():
    """The proposal knows nothing of them; a reward that has none is as good."""

    @jax.custom_jvp
    def rough(x):
        return x @ jnp.asarray(TILT)

    @rough.defjvp
    def _(primals, tangents):
        raise AssertionError("nobody follows this gradient")

    shift, _ = exact_answer(SCALAR)
    times = rj.time_grid(SCALAR, 4)
    with pytest.raises(AssertionError):
        rj.steer(KEY, rj.tilt(gaussian(SCALAR), rough), times, 8, warn=False)
    rj.steer(KEY, rj.tilt(gaussian(SCALAR), rough), times, 8, proposal=gaussian(SCALAR, shift), warn=False)


def test_the_law_generation_starts_from_is_the_targets():
    """A prior law of its own, and one of no Gaussian at all: weights know where particles come from."""
    process = RectifiedFlow(t_min=0.05, t_max=0.9)
    mixture = GaussianMixture([[-1.0], [1.5]], 0.5)
    top = mixture.noised(process.level(process.t_max))
    model = mixture.model(process, "x0", "full", prior=top)
    other = GaussianMixture([[-1.2], [1.6]], 0.6).model(process, "x0", "full", prior=top)
    result = rj.steer(
        KEY, model, rj.time_grid(process, 60), 128, 0.5, other, num_groups=200, progress=False, warn=False
    )
    ratios = np.exp(np.asarray(result.log_normalizer))
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(200) + 1e-12
    assert np.std(np.asarray(result.log_weights)) > 1e-3


def test_models_of_something_else_cannot_propose():
    times = rj.time_grid(SCALAR, 4)
    with pytest.raises(ValueError, match="only a model of the same process and shape can propose"):
        rj.steer(KEY, rj.tilt(gaussian(SCALAR), reward), times, 8, proposal=gaussian(CIRCULATING))
    flat = GaussianMixture([[0.0]], 1.0).model(SCALAR)
    with pytest.raises(ValueError, match="only a model of the same process and shape can propose"):
        rj.steer(KEY, rj.tilt(gaussian(SCALAR), reward), times, 8, proposal=flat)


def test_candidates_are_drawn_from_the_model_that_is_followed():
    """One candidate of the exact posterior needs no weight; of any other model, several leave log Z as it is."""
    times = rj.time_grid(TOKENS, 3, t_max=3.0)
    expected = np.logaddexp.reduce(TILTED)
    target = rj.tilt(table(LAW.log_probs), reward_of_tokens, gradient=False, schedule=lambda t: float(t == 0))
    one = rj.control.Candidates(1, rj.control.Follow(table(TILTED)))
    exact = rj.steer(KEY, target, times, 64, ess_threshold=0.0, proposal=one, warn=False)
    np.testing.assert_allclose(exact.log_normalizer, expected, atol=1e-9)
    np.testing.assert_allclose(exact.log_weights, 0, atol=1e-9)
    assert exact.log_densities.shape == (64, 1)
    other = rj.control.Candidates(3, rj.control.Follow(table(0.5 * TILTED)))
    result = rj.steer(KEY, target, times, 16, 0.5, other, num_groups=400, progress=False, warn=False)
    ratios = np.exp(np.asarray(result.log_normalizer) - expected)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(400)
