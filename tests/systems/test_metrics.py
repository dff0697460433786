"""Metrics between samples of molecules, on sets whose distance is known."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rnejax.systems import AlanineDipeptide, LennardJones, MullerBrown, metrics

RNG = np.random.default_rng(0)


def rotation(rng):
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def test_a_shift_is_its_own_distance():
    values = RNG.normal(size=500)
    for order in (1, 2):
        np.testing.assert_allclose(metrics.wasserstein(values + 0.7, values, order), 0.7, rtol=1e-6)


def test_the_order_matters_where_only_some_of_the_mass_moves():
    """A tenth of the mass moves by 2: W_1 = 0.2, W_2 = sqrt(0.1 * 4)."""
    values = np.zeros(10)
    moved = values.copy()
    moved[0] = 2.0
    np.testing.assert_allclose(metrics.wasserstein(moved, values, 1), 0.2, rtol=1e-6)
    np.testing.assert_allclose(metrics.wasserstein(moved, values, 2), np.sqrt(0.4), rtol=1e-6)


def test_weights_count_like_copies():
    values, reference = np.array([0.0, 1.0, 5.0]), RNG.normal(size=50)
    copies = np.repeat(values, [3, 1, 0])
    weights = metrics.weights_of(np.log([3.0, 1.0, 0.0 + 1e-300]) + 7, 3)
    for order in (1, 2):
        expected = metrics.wasserstein(copies, reference, order)
        np.testing.assert_allclose(metrics.wasserstein(values, reference, order, weights), expected, rtol=1e-6)
    ours = metrics.total_variation(values, reference, 20, weights)
    np.testing.assert_allclose(ours, metrics.total_variation(copies, reference, 20), atol=1e-9)


def test_infinite_energies_are_infinitely_far_unless_they_have_no_weight():
    values, reference = np.array([0.0, np.inf]), np.zeros(3)
    assert metrics.wasserstein(values, reference, 1) == np.inf
    assert metrics.wasserstein(values, reference, 1, np.array([1.0, 0.0])) == 0


def test_what_lies_outside_a_histogram_is_counted():
    found = metrics.histogram([-5.0, 0.1, 0.9, 1.0, 7.0, np.inf], 0.0, 1.0, 2)
    np.testing.assert_allclose(found.shares, np.array([1, 1, 2, 2]) / 6)
    assert found.outside == 0.5
    # A quarter lies outside the reference's range, and agrees with nothing there.
    reference = np.linspace(0, 1, 1000)
    ours = np.concatenate([np.linspace(0, 1, 750), np.full(250, 9.0)])
    np.testing.assert_allclose(metrics.total_variation(ours, reference, 10), 0.25, atol=0.01)


def test_total_variation_of_disjoint_and_equal_sets():
    reference = RNG.normal(size=300)
    assert metrics.total_variation(reference, reference) == 0
    np.testing.assert_allclose(metrics.total_variation(reference + 100, reference), 1)


def test_distances_of_pairs():
    x = np.array([[[0.0, 0, 0], [3, 4, 0], [0, 0, 2]]])
    np.testing.assert_allclose(np.sort(metrics.pair_distances(x)[0]), np.sort([5, 2, np.sqrt(29)]))


def test_aligned_copies_have_no_distance_and_mirror_images_have_one():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 5, 3)) * 0.1 + rng.normal(size=(5, 3))
    turned = np.stack([frame @ rotation(rng) + rng.normal(size=3) for frame in x])
    assert metrics.aligned_wasserstein(turned, x) < 1e-6
    mirrored = turned * np.array([-1.0, 1, 1])
    assert metrics.aligned_wasserstein(mirrored, x) > 0.5


def test_aligned_distance_is_the_root_of_the_mean_square_by_weight():
    """A quarter of the weight on a copy that is half as large again, turned away: W_2 = sqrt(1/4) |x| / 2."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5, 3))
    x -= x.mean(axis=0)
    ours = np.stack([x, 1.5 * x @ rotation(rng)])
    found = metrics.aligned_wasserstein(ours, np.stack([x, x]), [0.75, 0.25])
    np.testing.assert_allclose(found, 0.5 * 0.5 * np.linalg.norm(x), rtol=1e-6)


def test_alignment_is_the_best_rotation():
    """Against scipy's Kabsch algorithm."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(2)
    onto = rng.normal(size=(6, 3))
    x = rng.normal(size=(3, 6, 3))
    onto -= onto.mean(0)
    for frame, aligned in zip(x - x.mean(1, keepdims=True), metrics.align(x, onto), strict=True):
        best, _ = Rotation.align_vectors(onto, frame)
        np.testing.assert_allclose(aligned, best.apply(frame), atol=1e-9)


def test_jensen_shannon_is_between_nothing_and_log_two():
    angles = RNG.uniform(-np.pi, np.pi, size=(400, 2))
    shares = metrics.torsion_histogram(angles, 8)
    assert shares.shape == (8, 8)
    one = metrics.torsion_histogram([[-3.0, 3.0]], 8)
    assert one[0, 7] == 1, "phi goes along the first axis"
    assert metrics.jensen_shannon(shares, shares) == 0
    left, right = np.eye(4)[0], np.eye(4)[1]
    np.testing.assert_allclose(metrics.jensen_shannon(left, right), np.log(2))
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    middle = (p + q) / 2
    expected = 0.5 * (p @ np.log(p / middle) + q @ np.log(q / middle))
    np.testing.assert_allclose(metrics.jensen_shannon(p, q), expected)


def test_the_free_energy_along_a_torsion_is_that_of_its_law():
    """Of a von Mises law: -cos(angle) kappa up to a constant, bin by bin."""
    kappa, n = 1.0, 200_000
    angles = np.random.default_rng(3).vonmises(0.0, kappa, n)
    found = metrics.torsion_free_energy(angles)
    centres = -np.pi + 2 * np.pi * (np.arange(36) + 0.5) / 36
    expected = -kappa * np.cos(centres)
    # The rarest bin holds 0.8 %, so its logarithm has a standard error of 0.025 and is moved by 0.03 by the resolution.
    np.testing.assert_allclose(found, expected - expected.min(), atol=5 * 0.025 + 0.03)
    assert found.min() == 0


def test_free_energies_along_a_torsion_differ_by_what_one_side_was_lowered():
    """Half of the circle made e^2 times as likely as the other; the resolution is added to the share of every bin."""
    even = np.linspace(-np.pi, np.pi, 72_000, endpoint=False) + 1e-5
    weights = np.where(even > 0, np.exp(2.0), 1.0)
    weights /= weights.sum()
    favoured = np.exp(2.0) / (1 + np.exp(2.0))
    high, low = (np.log(2 * share / 36 + 2.5e-4) for share in (favoured, 1 - favoured))
    share = 0.5 * (0.5 + favoured)  # of the favoured half, over both sets alike
    expected = (high - low) * np.sqrt(share * (1 - share))
    np.testing.assert_allclose(metrics.torsion_free_energy_error(even, even, weights), expected, rtol=1e-3)
    assert metrics.torsion_free_energy_error(even, even) == 0
    copies = np.concatenate([even, even[even > 0]])
    doubled = np.where(even > 0, 2.0, 1.0) / (1.5 * len(even))
    np.testing.assert_allclose(
        metrics.torsion_free_energy_error(even, even, doubled), metrics.torsion_free_energy_error(copies, even)
    )


def test_what_never_happened_has_the_free_energy_of_what_is_too_rare_to_tell():
    found = metrics.torsion_free_energy(np.full(2000, 0.1))
    np.testing.assert_allclose(found.max(), np.log((1 + 2.5e-4) / 2.5e-4))
    with pytest.raises(ValueError, match=r"angles must lie in \[-pi, pi\]"):
        metrics.torsion_free_energy([3.5])


def test_float32_pi_is_an_angle_and_is_counted():
    """The float32 next to pi lies above it."""
    angles = np.full((3, 2), np.pi, np.float32)
    np.testing.assert_allclose(metrics.torsion_histogram(angles, 8)[7, 7], 1)
    assert metrics.torsion_free_energy(angles[:, 0])[-1] == 0
    assert metrics.torsion_free_energy_error(angles[:, 0], angles[:, 0]) == 0
    with pytest.raises(ValueError, match=r"angles must lie in \[-pi, pi\]"):
        metrics.torsion_histogram(angles + 0.1)


def test_a_molecule_is_compared_in_its_standard_form_and_by_weight():
    with np.load(Path(__file__).parent / "alanine_dipeptide_frames.npz") as arrays:
        cold, hot = arrays["positions"][0][:40].astype(np.float32), arrays["positions"][-1][:40].astype(np.float32)
    system = AlanineDipeptide()
    mirrored = cold[:, [2, 1, 0, *range(3, 22)]] * np.float32([1, 1, -1])
    names = ("aligned_w2", "phi_free_energy", "ramachandran_js")
    found = metrics.compare(system, mirrored, cold)
    assert found["phi_free_energy"] == pytest.approx(0, abs=1e-5)
    assert found["ramachandran_js"] == pytest.approx(0, abs=1e-5)
    # All weight on the cold half: as if the other half were not there.
    both = np.concatenate([hot, cold])
    log_weights = np.repeat([-np.inf, 0.0], 40)
    by_weight = metrics.compare(system, both, cold, log_weights)
    assert all(by_weight[name] == pytest.approx(0, abs=1e-5) for name in names)
    apart = metrics.compare(system, hot, cold)
    assert apart["aligned_w2"] > 0.05
    phi, theirs = (np.asarray(jax.vmap(system.torsions)(metrics.standard_form(system, x)))[:, 0] for x in (hot, cold))
    assert apart["phi_free_energy"] == pytest.approx(metrics.torsion_free_energy_error(phi, theirs), abs=1e-6)


def test_what_is_aligned_is_spread_over_all_of_a_set():
    with np.load(Path(__file__).parent / "alanine_dipeptide_frames.npz") as arrays:
        x = np.repeat(arrays["positions"][-1][[0, 20]].astype(np.float32), 20, axis=0)
    assert metrics.compare(AlanineDipeptide(), x, x, most_aligned=10)["aligned_w2"] == pytest.approx(0, abs=1e-5)


def test_everything_at_once_for_a_cluster_and_for_a_surface():
    cluster = LennardJones(3)
    x = RNG.normal(size=(40, 3, 3))
    same = metrics.compare(cluster, x, x)
    assert {name: value for name, value in same.items() if value > 1e-7} == {}
    assert {"distance_w2", "energy_w1", "outside", "infinite"} <= set(same)
    assert "distance_w2" not in metrics.compare(MullerBrown(), x[:, 0, :2], x[:, 1, :2])


def test_a_clash_is_counted_by_its_weight():
    cluster = LennardJones(2)
    x = np.array([[[0.5, 0, 0], [-0.5, 0, 0]], [[0.0, 0, 0], [0, 0, 0]]])
    found = metrics.compare(cluster, x, x[:1], np.log([3.0, 1.0]))
    assert found["infinite"] == pytest.approx(0.25)
    assert found["energy_w1"] == np.inf


def test_weights_have_one_number_per_sample():
    with pytest.raises(ValueError, match=r"log_weights must have shape \(3,\)"):
        metrics.weights_of(np.zeros(2), 3)


class TestDiscrepancy:
    """MMD between laws of triangles: equal laws, another law, weights that make it the same again."""

    @staticmethod
    def triangles(seed, count, scale=1.0):
        return scale * np.random.default_rng(seed).normal(size=(count, 3, 2))

    def test_it_is_zero_for_equal_laws_within_its_noise_and_not_for_another(self):
        same = [metrics.distance_mmd(self.triangles(seed, 300), self.triangles(50, 1000)) for seed in range(20)]
        squares = np.sign(same) * np.square(same)
        assert abs(squares.mean()) < 4 * squares.std(ddof=1) / np.sqrt(20)
        other = metrics.distance_mmd(self.triangles(0, 300, scale=1.3), self.triangles(50, 1000))
        assert other > 5 * np.abs(same).max()

    def test_weights_and_names_of_particles(self):
        x, reference = self.triangles(1, 400), self.triangles(2, 400)
        halves = np.concatenate([x, 3 * x])
        first = np.repeat([1 / 400, 0.0], 400)
        np.testing.assert_allclose(
            metrics.distance_mmd(halves, reference, first), metrics.distance_mmd(x, reference), rtol=1e-6
        )
        np.testing.assert_allclose(
            metrics.distance_mmd(x[:, [2, 0, 1]], reference), metrics.distance_mmd(x, reference), rtol=1e-9
        )
