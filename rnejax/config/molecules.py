"""Molecular systems, biases on them, and what particles are compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .basics import Atom, Number, Positive, PositiveInt, Section


class DistanceBias(Section):
    """A harmonic potential on the distance of two atoms, stiffness / 2 (distance - centre)^2."""

    kind: Literal["distance"]
    atoms: tuple[Atom, Atom]
    """numbered from 0"""
    stiffness: Number
    """in the system's units"""
    centre: Number
    """in the system's unit of length"""


class TorsionBias(Section):
    """A potential on a torsion angle, strength (1 - cos(angle - centre))."""

    kind: Literal["torsion"]
    atoms: tuple[Atom, Atom, Atom, Atom]
    """numbered from 0"""
    strength: Number
    """in the system's unit of energy"""
    centre: Number
    """in radians"""


Bias = Annotated[DistanceBias | TorsionBias, Field(discriminator="kind")]


class Particles(Section):
    """What systems of particles share."""

    biases: list[Bias] = []  # noqa: RUF012 - pydantic copies it
    """potentials that are added to the energy"""


class MullerBrownSystem(Section):
    """Three wells in the plane."""

    kind: Literal["muller_brown"]
    scale: Positive = 1.0
    """multiplies the energy"""


class DoubleWellSystem(Particles):
    """Particles whose pairs sit in double wells; DW-4 by default."""

    kind: Literal["double_well"]
    num_particles: PositiveInt = 4
    """how many"""
    dimension: PositiveInt = 2
    """of the space they live in"""


class LennardJonesSystem(Particles):
    """A cluster of Lennard-Jones particles in a harmonic trap; LJ-13 by default."""

    kind: Literal["lennard_jones"]
    num_particles: PositiveInt = 13
    """how many"""
    dimension: PositiveInt = 3
    """of the space they live in"""
    strength: Positive = 2.0
    """depth of a pair's well; 2 is the convention of DEM and PITA"""


class AlanineDipeptideSystem(Particles):
    """22 atoms in implicit solvent; nm, kJ/mol, K."""

    kind: Literal["alanine_dipeptide"]


System = Annotated[
    MullerBrownSystem | DoubleWellSystem | LennardJonesSystem | AlanineDipeptideSystem, Field(discriminator="kind")
]


class MoleculeComparison(Section):
    """A molecular system at one temperature, to hold particles against."""

    system: System
    """the system that the model was trained on"""
    temperature: Positive
    """that of the target, in the system's unit"""
    reference: str | None = None
    """the name of shipped samples at this temperature, a file that rnejax reference wrote, or an .npz file with x"""
    reweight: bool = True
    """also weigh the particles for the true energy, at the last step"""
