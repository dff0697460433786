"""Layers that the networks share: noise-level embedding, adaptive group normalisation, residual blocks, attention.

Every layer acts on the last axes of its input and lets leading axes through, so that one module serves a single example
and a batch of them. flax's own `GroupNorm` treats the first axis as a batch and therefore cannot.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from .arguments import check_choice
from .convolution import convolution

TIME_SCALES = ("logit", "log", "identity")


def noise_coordinate(t: jax.Array, scale: str, resolution: float = 1e-4) -> jax.Array:
    """A smooth coordinate in which every noise level that matters has the same room.

    A process with t in [0, 1] spends half of what decides its likelihood in t < 0.01, where sin(t) and sin(2 t) are
    equal to three digits. The coordinate

        logit:     u = log((t + r) / (1 - t + r))     for t in [0, 1]; affine in the log-SNR of the cosine process
                                                      and of the rectified flow, up to a correction of order one
        log:       u = log(t + r)                     for t = sigma (variance exploding)
        identity:  u = t

    spreads them out; r (`resolution`) keeps u finite at t = 0 and t = 1.

    Args:
        t: times, any shape.
        scale: "logit", "log" or "identity".
        resolution: r above; noise levels below it look alike.

    Returns:
        u, the shape of t.

    Raises:
        ValueError: if `scale` is none of the three.
    """
    check_choice("scale", scale, TIME_SCALES)
    if scale == "logit":
        return jnp.log(t + resolution) - jnp.log(1.0 - t + resolution)
    if scale == "log":
        return jnp.log(t + resolution)
    return t


def sinusoidal_features(u: jax.Array, num_features: int, longest: float = 40.0, shortest: float = 1.0) -> jax.Array:
    """Sines and cosines of u at wavelengths spaced geometrically from `longest` to `shortest`.

    Args:
        u: shape (...,).
        num_features: an even number.
        longest: longest wavelength, in the units of u; above the range of u, so that no two noise levels collide.
        shortest: shortest wavelength.

    Returns:
        features, shape (..., num_features), in [-1, 1].
    """
    count = num_features // 2
    wavelengths = jnp.geomspace(longest, shortest, count)
    angles = u[..., None] * (2.0 * math.pi / wavelengths)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def normal_energy(x: jax.Array, num_axes: int, dimension: int, scale: jax.Array | float = 1.0) -> jax.Array:
    """scale |x|^2 / 2 + (d / 2) log(2 pi) over the last axes: at scale 1, minus log-density of standard normal data.

    With the constant, an energy starts out normalised. Without it, a training that pins the density at t_max begins by
    lifting a number of the size of d through a network whose score every layer of that lift spoils; where a residual
    takes its target from that score, it may never recover (100 dimensions: it did not, for two seeds of three).

    Args:
        x: shape (..., *example).
        num_axes: of an example.
        dimension: d, of the space that examples live in.
        scale: of the square, shape (...).
    """
    square = jnp.sum(x**2, axis=tuple(range(-num_axes, 0)))
    return 0.5 * (scale * square + dimension * math.log(2 * math.pi))


class NoiseEmbedding(nnx.Module):
    """t -> features -> Dense -> SiLU -> Dense: a vector of size `features` per noise level."""

    def __init__(self, features: int, scale: str, *, num_sinusoids: int = 64, rngs: nnx.Rngs):
        check_choice("scale", scale, TIME_SCALES)
        self.scale = scale
        self.num_sinusoids = num_sinusoids
        self.first = nnx.Linear(num_sinusoids, features, rngs=rngs)
        self.second = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        u = noise_coordinate(jnp.asarray(t), self.scale)
        return self.second(nnx.silu(self.first(sinusoidal_features(u, self.num_sinusoids))))


def group_norm(
    x: jax.Array,
    num_groups: int,
    scale: jax.Array | float = 1.0,
    shift: jax.Array | float = 0.0,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Normalise each group of channels of one image to mean 0 and variance 1 (Wu & He 2018), then scale and shift.

    Args:
        x: shape (..., height, width, channels).
        num_groups: divides channels.
        scale, shift: per image and channel, shape (..., channels), or numbers.
        epsilon: added to the variance.

    Returns:
        the shape of x.
    """
    *lead, _, _, channels = x.shape

    def group_mean(values: jax.Array) -> jax.Array:
        # Pixels first, then channels within a group: reshaping the whole image into groups costs six times as much on
        # a CPU.
        per_channel = jnp.mean(values, axis=(-3, -2))
        per_group = jnp.mean(per_channel.reshape(*lead, num_groups, channels // num_groups), axis=-1)
        return jnp.repeat(per_group, channels // num_groups, axis=-1)

    def over_pixels(values: jax.Array | float) -> jax.Array:
        values = jnp.asarray(values)
        return values[..., None, None, :] if values.ndim else values

    centred = x - over_pixels(group_mean(x))
    slope = scale * jax.lax.rsqrt(group_mean(jnp.square(centred)) + epsilon)
    return centred * over_pixels(slope) + over_pixels(shift)


class AdaptiveGroupNorm(nnx.Module):
    """Group normalisation whose scale and shift are an affine function of an embedding: (1 + a(e)) norm(x) + b(e)."""

    def __init__(self, channels: int, embedding: int, *, num_groups: int = 8, rngs: nnx.Rngs):
        if channels % num_groups:
            raise ValueError(f"num_groups must divide channels: got {num_groups} groups for {channels} channels")
        self.num_groups = num_groups
        zeros = nnx.initializers.zeros_init()
        self.modulation = nnx.Linear(embedding, 2 * channels, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.modulation(e), 2, axis=-1)
        return group_norm(x, self.num_groups, 1.0 + scale, shift)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout: keep each entry with probability 1 - rate and divide it by that. No key, no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def conv3x3(inputs: int, outputs: int, rngs: nnx.Rngs, kernel_init: Callable | None = None) -> nnx.Conv:
    """A 3 x 3 convolution that keeps height and width."""
    init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init
    return convolution(inputs, outputs, 3, kernel_init=init, rngs=rngs)


class ResidualBlock(nnx.Module):
    """x + conv(dropout(silu(norm_2(conv(silu(norm_1(x))))))), with both norms modulated by the embedding.

    The last convolution starts at zero, so that the block starts as the identity (or as the 1 x 1 projection that
    changes the number of channels).
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, *, dropout_rate: float = 0.0, rngs: nnx.Rngs):
        self.dropout_rate = dropout_rate
        self.norm1 = AdaptiveGroupNorm(inputs, embedding, rngs=rngs)
        self.conv1 = conv3x3(inputs, outputs, rngs)
        self.norm2 = AdaptiveGroupNorm(outputs, embedding, rngs=rngs)
        self.conv2 = conv3x3(outputs, outputs, rngs, nnx.initializers.zeros_init())
        self.project = None if inputs == outputs else nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, e: jax.Array, key: jax.Array | None = None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x, e)))
        h = dropout(nnx.silu(self.norm2(h, e)), self.dropout_rate, key)
        skip = x if self.project is None else self.project(x)
        return skip + self.conv2(h)


class SpatialAttention(nnx.Module):
    """Multi-head self-attention over the pixels of one image, with a residual connection (Vaswani et al. 2017)."""

    def __init__(self, channels: int, *, num_heads: int = 4, num_groups: int = 8, rngs: nnx.Rngs):
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels: got {num_heads} heads for {channels} channels")
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.qkv = nnx.Linear(channels, 3 * channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        *lead, height, width, channels = x.shape
        size = channels // self.num_heads
        qkv = self.qkv(group_norm(x, self.num_groups))
        query, key, value = jnp.split(qkv.reshape(*lead, height * width, 3 * self.num_heads, size), 3, axis=-2)
        scores = jnp.einsum("...qhc,...khc->...hqk", query, key) / math.sqrt(size)
        mixed = jnp.einsum("...hqk,...khc->...qhc", nnx.softmax(scores, axis=-1), value)
        return x + self.out(mixed.reshape(x.shape))


def space_to_depth(x: jax.Array) -> jax.Array:
    """Halve height and width, stacking each 2 x 2 patch into channels: (..., 2h, 2w, c) -> (..., h, w, 4c)."""
    *lead, height, width, channels = x.shape
    patches = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    return jnp.swapaxes(patches, -4, -3).reshape(*lead, height // 2, width // 2, 4 * channels)


def repeat_pixels(x: jax.Array) -> jax.Array:
    """Double height and width by repeating each pixel: (..., h, w, c) -> (..., 2h, 2w, c)."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
