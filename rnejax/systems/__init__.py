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
_MODULES = ("digits", "mixture")

__all__ = ["AlanineDipeptide", "DoubleWell", "GaussianMixture", "LennardJones", "MullerBrown", "digits", "mixture"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
