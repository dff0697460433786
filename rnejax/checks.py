"""What arguments must be, in words: checks that all parts of the library share, and that know none of them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def check_count(name: str, number: Any) -> int:
    """The number, if it is an integer of at least 1; else ValueError, by its name."""
    try:
        count = operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {number!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """The value as a float, if it is one finite number (positive where asked for); else ValueError, by its name."""
    is_scalar = isinstance(value, numbers.Real) or (isinstance(value, (np.ndarray, jax.Array)) and value.shape == ())
    if not is_scalar or not np.isrealobj(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if positive and not number > 0:
        raise ValueError(f"{name} must be positive, got {number:g}")
    return number


def check_integers(name: str, values: Any, highest: int | Sequence[int]) -> None:
    """Raises ValueError, by the name, for an array of another type or with an entry that is not from 0 to `highest`,
    which may be one number for each entry of the last axis. Of traced values only the type is known.
    """
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if is_traced(values):
        return
    values = np.asarray(values)
    bad = (values < 0) | (values > np.asarray(highest))
    if bad.any():
        position = tuple(np.argwhere(bad)[0].tolist())
        largest = np.broadcast_to(highest, values.shape)[position]
        raise ValueError(
            f"{name} must be from 0 to {largest}{f' at {list(position)}' if position else ''}, got {values[position]}"
        )


def check_key(key: Any) -> None:
    """Raises TypeError for anything but a single typed key."""
    if not (isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"key must be a single typed key, such as jax.random.key(0); got {key!r}")


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is known only when the caller's compiled code runs."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
