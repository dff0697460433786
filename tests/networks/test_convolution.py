"""The convolution is flax's; only its derivatives are computed in another way."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rnejax.networks.convolution import convolution, convolve

IMAGES = jax.random.normal(jax.random.key(0), (3, 14, 12, 4))


def loss(network: nnx.Conv, images: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(network(images)))


def weight_gradient(network: nnx.Conv) -> Any:
    return nnx.grad(loss)(network, IMAGES)


QUANTITIES: dict[str, Callable[[nnx.Conv], Any]] = {
    "value": lambda network: network(IMAGES),
    "gradient in the image": lambda network: jax.grad(loss, 1)(network, IMAGES),
    "gradient in the weights": weight_gradient,
    "directional derivative": lambda network: jax.jvp(network, (IMAGES,), (jnp.cos(IMAGES),))[1],
    "per-image gradients under vmap": lambda network: jax.vmap(lambda image: jax.grad(loss, 1)(network, image))(IMAGES),
    "gradient in a loop": lambda network: jax.lax.scan(
        lambda images, _: (images - jax.grad(loss, 1)(network, images), None), IMAGES, None, 2
    )[0],
    "gradient of a squared gradient": lambda network: jax.grad(
        lambda images: jnp.sum(jax.grad(loss, 1)(network, images) ** 2)
    )(IMAGES),
}


@pytest.mark.parametrize(("size", "strides"), [(3, 1), (3, 2), (5, 1), (2, 3)])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_values_and_derivatives_are_those_of_flax(quantity, size, strides):
    ours = convolution(4, 6, size, strides=strides, rngs=nnx.Rngs(0))
    flax = nnx.Conv(4, 6, (size, size), strides, rngs=nnx.Rngs(0))
    measured, expected = (jax.tree.leaves(QUANTITIES[quantity](network)) for network in (ours, flax))
    # float32 sums of at most 3 * 14 * 12 terms of order one
    chex.assert_trees_all_close(measured, expected, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_know_is_refused():
    dilated = nnx.Conv(4, 6, (3, 3), kernel_dilation=2, conv_general_dilated=convolve, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="neither dilations nor groups"):
        dilated(IMAGES)
