"""Convolutions whose derivatives are fast on a CPU too.

XLA computes the gradients of a convolution inside a loop (`lax.scan`, which training and sampling are) ten to fifty
times slower on a CPU than the matrix products that they consist of. A convolution is linear in the image and in the
kernel, so its derivative is two convolutions; on a CPU these are written as sums of matrix products over shifted
images, whose transposes XLA does well. The value itself, and everything on other platforms, is XLA's own convolution.
`scripts/benchmark_cost.py` measures it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero


def convolution(inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs, strides: int = 1, **options: Any) -> nnx.Conv:
    """A `flax.nnx.Conv` with a square kernel and zeros around the image, whose derivatives are fast on a CPU too."""
    return nnx.Conv(inputs, outputs, (size, size), strides, conv_general_dilated=convolve, rngs=rngs, **options)


def convolve(images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **other: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of channels-last images, neither dilated nor in groups.

    Args:
        images: (n, height, width, inputs).
        kernel: (height, width, inputs, outputs).
        strides: two integers.
        padding: "SAME" or "VALID".
        other: what flax passes on.

    Returns:
        (n, rows, columns, outputs).

    Raises:
        ValueError: for dilations or groups.
    """
    if {*other.get("lhs_dilation", (1,)), *other.get("rhs_dilation", (1,)), other.get("feature_group_count", 1)} != {1}:
        raise ValueError(f"convolve knows neither dilations nor groups: got {other}")
    return _convolve(images, kernel, tuple(strides), padding, tuple(sorted(other.items())))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, other: tuple[tuple[str, Any], ...]
) -> jax.Array:
    return jax.lax.conv_general_dilated(images, kernel, strides, padding, **dict(other))


@partial(_convolve.defjvp, symbolic_zeros=True)
def _derivative(
    strides: tuple[int, int], padding: str, other: Any, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (images, kernel), (d_images, d_kernel) = primals, tangents
    linear = partial(
        jax.lax.platform_dependent,
        cpu=partial(_sum_over_shifts, strides=strides, padding=padding, precision=dict(other).get("precision")),
        default=lambda images, kernel: jax.lax.conv_general_dilated(images, kernel, strides, padding, **dict(other)),
    )
    value = _convolve(images, kernel, strides, padding, other)
    terms = [
        linear(*factors)
        for tangent, factors in ((d_images, (d_images, kernel)), (d_kernel, (images, d_kernel)))
        if not isinstance(tangent, SymbolicZero)
    ]
    return value, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(value)


def _sum_over_shifts(
    images: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, precision: Any
) -> jax.Array:
    """sum_{i, j} shift_{i, j}(images) @ kernel[i, j]."""
    size = kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(images.shape[1:3], size, strides, padding)
    # The barriers keep XLA from computing what made the images, or the gradient that arrives, anew for every shift.
    padded = jax.lax.optimization_barrier(jnp.pad(images, [(0, 0), *pads, (0, 0)]))
    lasts = [length - width + 1 for length, width in zip(padded.shape[1:3], size, strict=True)]
    shifts = [
        jnp.matmul(
            padded[:, i : i + lasts[0] : strides[0], j : j + lasts[1] : strides[1]], kernel[i, j], precision=precision
        )
        for i in range(size[0])
        for j in range(size[1])
    ]
    return jax.lax.optimization_barrier(sum(shifts[1:], start=shifts[0]))
