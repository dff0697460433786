"""Free energies against harmonic oscillators, whose configuration integral is known."""

import jax
import numpy as np
import pytest

from rnejax.systems.free_energy import multistate_bennett


def test_harmonic_oscillators_and_the_precision_of_everything_else():
    """U = x^2 / 2 in 3 dimensions: log Z = 1.5 log kT + constant. pymbar must not leave JAX in double precision."""
    rng = np.random.default_rng(0)
    kT = np.array([1.0, 1.5, 2.2])
    energy = 0.5 * kT[:, None] * rng.chisquare(3, size=(3, 4000))
    before = jax.config.read("jax_enable_x64")
    found = multistate_bennett(kT, energy)
    assert jax.config.read("jax_enable_x64") == before
    expected = 1.5 * np.log(kT / kT[-1])
    z = (found.log_normalizer[:2] - expected[:2]) / found.standard_error[:2]
    assert np.all(np.abs(z) < 4)
    assert np.all(found.standard_error[:2] < 0.05)
    assert found.log_normalizer[2] == 0


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"energy must have shape \(2, n\)"):
        multistate_bennett([1.0, 2.0], np.zeros((3, 5)))
