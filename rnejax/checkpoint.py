"""Arrays and a JSON header in one safetensors file: nothing in it is ever executed, unlike a pickle.

Any pytree of arrays will do. A leaf is stored under its path, for example "down/0/conv1/kernel".
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

HEADER = "rnejax"
"""The entry of the safetensors metadata that holds our JSON header."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit what it is to be loaded into."""


def save_arrays(
    path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, Any] | None = None, dtype: Any = None
) -> None:
    """Write a pytree of arrays and a header to `path`; whoever reads it sees the old file or the new one, never half.

    Args:
        path: where; the folder is made if it is missing. Conventionally ends in ".safetensors".
        tree: a pytree whose leaves are arrays or numbers; no two leaves may have the same path.
        metadata: anything that JSON can hold: what the arrays are and how they were made.
        dtype: store floating-point leaves in this type, for example `jnp.bfloat16` to halve the file.

    Raises:
        TypeError: a leaf is no array, or the metadata is not JSON.
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _named_leaves(tree):
        array = _as_array(name, leaf)
        if dtype is not None and jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            array = array.astype(dtype)
        if name in arrays:
            raise ValueError(f"two leaves of the tree have the path {name!r}")
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
    header = json.dumps(dict(metadata or {}), sort_keys=True, allow_nan=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, so that the last step is a rename and cannot be interrupted half-way.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays, metadata={HEADER: header}))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_arrays(path: str | os.PathLike[str], like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Read what `save_arrays` wrote.

    Args:
        path: the file.
        like: a pytree of arrays (or of `jax.ShapeDtypeStruct`) with the wanted structure, shapes and types; stored
            arrays are converted to its types. Default: nested dictionaries by path component, in the types stored.

    Returns:
        (tree, metadata)

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated or no safetensors file, or its arrays are not those of `like` (another
            architecture); the message lists what differs.
    """
    arrays, metadata = _read(Path(path))
    if like is None:
        return _nest(arrays), metadata
    wanted = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in _named_leaves(like)}
    _check_same(Path(path), arrays, wanted)
    leaves = [jax.numpy.asarray(arrays[name], dtype=leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), metadata


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the header of a checkpoint; raises as `load_arrays` does."""
    return _read(Path(path), header_only=True)[1]


def _read(path: Path, header_only: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(HEADER, "{}")
            arrays = {} if header_only else {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file ({error}): it was cut short "
            "while it was copied or written, or it is another format; fetch or write it again"
        ) from error
    try:
        return arrays, json.loads(header)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has a header that is no JSON ({error}): it was not written by rnejax") from error


def _check_same(path: Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in arrays]
    surplus = [name for name in arrays if name not in wanted]
    differing = [
        f"{name} is {arrays[name].shape}, not {leaf.shape}"
        for name, leaf in wanted.items()
        if name in arrays and arrays[name].shape != leaf.shape
    ]
    if not (missing or surplus or differing):
        return
    complaints = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for what, names in (
            ("arrays are missing", missing),
            ("arrays are not wanted", surplus),
            ("have another shape", differing),
        )
        if names
    ]
    raise CheckpointError(
        f"{path} was made for another architecture: of {len(wanted)} arrays, {', '.join(complaints)}; build the "
        "network with the numbers in the checkpoint's header"
    )


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/") or "array", leaf) for path, leaf in leaves]


def _as_array(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"the leaf {name!r} is a random key: store jax.random.key_data(key) instead")
    array = np.asarray(leaf)
    if array.dtype == object or array.dtype.kind in "US":
        raise TypeError(f"the leaf {name!r} is no array: got {type(leaf).__name__}")
    return array


def _nest(arrays: Mapping[str, np.ndarray]) -> Any:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return tree
