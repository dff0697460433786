"""Noise through velocities: data are positions that are pushed by noisy velocities, and so become noise smoothly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ..checks import check_number
from .linear import LinearProcess
from .linear_system import System


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class PhaseSpaceLangevin(LinearProcess):
    r"""Underdamped Langevin dynamics of a harmonic oscillator for every coordinate of the data.

    A state has shape (2, ...): positions x, which are the data, and velocities (momenta) v:

        dx = v / mass beta dt,    dv = -x beta dt - friction v / mass beta dt + sqrt(2 friction beta) dW.

    It keeps N(0, I) for positions and N(0, mass I) for velocities. Velocities start from N(0, velocity_share mass I),
    independently of the data, and that law is summed out: given x_0 alone the noised state is Gaussian, a network that
    says E[x_0 | x_t, v_t] says the whole score, and one that is asked for the ``score`` or for ``epsilon`` returns that
    part which belongs to the velocities, of the shape of the data (hybrid score matching).

    Args:
      friction: critical is 2 sqrt(mass); None for that.
      mass: of the velocities.
      velocity_share: of the stationary variance that velocities start with.
      data_std: of the reference's data.
      t_min, t_max, beta: as for `LinearSDE`.

    Raises:
      ValueError: for numbers that are not positive.

    Source: Dockhorn, Vahdat & Kreis 2022, sections 3.1 and 3.2 and appendix B, whose defaults these are.
    """

    friction: float | None = None
    mass: float = 0.25
    velocity_share: float = 0.04
    data_std: float = 1.0
    t_min: float = 1e-3
    t_max: Any = 1.0
    beta: Any = 4.0

    def __post_init__(self) -> None:
        if self.friction is None:
            object.__setattr__(self, "friction", 2 * float(np.sqrt(check_number("mass", self.mass, positive=True))))
        for name in ("friction", "mass", "velocity_share", "data_std"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), positive=True))
        self._set_range()

    @cached_property
    def system(self) -> System:
        assert self.friction is not None
        drift = np.array([[[0.0, -1 / self.mass], [1.0, self.friction / self.mass]]])
        return System(
            drift=drift,
            noise_rate=np.array([[[0.0, 0.0], [0.0, 2 * self.friction]]]),
            data=np.array([[[self.data_std**2]]]),
            auxiliary=np.array([[[self.velocity_share * self.mass]]]),
        )


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class CriticallyDamped(PhaseSpaceLangevin):
    """`PhaseSpaceLangevin` with friction = 2 sqrt(mass): the fastest that does not oscillate. Its drift has one
    eigenvector only.

    Raises:
      ValueError: for another friction.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.friction is not None
        critical = 2 * np.sqrt(self.mass)
        if abs(self.friction - critical) > 1e-12 * critical:
            raise ValueError(
                f"critical damping is friction = 2 sqrt(mass) = {critical:g}, got {self.friction:g}; "
                "PhaseSpaceLangevin takes any"
            )
