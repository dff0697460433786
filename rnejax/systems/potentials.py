r"""Small systems in reduced units: a surface in two dimensions and clusters of particles with pair potentials.

Energies act on one configuration, in units of the system's own energy; the law at temperature T (in the same units,
k = 1) is proportional to exp(-energy(x) / T). They are what the sampling literature uses, with its conventions, which
differ by factors of two from paper to paper and are therefore spelt out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, check_number
from ..kernels import Array, CentreOfMassFree, FullSpace, Subspace


def check_temperature(temperature: Any) -> float:
    """The temperature as a float; ValueError where it is no positive number."""
    return check_number("temperature", temperature, positive=True)


def check_configuration(system: Any, x: Array) -> None:
    """ValueError where an array is no configuration of the system: its number of atoms is part of its shape."""
    if jnp.shape(x) != system.shape:
        raise ValueError(
            f"a configuration of {type(system).__name__} has shape {system.shape}, got {jnp.shape(x)}; for many at "
            "once take jax.vmap(system.energy)"
        )


def pair_distances_squared(x: Array) -> Array:
    """|x_i - x_j|^2 of all pairs i < j of one configuration (atoms, space): (atoms (atoms - 1) / 2,)."""
    first, second = np.triu_indices(x.shape[0], k=1)
    return jnp.sum((x[first] - x[second]) ** 2, axis=-1)


class ReducedUnits:
    """Energies and temperatures have one unit."""

    def thermal_energy(self, temperature: Any) -> float:
        """kT in units of the energy: the temperature itself.

        Raises:
          ValueError: for anything but a positive number.
        """
        return check_temperature(temperature)


class Cluster(ReducedUnits):
    """Particles that nothing holds in one place: their centre of mass is left out."""

    num_particles: int
    dimension: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        if check_count(f"num_particles of {name}", self.num_particles) < 2:
            raise ValueError(f"num_particles of {name} must be at least 2: energies are those of pairs")
        check_count(f"dimension of {name}", self.dimension)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.num_particles, self.dimension)

    @property
    def subspace(self) -> Subspace:
        return CentreOfMassFree()

    def start(self, key: Array) -> Array:
        """A configuration to start from: Gaussian positions, about one particle per unit of volume."""
        extent = self.num_particles ** (1 / self.dimension)
        return self.subspace.project(extent * jax.random.normal(key, self.shape))


@dataclass(frozen=True)
class MullerBrown(ReducedUnits):
    """Three wells and two saddles in the plane (Müller and Brown 1979).

    energy = scale * sum_k A_k exp(a_k (x - X_k)^2 + b_k (x - X_k)(y - Y_k) + c_k (y - Y_k)^2)

    with A = (-200, -100, -170, 15). Its minima lie at (-0.558, 1.442), (0.623, 0.028) and (-0.050, 0.467), with
    energies -146.70, -108.17 and -80.77 times ``scale``.

    Attributes:
      scale: multiplies the energy; with 1, barriers are 9 to 106 high, and temperatures of 10 to 40 are of interest.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale, positive=True)

    @property
    def shape(self) -> tuple[int]:
        return (2,)

    @property
    def subspace(self) -> Subspace:
        return FullSpace()

    def start(self, key: Array) -> Array:
        """A point to start from: the deepest minimum, whatever the key."""
        return jnp.asarray([-0.558, 1.442])

    def energy(self, x: Array) -> Array:
        """Of one point (2,).

        Raises:
          ValueError: for another shape.
        """
        check_configuration(self, x)
        depth = jnp.asarray([-200.0, -100.0, -170.0, 15.0])
        a, b, c = jnp.asarray([[-1.0, -1.0, -6.5, 0.7], [0.0, 0.0, 11.0, 0.6], [-10.0, -10.0, -6.5, 0.7]])
        dx = x[0] - jnp.asarray([1.0, 0.0, -0.5, -1.0])
        dy = x[1] - jnp.asarray([0.0, 0.5, 1.5, 1.0])
        return self.scale * jnp.sum(depth * jnp.exp(a * dx**2 + b * dx * dy + c * dy**2))


@dataclass(frozen=True)
class DoubleWell(Cluster):
    """Particles whose pairs sit in a double well of their distance (Köhler et al. 2020); DW-4 is ``DoubleWell(4)``.

    energy = sum_{i < j} b (d_ij - d_0)^2 + c (d_ij - d_0)^4,   b = -4, c = 0.9, d_0 = 4,

    every pair counted once: half of the sum over ordered pairs that the papers write. A pair has minima at distances
    d_0 -+ sqrt(-b / (2 c)) = 2.51 and 5.49.

    Attributes:
      num_particles: 4 in the literature.
      dimension: of the space they live in; 2 in the literature.
    """

    num_particles: int = 4
    dimension: int = 2
    quadratic: float = -4.0
    quartic: float = 0.9
    distance: float = 4.0

    def energy(self, x: Array) -> Array:
        """Of one configuration (particles, dimension).

        Raises:
          ValueError: for another shape.
        """
        check_configuration(self, x)
        stretch = jnp.sqrt(pair_distances_squared(x)) - self.distance
        return jnp.sum(self.quadratic * stretch**2 + self.quartic * stretch**4)


@dataclass(frozen=True)
class LennardJones(Cluster):
    """A cluster in a harmonic trap around its own centre; LJ-13 is ``LennardJones(13)``.

    energy = strength * sum_{i < j} [(r_m / d_ij)^12 - 2 (r_m / d_ij)^6] + trap / 2 * sum_i |x_i - centre|^2

    The default strength of 2 is the convention of the DEM and PITA papers, which sum over ordered pairs, each pair
    twice, with a unit well depth; ``strength=1`` is that of Köhler et al. 2020.

    Two particles in one place have infinite energy, that is a density of zero.
    """

    num_particles: int = 13
    dimension: int = 3
    strength: float = 2.0
    minimum: float = 1.0
    trap: float = 1.0

    def energy(self, x: Array) -> Array:
        """Of one configuration (particles, dimension).

        Raises:
          ValueError: for another shape.
        """
        check_configuration(self, x)
        attraction = (self.minimum**2 / pair_distances_squared(x)) ** 3
        # Not a difference of powers: at no distance that would be inf - inf.
        pairs = jnp.sum(attraction * (attraction - 2))
        return self.strength * pairs + 0.5 * self.trap * jnp.sum((x - jnp.mean(x, axis=0)) ** 2)
