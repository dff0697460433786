"""From the network's coordinates to the user's, with the Jacobian that a density needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .kernels import Array, FullSpace, Subspace


class Transform(Protocol):
    """An invertible map on one example; hashable."""

    def to_data(self, x: Array) -> Array: ...

    def to_model(self, y: Array) -> Array: ...

    def log_det(self, x: Array, subspace: Subspace) -> Array:
        """log |d to_data / dx| at x, in nats."""
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class Identity:
    """The network's coordinates are the user's."""

    def to_data(self, x: Array) -> Array:
        return x

    def to_model(self, y: Array) -> Array:
        return y

    def log_det(self, x: Array, subspace: Subspace) -> Array:
        return jnp.zeros((), x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float))


@jax.tree_util.register_static
class Affine:
    """y = scale * x + shift, elementwise; numbers or arrays of the event's shape.

    Raises:
      ValueError: where a scale is zero, a scale or shift is not finite, or, in a model, where a scale varies on a
        subspace that it would leave.
    """

    def __init__(self, scale: np.ndarray | float = 1.0, shift: np.ndarray | float = 0.0):
        self.scale, self.shift = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        if not (np.isfinite(self.scale).all() and (self.scale != 0).all()):
            raise ValueError(f"scale must be finite and non-zero everywhere, got {self.scale}")
        if not np.isfinite(self.shift).all():
            raise ValueError(f"shift must be finite everywhere, got {self.shift}")

    def to_data(self, x: Array) -> Array:
        return jnp.asarray(self.scale, x.dtype) * x + jnp.asarray(self.shift, x.dtype)

    def to_model(self, y: Array) -> Array:
        return (y - jnp.asarray(self.shift, y.dtype)) / jnp.asarray(self.scale, y.dtype)

    def log_det(self, x: Array, subspace: Subspace) -> Array:
        log_scale = np.log(np.abs(self.scale))
        if self.scale.ndim == 0:
            return jnp.asarray(subspace.dimension(x.shape) * log_scale, x.dtype)
        if not isinstance(subspace, FullSpace):
            raise ValueError(
                f"a scale that differs between coordinates does not map {subspace} to itself; use one number"
            )
        return jnp.asarray(np.broadcast_to(log_scale, x.shape).sum(), x.dtype)

    def _key(self) -> tuple[object, ...]:
        return (self.scale.shape, self.scale.tobytes(), self.shift.shape, self.shift.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())
