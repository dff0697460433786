"""Potentials that are added to a system's energy."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems import AlanineDipeptide, Biased, DistanceBias, DoubleWell, TorsionBias, build

CLUSTER = DoubleWell(4)
PAIR = DistanceBias((0, 2), stiffness=3.0, centre=1.5)


def configuration():
    return jnp.asarray([[0.0, 0.0], [5.0, 1.0], [0.0, 2.0], [-3.0, 0.5]])


def test_a_distance_is_held_by_a_spring():
    x = configuration()
    system = Biased(CLUSTER, (PAIR,))
    np.testing.assert_allclose(system.energy(x) - CLUSTER.energy(x), 0.5 * 3.0 * (2.0 - 1.5) ** 2, rtol=1e-4)


def test_a_torsion_is_turned_towards_its_centre():
    dipeptide = AlanineDipeptide()
    x = dipeptide.start(jax.random.key(0))
    phi = float(dipeptide.torsions(x)[0])
    bias = TorsionBias(dipeptide.phi_atoms, strength=5.0, centre=phi + np.pi / 2)
    np.testing.assert_allclose(bias.energy(x), 5.0, rtol=1e-4)
    system = Biased(dipeptide, (bias,))
    np.testing.assert_allclose(system.energy(x), dipeptide.energy(x) + 5.0, rtol=1e-5)


def test_biases_add_up_and_all_else_is_the_system_s():
    x = configuration()
    system = Biased(CLUSTER, (PAIR, DistanceBias((1, 3), 1.0, 2.0)))
    added = [Biased(CLUSTER, (bias,)).energy(x) - CLUSTER.energy(x) for bias in system.biases]
    np.testing.assert_allclose(system.energy(x) - CLUSTER.energy(x), sum(added), rtol=1e-4)
    assert (system.shape, system.subspace) == (CLUSTER.shape, CLUSTER.subspace)
    assert system.thermal_energy(2.0) == 2.0
    assert system.num_particles == 4
    assert Biased(AlanineDipeptide(), ()).phi_atoms == AlanineDipeptide().phi_atoms
    assert not hasattr(system, "torsions")
    assert copy.deepcopy(system) == system == pickle.loads(pickle.dumps(system))


def test_they_are_built_from_a_configuration():
    bias = {"kind": "distance", "atoms": [0, 2], "stiffness": 3.0, "centre": 1.5}
    assert build("double_well", num_particles=4, biases=[bias]) == Biased(CLUSTER, (PAIR,))
    assert build("double_well", num_particles=4, biases=[]) == CLUSTER
    with pytest.raises(ValueError, match="unknown bias 'angle': there are distance, torsion"):
        build("double_well", biases=[{"kind": "angle"}])
    with pytest.raises(ValueError, match=r"bias 'distance': .*strength"):
        build("double_well", biases=[bias | {"strength": 1.0}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistanceBias((0, 0), 1.0, 1.0), "DistanceBias needs 2 different atoms, got"),
        (lambda: DistanceBias((0, -1), 1.0, 1.0), r"atoms of DistanceBias must be integers from 0, got \(0, -1\)"),
        (lambda: DistanceBias((0, 1), np.nan, 1.0), "stiffness must be finite"),
        (lambda: TorsionBias((0, 1, 2), 1.0, 1.0), "TorsionBias needs 4 different atoms"),
        (lambda: Biased(CLUSTER, (DistanceBias((0, 4), 1.0, 1.0),)), r"atoms \(0, 4\) does not fit .* shape \(4, 2\)"),
        (lambda: Biased(rj.systems.MullerBrown(), (PAIR,)), r"does not fit a system of shape \(2,\)"),
        (lambda: Biased(CLUSTER, (TorsionBias((0, 1, 2, 3), 1.0, 1.0),)), "a torsion is one of three dimensions"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
