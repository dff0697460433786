r"""The exact model of a data set: what a network that fits its training points perfectly would say.

The law of x_0 is uniform over the points, so that

    D(x, t) = sum_i w_i x_i,   w_i proportional to N(x; E[x_t | x_0 = x_i], Cov[x_t | x_0]).

It generates the training points and nothing else: the end of memorisation, where the collapse of a sample onto one of
them can be watched (Biroli et al. 2024).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count
from ..kernels import Array
from ..model import DiffusionModel
from ..processes.process import Process, check_process


def empirical_model(
    process: Process, points: Any, covariance: Any = "reference", chunk_size: int = 1024, **options: Any
) -> DiffusionModel:
    """The diffusion model of a data set, exact for any process of numbers that diffuse.

    Args:
      process: the noising process.
      points: the training points, (n, *shape).
      covariance, options: as for `rnejax.DiffusionModel`. The points travel as its ``params``.
      chunk_size: points that are looked at together: what memory a batch of b states needs is b times this, whatever
        the number of points. Fewer are as exact.

    Raises:
      ValueError: for points that are no finite numbers with a leading axis, or a process of tokens.
    """
    check_process(process)
    if process.is_discrete:
        raise ValueError(f"{type(process).__name__} is a process of tokens; the model of a data set is one of numbers")
    points = jnp.asarray(points, jnp.result_type(float))
    if points.ndim < 2 or len(points) == 0 or not bool(np.isfinite(np.asarray(points)).all()):
        raise ValueError(f"points must be finite numbers of shape (n, *shape), n >= 1, got shape {points.shape}")
    size = min(check_count("chunk_size", chunk_size), len(points))
    options = {"noise_level": "level", "batched": True, "shape": process.state_shape(points.shape[1:]), **options}
    return DiffusionModel(process, EmpiricalDenoiser(size), "x0", covariance, params=points, **options)


@jax.tree_util.register_static
class EmpiricalDenoiser:
    """``fn(points, x, level, condition)``: the mean of the points, weighted by what they explain of each state."""

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size

    def __call__(self, points: Array, x: Array, level: Any, condition: Any = None) -> Array:
        centre = jnp.mean(points, axis=0)
        states = jax.vmap(level.whiten)(x) - level.whiten_mean(centre)
        num, size = len(points), self.chunk_size
        padded = jnp.concatenate([points, jnp.broadcast_to(centre, ((-num) % size, *centre.shape))])
        chunks = padded.reshape(-1, size, *centre.shape)
        known = (jnp.arange(len(padded)) < num).reshape(-1, size)

        def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array]) -> tuple[Any, None]:
            # Of |y - m|^2 only what depends on the point, and both are centred, so that little is lost to rounding.
            largest, total, mean = carry
            part, is_point = chunk
            means = jax.vmap(lambda x0: level.whiten_mean(x0 - centre))(part)
            explained = jnp.matmul(states, means.T, precision=jax.lax.Precision.HIGHEST)
            logits = jnp.where(is_point, explained - 0.5 * jnp.sum(means**2, axis=1), -jnp.inf)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.exp(logits - new[:, None])
            keep = jnp.exp(largest - new)
            flat = (part - centre).reshape(size, -1)
            mean = mean * keep[:, None] + jnp.matmul(weights, flat, precision=jax.lax.Precision.HIGHEST)
            return (new, total * keep + jnp.sum(weights, axis=1), mean), None

        n = len(x)
        start = jnp.full(n, -jnp.inf, x.dtype), jnp.zeros(n, x.dtype), jnp.zeros((n, centre.size), x.dtype)
        # The first chunk decides a finite maximum: -inf - -inf would be NaN.
        first = start[0].at[:].set(jnp.finfo(x.dtype).min)
        (_, total, mean), _ = jax.lax.scan(add, (first, *start[1:]), (chunks, known))
        return centre + (mean / total[:, None]).reshape(n, *centre.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EmpiricalDenoiser) and self.chunk_size == other.chunk_size

    def __hash__(self) -> int:
        return hash(("EmpiricalDenoiser", self.chunk_size))


def nearest_point(points: Any) -> Any:
    """``label(x)``: the index of the point that is nearest to a sample, for `cloning_probability`."""
    points = jnp.asarray(points, jnp.result_type(float))
    centre = jnp.mean(points, axis=0)
    flat = (points - centre).reshape(len(points), -1)
    offsets = 0.5 * jnp.sum(flat**2, axis=1)

    def label(x: Array) -> Array:
        return jnp.argmax(flat @ (x - centre).reshape(-1) - offsets)

    return label
