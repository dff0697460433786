"""A small class-conditional U-Net for images (Ronneberger et al. 2015; Ho et al. 2020; Dhariwal & Nichol 2021).

Three resolutions; a residual block per level on the way down and on the way up, two at the bottom with attention
between them. Three choices differ from the usual recipe:

- On the way down the full resolution has no residual block, only the first convolution: on a CPU a block there costs as
  much as the whole bottom, and the block on the way up already sees these pixels.
- The way up *adds* the skip connection instead of concatenating it, which halves the cost of its convolutions.
- The input is joined by sines and cosines of the pixel values at wavelengths down to one grey level (Kingma et
  al. 2021, appendix C). The likelihood of dequantised images is decided at noise levels near the width of a grey level,
  where a network that sees only the pixel would have to amplify it some four hundred times. A gate per channel, a
  function of the noise level, closes where these features carry nothing but noise.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from .arguments import check_last_axes
from .layers import (
    NoiseEmbedding,
    ResidualBlock,
    SpatialAttention,
    conv3x3,
    group_norm,
    repeat_pixels,
    space_to_depth,
)


class UNet(nnx.Module):
    """prediction = UNet(x, t, label), on one image or on any number of leading batch axes.

    Args:
        image_shape: (height, width, channels); height and width are divided by 2 between levels.
        num_classes: labels run from 0 to num_classes - 1; the label `num_classes` (`null_label`) means "no class",
            which classifier-free guidance (Ho & Salimans 2022) trains on for a fraction of the examples.
        channels: channels at each level, finest first, multiples of 8; at least two levels.
        embedding: size of the embedding of noise level and class.
        wavelengths: of the sinusoidal input features, in units of x; empty for none. The default goes down to the grey
            level of an 8-bit image scaled to [-1, 1], whose width is 2/256.
        dropout_rate: in the residual blocks below the full resolution, active only if a key is given.
        time_scale: the coordinate in which t is embedded, see `layers.noise_coordinate`: "logit" for processes on
            [0, 1], "log" for t = sigma.
        classes_above: labels count at larger times only; up to this one the network is that of "no class". For labels
            that are taught to a network later, where they have long been decided by then.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        channels: tuple[int, ...] = (32, 48, 96),
        embedding: int = 128,
        wavelengths: tuple[float, ...] = (1 / 32, 1 / 64, 1 / 128),
        dropout_rate: float = 0.1,
        time_scale: str = "logit",
        classes_above: float | None = None,
        rngs: nnx.Rngs,
    ):
        if len(channels) < 2:
            raise ValueError(f"channels must name at least two levels: got {channels}")
        reduction = 2 ** (len(channels) - 1)
        if image_shape[0] % reduction or image_shape[1] % reduction:
            raise ValueError(
                f"height and width must be multiples of {reduction} for {len(channels)} levels: got {image_shape}"
            )
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.wavelengths = wavelengths
        self.classes_above = classes_above
        self.noise_embedding = NoiseEmbedding(embedding, time_scale, rngs=rngs)
        self.class_embedding = nnx.Embed(num_classes + 1, embedding, rngs=rngs)
        self.fuse = nnx.Linear(embedding, embedding, rngs=rngs)

        pixel_features = 2 * len(wavelengths) * image_shape[2]
        self.gate = nnx.Linear(embedding, pixel_features, rngs=rngs) if wavelengths else None
        self.stem = conv3x3(image_shape[2] + pixel_features, channels[0], rngs)

        def block(level: int) -> ResidualBlock:
            rate = dropout_rate if level else 0.0
            return ResidualBlock(channels[level], channels[level], embedding, dropout_rate=rate, rngs=rngs)

        levels = range(len(channels))
        self.down = nnx.List([block(level) for level in levels[1:-1]])
        steps = list(pairwise(channels))
        self.shrink = nnx.List([nnx.Linear(4 * fine, coarse, rngs=rngs) for fine, coarse in steps])
        self.middle1 = block(levels[-1])
        self.attention = SpatialAttention(channels[-1], rngs=rngs)
        self.middle2 = block(levels[-1])
        self.grow = nnx.List([nnx.Linear(coarse, fine, rngs=rngs) for fine, coarse in steps])
        self.up = nnx.List([block(level) for level in levels[:-1]])
        self.head = conv3x3(channels[0], image_shape[2], rngs, nnx.initializers.zeros_init())

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The prediction at x.

        Args:
            x: images, shape (..., height, width, channels).
            t: times, shape (...).
            label: integers in [0, num_classes], shape (...); any other integer gives NaN.
            key: turns dropout on (training).

        Returns:
            the shape of x.

        Raises:
            ValueError: if x does not end in `image_shape`.
        """
        check_last_axes("x", x.shape, self.image_shape)
        num_blocks = len(self.down) + len(self.up) + 2
        if self.classes_above is not None:
            label = jnp.where(jnp.asarray(t) > self.classes_above, label, self.null_label)
        keys = iter([None] * num_blocks if key is None else jax.random.split(key, num_blocks))
        e = nnx.silu(
            self.fuse(nnx.silu(self.noise_embedding(t) + self.class_embedding(_within(label, self.num_classes))))
        )
        h = self.stem(self._with_pixel_features(x, e))

        skips = [h]
        h = self.shrink[0](space_to_depth(h))
        for block, shrink in zip(self.down, self.shrink[1:], strict=True):
            h = block(h, e, next(keys))
            skips.append(h)
            h = shrink(space_to_depth(h))
        h = self.middle1(h, e, next(keys))
        h = self.attention(h)
        h = self.middle2(h, e, next(keys))
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = skips.pop() + repeat_pixels(grow(h))
            h = block(h, e, next(keys))
        return self.head(nnx.silu(group_norm(h, 8)))

    def _with_pixel_features(self, x: jax.Array, e: jax.Array) -> jax.Array:
        if self.gate is None:
            return x
        angles = jnp.concatenate([x * (2.0 * math.pi / wavelength) for wavelength in self.wavelengths], axis=-1)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return jnp.concatenate([x, waves * nnx.sigmoid(self.gate(e))[..., None, None, :]], axis=-1)


def _within(label: jax.Array, num_classes: int) -> jax.Array:
    """The label; one outside [0, num_classes] past the end, where an embedding is NaN: negative ones would wrap."""
    label = jnp.asarray(label)
    return jnp.where((label < 0) | (label > num_classes), num_classes + 1, label)
