"""A network of particles that turns, mirrors and moves with its input (after Satorras, Hoogeboom and Welling 2021).

A density of distances d_ij = |x_i - x_j| has a score of one form,

    score_i = sum_j g_ij (x_i - x_j) / d_ij,   g_ij = d log p / d d_ij = g_ji.

So every unordered pair carries one message, whose number g_ij pulls both of its ends: half the work of a network of
ordered pairs, nothing lost, and the sum over all particles is zero by itself. An energy follows from the same messages.

Between two rounds of messages the particles move, by another number per pair, and the next round sees the distances
where they are then. To denoise is to relax: a particle in a crowd is pushed by all neighbours at once, less far than
the sum of what each of them would do to it alone. A few moves say that about any number of neighbours; a function of
the distances as they were has to learn it for each number, and fails for those that were rare in training. On
configurations of LJ-13 at T = 0.8, for networks trained at T = 2 for equally many steps, moving made the squared error
of the noise 2.5 to 6 times smaller (``scripts/denoising_oracle.py`` measures it).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .arguments import check_choice, check_last_axes
from .layers import NoiseEmbedding, normal_energy


class EGNN(nnx.Module):
    """prediction = EGNN(x, t), on one configuration or on any number of leading batch axes.

    Args:
        shape: (particles, space) of one configuration.
        kinds: the kind of each particle, integers from 0; equal kinds are interchangeable. Default: all alike.
        features: width of particle features and messages.
        num_layers: rounds of messages, and moves between them.
        num_radial: Gaussian functions of the distance, as wide as they are apart.
        reach: largest distance that they resolve, in units of x; beyond it pairs still interact, by d / (1 + d).
        radial_growth: log of how much further apart they are at ``reach`` than at zero: bonds and walls are stiff,
            and what acts over a long distance is smooth.
        embedding: size of the embedding of the noise level.
        pair_types: let every pair of kinds have its own modulation of messages, going in and coming out. In a
            molecule one distance means a bond for one pair and a clash for another; a sum of two kinds has to say so
            through a hidden layer that all pairs share.
        output: "vector", of the shape of x and without a centre of mass, "scalar", a number, or "energy": the energy
            of standard normal data without a centre of mass, |x|^2 / 2 + (d / 2) log(2 pi) with d = (n - 1) k, plus
            that number.
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
        radial_growth: float = 3.0,
        embedding: int = 64,
        pair_types: bool = False,
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
        self.radial_growth = radial_growth
        self.output = output
        self.noise_embedding = NoiseEmbedding(embedding, time_scale, rngs=rngs)
        self.kind_embedding = nnx.Embed(max(self.kinds) + 1, features, rngs=rngs)
        self.from_noise = nnx.Linear(embedding, features, rngs=rngs)
        types = int(self._pair_types().max()) + 1 if pair_types else 0
        self.layers = nnx.List(
            [Messages(features, num_radial + 1, embedding, types, rngs=rngs) for _ in range(num_layers)]
        )
        zeros = nnx.initializers.zeros_init()
        # Two numbers per pair: what the round adds to the answer, and what moves the particles before the next one.
        self.last = nnx.List(
            [nnx.Linear(features, 2, use_bias=False, kernel_init=zeros, rngs=rngs) for _ in range(num_layers)]
        )
        self.last_of_types = nnx.List(
            [nnx.Embed(types, 2 * features, embedding_init=zeros, rngs=rngs) for _ in range(num_layers if types else 0)]
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
        e = self.noise_embedding(t)
        first, second = np.triu_indices(self.shape[0], k=1)
        # Sums over pairs are products with these: a gather has a slow gradient on a CPU.
        ends = [jnp.asarray(np.eye(self.shape[0])[each], x.dtype) for each in (first, second)]
        joint, difference = ends[0] + ends[1], ends[0] - ends[1]
        h = self.kind_embedding(jnp.asarray(self.kinds)) + self.from_noise(e)[..., None, :]
        moved, vector, pairs = x, jnp.zeros_like(x), jnp.zeros(x.shape[:-2], x.dtype)
        types = jnp.asarray(self._pair_types())
        for number, (layer, last) in enumerate(zip(self.layers, self.last, strict=True)):
            differences = jnp.einsum("pn,...nk->...pk", difference, moved)
            # A distance has no derivative at zero; two particles in one place push each other nowhere.
            distances = jnp.sqrt(jnp.sum(differences**2, axis=-1, keepdims=True) + 1e-12)
            h, messages = layer(h, self._radial(distances), e, joint, types)
            pull, push = jnp.split(last(messages), 2, axis=-1)
            if self.last_of_types:
                # Written as sums, since a product of matrices for each pair is slow on a CPU.
                of_pull, of_push = jnp.split(self.last_of_types[number](types), 2, axis=-1)
                pull = pull + jnp.sum(messages * of_pull, axis=-1, keepdims=True)
                push = push + jnp.sum(messages * of_push, axis=-1, keepdims=True)
            if self.output != "vector":
                pairs = pairs + jnp.sum(pull, axis=(-2, -1)) / self.shape[0]
            directions = differences / (1 + distances)
            vector = vector + jnp.einsum("pn,...pk->...nk", difference, pull * directions)
            moved = moved + layer.step(e)[..., None] * jnp.einsum("pn,...pk->...nk", difference, push * directions)
        if self.last_of_particles is None:
            return vector
        scalar = pairs + jnp.sum(self.last_of_particles(nnx.silu(h)), axis=(-2, -1))
        if self.output == "scalar":
            return scalar
        return scalar + normal_energy(x, 2, (self.shape[0] - 1) * self.shape[1])

    def _pair_types(self) -> np.ndarray:
        """Which two kinds every unordered pair has, numbered from 0: (pairs,)."""
        ends = np.sort(np.asarray(self.kinds)[np.stack(np.triu_indices(self.shape[0], k=1))], axis=0)
        return np.unique(ends, axis=1, return_inverse=True)[1].reshape(-1)

    def _radial(self, distances: jax.Array) -> jax.Array:
        """Gaussians of the distance, and one function that never dies: (..., num_radial + 1)."""
        u = np.linspace(0.0, 1.0, self.num_radial)
        centres = self.reach * np.expm1(self.radial_growth * u) / np.expm1(self.radial_growth)
        width = np.gradient(centres, u) / (self.num_radial - 1)
        gaussians = jnp.exp(-0.5 * ((distances - centres) / width) ** 2)
        return jnp.concatenate([gaussians, distances / (1 + distances)], axis=-1)


class Messages(nnx.Module):
    """One round: m_ij = phi(h_i + h_j, d_ij, t) = m_ji, and h_i + psi(sum_j m_ij); ``step`` scales the moves after."""

    def __init__(self, features: int, radial: int, embedding: int, types: int = 0, *, rngs: nnx.Rngs):
        self.of_particles = nnx.Linear(features, features, rngs=rngs)
        self.of_distance = nnx.Linear(radial, features, use_bias=False, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.modulation = nnx.Linear(embedding, 2 * features, kernel_init=zeros, rngs=rngs)
        self.modulation_of_types = nnx.Embed(types, 2 * features, embedding_init=zeros, rngs=rngs) if types else None
        self.second = nnx.Linear(features, features, rngs=rngs)
        self.update = nnx.Linear(features, features, rngs=rngs)
        self.closing = nnx.Linear(features, features, kernel_init=zeros, rngs=rngs)
        self.step = nnx.Linear(embedding, 1, rngs=rngs)

    def __call__(
        self, h: jax.Array, radial: jax.Array, e: jax.Array, joint: jax.Array, types: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        modulation = self.modulation(e)[..., None, :]
        if self.modulation_of_types is not None:
            modulation = modulation + self.modulation_of_types(types)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        seen = jnp.einsum("pn,...nf->...pf", joint, self.of_particles(h)) + self.of_distance(radial)
        messages = nnx.silu(self.second(nnx.silu((1 + scale) * seen + shift)))
        gathered = jnp.einsum("pn,...pf->...nf", joint, messages) / np.sqrt(joint.shape[-1] - 1)
        return h + self.closing(nnx.silu(self.update(gathered))), messages
