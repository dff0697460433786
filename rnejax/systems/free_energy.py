"""Free-energy differences between temperatures from samples at all of them: MBAR (Shirts and Chodera 2008).

The estimator is pymbar's (``pip install pymbar``, rnejax's extra ``molecules``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np


class FreeEnergies(NamedTuple):
    """log Z of every temperature relative to the last one, Z the configuration integral of exp(-U / kT), in nats.

    The Helmholtz free energy is -kT log Z. Both arrays have one entry per temperature; those of the last are zero.
    """

    log_normalizer: np.ndarray
    standard_error: np.ndarray


def multistate_bennett(thermal_energies: Any, energy: Any) -> FreeEnergies:
    """MBAR over a ladder.

    Args:
      thermal_energies: kT in the energy's unit, (k,).
      energy: (k, n), n effectively independent samples at each temperature; neighbours must overlap.

    Raises:
      ValueError: for shapes that do not fit.
    """
    thermal_energies, energy = np.asarray(thermal_energies, np.float64), np.asarray(energy, np.float64)
    if energy.ndim != 2 or energy.shape[0] != len(thermal_energies):
        raise ValueError(
            f"energy must have shape ({len(thermal_energies)}, n), one row per temperature, got {energy.shape}"
        )
    before = bool(jax.config.read("jax_enable_x64"))
    try:
        from pymbar import MBAR  # which turns double precision on, for everybody

        solved = MBAR(energy.ravel()[None] / thermal_energies[:, None], np.full(len(energy), energy.shape[1]))
        found = solved.compute_free_energy_differences()
    finally:
        jax.config.update("jax_enable_x64", before)
    # Delta_f[i, j] = f_j - f_i with f = -log Z
    return FreeEnergies(-np.asarray(found["Delta_f"])[-1], np.asarray(found["dDelta_f"])[-1])
