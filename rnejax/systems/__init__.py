"""Problems with known answers, and real data. Each lives in its own module and is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

_HOMES = {
    "AlanineDipeptide": "alanine_dipeptide",
    "Biased": "bias",
    "DistanceBias": "bias",
    "DoubleWell": "potentials",
    "GaussianMixture": "mixture",
    "LennardJones": "potentials",
    "MullerBrown": "potentials",
    "TokenLaw": "token_law",
    "TorsionBias": "bias",
}
_MODULES = (
    "digit_tokens", "digits", "ink", "metrics", "mixture", "modes", "prompt_matchers", "references", "text",
    "text_rewards", "token_law",
)  # fmt: skip

SYSTEMS = {
    "alanine_dipeptide": "AlanineDipeptide",
    "double_well": "DoubleWell",
    "lennard_jones": "LennardJones",
    "muller_brown": "MullerBrown",
}
BIASES = {"distance": "DistanceBias", "torsion": "TorsionBias"}

__all__ = [
    "BIASES",
    "SYSTEMS",
    "AlanineDipeptide",
    "Biased",
    "DistanceBias",
    "DoubleWell",
    "GaussianMixture",
    "LennardJones",
    "MullerBrown",
    "TokenLaw",
    "TorsionBias",
    "build",
    "digit_tokens",
    "digits",
    "ink",
    "metrics",
    "mixture",
    "modes",
    "prompt_matchers",
    "references",
    "text",
    "text_rewards",
    "token_law",
]


def build(kind: str, *, biases: Iterable[Mapping[str, Any]] = (), **arguments: Any) -> Any:
    """A system with an energy, by name; ``biases`` as dictionaries of their ``kind`` and arguments.

    Raises:
      ValueError: for an unknown name, or arguments that the system or a bias does not take.
    """
    system = _build(SYSTEMS, "system", kind, arguments)
    added = tuple(
        _build(BIASES, "bias", each["kind"], {name: value for name, value in each.items() if name != "kind"})
        for each in biases
    )
    return __getattr__("Biased")(system, added) if added else system


def _build(known: Mapping[str, str], what: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    if kind not in known:
        raise ValueError(f"unknown {what} {kind!r}: there are {', '.join(known)}")
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return __getattr__(known[kind])(**frozen)
    except TypeError as error:
        raise ValueError(f"{what} {kind!r}: {error}") from None


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
