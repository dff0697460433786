r"""Mixtures of Gaussians: the law at every noise level, the score, normalising constants, all in closed form.

If x_0 ~ sum_k w_k N(m_k, C_k) and x_t = alpha x_0 + sigma eps, then

    x_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I),

so a diffusion model without any error exists, and whatever the library estimates can be held against the truth.
Everything here is exact; what is not (`GaussianMixture.sample_power`) returns weights that make it so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import Array
from ..model import DiffusionModel
from ..processes import GaussianProcess, LinearLevel, LinearProcess, NoiseLevel
from .linear_mixture import NoisedMixture


@jax.tree_util.register_pytree_with_keys_class
class GaussianMixture:
    r"""sum_k w_k N(m_k, C_k) on R^d. Methods act on one point, of shape ``(d,)``.

    Args:
      means: (K, d).
      std: standard deviation of the components: a number, or one per component, (K,).
      weights: (K,), positive up to zeros, normalised here; equal by default.
      covariances: (K, d, d) instead of ``std``.

    Attributes:
      means: (K, d).
      variances: eigenvalues of the covariances, (K, d).
      log_weights: (K,), normalised; -inf is a component that is not there.
      basis: eigenvectors as columns, (K, d, d), or None where covariances are diagonal.

    Raises:
      ValueError: for arrays that do not fit, covariances that are not positive, weights that are negative or all zero.
    """

    _fields = ("means", "variances", "log_weights", "basis")

    def __init__(self, means: Any, std: Any = None, weights: Any = None, *, covariances: Any = None):
        means = np.asarray(means, np.float64)
        if means.ndim != 2 or 0 in means.shape:
            raise ValueError(f"means must have shape (components, dimension), got {means.shape}")
        num, dimension = means.shape
        if (std is None) == (covariances is None):
            raise ValueError("give either std or covariances")
        basis = None
        if covariances is None:
            std = np.asarray(std, np.float64)
            if std.shape not in ((), (num,)):
                raise ValueError(f"std must be a number or have shape ({num},), one per component, got {std.shape}")
            variances = np.broadcast_to((std**2).reshape(-1, 1), means.shape)
        else:
            covariances = np.asarray(covariances, np.float64)
            if covariances.shape != (num, dimension, dimension):
                raise ValueError(f"covariances must have shape {(num, dimension, dimension)}, got {covariances.shape}")
            variances, basis = np.linalg.eigh(covariances)
        if not (variances > 0).all():
            raise ValueError(f"covariances must be positive definite; the smallest eigenvalue is {variances.min():.3g}")
        weights = np.full(num, 1.0) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != (num,) or not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(f"weights must be {num} non-negative numbers with a positive sum, got {weights}")
        with np.errstate(divide="ignore"):
            log_weights = np.log(weights / weights.sum())
        self.means, self.variances, self.log_weights = (jnp.asarray(a, float) for a in (means, variances, log_weights))
        self.basis = None if basis is None else jnp.asarray(basis, float)

    # -- the law ------------------------------------------------------------------------------------------------------

    @property
    def num_components(self) -> int:
        return self.means.shape[0]

    @property
    def shape(self) -> tuple[int]:
        """Of one point."""
        return (self.means.shape[1],)

    @property
    def weights(self) -> Array:
        return jnp.exp(self.log_weights)

    @property
    def mean(self) -> Array:
        """(d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Array:
        """(d, d)."""
        centred = self.means - self.mean
        within = jnp.einsum("k,kij->ij", self.weights, self._matrices(self.variances))
        return within + jnp.einsum("k,ki,kj->ij", self.weights, centred, centred)

    @property
    def std(self) -> float:
        """Root of the mean variance over coordinates: what ``data_std`` of a process should be; not under jit."""
        return float(jnp.sqrt(jnp.trace(self.covariance) / self.shape[0]))

    def log_prob(self, x: Array) -> Array:
        """log p(x), in nats."""
        return jax.nn.logsumexp(self.component_log_probs(x))

    def energy(self, x: Array) -> Array:
        """-log p(x), in nats."""
        return -self.log_prob(x)

    def score(self, x: Array) -> Array:
        """grad log p(x), (d,)."""
        responsibilities = jax.nn.softmax(self.component_log_probs(x))
        return -responsibilities @ self._rotate_back(self._residuals(x) / self.variances)

    def component_log_probs(self, x: Array) -> Array:
        """log w_k + log N(x; m_k, C_k), (K,)."""
        quadratic = jnp.sum(self._residuals(x) ** 2 / self.variances, axis=-1)
        log_det = jnp.sum(jnp.log(2 * jnp.pi * self.variances), axis=-1)
        return self.log_weights - 0.5 * (quadratic + log_det)

    def component(self, x: Array) -> Array:
        """The component that most probably made x: the mode that x is counted to."""
        return jnp.argmax(self.component_log_probs(x))

    def sample(self, key: Array) -> Array:
        """One draw."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, self.log_weights)
        noise = jnp.sqrt(self.variances[k]) * jax.random.normal(key_noise, self.shape, self.means.dtype)
        return self.means[k] + (noise if self.basis is None else self.basis[k] @ noise)

    # -- the law under noise ------------------------------------------------------------------------------------------

    def noised(self, level: NoiseLevel | LinearLevel) -> GaussianMixture | NoisedMixture:
        """The law of x_t, with log_prob, energy, score and sample; ``level`` as from ``process.level(t)``.

        Of a scalar process, x_t = alpha x_0 + sigma eps, it is another mixture.
        """
        if isinstance(level, LinearLevel):
            return NoisedMixture.of(self, level)
        variances = level.alpha**2 * self.variances + level.sigma**2
        return self._replace(means=level.alpha * self.means, variances=variances)

    def denoise(self, x: Array, level: NoiseLevel | LinearLevel) -> Array:
        """E[x_0 | x_t = x], also where alpha = 0."""
        noised = self.noised(level)
        if isinstance(noised, NoisedMixture):
            return noised.denoise(x)
        responsibilities = jax.nn.softmax(noised.component_log_probs(x))
        gain = level.alpha * self.variances / noised.variances
        return responsibilities @ (self.means + self._rotate_back(gain * noised._residuals(x)))

    def model(
        self,
        process: GaussianProcess | LinearProcess,
        prediction: str = "score",
        covariance: Any = "reference",
        **options: Any,
    ) -> DiffusionModel:
        """The diffusion model without error.

        The mixture travels as the model's ``params``; as ``condition`` the model takes log-weights (K,) that replace
        the mixture's, such as those of one class: neither recompiles anything.

        Args:
          process: any process of numbers that diffuse.
          prediction: any of the model's; ``score`` keeps the most digits at small noise, ``x0`` is right at alpha = 0.
          covariance, options: as for `rnejax.DiffusionModel`.
        """
        if prediction not in process.predictions:
            raise ValueError(f"unknown prediction {prediction!r}; one of {', '.join(process.predictions)}")
        network = ExactPrediction(prediction)
        options = {"noise_level": "level", "shape": process.state_shape(self.shape), **options}
        return DiffusionModel(process, network, prediction, covariance, params=self, **options)

    # -- powers and products ------------------------------------------------------------------------------------------

    def product(self, *others: GaussianMixture, max_components: int = 10**6) -> tuple[GaussianMixture, float]:
        r"""The mixture proportional to the product of mixtures, and log of the product's integral, in nats.

        Components multiply pairwise: N(m, C) N(m', C') = N(m - m'; 0, C + C') N(m'', (C^{-1} + C'^{-1})^{-1}). In
        float64 on the host.

        Raises:
          ValueError: for other dimensions, or more than ``max_components`` components.
        """
        result, total = self, 0.0
        for other in others:
            if other.shape != self.shape:
                raise ValueError(f"a product needs mixtures of one dimension, got {self.shape} and {other.shape}")
            num = result.num_components * other.num_components
            if num > max_components:
                raise ValueError(f"the product has {num} components, more than max_components = {max_components}")
            result, log_normalizer = _multiply(result, other)
            total += log_normalizer
        return result, total

    def log_normalizer(self, beta: int) -> float:
        """log of the integral of p^beta for a whole number beta >= 1, in nats: a sum over K^beta tuples of components.

        Raises:
          ValueError: for other exponents; `sample_power` serves those.
        """
        if beta != int(beta) or beta < 1:
            raise ValueError(f"the closed form needs a whole exponent of at least 1, got {beta}; see sample_power")
        return self.product(*[self] * (int(beta) - 1))[1]

    def sample_power(self, key: Array, beta: float, num_samples: int) -> tuple[Array, Array]:
        r"""Importance sample of p^beta, beta > 0: points (n, d) and log-weights (n,), whose mean weight estimates Z.

        The proposal, proportional to sum_k (w_k N_k)^beta, has components N(m_k, C_k / beta). Weights lie between 1 and
        K^(beta - 1) times its constant, whatever the mixture: a long run is a reference answer.
        """
        if not beta > 0:
            raise ValueError(f"the exponent must be positive, got {beta}")
        log_det = jnp.sum(jnp.log(2 * jnp.pi * self.variances), axis=-1)
        log_masses = beta * self.log_weights + 0.5 * (1 - beta) * log_det - 0.5 * self.shape[0] * math.log(beta)
        log_total = jax.nn.logsumexp(log_masses)
        proposal = self._replace(variances=self.variances / beta, log_weights=log_masses - log_total)
        x = jax.vmap(proposal.sample)(jax.random.split(key, num_samples))
        return x, jax.vmap(lambda x: beta * self.log_prob(x) - proposal.log_prob(x))(x)

    def mode_weights(self, x: Array, log_weights: Array | None = None) -> Array:
        """The share of weighted points (n, d) that belongs to each component, (K,); it sums to 1."""
        weights = jnp.full(len(x), 1 / len(x)) if log_weights is None else jax.nn.softmax(log_weights)
        return jnp.zeros(self.num_components).at[jax.vmap(self.component)(x)].add(weights)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _residuals(self, x: Array) -> Array:
        """x - m_k in the eigenbasis of component k, (K, d)."""
        residuals = x - self.means
        return residuals if self.basis is None else jnp.einsum("kij,ki->kj", self.basis, residuals)

    def _rotate_back(self, vectors: Array) -> Array:
        return vectors if self.basis is None else jnp.einsum("kij,kj->ki", self.basis, vectors)

    def _matrices(self, eigenvalues: Array) -> Array:
        if self.basis is None:
            return jax.vmap(jnp.diag)(eigenvalues)
        return jnp.einsum("kij,kj,klj->kil", self.basis, eigenvalues, self.basis)

    def _replace(self, **changes: Any) -> GaussianMixture:
        new = object.__new__(GaussianMixture)
        new.__dict__.update({**self.__dict__, **changes})
        return new

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._fields), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> GaussianMixture:
        new = object.__new__(cls)
        new.__dict__.update(zip(cls._fields, children, strict=True))
        return new

    def __repr__(self) -> str:
        return f"GaussianMixture({self.num_components} components in {self.shape[0]} dimensions)"


@jax.tree_util.register_static
@dataclass(frozen=True)
class ExactPrediction:
    """What a network without error returns for a noised mixture: ``fn(mixture, x, level, condition)``."""

    name: str

    def __call__(self, mixture: GaussianMixture, x: Array, level: Any, condition: Array | None = None) -> Array:
        if condition is not None:
            mixture = mixture._replace(log_weights=condition)
        if self.name == "energy":
            return mixture.noised(level).energy(x)
        if self.name == "x0":
            return mixture.denoise(x, level)
        score = mixture.noised(level).score(x)
        if isinstance(level, LinearLevel):
            return level.predicted(self.name, score)
        if self.name == "score":
            return score
        noise = -level.sigma * score
        if self.name == "epsilon":
            return noise
        x0 = mixture.denoise(x, level)
        if self.name == "v":
            return level.alpha * noise - level.sigma * x0
        return level.alpha_rate * x0 + level.sigma_rate * noise


def _multiply(first: GaussianMixture, second: GaussianMixture) -> tuple[GaussianMixture, float]:
    """The normalised product of two mixtures and log of its integral."""
    p, q = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mixture) for mixture in (first, second))
    dimension = p.means.shape[1]
    difference = p.means[:, None] - q.means[None]
    if p.basis is None and q.basis is None:
        total = p.variances[:, None] + q.variances[None]
        quadratic, log_det = (difference**2 / total).sum(-1), np.log(total).sum(-1)
        variances = p.variances[:, None] * q.variances[None] / total
        precise = p.means[:, None] / p.variances[:, None] + q.means[None] / q.variances[None]
        means, basis = variances * precise, None
    else:
        first_matrices, second_matrices = (np.asarray(m._matrices(m.variances)) for m in (first, second))
        total = first_matrices[:, None].astype(np.float64) + second_matrices[None]
        solved = np.linalg.solve(total, difference[..., None])
        quadratic, log_det = (difference * solved[..., 0]).sum(-1), np.linalg.slogdet(total)[1]
        # m - C (C + C')^{-1} (m - m') and C - C (C + C')^{-1} C
        left = first_matrices[:, None].astype(np.float64)
        means = p.means[:, None] - (left @ solved)[..., 0]
        covariances = left - left @ np.linalg.solve(total, np.broadcast_to(left, total.shape))
        variances, basis = np.linalg.eigh(0.5 * (covariances + np.swapaxes(covariances, -1, -2)))
        basis = basis.reshape(-1, dimension, dimension)
    log_weights = p.log_weights[:, None] + q.log_weights[None] - 0.5 * (quadratic + log_det)
    log_weights = log_weights.reshape(-1) - 0.5 * dimension * math.log(2 * math.pi)
    log_normalizer = float(np.logaddexp.reduce(log_weights))
    parts = (means.reshape(-1, dimension), variances.reshape(-1, dimension), log_weights - log_normalizer, basis)
    leaves = tuple(None if part is None else jnp.asarray(part, float) for part in parts)
    return GaussianMixture.tree_unflatten(None, leaves), log_normalizer


# ---------------------------------------------------------------------------------------------------- named problems


def random_mixture(
    key: Array,
    num_components: int,
    dimension: int,
    std: float,
    half_width: float = 1.0,
    concentration: float | None = None,
) -> GaussianMixture:
    """Means uniform in [-half_width, half_width]^d, one std; weights equal, or drawn from Dirichlet(concentration)."""
    key_means, key_weights = jax.random.split(key)
    means = jax.random.uniform(key_means, (num_components, dimension), minval=-half_width, maxval=half_width)
    weights = None
    if concentration is not None:
        weights = jax.random.dirichlet(key_weights, jnp.full(num_components, float(concentration)))
    return GaussianMixture(means, std, weights)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


density_benchmark = partial(random_mixture, num_components=40, dimension=10, std=_softplus(-3.5))
"""The density problem of He et al. 2025 (RNE): 10-D, 40 components, std softplus(-3.5) = 0.0298; give it a key."""

many_modes = partial(random_mixture, num_components=40, dimension=2, std=_softplus(1.0), half_width=40.0)
"""GMM40 of Midgley et al. 2023 (FAB): 2-D, means in [-40, 40]^2, std softplus(1) = 1.313; give it a key."""
