"""Problems with known answers, and real data. Each lives in its own module and is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AlanineDipeptide": "alanine_dipeptide",
    "DoubleWell": "potentials",
    "GaussianMixture": "mixture",
    "LennardJones": "potentials",
    "MullerBrown": "potentials",
}
_MODULES = ("digits", "metrics", "mixture", "references")

SYSTEMS = {
    "alanine_dipeptide": "AlanineDipeptide",
    "double_well": "DoubleWell",
    "lennard_jones": "LennardJones",
    "muller_brown": "MullerBrown",
}

__all__ = [
    "SYSTEMS",
    "AlanineDipeptide",
    "DoubleWell",
    "GaussianMixture",
    "LennardJones",
    "MullerBrown",
    "build",
    "digits",
    "metrics",
    "mixture",
    "references",
]


def build(name: str, **arguments: Any) -> Any:
    """A system with an energy, by name.

    Raises:
      ValueError: for an unknown name, or arguments that the system does not take.
    """
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}: there are {', '.join(SYSTEMS)}")
    try:
        return __getattr__(SYSTEMS[name])(**arguments)
    except TypeError as error:
        raise ValueError(f"system {name!r}: {error}") from None


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
