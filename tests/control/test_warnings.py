"""What steer() says of results that should not be trusted, and of targets that it cannot take."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import rnejax as rj
from rnejax.control.steer import SteeringWarning, warn_of_constraints
from rnejax.density import SignalAtEndWarning
from rnejax.systems import GaussianMixture

KEY = jax.random.key(5)
VP = rj.processes.VariancePreserving(t_min=0.02)
TIMES = rj.time_grid(VP, 12)


def normal(process=VP, **options):
    """A standard normal in two dimensions."""
    return GaussianMixture([(0.0, 0.0)], 1.0).model(process, **options)


def messages_of(target, times=TIMES, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rj.steer(KEY, target, times, 256, progress=False, **settings)
    return [str(warning.message) for warning in caught if issubclass(warning.category, SteeringWarning)]


def positive(x):
    return jnp.where(x[0] > 0, 0.0, -jnp.inf)


def test_a_constraint_on_the_way_is_warned_of():
    target = rj.tilt(normal(), positive, gradient=False)
    assert any("-inf for some states before t_min" in message for message in messages_of(target))


def test_euler_steps_that_are_too_long_are_warned_of():
    """Near pure noise the cosine process's drift is some hundred, and the process's own grid steps over it."""
    target = rj.temper(normal(rj.processes.Cosine()), 1.5)
    own, suitable = (
        rj.time_grid(target.process, 40),
        rj.time_grid(target.process, 40, "log_snr", t_max=0.95),
    )
    told = [message for message in messages_of(target, own, proposal="feynman_kac") if "Euler-Maruyama" in message]
    assert len(told) == 1
    # |f| = pi / 2 tan(pi t / 2) at the first step of all, from t_max.
    factor = 1 + np.pi / 2 * np.tan(np.pi / 2 * own[-1]) * (own[-1] - own[-2])
    assert f"from t = {own[-1]:.6g} multiplies a state by {factor:.3g}" in told[0]
    for times, proposal in ((suitable, "feynman_kac"), (own, "symmetric")):
        assert not any("Euler-Maruyama" in message for message in messages_of(target, times, proposal=proposal))


def test_a_constraint_on_the_result_alone_is_not():
    target = rj.tilt(normal(), positive, schedule=lambda t: float(t <= TIMES[0]), gradient=False)
    assert not any("-inf" in message for message in messages_of(target))


@pytest.mark.parametrize(("num_particles", "words"), [(1, "a single particle"), (4, "only 4 particles")])
def test_so_few_particles_are_warned_of(num_particles, words):
    with pytest.warns(SteeringWarning, match=words):
        rj.steer(KEY, normal(), TIMES, num_particles, progress=False)


def test_steering_from_a_time_at_which_the_data_are_still_there_is_warned_of():
    with pytest.warns(SignalAtEndWarning, match="end it near"):
        rj.steer(KEY, rj.temper(normal(prior=None), 2.0), TIMES[:6], 64, progress=False)


def test_so_is_the_probability_flow():
    pytest.importorskip("diffrax")
    with pytest.warns(SignalAtEndWarning, match="end it near"):
        rj.probability_flow_log_density(KEY, normal(prior=None), jnp.zeros((1, 2)), TIMES[:6])


@pytest.mark.parametrize(
    "make",
    [
        lambda beta: rj.temper(normal(), beta),
        lambda beta: rj.product([normal(), normal()], [beta, beta]),
        lambda beta: rj.guide(normal(), normal(), beta),
        lambda beta: rj.tilt(normal(), lambda x: x[0], scale=beta),
    ],
    ids=["temper", "product", "guide", "tilt"],
)
def test_a_traced_number_is_refused_with_the_way_out(make):
    with pytest.raises(ValueError, match=r"must be known when the program is traced.*static_argnames"):
        jax.jit(lambda beta: rj.steer(KEY, make(beta), TIMES, 8, warn=False).log_normalizer)(2.0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Sinh:
    """y = sinh(x): volumes change from place to place."""

    def to_data(self, x):
        return jnp.sinh(x)

    def to_model(self, y):
        return jnp.arcsinh(y)

    def log_det(self, x, subspace):
        return jnp.sum(jnp.log(jnp.cosh(x)))


@pytest.mark.parametrize("final", [False, True])
def test_where_volumes_change_from_place_to_place_a_power_is_one_in_the_users_coordinates(final):
    model = GaussianMixture([(0.0,)], 1.0).model(VP, transform=Sinh())
    result = rj.steer(KEY, rj.temper(model, 2.0), TIMES, 2000, num_groups=8, final_resampling=final, progress=False)
    if final:
        np.testing.assert_array_equal(result.log_weights, 0.0)

    def density(y):
        return np.exp(-0.5 * np.arcsinh(y) ** 2) / np.sqrt(2 * np.pi * (1 + y**2))

    volume, _ = scipy.integrate.quad(lambda y: density(y) ** 2, -np.inf, np.inf)
    second, _ = scipy.integrate.quad(lambda y: y**2 / (1 + y**2) * density(y) ** 2 / volume, -np.inf, np.inf)
    normalizers = np.exp(np.asarray(result.log_normalizer, np.float64))
    assert abs(normalizers.mean() - volume) < 4 * normalizers.std(ddof=1) / np.sqrt(8)
    y = np.asarray(result.particles, np.float64)[..., 0]
    shares = np.exp(np.asarray(result.log_weights, np.float64))
    means = (shares * y**2 / (1 + y**2)).mean(axis=1) / shares.mean(axis=1)
    assert abs(means.mean() - second) < 4 * means.std(ddof=1) / np.sqrt(8)


@pytest.mark.parametrize(("forbidden", "warned"), [([True, False, False], True), ([False, False, True], False)])
def test_a_constraint_is_warned_of_where_it_acts_before_the_end(forbidden, warned):
    # In order of execution: at t_max, on the way, at t_min.
    aux = {"reward_forbids_some": np.array(forbidden)[:, None]}
    assert bool(warn_of_constraints(aux, np.ones((3, 1)))) == warned
