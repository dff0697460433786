"""Linear maps between events, in blocks: what a number does to a state of a scalar process, a matrix does here.

A map is an array of shape ``(b, i, j)``: ``b`` blocks of ``i x j`` numbers. It looks at an event as an array
``(j, b, m)`` and returns ``(i, b, m)``: blocks act on the first axis, and all ``m`` entries of the last are alike.

========== ===================== ========================================================
drift       shape of the map      acts on an event of
========== ===================== ========================================================
scalar      (1, 1, 1)             any shape: one number for all entries
diagonal    (d, 1, 1)             d entries, each multiplied by its own number
block       (1, k, k)             shape (k, ...): k x k Kronecker the identity
dense       (1, d, d)             d entries in all, flattened
========== ===================== ========================================================
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

_EXACT = jax.lax.Precision.HIGHEST  # what an accelerator does by default keeps three digits


def blocks_of(event: Array, blocks: int, size: int) -> Array:
    """An event as (size, blocks, m)."""
    return event.reshape(size, blocks, -1)


def apply(matrix: Array, event: Array) -> Array:
    """The map applied to an event, given in any shape, as (i, b, m)."""
    matrix = jnp.asarray(matrix)
    b, i, j = matrix.shape
    view = blocks_of(event, b, j)
    if i == j == 1:
        return matrix[:, 0, :] * view
    if b == 1 and view.shape[-1] == 1:
        return jnp.matmul(matrix[0], view[:, 0, 0], precision=_EXACT)[:, None, None]
    if b == 1:
        return jnp.matmul(matrix[0], view[:, 0], precision=_EXACT)[:, None]
    return jnp.einsum("bij,jbm->ibm", matrix, view, precision=_EXACT)


def transposed(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)


class Frame(NamedTuple):
    """Coordinates z = inverse x of an event x = matrix z, in which covariances are simple.

    Attributes:
      matrix, inverse: maps, (b, k, k).
      log_det: log |det| of the matrix, summed over its blocks, a scalar.
      drift: of the kernels of a step, the map from where they start to the change of the mean that all of them make.
    """

    matrix: Any  # arrays, of numpy where they are made
    inverse: Any
    log_det: Any
    drift: Any = None

    def coordinates(self, event: Array) -> Array:
        """z, of shape (k, b, m)."""
        return apply(self.inverse, event)

    def event(self, coordinates: Array, shape: tuple[int, ...]) -> Array:
        """x, of the event's shape."""
        return apply(self.matrix, coordinates).reshape(shape)

    def moved(self, start: Array) -> Array:
        """Where kernels that start from an event have their mean, but for what each of them adds."""
        return start if self.drift is None else start + apply(self.drift, start).reshape(start.shape)

    def volume(self, size: int) -> Array:
        """log |dx / dz| of an event of so many entries."""
        b, k, _ = self.matrix.shape
        return self.log_det * (size // (b * k))

    def view(self, event: Array) -> Array:
        """An event's entries in the shape of coordinates."""
        b, k, _ = self.matrix.shape
        return blocks_of(event, b, k)


def same_frame(one: Frame | None, other: Frame | None) -> bool:
    """Whether two frames are one object's: decided where programs are traced, so numbers are not compared."""
    if one is None or other is None:
        return one is other
    return one.matrix is other.matrix and one.inverse is other.inverse


def num_entries(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


__all__: Any = ["Frame", "apply", "blocks_of", "num_entries", "same_frame", "transposed"]
