"""Networks of token sequences: a transformer, and a U-Net for tokens that lie on a grid.

Both return logits of the clean tokens, shape (..., length, vocab_size), for states whose tokens are 0, ..., vocab_size,
the last of which is MASK. They are time-free by default: what masked tokens were does not depend on when they were
masked, given which are (Ou et al. 2025; Zheng et al. 2025). A network of uniform tokens needs ``time=True``.
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
    dropout,
    group_norm,
    repeat_pixels,
    space_to_depth,
)


class ConditionEmbedding(nnx.Module):
    """Time and a vector of classes -> one vector: e = sum of an embedding of each, through a SiLU network.

    Args:
        features: size of e.
        condition_sizes: the numbers of classes of each entry of a condition; one more, that number itself, means "not
            said". Empty: no condition.
        time: whether the time is looked at.
        rngs: source of the initial weights.
    """

    def __init__(self, features: int, condition_sizes: tuple[int, ...], time: bool, *, rngs: nnx.Rngs):
        self.condition_sizes = tuple(condition_sizes)
        self.noise_embedding = NoiseEmbedding(features, "logit", rngs=rngs) if time else None
        self.classes = nnx.List([nnx.Embed(size + 1, features, rngs=rngs) for size in self.condition_sizes])
        self.constant = nnx.Param(jnp.zeros(features))
        self.first = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, lead: tuple[int, ...], t: jax.Array, condition: jax.Array | None) -> jax.Array:
        """(*lead, features). A class that does not exist gives NaN."""
        constant = self.constant[...]
        e = jnp.broadcast_to(constant, (*lead, len(constant)))
        if self.noise_embedding is not None:
            e = e + self.noise_embedding(t)
        if self.condition_sizes:
            condition = jnp.asarray(condition)
            check_last_axes("condition", condition.shape, (len(self.condition_sizes),))
            for i, (size, embed) in enumerate(zip(self.condition_sizes, self.classes, strict=True)):
                chosen = condition[..., i]
                # Past the end an embedding is NaN; negative numbers would wrap.
                e = e + embed(jnp.where((chosen < 0) | (chosen > size), size + 1, chosen))
        return nnx.silu(self.first(nnx.silu(e)))


class TransformerBlock(nnx.Module):
    """Self-attention and a two-layer network, each behind a layer norm whose scale and shift follow e (DiT, Peebles &
    Xie 2023), and each starting as zero. Queries and keys are turned by angles that grow with their positions (rotary
    embedding, Su et al. 2021), so that how much one token looks at another follows from how far apart they are, too.
    """

    def __init__(
        self,
        width: int,
        embedding: int,
        num_heads: int,
        dropout_rate: float,
        causal: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        zeros = nnx.initializers.zeros_init()
        self.num_heads = num_heads
        self.causal = causal
        self.dropout_rate = dropout_rate
        self.modulation = nnx.Linear(embedding, 4 * width, kernel_init=zeros, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=zeros, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=zeros, rngs=rngs)

    def __call__(self, h: jax.Array, e: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        scale1, shift1, scale2, shift2 = jnp.split(self.modulation(e)[..., None, :], 4, axis=-1)
        attended = self.out(self._attend((1 + scale1) * _layer_norm(h) + shift1))
        h = h + dropout(attended, self.dropout_rate, keys[0])
        moved = self.down(nnx.gelu(self.up((1 + scale2) * _layer_norm(h) + shift2)))
        return h + dropout(moved, self.dropout_rate, keys[1])

    def _attend(self, h: jax.Array) -> jax.Array:
        *lead, length, width = h.shape
        size = width // self.num_heads
        query, key, value = jnp.split(self.qkv(h).reshape(*lead, length, 3 * self.num_heads, size), 3, axis=-2)
        query, key = _turned(query), _turned(key)
        scores = jnp.einsum("...qhc,...khc->...hqk", query, key) / math.sqrt(size)
        if self.causal:  # nobody looks at what comes later
            scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        return jnp.einsum("...hqk,...khc->...qhc", nnx.softmax(scores, axis=-1), value).reshape(h.shape)


class TokenTransformer(nnx.Module):
    """logits = TokenTransformer(x, t[, condition]) of sequences, on one or on any number of leading batch axes.

    The logit of a token is the inner product of the last layer's features and the token's own embedding, plus a bias
    (tied embeddings, Press & Wolf 2017).

    Args:
        vocab_size: number of tokens, without MASK.
        length: of a sequence.
        width: features of a token, a multiple of twice `num_heads`.
        num_layers, num_heads: of the transformer.
        condition_sizes: the numbers of classes of each entry of a condition; that number itself means "not said".
        time: whether the network looks at the time.
        dropout_rate: active only if a key is given.
        causal: whether each position looks only at itself and at those before it.
        rngs: source of the initial weights.

    Raises:
        ValueError: if 2 num_heads does not divide width.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        condition_sizes: tuple[int, ...] = (),
        time: bool = False,
        dropout_rate: float = 0.0,
        causal: bool = False,
        rngs: nnx.Rngs,
    ):
        if width % (2 * num_heads):
            raise ValueError(f"2 num_heads must divide width: got {num_heads} heads for a width of {width}")
        self.vocab_size, self.length = vocab_size, length
        self.embed = nnx.Embed(vocab_size + 1, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.embedding = ConditionEmbedding(width, condition_sizes, time, rngs=rngs)
        blocks = [TransformerBlock(width, width, num_heads, dropout_rate, causal, rngs=rngs) for _ in range(num_layers)]
        self.blocks = nnx.List(blocks)
        self.bias = nnx.Param(jnp.zeros(vocab_size))

    def __call__(
        self, x: jax.Array, t: jax.Array, condition: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits, (..., length, vocab_size).

        Args:
            x: integers in [0, vocab_size], shape (..., length); any other integer gives NaN.
            t: times, shape (...).
            condition: integers, shape (..., entries), if there are `condition_sizes`.
            key: turns dropout on (training).

        Raises:
            ValueError: for sequences that are longer or shorter than `length`.
        """
        check_last_axes("x", x.shape, (self.length,))
        keys = [None] * len(self.blocks) if key is None else list(jax.random.split(key, len(self.blocks)))
        e = self.embedding(x.shape[:-1], t, condition)
        h = self.embed(_within(x, self.vocab_size)) + self.positions.embedding[...]
        for block, block_key in zip(self.blocks, keys, strict=True):
            h = block(h, e, block_key)
        tokens = self.embed.embedding[: self.vocab_size]  # all but MASK
        return _layer_norm(h) @ tokens.T + self.bias[...]


class TokenUNet(nnx.Module):
    """logits = TokenUNet(x, t[, condition]) of tokens on a grid, such as patches of an image in raster order.

    Args:
        vocab_size: number of tokens, without MASK.
        grid: (height, width); divided by 2 between levels. Sequences have length height * width.
        channels: channels at each level, finest first, multiples of 8.
        embedding: size of the embedding of time and condition.
        condition_sizes, time, dropout_rate, rngs: as of `TokenTransformer`.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        grid: tuple[int, int] = (14, 14),
        *,
        channels: tuple[int, ...] = (64, 96),
        embedding: int = 128,
        condition_sizes: tuple[int, ...] = (),
        time: bool = False,
        dropout_rate: float = 0.1,
        rngs: nnx.Rngs,
    ):
        reduction = 2 ** (len(channels) - 1)
        if grid[0] % reduction or grid[1] % reduction:
            raise ValueError(
                f"height and width must be multiples of {reduction} for {len(channels)} levels: got {grid}"
            )
        self.vocab_size, self.grid = vocab_size, tuple(grid)
        self.embed = nnx.Embed(vocab_size + 1, channels[0], rngs=rngs)
        self.positions = nnx.Embed(grid[0] * grid[1], channels[0], rngs=rngs)
        self.embedding = ConditionEmbedding(embedding, condition_sizes, time, rngs=rngs)
        self.stem = conv3x3(channels[0], channels[0], rngs)

        def block(level: int) -> ResidualBlock:
            return ResidualBlock(channels[level], channels[level], embedding, dropout_rate=dropout_rate, rngs=rngs)

        levels, steps = range(len(channels)), list(pairwise(channels))
        self.down = nnx.List([block(level) for level in levels[:-1]])
        self.shrink = nnx.List([nnx.Linear(4 * fine, coarse, rngs=rngs) for fine, coarse in steps])
        self.middle1 = block(levels[-1])
        self.attention = SpatialAttention(channels[-1], rngs=rngs)
        self.middle2 = block(levels[-1])
        self.grow = nnx.List([nnx.Linear(coarse, fine, rngs=rngs) for fine, coarse in steps])
        self.up = nnx.List([block(level) for level in levels[:-1]])
        self.head = nnx.Linear(channels[0], vocab_size, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(
        self, x: jax.Array, t: jax.Array, condition: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits, (..., height * width, vocab_size); arguments as of `TokenTransformer`."""
        height, width = self.grid
        check_last_axes("x", x.shape, (height * width,))
        num_blocks = len(self.down) + len(self.up) + 2
        keys = iter([None] * num_blocks if key is None else list(jax.random.split(key, num_blocks)))
        e = self.embedding(x.shape[:-1], t, condition)
        h = self.embed(_within(x, self.vocab_size)) + self.positions.embedding[...]
        h = self.stem(h.reshape(*x.shape[:-1], height, width, h.shape[-1]))
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, e, next(keys))
            skips.append(h)
            h = shrink(space_to_depth(h))
        h = self.middle1(h, e, next(keys))
        h = self.attention(h)
        h = self.middle2(h, e, next(keys))
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = skips.pop() + repeat_pixels(grow(h))
            h = block(h, e, next(keys))
        logits = self.head(nnx.silu(group_norm(h, 8)))
        return logits.reshape(*x.shape, self.vocab_size)


def _layer_norm(h: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def _within(x: jax.Array, vocab_size: int) -> jax.Array:
    """The token; one outside [0, vocab_size] past the end, where an embedding is NaN: negative ones would wrap."""
    return jnp.where((x < 0) | (x > vocab_size), vocab_size + 1, x)


def _turned(h: jax.Array) -> jax.Array:
    """Pairs (h_i, h_{i + size/2}) of h, (..., length, heads, size), turned by position * 10000^(-2 i / size)."""
    length, _, size = h.shape[-3:]
    frequencies = 10_000.0 ** (-jnp.arange(size // 2) / (size // 2))
    angles = (jnp.arange(length)[:, None] * frequencies)[:, None, :]
    first, second = jnp.split(h, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
