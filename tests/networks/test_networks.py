"""Networks: shapes, batches, names, and what is said of wrong input."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rnejax.networks import NETWORKS, build, functional, load_network, num_weights, save_network
from rnejax.networks.layers import (
    AdaptiveGroupNorm,
    dropout,
    group_norm,
    noise_coordinate,
    repeat_pixels,
    space_to_depth,
)

SMALL_UNET = {
    "image_shape": (8, 8, 1),
    "channels": (8, 8, 16),
    "embedding": 16,
    "num_classes": 3,
    "dropout_rate": 0.5,
}


@cache
def compiled(name, **arguments):
    """(apply, params) as `randomised`, compiled."""
    apply, params = randomised(name, **arguments)
    return jax.jit(apply), params


def randomised(name, **arguments):
    """A network none of whose weights is zero: the layers that start at zero would hide a lot."""
    apply, like = abstract(name, **arguments)
    draw = np.random.default_rng(1)
    return apply, jax.tree.map(lambda leaf: jnp.asarray(0.1 * draw.normal(size=leaf.shape), leaf.dtype), like)


def abstract(name, **arguments):
    """(apply, shapes of params): drawing initial weights would take longer than the tests."""
    return functional(nnx.eval_shape(lambda: build(name, jax.random.key(0), **arguments)))


def inputs(name, count):
    draw = np.random.default_rng(2)
    shape = {"mlp": (2,), "unet": (8, 8, 1), "egnn": (13, 3)}.get(name, (28, 28, 1))
    x = jnp.asarray(draw.normal(size=(count, *shape)), jnp.float32)
    t = jnp.asarray(draw.uniform(size=count), jnp.float32)
    return {"mlp": (x, t), "egnn": (x, t), "unet": (x, t, jnp.arange(count) % 4)}.get(name, (x,))


# Networks of tokens have tests of their own (test_token_networks.py).
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("token_")])
def test_a_batch_gives_what_its_examples_give_one_by_one(name):
    apply, params = compiled(name, **(SMALL_UNET if name == "unet" else {}))
    arguments = inputs(name, 3)
    together = apply(params, *arguments)
    for i in range(3):
        alone = apply(params, *(argument[i] for argument in arguments))
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_the_unet_depends_on_each_of_its_inputs():
    apply, params = compiled("unet", **SMALL_UNET)
    x, t, label = (argument[0] for argument in inputs("unet", 1))
    base = apply(params, x, t, label)
    for changed in ((x + 0.1, t, label), (x, 0.5 * t, label), (x, t, (label + 1) % 4)):
        assert float(jnp.max(jnp.abs(apply(params, *changed) - base))) > 1e-3


def test_a_label_that_is_no_class_gives_nan_instead_of_another_class():
    apply, params = compiled("unet", **SMALL_UNET)
    x, t, _ = (argument[0] for argument in inputs("unet", 1))
    for label in (-1, 4):
        assert bool(jnp.all(jnp.isnan(apply(params, x, t, jnp.int32(label)))))
    assert bool(jnp.all(jnp.isfinite(apply(params, x, t, jnp.int32(3)))))  # no class


def test_the_unet_tells_noise_levels_apart_that_are_close_to_the_data():
    apply, params = compiled("unet", **SMALL_UNET)
    x, _, label = (argument[0] for argument in inputs("unet", 1))
    near, nearer = (apply(params, x, jnp.float32(t), label) for t in (0.004, 0.002))
    assert float(jnp.max(jnp.abs(near - nearer))) > 1e-3


def test_a_fresh_unet_predicts_zero():
    _, params = functional(build("unet", jax.random.key(0), **SMALL_UNET))
    assert not np.any(params["head"]["kernel"])
    assert not np.any(params["head"]["bias"])


def test_dropout_needs_a_key_and_changes_the_prediction():
    apply, params = compiled("unet", **SMALL_UNET)
    arguments = [argument[0] for argument in inputs("unet", 1)]
    np.testing.assert_array_equal(apply(params, *arguments), apply(params, *arguments))
    dropped = apply(params, *arguments, key=jax.random.key(0))
    assert float(jnp.max(jnp.abs(dropped - apply(params, *arguments)))) > 1e-3


def test_dropout_keeps_the_mean():
    n, rate = 100_000, 0.3
    kept = dropout(jnp.ones(n), rate, jax.random.key(0))
    assert abs(float(kept.mean()) - 1.0) < 4 * np.sqrt(rate / (1 - rate) / n)


def test_group_norm_gives_each_group_mean_zero_and_variance_one():
    x = 3.0 + 5.0 * np.random.default_rng(0).normal(size=(2, 6, 5, 8)).astype(np.float32)
    groups = (
        np.asarray(jax.jit(group_norm, static_argnums=1)(x, 4))
        .reshape(2, 30, 4, 2)
        .transpose(0, 2, 1, 3)
        .reshape(8, 60)
    )
    np.testing.assert_allclose(groups.mean(axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(groups.var(axis=1), 1.0, rtol=1e-5)


def test_groups_must_divide_channels():
    with pytest.raises(ValueError, match="8 groups for 12 channels"):
        AdaptiveGroupNorm(12, 4, rngs=nnx.Rngs(0))


def test_space_to_depth_keeps_patches_together():
    x = jnp.arange(16.0).reshape(4, 4, 1)
    assert space_to_depth(x)[0, 0].tolist() == [0.0, 1.0, 4.0, 5.0]
    assert space_to_depth(x)[1, 1].tolist() == [10.0, 11.0, 14.0, 15.0]


def test_repeat_pixels_repeats_in_both_directions():
    x = jnp.arange(4.0).reshape(2, 2, 1)
    assert repeat_pixels(x)[..., 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_the_logit_coordinate_spreads_small_noise_levels_evenly():
    u = noise_coordinate(jnp.array([0.002, 0.02, 0.2]), "logit")
    # log 10 apart, but for log((1 - t)) and the resolution of 1e-4, which is 5 % of 0.002.
    np.testing.assert_allclose(jnp.diff(u), np.log(10), atol=0.25)


@pytest.mark.parametrize("scale", ["logit", "log", "identity"])
def test_noise_coordinates_are_finite_at_the_ends(scale):
    assert np.all(np.isfinite(noise_coordinate(jnp.array([0.0, 1.0]), scale)))


def test_an_unknown_network_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown network 'unets' .did you mean 'unet'"):
        build("unets", jax.random.key(0))


def test_an_unknown_argument_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"no argument 'chanels' .did you mean 'channels'"):
        build("unet", jax.random.key(0), chanels=(8, 16))


def test_lists_from_a_configuration_serve_as_tuples():
    apply, params = abstract("mlp", shape=[3])
    assert apply == abstract("mlp", shape=(3,))[0]
    assert params["first"]["kernel"].shape == (3, 128)


def test_image_sizes_that_cannot_be_halved_are_an_error():
    with pytest.raises(ValueError, match="multiples of 4 for 3 levels"):
        build("unet", jax.random.key(0), image_shape=(30, 28, 1))


def test_images_of_the_wrong_shape_are_an_error():
    apply, params = randomised("unet", **SMALL_UNET)
    with pytest.raises(ValueError, match=r"shape \(..., 8, 8, 1\): got \(8, 8\)"):
        apply(params, jnp.zeros((8, 8)), jnp.float32(0.5), jnp.int32(0))


def test_a_missing_label_is_an_error():
    apply, params = randomised("mlp", num_classes=3)
    with pytest.raises(ValueError, match="made with classes and takes a label"):
        apply(params, jnp.zeros(2), jnp.float32(0.5))


def test_an_energy_with_curvature_is_a_learned_multiple_of_the_square():
    """From that of normal data at first, at any t; the multiple is a function of t alone and enters the gradient."""
    apply, params = functional(build("mlp", jax.random.key(0), output="energy", curvature=True, shape=(5,)))
    x, t = jax.random.normal(jax.random.key(1), (7, 5)), jnp.linspace(0.1, 0.9, 7)
    constant = 2.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(apply(params, x, t), 0.5 * jnp.sum(x**2, axis=-1) + constant, rtol=1e-6)
    moved = jax.tree.map(lambda leaf: leaf, params)
    moved["curvature"]["bias"] = jnp.ones(1)
    np.testing.assert_allclose(apply(moved, x, t), jnp.sum(x**2, axis=-1) + constant, rtol=1e-6)
    moved["curvature"]["kernel"] = jnp.ones_like(moved["curvature"]["kernel"])
    ratio = [(apply(moved, scale * x, t) - constant) / jnp.sum(x**2, axis=-1) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(ratio[1], 4 * ratio[0], rtol=1e-5)
    assert float(jnp.ptp(ratio[0])) > 1e-3


@pytest.mark.parametrize(("kind", "shape", "dimension"), [("mlp", (3, 4), 12), ("egnn", (4, 3), 9)])
def test_an_energy_starts_out_as_the_normalised_one_of_normal_data(kind, shape, dimension):
    apply, params = functional(build(kind, jax.random.key(0), output="energy", shape=shape))
    x = jax.random.normal(jax.random.key(1), (6, *shape))
    x = x - x.mean(axis=1, keepdims=True) if kind == "egnn" else x
    wanted = 0.5 * (x**2).sum(axis=(1, 2)) + 0.5 * dimension * np.log(2 * np.pi)
    np.testing.assert_allclose(apply(params, x, jnp.full(6, 0.5)), wanted, rtol=1e-5)


def test_curvature_is_that_of_an_energy_only():
    with pytest.raises(ValueError, match="curvature is that of an energy, and output is 'scalar'"):
        build("mlp", jax.random.key(0), output="scalar", curvature=True)


def test_energies_are_scalars():
    apply, params = randomised("mlp", output="scalar")
    assert apply(params, jnp.zeros((4, 2)), jnp.full(4, 0.5)).shape == (4,)


def test_modules_with_other_state_are_refused():
    with pytest.raises(ValueError, match=r"weights only .* BatchStat"):
        functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_functions_of_equal_modules_are_equal_and_compile_once():
    first, params = randomised("mlp")
    second, _ = abstract("mlp")
    other, _ = abstract("mlp", depth=2)
    assert first == second
    assert hash(first) == hash(second)
    assert first != other
    run = jax.jit(lambda apply, params, x, t: apply(params, x, t), static_argnums=0)
    for apply in (first, second):
        run(apply, params, *inputs("mlp", 2))
    assert run._cache_size() == 1


def test_a_stored_network_builds_itself(tmp_path):
    apply, params = randomised("unet", **SMALL_UNET)
    save_network(tmp_path / "net.safetensors", "unet", SMALL_UNET, params, {"seed": 3})
    stored = load_network(tmp_path / "net.safetensors")
    assert stored.apply == apply
    assert stored.metadata["seed"] == 3
    jax.tree.map(np.testing.assert_array_equal, stored.params, params)


def test_the_unet_of_the_digits_is_small():
    _, params = abstract("unet")
    assert num_weights(params) < 1_000_000  # 4 MB in float32


def test_a_vector_as_condition_is_standardised_and_counts():
    arguments = {"shape": (2,), "hidden": 8, "depth": 1, "condition_size": 3}
    plain, params = functional(build("mlp", jax.random.key(0), **arguments))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    moved, _ = functional(
        build("mlp", jax.random.key(0), **arguments, condition_shift=(1.0, 2.0, 3.0), condition_scale=(2.0, 1.0, 0.5))
    )
    x, t = jnp.ones((4, 2)), jnp.full(4, 0.5)
    c = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    found = moved(params, x, t, c * jnp.asarray([2.0, 1.0, 0.5]) + jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, plain(params, x, t, c), rtol=1e-4, atol=1e-5)
    assert np.abs(plain(params, x, t, c) - plain(params, x, t, c + 1)).max() > 1e-3
    with pytest.raises(ValueError, match="takes a vector"):
        plain(params, x, t)
    with pytest.raises(ValueError, match="condition"):
        plain(params, x, t, c[:, :2])
    with pytest.raises(ValueError, match="condition_scale must have 3 numbers"):
        build("mlp", jax.random.key(0), **arguments, condition_scale=(1.0,))
    with pytest.raises(ValueError, match="give num_classes or condition_size"):
        build("mlp", jax.random.key(0), num_classes=3, condition_size=3)
