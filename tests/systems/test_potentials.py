"""Surfaces and clusters in reduced units: their minima, their conventions, their symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj

KEY = jax.random.key(3)
CLUSTERS = [rj.systems.DoubleWell(4), rj.systems.LennardJones(13)]


def icosahedron():
    """Vertices at distance 1 of the centre, which is a thirteenth point."""
    golden = (1 + np.sqrt(5)) / 2
    corners = [[0, s, t * golden] for s in (-1, 1) for t in (-1, 1)]
    vertices = np.concatenate([np.roll(corners, k, axis=1) for k in range(3)]) / np.sqrt(1 + golden**2)
    return np.concatenate([[[0, 0, 0]], vertices])


class TestMullerBrown:
    @pytest.mark.parametrize(
        ("point", "energy"),
        [((-0.558224, 1.441726), -146.69952), ((0.623499, 0.028038), -108.16672), ((-0.050011, 0.466694), -80.76782)],
    )
    def test_minima_are_where_they_are_published(self, point, energy):
        system, x = rj.systems.MullerBrown(), jnp.asarray(point)
        # Sums of terms of size 200 in float32; six published decimals, and a curvature of up to 1,000 for the gradient.
        assert abs(float(system.energy(x)) - energy) < 200 * 4 * np.finfo(np.float32).eps
        assert float(jnp.abs(jax.grad(system.energy)(x)).max()) < 1e-2
        assert np.linalg.eigvalsh(jax.hessian(system.energy)(x)).min() > 0

    def test_the_scale_multiplies(self):
        x = jnp.asarray([0.1, 0.2])
        scaled = rj.systems.MullerBrown(scale=0.05).energy(x)
        np.testing.assert_allclose(scaled, 0.05 * rj.systems.MullerBrown().energy(x), rtol=1e-6)


class TestDoubleWell:
    def test_a_pair_counts_once(self):
        for d in (2.0, 4.0, 6.5):
            energy = rj.systems.DoubleWell(2).energy(jnp.asarray([[0.0, 0.0], [d, 0.0]]))
            assert float(energy) == pytest.approx(-4 * (d - 4) ** 2 + 0.9 * (d - 4) ** 4, rel=1e-6)

    def test_four_particles_have_six_pairs(self):
        x = jnp.asarray([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
        side, diagonal = (-4 * (d - 4) ** 2 + 0.9 * (d - 4) ** 4 for d in (3, 3 * np.sqrt(2)))
        assert float(rj.systems.DoubleWell(4).energy(x)) == pytest.approx(4 * side + 2 * diagonal, rel=1e-5)


class TestLennardJones:
    def test_the_ground_state_of_thirteen_is_the_published_icosahedron(self):
        # -44.326801 well depths (Cambridge Cluster Database), each pair once; the trap is another term.
        free = rj.systems.LennardJones(13, strength=1.0, trap=0.0)
        best = min(float(free.energy(jnp.asarray(size * icosahedron()))) for size in np.linspace(0.94, 0.98, 401))
        assert best == pytest.approx(-44.326801, abs=1e-3)

    def test_the_default_convention_counts_every_pair_twice(self):
        x = jnp.asarray(0.97 * icosahedron())
        pairs = rj.systems.LennardJones(13, strength=1.0, trap=0.0).energy(x)
        trap = 0.5 * float(jnp.sum((x - x.mean(axis=0)) ** 2))
        assert float(rj.systems.LennardJones(13).energy(x)) == pytest.approx(2 * float(pairs) + trap, rel=1e-6)

    def test_two_particles_in_one_place_have_no_density(self):
        x = jnp.asarray(icosahedron()).at[1].set(0.0)
        assert float(rj.systems.LennardJones(13).energy(x)) == np.inf


@pytest.mark.parametrize("system", CLUSTERS, ids=lambda system: type(system).__name__)
class TestClusters:
    def test_moved_turned_mirrored_and_renumbered_they_have_the_same_energy(self, system):
        x = 2.0 * jax.random.normal(KEY, system.shape)
        turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(system.shape[1],) * 2))[0], x.dtype)
        energy = float(system.energy(x))
        for other in (x + 5.0, x @ turn, -x, x[::-1]):
            assert float(system.energy(other)) == pytest.approx(energy, rel=1e-4)

    def test_many_at_once(self, system):
        x = 2.0 * jax.random.normal(KEY, (5, *system.shape))
        np.testing.assert_allclose(jax.vmap(system.energy)(x)[3], system.energy(x[3]), rtol=1e-5)

    def test_another_number_of_atoms_is_refused(self, system):
        with pytest.raises(ValueError, match=rf"{type(system).__name__} has shape \({system.shape[0]}, .*got"):
            system.energy(jnp.zeros((system.shape[0] + 1, system.shape[1])))

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "hot"])
    def test_temperatures_are_positive_numbers(self, system, temperature):
        with pytest.raises(ValueError, match="temperature must be"):
            system.thermal_energy(temperature)


@pytest.mark.parametrize("make", [rj.systems.DoubleWell, rj.systems.LennardJones])
@pytest.mark.parametrize(("num", "words"), [(1, "at least 2"), (2.5, "must be an integer"), (0, "at least 1")])
def test_a_cluster_has_pairs(make, num, words):
    with pytest.raises(ValueError, match=words):
        make(num)
