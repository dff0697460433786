"""What cannot be exact is refused: combinations under which the exact scheme would silently lose its guarantee."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

import rnejax as rj

PROCESS = rj.processes.VariancePreserving(data_std=0.7)
TIMES = rj.time_grid(PROCESS, 4)


def score(x, t):
    return -x / (PROCESS.alpha(t) ** 2 * 0.49 + PROCESS.sigma(t) ** 2)


def reward(x):
    return -jnp.sum(x**2)


MODEL = rj.DiffusionModel(PROCESS, score, "score", "reference", (2,))


def test_a_product_with_an_exact_tilt_is_refused():
    with pytest.raises(ValueError, match=r"exact for one model with exponent 1.*2 model"):
        rj.product([rj.tilt(MODEL, reward), MODEL])
    with pytest.raises(ValueError, match="exact for one model"):
        rj.guide(MODEL, rj.tilt(MODEL, reward), scale=1.0)


def test_tempering_by_one_changes_nothing():
    target = rj.tilt(MODEL, reward)
    assert rj.temper(target, 1.0) is target


@pytest.mark.parametrize("proposal", [(0.5, 0.5), "feynman_kac"])
def test_a_proposal_with_another_auxiliary_kernel_is_refused_for_an_exact_tilt(proposal):
    with pytest.raises(ValueError, match="needs the noising kernel"):
        rj.steer(jax.random.key(0), rj.tilt(MODEL, reward), TIMES, 4, proposal=proposal)


@dataclass(frozen=True)
class Mine:
    """Everything that a proposal must have."""

    def needs_auxiliary(self, total_exponents):
        return rj.control.Drift().needs_auxiliary(total_exponents)

    def reverse(self, *arguments):
        return rj.control.Drift().reverse(*arguments)

    def forward(self, *arguments):
        return rj.control.Drift().forward(*arguments)


@dataclass(frozen=True)
class MineFollowsNoising(Mine):
    follows_noising: bool = True


def test_a_proposal_of_the_users_own_has_to_say_that_it_suits_an_exact_tilt():
    target = rj.tilt(MODEL, reward)
    with pytest.raises(ValueError, match="say so by an attribute follows_noising = True"):
        rj.steer(jax.random.key(0), target, TIMES, 4, proposal=Mine())
    rj.steer(jax.random.key(0), rj.tilt(MODEL, reward, exact=False), TIMES, 4, proposal=Mine(), warn=False)
    own = rj.steer(jax.random.key(0), target, TIMES, 4, proposal=MineFollowsNoising(), warn=False)
    ours = rj.steer(jax.random.key(0), target, TIMES, 4, warn=False)
    assert own.log_normalizer == ours.log_normalizer


def test_feynman_kac_refuses_exponents_that_change():
    with pytest.raises(ValueError, match="no weights for exponents that change"):
        rj.steer(jax.random.key(0), rj.temper(MODEL, lambda t: 1 + t), TIMES, 4, proposal="feynman_kac")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: rj.temper(MODEL, float("inf")), "exponent must be finite"),
        (lambda: rj.tilt(MODEL, reward, scale=float("nan")), "scale must be finite"),
        (lambda: rj.steer(jax.random.key(0), MODEL, TIMES, 4, proposal=(float("nan"), 0.0)), "must be finite"),
    ],
)
def test_numbers_that_are_none_are_refused_where_they_are_given(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_an_observation_of_integers_keeps_its_noise():
    target = rj.observe(MODEL, lambda x: x[:1], jnp.array([1]), 0.5)
    value = target.rewards[0].values(jnp.array([[1.0, 0.0]]))
    assert float(value[0]) == pytest.approx(-0.5 * math.log(2 * math.pi * 0.25), rel=1e-5)


def test_a_target_changed_by_hand_is_refused_when_it_is_run():
    target = replace(rj.tilt(MODEL, reward), exponents=(2.0,))
    with pytest.raises(ValueError, match="exact for one model with exponent 1"):
        rj.steer(jax.random.key(0), target, TIMES, 4)


def test_models_in_different_units_make_no_product():
    other = rj.DiffusionModel(PROCESS, score, "score", "reference", (2,), transform=rj.transforms.Affine(2.0))
    with pytest.raises(ValueError, match="must share one transform"):
        rj.product([MODEL, other])


def test_the_gradient_of_a_low_variance_reward_beside_an_exact_one_is_refused():
    exact = rj.tilt(MODEL, reward)
    with pytest.raises(ValueError, match="shifts the auxiliary kernel"):
        rj.steer(jax.random.key(0), rj.tilt(exact, reward, exact=False), TIMES, 4)
    rj.steer(jax.random.key(0), rj.tilt(exact, reward, exact=False, gradient=False), TIMES, 4, warn=False)


@pytest.mark.parametrize("options", [{"gradient": False}, {"at": "x0"}])
def test_feynman_kac_refuses_rewards_that_it_has_no_weights_for(options):
    with pytest.raises(ValueError, match="has no weights for rewards without one"):
        rj.steer(jax.random.key(0), rj.tilt(MODEL, reward, exact=False, **options), TIMES, 4, proposal="feynman_kac")
