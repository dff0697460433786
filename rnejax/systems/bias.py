r"""Potentials with something added: umbrella potentials on a distance or a torsion, as enhanced sampling uses them.

A model of U + b_1 times one of U + b_2 is a model of (U + b_1 + U + b_2); divided by one of U, of U + b_1 + b_2:
`rnejax.product`. What it should look like is known by sampling `Biased` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..checks import check_number
from ..kernels import Array, Subspace
from .alanine_dipeptide import dihedral


@dataclass(frozen=True)
class DistanceBias:
    """stiffness / 2 (|x_i - x_j| - centre)^2, in units of the system's energy and length.

    Attributes:
      atoms: the two particles, numbered from 0.
    """

    atoms: tuple[int, int]
    stiffness: float
    centre: float

    def __post_init__(self) -> None:
        _check_atoms(self, 2)
        check_number("stiffness", self.stiffness)
        check_number("centre", self.centre)

    def energy(self, x: Array) -> Array:
        """Of one configuration (atoms, space)."""
        i, j = self.atoms
        distance = jnp.sqrt(jnp.sum((x[i] - x[j]) ** 2))
        return 0.5 * self.stiffness * (distance - self.centre) ** 2


@dataclass(frozen=True)
class TorsionBias:
    """strength (1 - cos(angle - centre)), in units of the system's energy; angles in radians.

    Attributes:
      atoms: the four particles, numbered from 0, about the bond between the second and the third.
    """

    atoms: tuple[int, int, int, int]
    strength: float
    centre: float

    def __post_init__(self) -> None:
        _check_atoms(self, 4)
        check_number("strength", self.strength)
        check_number("centre", self.centre)

    def energy(self, x: Array) -> Array:
        """Of one configuration (atoms, 3)."""
        angle = dihedral(x, np.asarray([self.atoms]))[0]
        return self.strength * (1 - jnp.cos(angle - self.centre))


Bias = DistanceBias | TorsionBias


@dataclass(frozen=True)
class Biased:
    """A system whose energy has something added: energy = system.energy + sum of the biases' energies.

    All else (``torsions``, ``kinds``, ...) is the system's own.

    Raises:
      ValueError: for a bias on particles that the system does not have.
    """

    system: Any
    biases: tuple[Bias, ...]

    def __post_init__(self) -> None:
        for bias in self.biases:
            if len(self.shape) != 2 or max(bias.atoms) >= self.shape[0]:
                raise ValueError(
                    f"a bias on atoms {bias.atoms} does not fit a system of shape {self.shape}, whose first axis "
                    "counts atoms from 0"
                )
            if isinstance(bias, TorsionBias) and self.shape[1] != 3:
                raise ValueError(f"a torsion is one of three dimensions, the system has {self.shape[1]}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.system.shape

    @property
    def subspace(self) -> Subspace:
        return self.system.subspace

    def start(self, key: Array) -> Array:
        """The system's own."""
        return self.system.start(key)

    def thermal_energy(self, temperature: Any) -> float:
        """The system's own."""
        return self.system.thermal_energy(temperature)

    def energy(self, x: Array) -> Array:
        """Of one configuration, in the system's unit.

        Raises:
          ValueError: for another shape.
        """
        return self.system.energy(x) + sum(bias.energy(x) for bias in self.biases)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "system":  # while being copied, there is no system yet
            raise AttributeError(name)
        return getattr(self.system, name)


def _check_atoms(bias: Any, count: int) -> None:
    name = type(bias).__name__
    if len(bias.atoms) != count or len(set(bias.atoms)) != count:
        raise ValueError(f"{name} needs {count} different atoms, got {bias.atoms}")
    for atom in bias.atoms:
        if isinstance(atom, bool) or not isinstance(atom, (int, np.integer)) or atom < 0:
            raise ValueError(f"atoms of {name} must be integers from 0, got {bias.atoms}")
