"""The choices of the reverse kernel's covariance, against Cov[x_0 | x_t] of laws where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, MIXTURE

import rnejax as rj
from rnejax.covariance import Analytic, get_covariance
from rnejax.kernels import CentreOfMassFree
from rnejax.processes import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving

KEY = jax.random.key(17)
T = 0.4
X = np.array([0.1, 0.3])  # between the components of MIXTURE, where the posterior is no Gaussian


def posterior_covariance(model, x, t, key=KEY):
    """Cov[x_0 | x_t = x] as the model has it: a number, a diagonal or a matrix."""
    level = model.process.level(t)
    evaluation = jax.jit(lambda x: model._evaluate_one(x, level, key))(jnp.asarray(x))
    values = (evaluation.spread + 1) * level.reference_posterior_variance
    return values if evaluation.basis is None else (evaluation.basis * values) @ evaluation.basis.T


@pytest.mark.parametrize("process", [VariancePreserving(), Cosine(data_std=0.5), VarianceExploding(), RectifiedFlow()])
def test_full_is_the_covariance_of_a_mixture_and_diagonal_its_diagonal(process):
    with jax.enable_x64(True):
        exact = jax.jit(lambda x: MIXTURE.posterior(process, x, T)[1])(jnp.asarray(X))
        full = posterior_covariance(MIXTURE.model(process, "score", "full"), X, T)
        np.testing.assert_allclose(full, exact, rtol=1e-9, atol=1e-11)
        diagonal = posterior_covariance(MIXTURE.model(process, "x0", "diagonal"), X, T)
        np.testing.assert_allclose(diagonal, np.diag(exact), rtol=1e-9)


def test_hutchinson_is_right_on_average():
    process, n = VariancePreserving(), 4000
    exact = np.trace(jax.jit(lambda x: MIXTURE.posterior(process, x, T)[1])(jnp.asarray(X, jnp.float32))) / 2
    model, level = MIXTURE.model(process, "x0", "hutchinson"), process.level(T)
    states = jnp.tile(jnp.asarray(X, jnp.float32), (n, 1))
    spread = jax.jit(lambda key: model.evaluate(key, states, level).spread)(KEY)
    found = (spread + 1) * level.reference_posterior_variance
    z = (np.mean(found) - exact) / (np.std(found, ddof=1) / np.sqrt(n))
    assert abs(z) < 4
    # No draw is outside [0, sigma^2 / alpha^2], so that clipping did not bias the mean.
    assert 0 < found.min() < found.max() < level.sigma**2 / level.alpha**2


def test_hutchinson_draws_belong_to_the_key():
    # The model's kernel and a proposal made with the same key share their covariance.
    model = MIXTURE.model(VariancePreserving(), "x0", "hutchinson")
    first, again = (posterior_covariance(model, X, T, jax.random.key(2)) for _ in range(2))
    assert first == again


def test_reference_is_the_posterior_covariance_of_the_reference():
    process = VariancePreserving(data_std=0.6)
    variance = 0.36 * process.alpha(T) ** 2 + process.sigma(T) ** 2
    found = posterior_covariance(MIXTURE.model(process, "x0", "reference"), X, T)
    np.testing.assert_allclose(found, 0.36 * process.sigma(T) ** 2 / variance, rtol=1e-6)


def test_analytic_is_interpolated_in_log_snr_and_constant_outside():
    process = VariancePreserving()
    log_snr = process.level(np.array([0.6, 0.4, 0.2])).log_snr
    model = MIXTURE.model(process).with_covariance(Analytic(log_snr, jnp.asarray([0.5, 0.8, 1.2])))
    for t, ratio in ((0.4, 0.8), (0.9, 0.5), (0.1, 1.2)):
        reference = process.level(t).reference_posterior_variance
        np.testing.assert_allclose(posterior_covariance(model, X, t), ratio * reference, rtol=1e-5)


def test_a_denoiser_that_is_no_gradient_still_gives_a_covariance():
    # Jacobian [[1, 3], [-1, -0.5]]: symmetrised [[1, 1], [1, -0.5]], with a negative eigenvalue to be cut off.
    process = RectifiedFlow()
    jacobian = jnp.asarray([[1.0, 3.0], [-1.0, -0.5]])
    model = rj.DiffusionModel(process, lambda x, t: jacobian @ x, "x0", "full", shape=(2,))
    found = posterior_covariance(model, X, T)
    values, vectors = np.linalg.eigh(np.array([[1.0, 1.0], [1.0, -0.5]]))
    factor = process.sigma(T) ** 2 / process.alpha(T)
    np.testing.assert_allclose(found, factor * (vectors * np.maximum(values, 0)) @ vectors.T, atol=1e-6)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "hutchinson"])
def test_where_no_signal_is_left_the_covariance_is_that_of_the_data(covariance):
    # The Jacobian of the denoiser is zero at t = 1, and Cov[x_0 | x_1] is the data's. It is taken at a t just below,
    # which leaves errors of order eps^(2/3) = 2e-5 in float32; the denoiser itself is that at t = 1.
    process = RectifiedFlow(t_max=1.0)
    level = process.level(1.0)
    model = GAUSSIAN.model(process, "velocity", covariance)
    x = jnp.asarray([0.7, -1.2, 0.3])
    evaluation = jax.jit(lambda x: model._evaluate_one(x, level, KEY))(x)
    np.testing.assert_allclose(level.denoised(x, evaluation.excess), GAUSSIAN.means[0], atol=1e-6)
    data = GAUSSIAN.covariances[0]
    if covariance == "full":
        found = evaluation.basis @ jnp.diag(evaluation.spread) @ evaluation.basis.T
        np.testing.assert_allclose(found, data - np.eye(3), atol=1e-4)
    elif covariance == "diagonal":
        np.testing.assert_allclose(evaluation.spread, np.diag(data) - 1, atol=1e-4)
    else:  # v . C v / 3 for a probe of signs
        signs = np.array([[1, a, b] for a in (1, -1) for b in (1, -1)])
        possible = np.einsum("ki,ij,kj->k", signs, data, signs) / 3 - 1
        assert np.abs(possible - float(evaluation.spread)).min() < 1e-4


def test_full_covariance_on_a_subspace_stays_in_it():
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())
    model = rj.DiffusionModel(process, lambda x, t: jnp.tanh(x), "x0", "full", shape=(3, 2))
    x = jnp.asarray([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    kernel = jax.jit(lambda x: model.reverse(x, 0.4, 0.3))(x)
    uniform = jnp.ones((3, 2))
    np.testing.assert_allclose(kernel.covariance_times(uniform), 0, atol=1e-6)
    np.testing.assert_allclose(kernel.mean.mean(axis=0), 0, atol=1e-6)


def test_a_diagonal_covariance_is_refused_on_a_subspace():
    process = VariancePreserving(subspace=rj.kernels.CentreOfMassFree())
    model = rj.DiffusionModel(process, lambda x, t: x, "x0", "diagonal", shape=(3, 2))
    with pytest.raises(ValueError, match=r"diagonal covariance has no meaning on CentreOfMassFree.*'full'"):
        model.reverse(jnp.zeros((3, 2)), 0.4, 0.3)


def test_a_covariance_object_is_taken_as_it_is():
    table = Analytic(jnp.zeros(1), jnp.ones(1))
    assert get_covariance(table) is table


def evaluate(choice, linear, process=None, shape=(2,), n=1):
    """What a choice makes of an excess that is linear in the state: excess(x) = linear(x)."""
    process = VariancePreserving() if process is None else process
    level = process.level(T)
    excess_fn = jax.vmap(linear)
    return get_covariance(choice)(KEY, excess_fn, jnp.ones((n, *shape)), level, process.subspace), level


def test_hutchinson_and_diagonal_stay_where_a_covariance_can_be():
    low, level = evaluate("hutchinson", lambda x: -100 * x)
    high, _ = evaluate("hutchinson", lambda x: 100 * x)
    reference = level.reference_posterior_variance
    np.testing.assert_allclose(low.spread, -1, rtol=1e-6)
    np.testing.assert_allclose((high.spread + 1) * reference, level.sigma**2 / level.alpha**2, rtol=1e-6)
    diagonal, _ = evaluate("diagonal", lambda x: jnp.asarray([-100.0, 0.1]) * x)
    expected = [-reference, 0.1 * level.sigma**2 / level.alpha]
    np.testing.assert_allclose(diagonal.spread[0] * reference, expected, rtol=1e-6)


def test_hutchinson_on_a_subspace_averages_over_its_dimensions():
    process, c = VariancePreserving(subspace=CentreOfMassFree()), 0.1
    found, level = evaluate("hutchinson", lambda x: c * process.subspace.project(x), process, (3, 2), n=4000)
    # tr(c P) over the four dimensions of the subspace is c for every one of them.
    spread = np.asarray(found.spread) * float(level.reference_gain)
    assert abs(spread.mean() - c) < 4 * spread.std(ddof=1) / np.sqrt(len(spread))


def test_hutchinson_probes_only_the_subspace():
    # A network may do what it likes off the subspace, where no state ever is: here it moves with the centre of mass.
    process = VariancePreserving(subspace=CentreOfMassFree())
    centre = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    found, _ = evaluate("hutchinson", lambda x: x.mean() * centre, process, (3, 2), n=16)
    np.testing.assert_allclose(found.spread, 0, atol=1e-6)
