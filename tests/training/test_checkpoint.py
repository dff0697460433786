"""Checkpoints: what goes in comes out, and what cannot be read is named."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rnejax.checkpoint import CheckpointError, load_arrays, load_metadata, save_arrays

TREE = {"down": [{"kernel": jnp.arange(6.0).reshape(2, 3)}, {"kernel": jnp.ones(4)}], "count": jnp.int32(7)}


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_tree_comes_back_as_it_was(tmp_path):
    save_arrays(tmp_path / "a.safetensors", TREE, {"seed": 3, "sizes": [1, 2]})
    tree, metadata = load_arrays(tmp_path / "a.safetensors", like=TREE)
    assert_same(tree, TREE)
    assert metadata == {"seed": 3, "sizes": [1, 2]}


def test_without_a_likeness_leaves_come_back_by_path(tmp_path):
    save_arrays(tmp_path / "a.safetensors", TREE)
    tree, metadata = load_arrays(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tree["down"]["1"]["kernel"], np.ones(4))
    assert metadata == {}


def test_the_state_of_an_optimizer_comes_back(tmp_path):
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    state = optimizer.init({"w": jnp.ones(3)})
    _, state = optimizer.update({"w": jnp.arange(3.0)}, state)
    save_arrays(tmp_path / "a.safetensors", state)
    assert_same(load_arrays(tmp_path / "a.safetensors", like=state)[0], state)


def test_shapes_and_types_alone_are_a_likeness(tmp_path):
    save_arrays(tmp_path / "a.safetensors", TREE)
    assert_same(load_arrays(tmp_path / "a.safetensors", like=jax.eval_shape(lambda: TREE))[0], TREE)


def test_half_precision_halves_the_file_and_rounds_once(tmp_path):
    weights = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    save_arrays(tmp_path / "full.safetensors", weights)
    save_arrays(tmp_path / "half.safetensors", weights, dtype=jnp.bfloat16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[0] - sizes[1] >= 2000 - 8  # the header may grow by a few characters
    loaded, _ = load_arrays(tmp_path / "half.safetensors", like=weights)
    assert loaded["w"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["w"], weights["w"].astype(jnp.bfloat16).astype(jnp.float32))


def test_whole_numbers_are_not_rounded_by_a_storage_type(tmp_path):
    save_arrays(tmp_path / "a.safetensors", {"n": jnp.int32(16_777_217)}, dtype=jnp.bfloat16)
    assert int(load_arrays(tmp_path / "a.safetensors")[0]["n"]) == 16_777_217


def test_a_header_is_read_without_the_arrays(tmp_path):
    save_arrays(tmp_path / "a.safetensors", TREE, {"seed": 3})
    assert load_metadata(tmp_path / "a.safetensors") == {"seed": 3}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*absent.safetensors"):
        load_arrays(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_arrays(path, TREE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file.*cut short"):
        load_arrays(path)


def test_another_kind_of_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text(json.dumps({"weights": [1, 2, 3]}) * 10)
    with pytest.raises(CheckpointError, match="another format"):
        load_arrays(path)


def test_another_architecture_is_an_error_that_lists_what_differs(tmp_path):
    save_arrays(tmp_path / "a.safetensors", TREE)
    other = {"down": [{"kernel": jnp.ones((2, 4))}], "up": jnp.ones(1), "count": jnp.int32(0)}
    with pytest.raises(CheckpointError) as error:
        load_arrays(tmp_path / "a.safetensors", like=other)
    message = str(error.value)
    assert "another architecture" in message
    assert "1 arrays are missing (up)" in message
    assert "1 arrays are not wanted (down/1/kernel)" in message
    assert "down/0/kernel is (2, 3), not (2, 4)" in message


def test_random_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'key' is a random key: store jax.random.key_data"):
        save_arrays(tmp_path / "a.safetensors", {"key": jax.random.key(0)})


def test_leaves_that_are_no_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match="'name' is no array: got str"):
        save_arrays(tmp_path / "a.safetensors", {"name": "unet"})


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_arrays(path, TREE)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_arrays(path, {"other": jnp.ones(3)})
    assert_same(load_arrays(path, like=TREE)[0], TREE)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
