"""The network of particles: what turns with its input, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnejax.networks import build, functional

KEY = jax.random.key(4)
SHAPE = (5, 3)
T = jnp.asarray(0.3)


def network(**arguments):
    """None of the weights is zero: the layers that start there would hide a lot."""
    apply, params = functional(build("egnn", KEY, shape=SHAPE, features=16, num_radial=8, embedding=16, **arguments))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return lambda x, t=T: apply(jax.tree.unflatten(structure, moved), x, t)


def configuration():
    return jax.random.normal(jax.random.key(6), SHAPE)


def rotation(determinant):
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    return jnp.asarray(matrix * determinant * np.sign(np.linalg.det(matrix)), jnp.float32)


@pytest.mark.parametrize("pair_term", [False, True])
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_vectors_turn_with_the_configuration(determinant, pair_term):
    f, x, turn = network(pair_term=pair_term), configuration(), rotation(determinant)
    assert float(jnp.abs(f(x)).max()) > 0.01
    np.testing.assert_allclose(f(x @ turn + 3.0), f(x) @ turn, atol=1e-4)
    np.testing.assert_allclose(f(x).mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"output": "scalar"}, {"output": "energy"}, {"output": "energy", "pair_term": True}]
)
def test_energies_do_not(options):
    centre = options["output"] == "energy"  # |x|^2 / 2 is that of a configuration without a centre of mass
    g, x = network(**options), configuration()
    f = (lambda x: g(x - x.mean(axis=0))) if centre else g
    np.testing.assert_allclose(f(x @ rotation(-1) + 3.0), f(x), rtol=1e-5)
    gradient = jax.grad(f)(x)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(gradient.sum(axis=0), 0, atol=1e-4)


def test_particles_of_one_kind_are_interchangeable_and_those_of_two_are_not():
    x, order = configuration(), jnp.asarray([1, 0, 2, 3, 4])
    alike = network()
    np.testing.assert_allclose(alike(x[order]), alike(x)[order], atol=1e-5)
    two = network(kinds=(0, 1, 0, 1, 1))
    assert float(jnp.abs(two(x[order]) - two(x)[order]).max()) > 1e-3
    swapped = jnp.asarray([2, 1, 0, 3, 4])
    np.testing.assert_allclose(two(x[swapped]), two(x)[swapped], atol=1e-5)


def test_the_noise_level_matters():
    f, x = network(), configuration()
    assert float(jnp.abs(f(x, jnp.asarray(0.9)) - f(x)).max()) > 1e-3


def test_a_fresh_network_says_nothing():
    for output in ("vector", "scalar"):
        apply, params = functional(build("egnn", KEY, shape=SHAPE, output=output))
        assert float(jnp.abs(apply(params, configuration(), T)).max()) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kinds": (0, 1)}, "kinds must be 5 integers from 0, one per particle"),
        ({"kinds": (0, 1, 0, 1, -1)}, "kinds must be 5 integers"),
        ({"output": "tensor"}, "output must be one of 'vector', 'scalar'"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        build("egnn", KEY, shape=SHAPE, **arguments)


def test_another_number_of_particles_is_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(..., 5, 3\): got \(6, 3\)"):
        network()(jnp.zeros((6, 3)))


def test_an_energy_starts_as_that_of_normal_data():
    """Fresh weights: the last layers are zero."""
    apply, params = functional(build("egnn", KEY, shape=SHAPE, output="energy", pair_term=True))
    x = configuration()
    np.testing.assert_allclose(apply(params, x, T), 0.5 * jnp.sum(x**2), rtol=1e-6)


def test_the_pair_term_knows_both_kinds_and_the_distance():
    """Without messages a vector is a sum over pairs of numbers that depend on the pair alone."""
    from flax import nnx

    from rnejax.networks.egnn import PairTerm

    term = PairTerm(2, 8, 4, 8, rngs=nnx.Rngs(0))
    term.last.kernel[...] = jnp.ones_like(term.last.kernel[...])
    radial = jax.random.normal(KEY, (3, 3, 4))
    radial = radial + jnp.swapaxes(radial, 0, 1)
    found = term(jnp.asarray([0, 1, 1]), radial, jnp.ones(8))[..., 0]
    np.testing.assert_allclose(found, found.T, rtol=1e-5)
    same = term(jnp.asarray([0, 1, 1]), jnp.ones((3, 3, 4)), jnp.ones(8))[..., 0]
    assert float(jnp.abs(same[0, 1] - same[1, 2])) > 1e-3
    np.testing.assert_allclose(same[0, 1], same[0, 2], rtol=1e-6)


@pytest.mark.parametrize("output", ["vector", "energy"])
def test_the_pair_term_is_heard(output):
    apply, params = functional(build("egnn", KEY, shape=SHAPE, output=output, pair_term=True))
    before = apply(params, configuration(), T)
    params["pair_term"]["last"]["kernel"] = jnp.ones_like(params["pair_term"]["last"]["kernel"])
    assert float(jnp.abs(apply(params, configuration(), T) - before).max()) > 1e-2
