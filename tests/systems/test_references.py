"""Stored reference samples: what goes in comes out, and what is shipped is what it says."""

import numpy as np
import pytest

from rnejax.systems import metrics
from rnejax.systems.references import find_reference, load_reference, save_reference, shipped_references


def stored(folder, **metadata):
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 4, 3))
    x -= x.mean(axis=-2, keepdims=True)
    energy = np.arange(20.0).reshape(2, 2, 5)
    save_reference(folder / "some.npz", [1.0, 2.0], x, energy, metadata)
    return x, energy, folder / "some.npz"


def test_samples_come_back_to_half_a_unit(tmp_path):
    x, energy, path = stored(tmp_path, seed=3)
    for i, temperature in enumerate((1.0, 2.0)):
        read = load_reference(path, temperature)
        assert np.abs(read.x - x[i]).max() <= np.abs(x).max() / 32767  # half of it, and the centre of mass
        np.testing.assert_allclose(read.x.mean(axis=-2), 0, atol=1e-6)
        np.testing.assert_array_equal(read.energy, energy[i])
        assert (read.temperature, read.metadata) == (temperature, {"seed": 3})


def test_points_of_a_surface_keep_their_mean(tmp_path):
    x = np.random.default_rng(0).normal(size=(1, 1, 5, 2)) + 3
    save_reference(tmp_path / "s.npz", [1.0], x, np.zeros((1, 1, 5)), {})
    np.testing.assert_allclose(load_reference(tmp_path / "s.npz", 1).x, x[0], atol=1e-3)


def test_mistakes_are_told(tmp_path):
    _, _, path = stored(tmp_path)
    with pytest.raises(ValueError, match=r"no samples at temperature 1\.5: there are 1, 2"):
        load_reference(path, 1.5)
    with pytest.raises(ValueError, match="temperature must be positive"):
        load_reference(path, 0.0)
    with pytest.raises(FileNotFoundError, match=r"no shipped samples of that name; shipped: .*dw4.*lj13"):
        load_reference("lj14", 1.0)
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no reference samples"):
        load_reference(tmp_path / "no.npz", 1.0)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="holds no reference samples"):
        load_reference(tmp_path / "other.npz", 1.0)


def test_positions_that_are_no_numbers_are_not_stored(tmp_path):
    x = np.zeros((1, 1, 2, 3, 3))
    x[0, 0, 1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="positions must be finite: 1 of 18"):
        save_reference(tmp_path / "some.npz", [1.0], x, np.zeros((1, 1, 2)), {})
    assert not (tmp_path / "some.npz").exists()


def test_all_that_is_shipped_fits_into_25_megabytes():
    assert sum(find_reference(name).stat().st_size for name in shipped_references()) <= 25e6


@pytest.mark.parametrize("name", shipped_references())
def test_shipped_samples_have_the_energies_the_floors_and_the_convergence_that_they_claim(name):
    with np.load(find_reference(name)) as file:
        temperatures = file["temperatures"]
    for temperature in temperatures:
        read = load_reference(name, temperature)
        system = read.system
        energy = metrics.energies(system, read.x[0, ::50])
        # Rounding moves the energy by some gradients times half a unit; it must be far below kT.
        off = np.abs(energy - read.energy[0, ::50]) / system.thermal_energy(temperature)
        assert np.median(off) < 0.02
        floor = read.metadata["floor"][f"{temperature:g}"]
        found = metrics.energy_wasserstein(read.energy[0], read.energy[1])
        np.testing.assert_allclose(found, floor["energy_w1"], rtol=1e-3)
        assert read.metadata["command"] == "rnejax reference"
        assert read.metadata["config"]["seed"] is not None
    for diagnostics in read.metadata["diagnostics"]:
        assert max(diagnostics["rhat"]) < 1.01
        assert min(diagnostics["swap_rate"]) > 0.2
        assert min(diagnostics["effective_sample_size"]) > 1000
        # Of a few dozen statistics of both sets, none may be far off.
        assert max(abs(z) for z in diagnostics["halves_z"]) < 4
