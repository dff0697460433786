"""Data laws for which everything that a network could say is known, Gaussian mixtures with dense covariances, and the
processes that tests put them on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.scipy.stats import multivariate_normal

import rnejax as rj
from rnejax.processes import (
    Cosine,
    CriticallyDamped,
    DiscreteVariancePreserving,
    LinearSDE,
    NonReversible,
    PhaseSpaceLangevin,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights_k N(means_k, covariances_k) in d dimensions; arrays of shape (k,), (k, d), (k, d, d)."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @property
    def dimension(self):
        return self.means.shape[1]

    def noised(self, alpha, sigma):
        """The mixture of x_t = alpha x_0 + sigma eps: means and covariances."""
        means, covariances = jnp.asarray(self.means), jnp.asarray(self.covariances)
        return alpha * means, alpha**2 * covariances + sigma**2 * jnp.eye(self.dimension)

    def under(self, process, t):
        """Means and covariances of the flattened x_t, and the map from x_0 to its mean."""
        signal, noise = moments(process, t, self.dimension)
        means, covariances = jnp.asarray(self.means), jnp.asarray(self.covariances)
        return means @ signal.T, signal @ covariances @ signal.T + noise, signal

    def log_density(self, process, x, t):
        means, covariances, _ = self.under(process, t)
        each = jax.vmap(lambda m, c: multivariate_normal.logpdf(x.reshape(-1), m, c))(means, covariances)
        return jax.nn.logsumexp(jnp.log(jnp.asarray(self.weights, x.dtype)) + each)

    def posterior(self, process, x, t):
        """E[x_0 | x_t = x] and Cov[x_0 | x_t = x], by conditioning every component."""
        means, covariances, signal = self.under(process, t)
        x = x.reshape(-1)
        each = jax.vmap(lambda m, c: multivariate_normal.logpdf(x, m, c))(means, covariances)
        responsibilities = jax.nn.softmax(jnp.log(jnp.asarray(self.weights, x.dtype)) + each)

        def condition(m, c, noised_mean, noised_covariance):
            regression = jnp.linalg.solve(noised_covariance, signal @ c).T
            return m + regression @ (x - noised_mean), c - regression @ signal @ c

        locations, spreads = jax.vmap(condition)(
            jnp.asarray(self.means), jnp.asarray(self.covariances), means, covariances
        )
        mean = responsibilities @ locations
        second = spreads + locations[:, :, None] * locations[:, None, :]
        return mean, jnp.tensordot(responsibilities, second, 1) - jnp.outer(mean, mean)

    def output(self, process, prediction):
        """fn(x, t): what a perfect network of this prediction type returns, written from the posterior mean."""

        def fn(x, t):
            if prediction == "energy":
                return -self.log_density(process, x, t)
            if process in LINEAR:
                return self._linear_output(process, prediction, x, t)
            alpha, sigma = process.alpha(t), process.sigma(t)
            x0 = self.posterior(process, x, t)[0]
            noise = (x - alpha * x0) / sigma
            return {
                "x0": x0,
                "epsilon": noise,
                "score": -noise / sigma,
                "v": alpha * noise - sigma * x0,
                "velocity": process.alpha_rate(t) * x0 + process.sigma_rate(t) * noise,
            }[prediction]

        return fn

    def _linear_output(self, process, prediction, x, t):
        """Of a linear SDE: the score is that of the noise, whose last coordinates are what a network is asked for."""
        x0 = self.posterior(process, x, t)[0]
        signal, noise = moments(process, t, self.dimension)
        score = -jnp.linalg.solve(noise, x.reshape(-1) - signal @ x0)[-self.dimension :]
        root = jnp.linalg.cholesky(noise)[-self.dimension :, -self.dimension :]
        return {"x0": x0, "score": score, "epsilon": -root.T @ score}[prediction]

    def model(self, process, prediction="x0", covariance="reference", **options):
        """The model that knows this law, which at t_max it starts from exactly."""
        shape = process.state_shape((self.dimension,))
        options = {"prior": Noised(self, process, process.t_max), "shape": shape, **options}
        return rj.DiffusionModel(process, self.output(process, prediction), prediction, covariance, **options)

    def sample(self, key, num):
        key_component, key_noise = jax.random.split(key)
        components = jax.random.choice(key_component, len(self.weights), (num,), p=jnp.asarray(self.weights))
        roots = jnp.linalg.cholesky(jnp.asarray(self.covariances))
        noise = jax.random.normal(key_noise, (num, self.dimension))
        return jnp.asarray(self.means)[components] + jnp.einsum("nij,nj->ni", roots[components], noise)


@dataclass(frozen=True)
class Noised:
    """The law of a mixture at one time, as a prior."""

    data: Mixture
    process: rj.processes.GaussianProcess
    t: float

    def sample(self, key):
        key_data, key_noise = jax.random.split(key)
        clean = self.data.sample(key_data, 1)[0]
        signal, covariance = moments(self.process, self.t, clean.size)
        noise = jnp.linalg.cholesky(covariance) @ jax.random.normal(key_noise, covariance.shape[:1])
        return (signal @ clean + noise).reshape(self.process.state_shape(clean.shape))

    def log_prob(self, x):
        return self.data.log_density(self.process, x, self.t)


def gaussian(mean, covariance):
    """One Gaussian as a mixture."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    return Mixture(np.ones(1), mean[None], covariance[None])


# Lopsided on purpose: symmetric targets hide sign errors.
GAUSSIAN = gaussian([0.7, -0.4, 0.2], [[0.50, 0.20, -0.10], [0.20, 0.30, 0.05], [-0.10, 0.05, 0.80]])
MIXTURE = Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-1.0, 0.2], [0.8, 1.1], [0.5, -0.9]]),
    np.array([[[0.09, 0.03], [0.03, 0.04]], [[0.02, 0.0], [0.0, 0.05]], [[0.06, -0.02], [-0.02, 0.03]]]),
)

# Every kind of scalar process, some with a reference of another width than 1.
PROCESSES = [
    VariancePreserving(),
    Cosine(data_std=0.6),
    VarianceExploding(),
    RectifiedFlow(),
    DiscreteVariancePreserving(np.linspace(1e-4, 0.05, 300), data_std=1.5),
]

# Every kind of linear SDE, with its drift A, its noise rate G G^T and what the coordinates that are no data start with.
A = np.array([[1.0, -2.0, 0.2], [1.5, 1.2, 0.4], [0.1, 0.3, 0.7]])
G = np.array([[1.0, 0.2], [0.3, 1.0], [0.0, 0.5]])
U = np.array([[2.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 1.0]])
Q = np.array([[0.0, 2.0, -1.0], [-2.0, 0.0, 1.5], [1.0, -1.5, 0.0]])
OSCILLATOR = np.array([[0.0, -4.0], [1.0, 4.0]]), np.diag([0.0, 2.0])
DAMPED = np.array([[0.0, -2.0], [1.0, 1.0]]), np.diag([0.0, 1.0])
LINEAR = {
    LinearSDE(0.5, 1.0, t_max=4.0): (0.5 * np.eye(3), np.eye(3), 1.0, 0.0),
    LinearSDE([0.5, 1.0, 1.5], [1.0, 0.7, 2.0], data_covariance=0.6, t_max=2.0, beta=1.5): (
        np.diag([0.5, 1.0, 1.5]), np.diag([1.0, 0.49, 4.0]), 1.5, 0.0,
    ),
    LinearSDE(A, 1.3, t_max=1.0): (A, 1.69 * np.eye(3), 1.0, 0.0),
    LinearSDE(A, G, t_max=1.0): (A, G @ G.T, 1.0, 0.0),  # noise reaches a third of the directions by the drift only
    NonReversible(U, Q, t_max=2.0): ((np.eye(3) + Q) @ U, 2 * np.eye(3), 1.0, 0.0),
    NonReversible(np.diag(U), data_covariance=0.5, t_max=3.0): (np.diag(np.diag(U)), 2 * np.eye(3), 1.0, 0.0),
    CriticallyDamped(data_std=0.8, t_min=0.01): (*OSCILLATOR, 4.0, 0.01),
    PhaseSpaceLangevin(friction=0.5, mass=0.5, beta=2.0, t_max=2.0): (*DAMPED, 2.0, 0.02),
}  # fmt: skip


def moments(process, t, dimension):
    """The maps x_0 -> E[x_t | x_0] and Cov[x_t | x_0], as matrices of the flattened state.

    Of a linear SDE from its stationary law, V = S - E S E^T, which the library does not use.
    """
    if process not in LINEAR:
        return process.alpha(t) * jnp.eye(dimension), process.sigma(t) ** 2 * jnp.eye(dimension)
    drift, noise_rate, beta, auxiliary = LINEAR[process]
    repeats = dimension if len(drift) < dimension else 1
    stationary = jnp.asarray(scipy.linalg.solve_continuous_lyapunov(drift, noise_rate))
    decay = jax.scipy.linalg.expm(-jnp.asarray(drift) * beta * t)
    noise = stationary - decay @ stationary @ decay.T
    decay, noise = (jnp.kron(each, jnp.eye(repeats)) for each in (decay, noise))
    rest = decay[:, dimension:]
    return decay[:, :dimension], noise + auxiliary * rest @ rest.T
