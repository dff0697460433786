"""Data laws for which everything that a network could say is known, Gaussian mixtures with dense covariances, and the
processes that tests put them on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import multivariate_normal

import rnejax as rj
from rnejax.processes import (
    Cosine,
    DiscreteVariancePreserving,
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

    def log_density(self, process, x, t):
        means, covariances = self.noised(process.alpha(t), process.sigma(t))
        each = jax.vmap(lambda m, c: multivariate_normal.logpdf(x, m, c))(means, covariances)
        return jax.nn.logsumexp(jnp.log(jnp.asarray(self.weights, x.dtype)) + each)

    def posterior(self, process, x, t):
        """E[x_0 | x_t = x] and Cov[x_0 | x_t = x], by conditioning every component."""
        alpha = process.alpha(t)
        means, covariances = self.noised(alpha, process.sigma(t))
        each = jax.vmap(lambda m, c: multivariate_normal.logpdf(x, m, c))(means, covariances)
        responsibilities = jax.nn.softmax(jnp.log(jnp.asarray(self.weights, x.dtype)) + each)

        def condition(m, c, noised_mean, noised_covariance):
            regression = alpha * jnp.linalg.solve(noised_covariance, c).T
            return m + regression @ (x - noised_mean), c - alpha * regression @ c

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

    def model(self, process, prediction="x0", covariance="reference", **options):
        """The model that knows this law, which at t_max it starts from exactly."""
        options = {"prior": Noised(self, process, process.t_max), "shape": (self.dimension,), **options}
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
        noise = jax.random.normal(key_noise, clean.shape)
        return self.process.alpha(self.t) * clean + self.process.sigma(self.t) * noise

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
