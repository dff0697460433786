"""The formulas of the proposals at single states, against laws that say the same thing in another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import MIXTURE, gaussian
from steering_problems import FIRST, TIMES, VP

import rnejax as rj
from rnejax.control.problem import initial_law
from rnejax.control.proposals import Drift, FeynmanKac, Local, combine_covariances
from rnejax.kernels import CentreOfMassFree, Gaussian
from rnejax.processes.gaussian_steps import drift_and_diffusion

KEY = jax.random.key(13)
OTHER = gaussian([0.3, -0.5], [[0.30, 0.10], [0.10, 0.20]])
EXPONENTS = np.array([1.5, -0.4])


def reward(x):
    return jnp.sin(x[0]) + 0.5 * x[0] * x[1]


def local(x, level, strength, models=None, exponents=EXPONENTS):
    """What particles carry, looked at anew."""
    gradient = strength * jax.grad(reward)(x)
    return Local(
        x=x,
        evaluations=tuple(jax.tree.map(lambda leaf: leaf[0], m.evaluate(KEY, x[None], level)) for m in models),
        exponents=jnp.asarray(exponents),
        rewards=reward(x)[None],
        strengths=jnp.asarray([strength]),
        exact_gradient=jnp.zeros_like(x),
        gradient=gradient,
    )


@pytest.mark.parametrize("x", [[0.4, -0.2], [-1.1, 0.9]])
def test_feynman_kac_weights_and_drift_transport_the_path_of_targets(x):
    """Particles that drift with b and weigh at a rate c follow q if, in reverse time, with log q not normalised,

        c = -d/dt log q + div b + b . grad log q - (g^2 / 2) (lap log q + |grad log q|^2).

    Everything on the right but b is taken from closed-form densities by differentiation; b is the kernel's own, so
    that drift and weights are tested as a pair. A strength that grows adds its change times the reward.
    """
    process, t, strength, grown = rj.processes.VariancePreserving(), 0.3, 0.7, 0.9
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        models = [data.model(process, "score") for data in (MIXTURE, OTHER)]
        transition, proposal = process.transition(t - 1e-3, t), FeynmanKac()
        h = float(transition.duration)

        def log_q(x, t):
            parts = [data.log_density(process, x, t) for data in (MIXTURE, OTHER)]
            return sum(beta * part for beta, part in zip(EXPONENTS, parts, strict=True)) + strength * reward(x)

        def drift(x):
            at_t = local(x, process.level(t), strength, models)
            kernel = proposal.reverse(transition, at_t, jnp.asarray(EXPONENTS.sum()), ())
            return (kernel.mean - x) / h

        @jax.jit
        def rate(x, t):
            gradient, by_time = jax.grad(log_q, (0, 1))(x, t)
            laplacian = jnp.trace(jax.hessian(log_q)(x, t))
            b, divergence = drift(x), jnp.trace(jax.jacfwd(drift)(x))
            _, diffusion = drift_and_diffusion(process.level(0.3))
            return -by_time + divergence + b @ gradient - 0.5 * diffusion * (laplacian + gradient @ gradient)

        at_t = local(x, transition.t, strength, models)
        at_s = local(x + 0.3, transition.s, grown, models)
        found = proposal.log_increment(transition, at_t, at_s)
        expected = h * rate(x, t) + (grown - strength) * reward(x)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_feynman_kac_counts_the_dimensions_of_the_subspace():
    """For Gaussian data on it and exponent beta, a state with |x|^2 = d V / beta weighs d log Z_beta / d tau.

    Z_beta = int p_t^beta is proportional to V_t^{d (1 - beta) / 2}, and at such a state the rate is its own mean.
    """
    process, beta, atoms = rj.processes.VariancePreserving(subspace=CentreOfMassFree()), 2.0, 3
    model = rj.DiffusionModel(process, lambda x, t: -x, "score", shape=(atoms, 2))  # unit variance at every time
    d = (atoms - 1) * 2
    x = jnp.asarray([[1.0, 0.5], [-2.0, 0.5], [1.0, -1.0]])
    x = x * jnp.sqrt(d / beta / jnp.sum(x**2))
    transition = process.transition(0.29, 0.3)
    evaluation = jax.tree.map(lambda leaf: leaf[0], model.evaluate(KEY, x[None], transition.t))
    nothing = jnp.zeros_like(x)
    at = Local(x, (evaluation,), jnp.asarray([beta]), jnp.zeros(0), jnp.zeros(0), nothing, nothing)
    # V_t = 1 does not change, so that log Z_beta does not either. In float32 terms of size h d f = 0.1 cancel.
    np.testing.assert_allclose(FeynmanKac().log_increment(transition, at, at), 0.0, atol=1e-6)


@pytest.mark.parametrize(("scheme", "share"), [("exact_gradient", 0.3), ("gradient", 0.5)])
def test_a_gradient_moves_the_proposal_by_its_covariance_and_nothing_else(scheme, share):
    process = rj.processes.VariancePreserving()
    model, x = MIXTURE.model(process, "x0", "full"), jnp.asarray([0.1, 0.3])
    transition, proposal = process.transition(0.2, 0.4), Drift(reward_coefficient=0.3)
    evaluation = jax.tree.map(lambda leaf: leaf[0], model.evaluate(KEY, x[None], transition.t))
    nothing, gradient = jnp.zeros(2), jnp.asarray([0.8, -0.5])
    without = Local(x, (evaluation,), jnp.ones(1), jnp.zeros(1), jnp.ones(1), nothing, nothing)
    kernels = (model.kernel(transition, x, evaluation),)
    plain = proposal.reverse(transition, without, jnp.ones(()), kernels)
    moved = proposal.reverse(transition, without._replace(**{scheme: gradient}), jnp.ones(()), kernels)
    np.testing.assert_allclose(moved.mean - plain.mean, share * plain.covariance_times(gradient), rtol=1e-4, atol=1e-6)
    # Nothing is isotropic here: a covariance that is left out would show.
    assert abs(float(plain.excess[0] - plain.excess[1])) > 0.01
    for name in ("variance", "excess", "basis"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(plain, name))


def dense(eigenvalues, angle):
    c, s = np.cos(angle), np.sin(angle)
    return Gaussian(jnp.zeros(2), jnp.zeros(2), jnp.ones(()), jnp.asarray(eigenvalues), jnp.asarray([[c, -s], [s, c]]))


def matrix(kernel):
    return np.asarray((kernel.basis * kernel.excess) @ kernel.basis.T)


@pytest.mark.parametrize("weights", [(0.4, 0.6), (-1.5, 2.5)])
def test_covariances_are_averaged_and_stay_between_the_smallest_and_the_largest(weights):
    first, second = dense([-0.3, 0.5], 0.1), dense([0.4, -0.2], 0.4)
    excess, basis = combine_covariances((first, second), jnp.asarray(weights))
    eigenvalues, vectors = np.linalg.eigh(weights[0] * matrix(first) + weights[1] * matrix(second))
    clipped = np.clip(eigenvalues, -0.3, 0.5)
    np.testing.assert_allclose((basis * excess) @ basis.T, (vectors * clipped) @ vectors.T, atol=1e-6)
    assert np.any(clipped != eigenvalues) == (weights[0] < 0)  # the second case clips at both ends
    assert (eigenvalues[0] < -0.3 and eigenvalues[1] > 0.5) == (weights[0] < 0)


def test_covariances_of_a_product_are_averaged_by_their_share_of_the_exponents():
    transition, x = VP.transition(0.3, 0.5), jnp.ones(2)
    evaluation = jax.tree.map(lambda leaf: leaf[0], FIRST.model(VP).evaluate(KEY, x[None], transition.t))
    kernels = tuple(transition.reverse(x, evaluation.excess, spread) for spread in (0.02, -0.02))
    nothing = jnp.zeros(2)
    at_t = Local(x, (evaluation,) * 2, jnp.asarray([1.5, 0.5]), jnp.zeros(0), jnp.zeros(0), nothing, nothing)
    law = Drift().reverse(transition, at_t, jnp.asarray(2.0), kernels)
    np.testing.assert_allclose(law.excess, 0.75 * kernels[0].excess + 0.25 * kernels[1].excess, rtol=1e-5)


@pytest.mark.parametrize("totals", [(1.0, 2.0), (2.0, 1.0)])
def test_the_last_state_is_looked_at_wherever_exponents_do_not_sum_to_one(totals):
    assert Drift().needs_auxiliary(np.array(totals))
    assert not Drift().needs_auxiliary(np.ones(2))


def test_dense_priors_of_a_product_start_from_the_reference():
    top = VP.level(TIMES[-1])
    prior = Gaussian(jnp.zeros(2), jnp.zeros(2), jnp.ones(()), jnp.asarray([0.5, -0.5]), dense([0, 0], 0.7).basis)
    models = tuple(FIRST.model(VP, prior=prior) for _ in range(2))
    initial = initial_law(models, top, np.ones(2))
    assert initial.basis is None
    np.testing.assert_allclose(initial.variance * (1 + initial.excess), top.reference_variance / 2, rtol=1e-6)
