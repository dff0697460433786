"""Alanine dipeptide's energy against OpenMM's, on frames that scripts/check_alanine_dipeptide.py left here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnejax.systems import AlanineDipeptide
from rnejax.systems.alanine_dipeptide import dihedral
from rnejax.systems.metrics import align

SYSTEM = AlanineDipeptide()
HEAVY = [i for i, element in enumerate(SYSTEM.parameters["atom_elements"]) if element != "H"]


@pytest.fixture(scope="module")
def frames():
    with np.load(Path(__file__).parent / "alanine_dipeptide_frames.npz") as arrays:
        return dict(arrays)


def both(positions, dtype):
    """Energies and gradients of frames, computed in one precision."""
    with jax.enable_x64(dtype is np.float64):
        outputs = jax.jit(jax.vmap(jax.value_and_grad(SYSTEM.energy)))(positions.astype(dtype))
        return tuple(np.asarray(output, np.float64) for output in outputs)


@pytest.mark.parametrize("temperature", [300.0, 800.0, 1200.0])
def test_energies_and_forces_are_those_of_openmm(frames, temperature):
    k = list(frames["temperatures"]).index(temperature)
    positions, energies, forces = (frames[name][k] for name in ("positions", "energies", "forces"))
    size = np.linalg.norm(forces, axis=(1, 2))
    ours, gradients = both(positions, np.float64)
    np.testing.assert_allclose(ours, energies, rtol=1e-4)
    assert np.all(np.linalg.norm(gradients + forces, axis=(1, 2)) < 1e-4 * size)
    # In float32 an energy is a sum of terms that are each larger than it, and it crosses zero near 800 K.
    ours, gradients = both(positions, np.float32)
    terms = np.abs(np.asarray(jax.vmap(SYSTEM.energy_terms)(positions.astype(np.float32)), np.float64)).sum(axis=1)
    assert np.all(np.abs(ours - energies) < 1e-5 * terms)
    assert np.all(np.linalg.norm(gradients + forces, axis=(1, 2)) < 1e-4 * size)


def test_every_term_counts(frames):
    assert SYSTEM.energy_terms(frames["positions"][0, 0]).shape == (5,)
    assert np.all(np.abs(SYSTEM.energy_terms(frames["positions"][0, 0])) > 1)


def test_moved_and_turned_it_has_the_same_energy(frames):
    x = jnp.asarray(frames["positions"][0, 0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)
    np.testing.assert_allclose(SYSTEM.energy(x @ turn + 1.0), SYSTEM.energy(x), rtol=1e-4)


def test_torsions_have_the_sign_of_iupac():
    # Looking along the middle bond, the far one turned clockwise by 90 degrees is at +90.
    x = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(dihedral(x, np.arange(4)[None]), [np.pi / 2], rtol=1e-6)
    np.testing.assert_allclose(dihedral(x.at[3, 1].set(-1.0), np.arange(4)[None]), [-np.pi / 2], rtol=1e-6)


def test_phi_and_psi_are_of_the_backbone(frames):
    names = [name.split(":")[1] for name in SYSTEM.atom_names]
    assert [names[i] for i in SYSTEM.phi_atoms] == ["C", "N", "CA", "C"]
    assert [names[i] for i in SYSTEM.psi_atoms] == ["N", "CA", "C", "N"]
    torsions = jax.vmap(SYSTEM.torsions)(frames["positions"].reshape(-1, 22, 3))
    assert torsions.shape == (frames["positions"].shape[0] * frames["positions"].shape[1], 2)


def test_a_clash_has_no_density(frames):
    x = jnp.asarray(frames["positions"][0, 0])
    assert not float(SYSTEM.energy(x.at[0].set(x[21] + 1e-6))) < 1e6


def test_other_molecules_and_temperatures_are_refused():
    with pytest.raises(ValueError, match=r"AlanineDipeptide has shape \(22, 3\), got \(23, 3\)"):
        SYSTEM.energy(jnp.zeros((23, 3)))
    with pytest.raises(ValueError, match="temperature must be positive, got -300"):
        SYSTEM.thermal_energy(-300)
    assert SYSTEM.thermal_energy(300.0) == pytest.approx(2.4943387854, rel=1e-9)


def test_the_hydrogens_of_each_methyl_group_are_alike_and_nothing_else():
    from collections import Counter

    counts = Counter(SYSTEM.kinds)
    assert sorted(counts.values()) == [1] * 13 + [3] * 3
    groups = {frozenset(i for i, kind in enumerate(SYSTEM.kinds) if kind == k) for k, n in counts.items() if n == 3}
    carbons = {SYSTEM.atom_names.index(name) for name in ("ACE:CH3", "ALA:CB", "NME:C")}
    bonded = {
        frozenset(
            int(b if a == carbon else a)
            for a, b in SYSTEM.parameters["bond_atoms"]
            if carbon in (a, b) and SYSTEM.parameters["atom_elements"][int(b if a == carbon else a)] == "H"
        )
        for carbon in carbons
    }
    assert groups == bonded


def test_exchanging_alike_atoms_changes_no_energy(frames):
    x = np.asarray(frames["positions"], np.float32).reshape(-1, 22, 3)[:2]
    swapped = x[:, [2, 1, 0, *range(3, 22)]]
    energies, _ = both(np.concatenate([x, swapped]), np.float64)
    np.testing.assert_allclose(energies[2:], energies[:2], rtol=1e-6)


def test_mirror_images_become_the_l_form_and_the_l_form_stays(frames):
    x = jnp.asarray(frames["positions"].reshape(-1, 22, 3)[::20], jnp.float32)
    np.testing.assert_array_equal(jax.vmap(SYSTEM.to_l_form)(x), x)
    mirrored = x * jnp.asarray([-1.0, 1, 1])
    torsions = jax.vmap(SYSTEM.torsions)
    np.testing.assert_allclose(torsions(mirrored), -torsions(x), atol=1e-4)
    np.testing.assert_allclose(torsions(jax.vmap(SYSTEM.to_l_form)(mirrored)), torsions(x), atol=1e-4)


def test_every_relabelled_mirror_image_comes_back_to_one_standard_form(frames):
    """All sixteen: the mirror, and two hydrogens exchanged in each of three methyl groups. Energies stay."""
    x = np.asarray(frames["positions"], np.float32).reshape(-1, 22, 3)[::60]
    np.testing.assert_array_equal(jax.vmap(SYSTEM.standard_form)(x), x)
    for mirrored in (False, True):
        for exchanged in np.ndindex(2, 2, 2):
            order = np.arange(22)
            for swap, (_, hydrogens) in zip(exchanged, SYSTEM.methyl_groups, strict=True):
                order[hydrogens] = hydrogens[[1, 0, 2]] if swap else hydrogens
            found = np.asarray(jax.vmap(SYSTEM.standard_form)(x[:, order] * np.where(mirrored, [1, -1, 1], 1)))
            # The same molecule but for turns of methyl groups by a third, which any simulation makes.
            for one, other in zip(found, x, strict=True):
                turned = align(one[None, HEAVY], other[HEAVY])[0]
                np.testing.assert_allclose(turned, other[HEAVY] - other[HEAVY].mean(0), atol=1e-5)
                for carbon, hydrogens in SYSTEM.methyl_groups:
                    senses = [np.linalg.det(each[hydrogens] - each[carbon]) for each in (one, other)]
                    assert senses[0] * senses[1] > 0


def test_methyl_groups_are_three_hydrogens_on_a_carbon():
    names = SYSTEM.atom_names
    found = {names[carbon]: [names[h] for h in hydrogens] for carbon, hydrogens in SYSTEM.methyl_groups}
    assert found == {
        "ACE:CH3": ["ACE:H1", "ACE:H2", "ACE:H3"],
        "ALA:CB": ["ALA:HB1", "ALA:HB2", "ALA:HB3"],
        "NME:C": ["NME:H1", "NME:H2", "NME:H3"],
    }
