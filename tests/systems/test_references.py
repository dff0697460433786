"""Stored reference samples: what goes in comes out, and what is shipped is what it says."""

import jax
import numpy as np
import pytest

from rnejax.systems import AlanineDipeptide, LennardJones, metrics
from rnejax.systems.references import (
    find_reference,
    from_frames,
    load_reference,
    save_reference,
    shipped_references,
)


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


class TestFrames:
    """Configurations of a user's own simulation."""

    DIPEPTIDE = AlanineDipeptide()

    def frames(self, count=20):
        start = np.asarray(self.DIPEPTIDE.start(jax.random.key(0)))
        return start + 0.001 * np.random.default_rng(0).normal(size=(count, 22, 3)) + 0.3

    def test_they_become_consecutive_sets_without_a_centre_of_mass(self):
        x = self.frames(23)
        made = from_frames(self.DIPEPTIDE, x, 300.0, {"kind": "alanine_dipeptide"})
        assert made.x.shape == (5, 4, 22, 3)
        np.testing.assert_allclose(made.x[1, 0], x[4] - x[4].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(made.energy[2], metrics.energies(self.DIPEPTIDE, made.x[2]))
        assert made.system == self.DIPEPTIDE

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x[:, :21], r"frames must have shape \(n, 22, 3\), got \(20, 21, 3\)"),
            (lambda x: x[0], r"frames must have shape \(n, 22, 3\), got \(22, 3\)"),
            (lambda x: x[:0], r"got \(0, 22, 3\)"),
            (lambda x: (1000 * x).astype(int), "floating-point numbers, got int64"),
            (lambda x: np.where(np.arange(20)[:, None, None] == 7, np.nan, x), "1 of 20 frames .* the first is 7"),
            (lambda x: 10 * x, "10 times as long .* unit of length is nm; ångström. divide by 10"),
            (lambda x: x[:, ::-1], "is it this molecule, in this order of atoms"),
            (
                lambda x: np.where(np.arange(20)[:, None, None] < 3, 10 * x, x),
                "in 3 of 20 frames, the first is 0,.*10 t",
            ),
            (
                lambda x: x[:, [*range(6), 8, 7, 6, *range(9, 22)]],
                "20 of 20 frames .* torn or crushed: in frame 0, .* apart",
            ),
            (lambda x: x + 5.0 * (np.arange(22) == 18)[:, None], "NME:C.* their bond is 0.* cut by a periodic box"),
            (lambda x: x[:4], "4 frames do not make 5 sets"),
        ],
    )
    def test_what_is_no_frame_of_the_molecule_is_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            from_frames(self.DIPEPTIDE, change(self.frames()), 300.0, {"kind": "alanine_dipeptide"})

    def test_hot_frames_are_whole(self):
        hot = load_reference("alanine_dipeptide", 1200.0).x[0][:200]
        assert from_frames(self.DIPEPTIDE, hot, 1200.0, {"kind": "alanine_dipeptide"}).x.shape == (5, 40, 22, 3)

    def test_clashes_are_refused_and_counted(self):
        x = np.random.default_rng(0).normal(size=(10, 3, 3))
        x[[4, 7], 0] = x[[4, 7], 1]
        with pytest.raises(
            ValueError, match="2 of 10 frames have an infinite energy, the first is 4: particles in one"
        ):
            from_frames(LennardJones(3), x, 1.0, {"kind": "lennard_jones", "num_particles": 3})

    def test_temperatures_are_positive(self):
        with pytest.raises(ValueError, match="temperature must be positive, got -1"):
            from_frames(self.DIPEPTIDE, self.frames(), -1.0, {})
