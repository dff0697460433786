r"""A Gaussian mixture under the noise of a linear SDE: its law, score and denoiser in closed form.

In the coordinates of a noise level (`rnejax.processes.LinearLevel`) noise acts on each of them alone, z_t = alpha z_0 +
sigma eps, so that component k with mean m and covariance C in the coordinates of clean data becomes

    N(alpha m, S),   S = alpha C alpha + sigma^2,   E[z_0 | z_t, k] = m + C alpha S^{-1} (z_t - alpha m).

S is as well conditioned as the data are close to the reference, however stiff the process is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import Array
from ..processes import LinearLevel


@partial(jax.tree_util.register_dataclass, data_fields=["level", "means", "covariances", "log_weights"], meta_fields=[])
@dataclass(frozen=True)
class NoisedMixture:
    """The law of x_t at one level; methods act on one state. Means (K, d), covariances (K, d, d) are those of z_0."""

    level: LinearLevel
    means: Array
    covariances: Array
    log_weights: Array

    @classmethod
    def of(cls, mixture: Any, level: LinearLevel) -> NoisedMixture:
        """The law of clean data that are ``mixture`` at ``level``, from ``process.level(t)``."""
        dimension = mixture.means.shape[1]
        to_coordinates = jax.vmap(lambda unit: level.data.coordinates(unit).reshape(-1), out_axes=1)
        root = to_coordinates(jnp.eye(dimension, dtype=mixture.means.dtype))
        covariances = root @ mixture._matrices(mixture.variances) @ root.T
        return cls(level, mixture.means @ root.T, covariances, mixture.log_weights)

    def log_prob(self, x: Array) -> Array:
        """log p_t(x), in nats."""
        z, rest = self._split(x)
        noise = -0.5 * jnp.sum(rest**2) - 0.5 * rest.size * jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(self._components(z)[0]) + noise - self.level.frame.volume(x.size)

    def energy(self, x: Array) -> Array:
        """-log p_t(x), in nats."""
        return -self.log_prob(x)

    def score(self, x: Array) -> Array:
        """grad log p_t(x)."""
        alpha, sigma = self._flat(self.level.alpha), self._flat(self.level.sigma)
        z, _ = self._split(x)
        excess = (sigma**2 / alpha) * (self._score_of_coordinates(z) + z)
        return self.level.score(x, excess.reshape(self._view(x)))

    def denoise(self, x: Array) -> Array:
        """E[x_0 | x_t = x], of the shape of the data."""
        z, _ = self._split(x)
        log_probs, solved = self._components(z)
        gains = jnp.einsum("kij,kj->ki", self.covariances, self._flat(self.level.alpha) * solved)
        clean = jax.nn.softmax(log_probs) @ (self.means + gains)
        return self.level.data.event(clean.reshape(self._view(x)), clean.shape)

    def sample(self, key: Array) -> Array:
        """One draw of x_t."""
        key_component, key_data, key_noise = jax.random.split(key, 3)
        k = jax.random.categorical(key_component, self.log_weights)
        root = jnp.linalg.cholesky(self.covariances[k])
        clean = self.means[k] + root @ jax.random.normal(key_data, self.means.shape[1:], self.means.dtype)
        b, n, _ = self.level.frame.matrix.shape
        k_data = self.level.alpha.shape[-3]
        multiplicity = clean.size // (k_data * b)
        noise = jax.random.normal(key_noise, (n, b, multiplicity), clean.dtype)
        z = self.level.alpha * clean.reshape(k_data, b, multiplicity) + self.level.sigma * noise[:k_data]
        shape = clean.shape if k_data == n else (n, *clean.shape)
        return self.level.frame.event(jnp.concatenate([z, noise[k_data:]]), shape)

    def _components(self, z: Array) -> tuple[Array, Array]:
        """log w_k + log N(z; alpha m_k, S_k), (K,), and S_k^{-1} (z - alpha m_k), (K, d)."""
        alpha, sigma = self._flat(self.level.alpha), self._flat(self.level.sigma)
        covariances = alpha[:, None] * self.covariances * alpha + jnp.diag(sigma**2)
        roots = jnp.linalg.cholesky(covariances)
        residuals = z - alpha * self.means
        solved = jax.vmap(lambda root, residual: jax.scipy.linalg.cho_solve((root, True), residual))(roots, residuals)
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(roots, axis1=1, axis2=2)), axis=1)
        quadratic = jnp.sum(residuals * solved, axis=1)
        return self.log_weights - 0.5 * (quadratic + log_det + z.size * jnp.log(2 * jnp.pi)), solved

    def _score_of_coordinates(self, z: Array) -> Array:
        log_probs, solved = self._components(z)
        return -jax.nn.softmax(log_probs) @ solved

    def _split(self, x: Array) -> tuple[Array, Array]:
        """The coordinates that carry signal, and those that do not, flat."""
        z = self.level.frame.coordinates(x)
        k = self.level.alpha.shape[-3]
        return z[:k].reshape(-1), z[k:].reshape(-1)

    def _view(self, x: Array) -> tuple[int, ...]:
        z = jax.eval_shape(self.level.frame.coordinates, x)
        return (self.level.alpha.shape[-3], *z.shape[1:])

    def _flat(self, values: Array) -> Array:
        k, b, _ = values.shape
        size = self.means.shape[1]
        return jnp.broadcast_to(values, (k, b, size // (k * b))).reshape(-1)
