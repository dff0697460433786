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


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_vectors_turn_with_the_configuration(determinant):
    f, x, turn = network(), configuration(), rotation(determinant)
    assert float(jnp.abs(f(x)).max()) > 0.01
    np.testing.assert_allclose(f(x @ turn + 3.0), f(x) @ turn, atol=1e-4)
    np.testing.assert_allclose(f(x).mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("output", ["scalar", "energy"])
def test_energies_do_not(output):
    centre = output == "energy"  # |x|^2 / 2 is that of a configuration without a centre of mass
    g, x = network(output=output), configuration()
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


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_with_pair_types_symmetries_stay(determinant):
    f, x, turn = network(kinds=(0, 1, 0, 1, 1), pair_types=True), configuration(), rotation(determinant)
    np.testing.assert_allclose(f(x @ turn + 3.0), f(x) @ turn, atol=1e-4)
    np.testing.assert_allclose(f(x).mean(axis=0), 0, atol=1e-5)
    swapped = jnp.asarray([2, 1, 0, 3, 4])
    np.testing.assert_allclose(f(x[swapped]), f(x)[swapped], atol=1e-5)


@pytest.mark.parametrize("name", ["last_of_types", "modulation_of_types"])
def test_a_type_of_pairs_changes_the_forces_of_its_own_pairs(name):
    """One round, so that nothing spreads: pairs are those of kinds 00, 01, 11, 02, 12, of which one is changed."""
    kinds = (0, 1, 0, 1, 2)
    apply, params = functional(build("egnn", KEY, shape=SHAPE, features=16, num_layers=1, kinds=kinds, pair_types=True))
    assert params["last_of_types"][0]["embedding"].shape[0] == 5  # nobody makes a pair of kinds 22
    params["last"][0]["kernel"] = jnp.ones_like(params["last"][0]["kernel"])
    table = params["last_of_types"][0] if name == "last_of_types" else params["layers"][0][name]
    x = configuration()
    before = apply(params, x, T)
    # Types are numbered in order: 00, 01, 02, 11, 12. The only pair of kinds 11 is that of particles 1 and 3.
    table["embedding"] = table["embedding"].at[3].set(1.0)
    change = apply(params, x, T) - before
    assert float(jnp.abs(change[jnp.asarray([0, 2, 4])]).max()) == 0
    along = (x[1] - x[3]) / jnp.linalg.norm(x[1] - x[3])
    assert float(jnp.abs(change[1]).max()) > 1e-3
    np.testing.assert_allclose(change[1], (change[1] @ along) * along, atol=1e-5)
    np.testing.assert_allclose(change[3], -change[1], atol=1e-6)


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


@pytest.mark.parametrize("output", ["vector", "energy"])
@pytest.mark.parametrize("number", [0, 2])
def test_messages_of_every_round_are_heard(output, number):
    apply, params = functional(build("egnn", KEY, shape=SHAPE, features=16, output=output))
    before = apply(params, configuration(), T)
    kernel = params["last"][number]["kernel"]
    params["last"][number]["kernel"] = kernel.at[:, 0].set(1.0)
    assert float(jnp.abs(apply(params, configuration(), T) - before).max()) > 1e-2


def test_particles_move_between_rounds_and_later_rounds_see_it():
    """What the first round pushes changes nothing by itself, and what the second one says of it a lot."""
    apply, params = functional(build("egnn", KEY, shape=SHAPE, features=16, num_layers=2))
    x = configuration()
    params["last"][0]["kernel"] = params["last"][0]["kernel"].at[:, 1].set(1.0)
    assert float(jnp.abs(apply(params, x, T)).max()) == 0
    params["last"][1]["kernel"] = params["last"][1]["kernel"].at[:, 0].set(1.0)
    pushed = apply(params, x, T)
    params["last"][0]["kernel"] = jnp.zeros_like(params["last"][0]["kernel"])
    assert float(jnp.abs(apply(params, x, T) - pushed).max()) > 1e-2


def test_features_of_particles_are_gathered_between_rounds():
    """The second round's messages know of the first round's, with nothing moved: a third particle is felt."""
    apply, params = functional(build("egnn", KEY, shape=(3, 3), features=16, num_layers=2))
    params["last"][1]["kernel"] = params["last"][1]["kernel"].at[:, 0].set(1.0)
    closing = params["layers"][0]["closing"]["kernel"]
    params["layers"][0]["closing"]["kernel"] = jax.random.normal(jax.random.key(7), closing.shape)
    corner = jnp.asarray([[0.0, 0, 0], [0.7, 0, 0], [0, 0, 0]])
    near, far = (apply(params, corner.at[2].set(jnp.asarray([0.0, y, 0])), T)[0] for y in (0.4, 0.8))
    assert abs(float(near[0] - far[0])) > 1e-3, "the pull along x does not depend on the third particle"


def test_without_surroundings_a_pair_is_pulled_by_its_distance_alone():
    """The first round by itself: along the line between two particles, whatever the third one does."""
    apply, params = functional(build("egnn", KEY, shape=(3, 3), features=16, num_layers=1))
    params["last"][0]["kernel"] = jnp.ones_like(params["last"][0]["kernel"])
    corner = jnp.asarray([[0.0, 0, 0], [0.7, 0, 0], [0, 0, 0]])
    near, far = (apply(params, corner.at[2].set(jnp.asarray([0.0, y, 0])), T)[0] for y in (0.4, 0.8))
    assert abs(float(near[1] - far[1])) > 1e-3, "the third pulls the first one along y"
    np.testing.assert_allclose(near[0], far[0], rtol=1e-5)


def test_two_particles_in_one_place_break_nothing():
    x = configuration().at[1].set(configuration()[0])
    assert bool(jnp.isfinite(network()(x)).all())
    assert bool(jnp.isfinite(jax.grad(network(output="scalar"))(x)).all())


def test_radial_functions_are_as_wide_as_they_are_apart():
    """Then their sum is nearly the same at every distance that they resolve, and those of short ones are narrower."""
    module = build("egnn", KEY, shape=SHAPE, num_radial=48, reach=6.0)
    radial = np.asarray(module._radial(jnp.linspace(0.3, 5.0, 300)[:, None]))[:, :-1]
    np.testing.assert_allclose(radial.sum(axis=1), np.sqrt(2 * np.pi), rtol=0.02)
    near, far = (np.sum(module._radial(jnp.asarray([d]))[:-1] > 0.5) for d in (0.5, 5.0))
    assert near == pytest.approx(far, abs=1)
    spread = lambda d: np.sum(np.asarray(module._radial(jnp.linspace(d, d + 0.2, 50)[:, None])).std(axis=0) > 0.05)  # noqa: E731
    assert spread(0.5) > spread(4.5)
