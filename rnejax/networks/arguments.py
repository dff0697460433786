"""Checks of arguments that the networks share."""

from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError that names the argument, its value and the values it may have."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}: got {value!r}")


def check_last_axes(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise a ValueError unless `shape` ends in `expected` (leading axes are batch axes)."""
    if shape[max(0, len(shape) - len(expected)) :] != tuple(expected):
        raise ValueError(f"{name} must have shape (..., {', '.join(map(str, expected))}): got {shape}")
