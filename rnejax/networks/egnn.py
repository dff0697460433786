"""A network of particles that turns, mirrors and moves with its input (Satorras, Hoogeboom and Welling 2021).

Messages between all pairs see the distance through radial functions; a vector is a sum over pairs of difference vectors
times numbers. Both outputs follow from the same messages: a vector per particle that lies in the centre-of-mass-free
subspace, or an energy that no rotation, reflection or shift changes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .arguments import check_choice, check_last_axes
from .layers import NoiseEmbedding


class EGNN(nnx.Module):
    """prediction = EGNN(x, t), on one configuration or on any number of leading batch axes.

    Args:
        shape: (particles, space) of one configuration.
        kinds: the kind of each particle, integers from 0; equal kinds are interchangeable. Default: all alike.
        features: width of particle features and messages.
        num_layers: rounds of messages.
        num_radial: Gaussian functions of the distance.
        reach: largest distance that they resolve, in units of x; beyond it pairs still interact, by d / (1 + d).
        embedding: size of the embedding of the noise level.
        pair_term: add a function of distance and noise level alone, the same for all pairs of two kinds: what a pair
            potential contributes where there is little noise, whatever surrounds the pair.
        output: "vector", of the shape of x and without a centre of mass, "scalar", a number, or "energy", |x|^2 / 2
            plus that number: the energy of standard normal data, to start with.
        time_scale: the coordinate in which t is embedded, see `layers.noise_coordinate`.
        rngs: source of the initial weights. The last layer starts at zero.
    """

    def __init__(
        self,
        shape: tuple[int, int] = (13, 3),
        *,
        kinds: tuple[int, ...] | None = None,
        features: int = 64,
        num_layers: int = 3,
        num_radial: int = 24,
        reach: float = 4.0,
        embedding: int = 64,
        pair_term: bool = False,
        output: str = "vector",
        time_scale: str = "logit",
        rngs: nnx.Rngs,
    ):
        check_choice("output", output, ("vector", "scalar", "energy"))
        self.shape = tuple(shape)
        self.kinds = (0,) * shape[0] if kinds is None else tuple(int(kind) for kind in kinds)
        if len(self.kinds) != shape[0] or min(self.kinds) < 0:
            raise ValueError(f"kinds must be {shape[0]} integers from 0, one per particle: got {kinds}")
        self.num_radial = num_radial
        self.reach = reach
        self.output = output
        self.noise_embedding = NoiseEmbedding(embedding, time_scale, rngs=rngs)
        self.kind_embedding = nnx.Embed(max(self.kinds) + 1, features, rngs=rngs)
        self.from_noise = nnx.Linear(embedding, features, rngs=rngs)
        self.layers = nnx.List([Messages(features, num_radial + 1, embedding, rngs=rngs) for _ in range(num_layers)])
        zeros = nnx.initializers.zeros_init()
        self.last = nnx.Linear(features, 1, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.pair_term = (
            PairTerm(max(self.kinds) + 1, features, num_radial + 1, embedding, rngs=rngs) if pair_term else None
        )
        self.last_of_particles = nnx.Linear(features, 1, kernel_init=zeros, rngs=rngs) if output != "vector" else None

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The prediction.

        Args:
            x: shape (..., particles, space).
            t: shape (...).

        Returns:
            the shape of x, or (...) for an energy.

        Raises:
            ValueError: x does not end in `shape`.
        """
        check_last_axes("x", x.shape, self.shape)
        n = self.shape[0]
        e = self.noise_embedding(t)
        differences = x[..., :, None, :] - x[..., None, :, :]
        own = jnp.eye(n, dtype=x.dtype)[..., None]
        # A distance has no derivative at zero, where a particle is compared with itself.
        distances = jnp.sqrt(jnp.sum(differences**2, axis=-1, keepdims=True) + own)
        radial = self._radial(distances)
        h = self.kind_embedding(jnp.asarray(self.kinds)) + self.from_noise(e)[..., None, :]
        for layer in self.layers:
            h, messages = layer(h, radial, e, 1 - own)
        last = self.last(messages)
        if self.pair_term is not None:
            last = last + self.pair_term(jnp.asarray(self.kinds), radial, e)
        if self.last_of_particles is not None:
            pairs = jnp.sum(last * (1 - own), axis=(-3, -2, -1)) / n
            number = pairs + jnp.sum(self.last_of_particles(nnx.silu(h)), axis=(-2, -1))
            return number + 0.5 * jnp.sum(x**2, axis=(-2, -1)) if self.output == "energy" else number
        # These numbers are not symmetric, so that the sum over all particles is not zero by itself.
        strength = last * (1 - own) / (1 + distances)
        vector = jnp.sum(strength * differences, axis=-2)
        return vector - jnp.mean(vector, axis=-2, keepdims=True)

    def _radial(self, distances: jax.Array) -> jax.Array:
        """Gaussians of the distance, and one function that never dies: (..., num_radial + 1)."""
        centres = np.linspace(0.0, self.reach, self.num_radial)
        width = self.reach / self.num_radial
        gaussians = jnp.exp(-0.5 * ((distances - centres) / width) ** 2)
        return jnp.concatenate([gaussians, distances / (1 + distances)], axis=-1)


class Messages(nnx.Module):
    """One round: m_ij = phi(h_i, h_j, d_ij, t), and h_i + psi(sum_j m_ij)."""

    def __init__(self, features: int, radial: int, embedding: int, *, rngs: nnx.Rngs):
        self.of_receiver = nnx.Linear(features, features, rngs=rngs)
        self.of_sender = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.of_distance = nnx.Linear(radial, features, use_bias=False, rngs=rngs)
        self.modulation = nnx.Linear(embedding, 2 * features, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.second = nnx.Linear(features, features, rngs=rngs)
        self.update = nnx.Linear(features, features, rngs=rngs)
        self.closing = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, h: jax.Array, radial: jax.Array, e: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale, shift = jnp.split(self.modulation(e)[..., None, None, :], 2, axis=-1)
        seen = self.of_receiver(h)[..., :, None, :] + self.of_sender(h)[..., None, :, :] + self.of_distance(radial)
        messages = nnx.silu(self.second(nnx.silu((1 + scale) * seen + shift)))
        gathered = jnp.sum(messages * others, axis=-2) / np.sqrt(others.shape[-2])
        return h + self.closing(nnx.silu(self.update(gathered))), messages


class PairTerm(nnx.Module):
    """A number per pair from its distance, the kinds of both particles and the noise level. Starts at zero."""

    def __init__(self, num_kinds: int, features: int, radial: int, embedding: int, *, rngs: nnx.Rngs):
        self.kind_embedding = nnx.Embed(num_kinds, features, rngs=rngs)
        self.of_distance = nnx.Linear(radial, features, rngs=rngs)
        self.modulation = nnx.Linear(embedding, 2 * features, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.last = nnx.Linear(features, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, kinds: jax.Array, radial: jax.Array, e: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.modulation(e)[..., None, None, :], 2, axis=-1)
        of_kind = self.kind_embedding(kinds)
        seen = self.of_distance(radial) + of_kind[:, None, :] + of_kind[None, :, :]
        return self.last(nnx.silu((1 + scale) * seen + shift))
