"""A residual multilayer perceptron with noise-level embedding, for problems of few dimensions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from .arguments import check_choice, check_last_axes
from .layers import NoiseEmbedding, normal_energy


class MLP(nnx.Module):
    """prediction = MLP(x, t[, label]), on one example or on any number of leading batch axes.

    Args:
        shape: of one example; it is flattened inside.
        hidden: width.
        depth: number of residual blocks h + W_2 silu(W_1 h + e).
        output: "like_x" for a vector the shape of x, "scalar" for a number, "energy" for the energy of standard normal
            data, |x|^2 / 2 + (d / 2) log(2 pi), plus that number.
        curvature: of an energy: (1 + a(t)) |x|^2 / 2 in place of |x|^2 / 2, a learned and zero to start with. Within a
            mode of data of many dimensions, that is most of the energy, and a sum of squares of all directions is more
            than a few layers learn by themselves.
        num_classes: if given, the network takes a label in [0, num_classes], of which the last means "no class".
        condition_size: if given, the network takes a vector of so many numbers instead, such as what a policy observes.
        condition_shift, condition_scale: what is taken off such a vector, and what it is divided by then.
        time_scale: the coordinate in which t is embedded, see `layers.noise_coordinate`.
        rngs: source of the initial weights. The last layer starts at zero.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (2,),
        hidden: int = 128,
        depth: int = 3,
        *,
        output: str = "like_x",
        curvature: bool = False,
        num_classes: int | None = None,
        condition_size: int | None = None,
        condition_shift: tuple[float, ...] | None = None,
        condition_scale: tuple[float, ...] | None = None,
        time_scale: str = "logit",
        rngs: nnx.Rngs,
    ):
        check_choice("output", output, ("like_x", "scalar", "energy"))
        if num_classes is not None and condition_size is not None:
            raise ValueError("a network takes a label or a vector as its condition: give num_classes or condition_size")
        if curvature and output != "energy":
            raise ValueError(f"curvature is that of an energy, and output is {output!r}")
        self.shape = tuple(shape)
        self.output = output
        size = math.prod(self.shape)
        self.noise_embedding = NoiseEmbedding(hidden, time_scale, rngs=rngs)
        self.class_embedding = None if num_classes is None else nnx.Embed(num_classes + 1, hidden, rngs=rngs)
        standard = condition_shift, condition_scale
        self.look = None if condition_size is None else _Look(condition_size, hidden, *standard, rngs=rngs)
        self.first = nnx.Linear(size, hidden, rngs=rngs)
        self.inner = nnx.List([nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(depth)])
        self.outer = nnx.List([nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(depth)])
        zeros = nnx.initializers.zeros_init()
        self.last = nnx.Linear(hidden, size if output == "like_x" else 1, kernel_init=zeros, rngs=rngs)
        self.curvature = nnx.Linear(hidden, 1, kernel_init=zeros, rngs=rngs) if curvature else None

    def __call__(self, x: jax.Array, t: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """The prediction.

        Args:
            x: shape (..., *shape).
            t: shape (...).
            condition: labels, integers of shape (...), if the network was made with classes; vectors, (...,
                condition_size), if it was made for these.

        Returns:
            the shape of x, or (...) for an energy.

        Raises:
            ValueError: x does not end in `shape`; a condition is missing, not wanted, or of another size.
        """
        check_last_axes("x", x.shape, self.shape)
        e = self.noise_embedding(t)
        if self.class_embedding is not None and condition is not None:
            e = e + self.class_embedding(condition)
        elif self.class_embedding is not None:
            raise ValueError("the network was made with classes and takes a label")
        elif self.look is not None and condition is not None:
            e = e + self.look(condition)
        elif self.look is not None:
            raise ValueError("the network was made with a condition_size and takes a vector")
        elif condition is not None:
            raise ValueError("the network was made without classes and takes no label")
        lead = x.shape[: x.ndim - len(self.shape)]
        h = self.first(x.reshape(*lead, -1))
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(nnx.silu(inner(h) + e))
        out = self.last(nnx.silu(h))
        if self.output == "like_x":
            return out.reshape(x.shape)
        if self.output == "scalar":
            return out[..., 0]
        scale = 1.0 if self.curvature is None else 1.0 + self.curvature(e)[..., 0]
        return out[..., 0] + normal_energy(x, len(self.shape), math.prod(self.shape), scale)


class _Look(nnx.Module):
    """A vector as what is added to the embedding of the noise level."""

    def __init__(
        self,
        size: int,
        hidden: int,
        shift: tuple[float, ...] | None,
        scale: tuple[float, ...] | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.size = size
        self.shift = (0.0,) * size if shift is None else tuple(shift)
        self.scale = (1.0,) * size if scale is None else tuple(scale)
        for name, numbers in (("condition_shift", self.shift), ("condition_scale", self.scale)):
            if len(numbers) != size:
                raise ValueError(f"{name} must have {size} numbers, one for each of a condition, got {len(numbers)}")
        self.first = nnx.Linear(size, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)

    def __call__(self, condition: jax.Array) -> jax.Array:
        check_last_axes("condition", condition.shape, (self.size,))
        shift, scale = (jnp.asarray(numbers, condition.dtype) for numbers in (self.shift, self.scale))
        return self.second(nnx.silu(self.first((condition - shift) / scale)))
