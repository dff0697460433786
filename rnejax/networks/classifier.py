"""Two small classifiers of images that have as little in common as two good ones can.

One serves as a reward; the other, of another architecture and trained on other images, only judges. A sample that fools
the first need not fool the second.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from .arguments import check_last_axes
from .convolution import convolution
from .layers import group_norm, space_to_depth


class StridedClassifier(nnx.Module):
    """Strided convolutions with group normalisation, smooth throughout (SiLU), an average over all positions.

    log p(label | x), on one image or on any number of leading batch axes. Smoothness matters where the gradient in x is
    used; the average over positions makes it insensitive to small shifts.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        channels: tuple[int, ...] = (32, 64, 128),
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        sizes = [self.image_shape[2], *channels]
        self.convolutions = nnx.List([convolution(a, b, 3, strides=2, rngs=rngs) for a, b in pairwise(sizes)])
        self.head = nnx.Linear(channels[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, features: bool = False) -> jax.Array:
        """Log-probabilities, shape (..., num_classes), of images, shape (..., height, width, channels); or the features
        before the last layer, (..., channels).
        """
        check_last_axes("x", x.shape, self.image_shape)
        for layer in self.convolutions:
            x = nnx.silu(group_norm(layer(x), 8))
        x = jnp.mean(x, axis=(-3, -2))
        return x if features else nnx.log_softmax(self.head(x))


class PooledClassifier(nnx.Module):
    """Large kernels, maxima over 2 x 2 patches, and a dense layer that knows where things are (LeCun et al. 1998).

    log p(label | x), on one image or on any number of leading batch axes; the shape is as for `StridedClassifier`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        channels: tuple[int, int] = (16, 32),
        hidden: int = 64,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        height, width, inputs = self.image_shape
        self.first = convolution(inputs, channels[0], 5, rngs=rngs)
        self.second = convolution(channels[0], channels[1], 5, rngs=rngs)
        self.dense = nnx.Linear((height // 4) * (width // 4) * channels[1], hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, features: bool = False) -> jax.Array:
        """Log-probabilities, shape (..., num_classes), of images, shape (..., height, width, channels); or the features
        before the last layer, (..., hidden).
        """
        check_last_axes("x", x.shape, self.image_shape)
        for layer in (self.first, self.second):
            x = _max_of_patches(nnx.relu(layer(x)))
        x = nnx.relu(self.dense(x.reshape(*x.shape[:-3], -1)))
        return x if features else nnx.log_softmax(self.head(x))


def _max_of_patches(x: jax.Array) -> jax.Array:
    patches = space_to_depth(x)
    return jnp.max(patches.reshape(*patches.shape[:-1], 4, x.shape[-1]), axis=-2)
