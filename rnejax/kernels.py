"""Transition kernels: the law of the next state given the current one.

Everything in this library is a sum of log-ratios of such kernels along a path, so the ratio is what a kernel computes
best. Two kernels of one transition differ by a small shift of the mean and a small relative change of the covariance;
``log p - log q`` of two large log-densities would lose both in float32. A `Gaussian` therefore keeps its mean as
``anchor + shift``, where the anchor is shared by all kernels of a transition, and its covariance as
``variance * (I + M)``, where ``M`` is small: means and covariances are compared by the differences of the small parts.
Where noise has a covariance of its own, all of this holds in a `rnejax.linear.Frame` that the kernels share.
The log-probabilities of tokens are kept the same way, as a shared ``anchor`` and a ``shift`` (`Categorical`: all
tokens, each for itself; `OneToken`: one of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from .linear import Frame, apply, same_frame, transposed

Array = jax.Array


@runtime_checkable
class Kernel(Protocol):
    """The law of a state: what proposals, priors and models speak in."""

    def sample(self, key: Array) -> Array: ...

    def log_prob(self, x: Array) -> Array: ...


def draw(kernel: Kernel, key: Array) -> tuple[Array, Array | None]:
    """One draw, and what is known of it that `log_ratio` would have to find out again (`Gaussian.draw`)."""
    return kernel.draw(key) if isinstance(kernel, Gaussian) else (kernel.sample(key), None)


def log_ratio(numerator: Kernel, denominator: Kernel, x: Array, coordinates: Array | None = None) -> Array:
    """log p(x) - log q(x), without cancellation where both are of one family; ``coordinates`` as `draw` gives them."""
    if isinstance(numerator, Gaussian) and isinstance(denominator, Gaussian):
        return numerator.log_ratio(denominator, x, coordinates)
    if type(numerator) is type(denominator) and hasattr(numerator, "log_ratio"):
        return numerator.log_ratio(denominator, x)
    # Laws of some coordinates only, that say themselves what their ratio to a law of all of them means.
    if hasattr(numerator, "relative_to"):
        ratio: Array = numerator.relative_to(denominator, x)
        return ratio
    if hasattr(denominator, "relative_to"):
        inverse: Array = denominator.relative_to(numerator, x)
        return -inverse
    return numerator.log_prob(x) - denominator.log_prob(x)


def log_product(exponents: Array, log_factors: Array) -> Array:
    """log prod_i f_i^{beta_i} along the first axis, where factors may be zero: 0^0 = 1, and 0 whatever the others are
    where a factor with a positive exponent is.
    """
    betas = exponents.reshape(-1, *[1] * (log_factors.ndim - 1))
    terms = jnp.where(betas == 0, 0.0, betas * log_factors)
    is_zero = jnp.any((log_factors == -jnp.inf) & (betas > 0), axis=0)
    return jnp.where(is_zero, -jnp.inf, jnp.sum(jnp.where(is_zero, 0.0, terms), axis=0))


def event_sum(values: Array) -> Array:
    """The sum over all axes of one event, as a scalar.

    As an inner product with ones, because XLA's own sum takes up to forty times as long on a CPU where the last axis is
    short (one colour channel, three space coordinates), and would be a third of the cost of steering a small network.
    """
    values = jnp.asarray(values)
    return jnp.vdot(values, jnp.ones_like(values), precision=jax.lax.Precision.HIGHEST)


# --------------------------------------------------------------------------------------------------- linear subspaces


@jax.tree_util.register_static
@dataclass(frozen=True)
class FullSpace:
    """The whole of R^d: every coordinate is free."""

    def project(self, x: Array) -> Array:
        return x

    def dimension(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64))


@jax.tree_util.register_static
@dataclass(frozen=True)
class CentreOfMassFree:
    """Configurations of shape ``(atoms, 3)`` (or any ``(atoms, space)``) whose mean over atoms is zero.

    The subspace has dimension ``(atoms - 1) * space``, and that is the dimension every density on it uses. Densities
    are with respect to Lebesgue measure in orthonormal coordinates of the subspace (Hoogeboom et al. 2022).
    """

    def project(self, x: Array) -> Array:
        return x - jnp.mean(x, axis=-2, keepdims=True)

    def dimension(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 2:
            raise ValueError(f"CentreOfMassFree needs configurations of shape (atoms, space), got {shape}")
        return (shape[0] - 1) * shape[1]


@jax.tree_util.register_static
class LinearSubspace:
    """The span of the orthonormal rows of ``basis``, shape ``(k, d)``; events have ``d`` entries in all.

    Raises:
      ValueError: if the rows are not orthonormal.
    """

    def __init__(self, basis: np.ndarray, tolerance: float = 1e-6):
        basis = np.asarray(basis, np.float64)
        if basis.ndim != 2:
            raise ValueError(f"basis must be a matrix with one row per dimension, got shape {basis.shape}")
        defect = float(np.abs(basis @ basis.T - np.eye(len(basis))).max())
        if defect > tolerance:
            raise ValueError(f"rows of basis must be orthonormal: |B B^T - I| is {defect:.2e}; use numpy.linalg.qr")
        self.basis = basis

    def project(self, x: Array) -> Array:
        basis = jnp.asarray(self.basis, x.dtype)
        return (basis.T @ (basis @ x.reshape(-1))).reshape(x.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearSubspace) and np.array_equal(self.basis, other.basis)

    def __hash__(self) -> int:
        return hash((self.basis.shape, self.basis.tobytes()))

    def __repr__(self) -> str:
        return f"LinearSubspace({self.basis.shape[0]} of {self.basis.shape[1]} dimensions)"

    def dimension(self, shape: tuple[int, ...]) -> int:
        if int(np.prod(shape)) != self.basis.shape[1]:
            raise ValueError(f"the subspace lives in {self.basis.shape[1]} dimensions, but the event shape is {shape}")
        return len(self.basis)


Subspace = FullSpace | CentreOfMassFree | LinearSubspace


# ----------------------------------------------------------------------------------------------------------- Gaussian


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["anchor", "shift", "variance", "excess", "basis", "frame"],
    meta_fields=["subspace"],
)
@dataclass(frozen=True)
class Gaussian:
    r"""N(anchor + shift, variance (I + M)) on one event, possibly restricted to a linear subspace.

    In a frame, with its matrix L and its drift H, on the whole space: N(anchor + H anchor + L shift,
    L sqrt(variance) (I + M) sqrt(variance) L^T).

    ``M`` has eigenvalues ``excess`` > -1:

    - isotropic: ``excess`` is a scalar;
    - diagonal: ``excess`` has the event's shape;
    - dense: ``excess`` has shape ``(d,)`` and ``basis``, shape ``(d, d)``, holds the eigenvectors as columns; or, in a
      frame, both are in blocks, (k, b, m) and (b, k, k).

    Attributes:
      anchor: the part of the mean that all kernels of a transition share, event shape (or broadcastable to it).
      shift: the rest of the mean; in a frame, in its coordinates, broadcastable to (k, b, m).
      variance: the base variance: a scalar, or, in a frame, one per coordinate, broadcastable to (k, b, m).
      excess: the relative excess of the covariance over the base.
      basis: eigenvectors of a dense covariance over the flattened event (or its flattened coordinates), else None.
      subspace: where the law lives; the density is taken in orthonormal coordinates of it.
      frame: the map L and its inverse, or None; ``excess`` and ``basis`` are then in the coordinates L^{-1} x.
    """

    anchor: Array
    shift: Array
    variance: Array
    excess: Array | float = 0.0
    basis: Array | None = None
    subspace: Subspace = FullSpace()
    frame: Frame | None = None

    @property
    def mean(self) -> Array:
        if self.frame is None:
            return self.anchor + self.shift
        shift = jnp.broadcast_to(self.shift, self.frame.view(self.anchor).shape)
        return self.frame.moved(self.anchor) + self.frame.event(shift, self.anchor.shape)

    @property
    def is_isotropic(self) -> bool:
        return self.basis is None and jnp.ndim(self.excess) == 0

    def sample(self, key: Array) -> Array:
        """One draw, of the event's shape."""
        return self.draw(key)[0]

    def draw(self, key: Array) -> tuple[Array, Array | None]:
        """One draw, and in a frame its coordinates L^{-1} (x - anchor - H anchor), which are cheaper to keep than to
        find again.
        """
        mean = self.mean if self.frame is None else self.frame.moved(self.anchor)
        # The barrier keeps XLA from drawing the same noise anew in everything that is computed from the sample.
        noise = jax.lax.optimization_barrier(jax.random.normal(key, mean.shape, mean.dtype))
        noise = self.subspace.project(noise) if self.frame is None else self.frame.view(noise)
        moved = jnp.sqrt(self.variance) * self._map(noise, jnp.sqrt(1 + jnp.asarray(self.excess)))
        if self.frame is None:
            return mean + moved, None
        coordinates = self.shift + moved
        return mean + self.frame.event(coordinates, mean.shape), coordinates

    def covariance_times(self, vector: Array) -> Array:
        """The covariance applied to a vector of the event's shape."""
        spectrum = 1 + jnp.asarray(self.excess)
        if self.frame is None:
            return self.variance * self._map(self.subspace.project(vector), spectrum)
        return self.frame.event(self.pull(vector), jnp.shape(vector))

    def pull(self, vector: Array, trust: float = math.inf) -> Array:
        """The covariance applied to a vector of the event's shape, as a change of ``shift``: an exponential tilt.

        It is shortened until the KL divergence that it makes, vector . C vector / 2, is ``trust``, in nats.
        """
        if self.frame is None:
            turned = vector
            pulled = self.covariance_times(vector)
        else:
            std = jnp.sqrt(self.variance)
            turned = apply(transposed(self.frame.matrix), vector)
            pulled = std * self._map(std * turned, 1 + jnp.asarray(self.excess))
        if not math.isfinite(trust):
            return pulled
        divergence = 0.5 * event_sum(turned * pulled)
        return pulled * jnp.minimum(1.0, jnp.sqrt(trust / jnp.maximum(divergence, 1e-30)))

    def log_prob(self, x: Array) -> Array:
        """log N(x), in nats, as a scalar."""
        if self.frame is None:
            z, variance, log_volume = x - self.anchor - self.shift, self.variance, jnp.zeros(())
        else:
            z, variance = self._residual(x) / jnp.sqrt(self.variance), jnp.ones(())
            log_volume = 0.5 * event_sum(jnp.broadcast_to(jnp.log(self.variance), z.shape)) + self.frame.volume(z.size)
        z = self._rotate(z)
        quadratic = event_sum(z**2 / (1 + self.excess)) / variance
        dimension = self.subspace.dimension(z.shape if self.basis is None else jnp.shape(x))
        log_det = self._sum_over_dimensions(jnp.log1p(self.excess), dimension)
        return -0.5 * (dimension * jnp.log(2 * jnp.pi * variance) + log_det + quadratic) - log_volume

    def log_ratio(self, other: Gaussian, x: Array, coordinates: Array | None = None) -> Array:
        r"""log p(x) - log q(x) for p = self and q = other, without cancellation.

        With residual r = x - mean_p, difference of means d = mean_p - mean_q, eigenvalues l_p, l_q of the covariances
        and e = (l_p - l_q) / l_q:

            sum_i  e_i r_i^2 / (2 l_p,i) - log(1 + e_i) / 2 + (r_i + d_i / 2) d_i / l_q,i

        One ``e`` serves both of the first two terms, so that its rounding error cancels to first order. Laws in frames
        that are not one and the same are compared by their log-densities: something is lost, and nothing is wrong.
        """
        if not same_frame(self.frame, other.frame):
            return self.log_prob(x) - other.log_prob(x)
        if self.frame is not None:
            return self._log_ratio_in_frame(other, x, coordinates)
        if self.basis is not None and not (other.basis is self.basis or other.is_isotropic):
            return self._log_ratio_through_isotropic(other, x)
        if self.basis is None and other.basis is not None and not self.is_isotropic:
            return self._log_ratio_through_isotropic(other, x)
        basis = other.basis if self.basis is None else self.basis
        residual = _rotate((x - self.anchor) - self.shift, basis)
        difference = _rotate((self.anchor - other.anchor) + (self.shift - other.shift), basis)
        base = (self.variance - other.variance) / other.variance

        def relative(excess: Array | float, other_excess: Array | float) -> Array:
            return (base * (1 + excess) + (excess - other_excess)) / (1 + other_excess)

        e = relative(self.excess, other.excess)
        eigenvalue, other_eigenvalue = self.variance * (1 + self.excess), other.variance * (1 + other.excess)
        quadratic = e * residual**2 / (2 * eigenvalue) + (residual + 0.5 * difference) * difference / other_eigenvalue
        dimension = self.subspace.dimension(jnp.shape(x))
        normal = relative(self._excess_in_normal_directions, other._excess_in_normal_directions)
        log_det = self._sum_over_dimensions(jnp.log1p(e), dimension, normal=jnp.log1p(normal))
        return event_sum(quadratic) - 0.5 * log_det

    def _residual(self, x: Array, coordinates: Array | None = None) -> Array:
        """x - mean, in the coordinates of the frame."""
        assert self.frame is not None
        if coordinates is not None:
            return coordinates - self.shift
        start = x - self.anchor
        if self.frame.drift is not None:
            start = start - apply(self.frame.drift, self.anchor).reshape(start.shape)
        return self.frame.coordinates(start) - self.shift

    @property
    def _excess_in_normal_directions(self) -> Array | float:
        """What ``excess`` says of directions that the subspace has not: a dense M is zero there."""
        return self.excess if jnp.ndim(self.excess) == 0 else 0.0

    def _log_ratio_in_frame(self, other: Gaussian, x: Array, coordinates: Array | None = None) -> Array:
        """In the coordinates of the frame that both share, in units of the other's base variances."""
        assert self.frame is not None
        same_variance = self.variance is other.variance
        if not same_variance and not (self.basis is None and other.basis is None):
            # Not diagonal in the same coordinates: through the law that has the one's variances and no M.
            if self.basis is None:
                return -other.log_ratio(self, x, coordinates if self.anchor is other.anchor else None)
            between = replace(self, excess=jnp.zeros(()), basis=None)
            return self.log_ratio(between, x, coordinates) + between.log_ratio(other, x, coordinates)
        std = jnp.sqrt(other.variance)
        residual = self._residual(x, coordinates) / std
        difference = jnp.broadcast_to(self.shift - other.shift, residual.shape) / std
        if self.anchor is not other.anchor:
            starts = self.frame.moved(self.anchor - other.anchor)
            difference = difference + self.frame.coordinates(starts) / std
        excess = self.excess
        if not same_variance:
            change = (self.variance - other.variance) / other.variance
            excess = jnp.broadcast_to(change * (1 + jnp.asarray(excess)) + excess, residual.shape)
        zeros, unit = jnp.zeros_like(residual), jnp.ones((), residual.dtype)
        one = Gaussian(zeros, zeros, unit, excess, self.basis)
        two = Gaussian(zeros, -difference, unit, other.excess, other.basis)
        return one.log_ratio(two, residual)

    def scale_covariance(self, factor: Array) -> Gaussian:
        return replace(self, variance=self.variance * factor)

    def _sum_over_dimensions(self, values: Array, dimension: int, normal: Array | float = 0.0) -> Array:
        """Sum of a function of the eigenvalues over the subspace; ``normal`` is its value in normal directions."""
        if jnp.ndim(values) == 0:
            return dimension * values
        return event_sum(values) - (np.size(values) - dimension) * normal

    def _log_ratio_through_isotropic(self, other: Gaussian, x: Array) -> Array:
        between = replace(other, excess=jnp.zeros_like(other.variance), basis=None)
        return self.log_ratio(between, x) - other.log_ratio(between, x)

    def _rotate(self, vector: Array) -> Array:
        return _rotate(vector, self.basis)

    def _map(self, vector: Array, eigenvalues: Array) -> Array:
        if self.basis is None:
            return eigenvalues * vector
        turned = eigenvalues * self._rotate(vector)
        moved = self.basis @ turned if self.basis.ndim == 2 else apply(self.basis, turned)
        return moved.reshape(vector.shape)


def _rotate(vector: Array, basis: Array | None) -> Array:
    if basis is None:
        return vector
    return basis.T @ vector.reshape(-1) if basis.ndim == 2 else apply(transposed(basis), vector)


# -------------------------------------------------------------------------------------------------------- categorical


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Categorical:
    r"""Independent categories: p(x) = prod_i exp(anchor_i + shift_i)[x_i] of integers, shape ``(length,)``.

    Attributes:
      anchor: log-probabilities that all kernels of a transition share, (length, categories); -inf forbids.
      shift: what is added to them, of the same shape; the sum must be normalised in every row.
    """

    anchor: Array
    shift: Array | float = 0.0

    def sample(self, key: Array) -> Array:
        """One draw, integers of shape (length,)."""
        drawn = jax.random.categorical(key, self.anchor + self.shift, axis=-1).astype(jnp.int32)
        return jax.lax.optimization_barrier(drawn)

    def log_prob(self, x: Array) -> Array:
        """log p(x), in nats, as a scalar."""
        return event_sum(_pick(self.anchor + self.shift, x))

    def log_ratio(self, other: Categorical, x: Array) -> Array:
        """log p(x) - log q(x): what the two share cancels before it is summed; -inf wherever p(x) = 0."""
        return event_sum(_log_ratio_of(self, other, lambda table: _pick(table, x)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneToken:
    r"""One position of ``state`` changes: p(x) = exp(anchor + shift)[i, k] where x is ``state`` with token k at i.

    Attributes:
      state: where the step starts, integers of shape (length,).
      anchor: log-probabilities that all kernels of a transition share, (length, categories); -inf forbids.
      shift: what is added to them; the sum must be normalised over positions and categories together.
    """

    state: Array
    anchor: Array
    shift: Array | float = 0.0

    def sample(self, key: Array) -> Array:
        """One draw, integers of shape (length,)."""
        table = self.anchor + self.shift
        flat = jax.random.categorical(key, table.reshape(-1))
        position, token = jnp.divmod(flat, table.shape[-1])
        drawn = self.state.at[position].set(token.astype(self.state.dtype))
        return jax.lax.optimization_barrier(drawn)

    def log_prob(self, x: Array) -> Array:
        """log p(x), in nats, as a scalar; -inf where not exactly one position has changed."""
        return self._where_one_changed(x, _pick(self.anchor + self.shift, x))

    def log_ratio(self, other: OneToken, x: Array) -> Array:
        """log p(x) - log q(x) for kernels that start from one state."""
        return self._where_one_changed(x, _log_ratio_of(self, other, lambda table: _pick(table, x)))

    def _where_one_changed(self, x: Array, values: Array) -> Array:
        changed = x != self.state
        return jnp.where(jnp.sum(changed) == 1, event_sum(jnp.where(changed, values, 0.0)), -jnp.inf)


def _pick(table: Array, x: Array) -> Array:
    """table[i, x_i]."""
    return jnp.take_along_axis(table, x[:, None], axis=-1)[:, 0]


def _log_ratio_of(p: Any, q: Any, pick: Callable[[Array], Array]) -> Array:
    anchors = [pick(kernel.anchor) for kernel in (p, q)]
    shifts = [pick(jnp.broadcast_to(kernel.shift, kernel.anchor.shape)) for kernel in (p, q)]
    impossible = anchors[0] + shifts[0] == -jnp.inf
    # Where both are impossible a difference would be NaN; that p is decides.
    difference = jnp.where(anchors[0] == anchors[1], 0.0, anchors[0] - anchors[1]) + (shifts[0] - shifts[1])
    return jnp.where(impossible, -jnp.inf, difference)
