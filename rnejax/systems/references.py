"""Stored reference samples: several independent sets per temperature, small enough to keep in a repository.

Positions are kept as 16-bit integers times one length, which moves an atom by at most half of it: some 1e-4 of the
size of a molecule, far below its thermal motion. Energies are those of the positions before rounding.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_number
from .metrics import energies


class ReferenceSet(NamedTuple):
    """Independent sets of samples at one temperature.

    Attributes:
      x: (sets, n, *shape), in the system's units, without a centre of mass where the system has none.
      energy: (sets, n).
      temperature: as stored.
      metadata: how they were made: system, command, seed, diagnostics, floors.
    """

    x: np.ndarray
    energy: np.ndarray
    temperature: float
    metadata: dict[str, Any]

    @property
    def system(self) -> Any:
        """What they are samples of, built from the metadata."""
        from . import build

        return build(**self.metadata["config"]["system"])


def shipped_references() -> list[str]:
    """Names that `load_reference` knows."""
    return sorted(path.stem for path in _folder().glob("*.npz"))


def save_reference(
    path: str | os.PathLike[str],
    temperatures: Sequence[float],
    x: np.ndarray,
    energy: np.ndarray,
    metadata: Mapping[str, Any],
) -> None:
    """Write sets of samples.

    Args:
      path: a ``.npz`` file.
      temperatures: (k,).
      x: (k, sets, n, *shape).
      energy: (k, sets, n).
      metadata: JSON.

    Raises:
      ValueError: for positions that are NaN or infinite.
    """
    if not np.all(np.isfinite(x)):
        raise ValueError(f"positions must be finite: {int(np.sum(~np.isfinite(x)))} of {np.size(x)} numbers are not")
    unit = float(np.abs(x).max()) / 32767
    rounded = np.round(np.asarray(x, np.float64) / unit).astype(np.int16)
    np.savez_compressed(
        Path(path),
        allow_pickle=False,
        temperatures=np.asarray(temperatures, np.float64),
        positions=rounded,
        unit=unit,
        energy=np.asarray(energy, np.float32),
        metadata=json.dumps(dict(metadata)),
    )


def load_reference(name_or_path: str | os.PathLike[str], temperature: Any) -> ReferenceSet:
    """Read the sets of one temperature.

    Args:
      name_or_path: the name of shipped samples, or a file that ``rnejax reference`` wrote.
      temperature: one of those stored.

    Raises:
      FileNotFoundError: if there is neither; the message lists the shipped names.
      ValueError: for a temperature that is not stored, or a file of anything else.
    """
    temperature = check_number("temperature", temperature, positive=True)
    path = find_reference(name_or_path)
    try:
        with np.load(path) as file:
            stored, positions, unit, energies = (file[k] for k in ("temperatures", "positions", "unit", "energy"))
            metadata = json.loads(str(file["metadata"]))
    except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no reference samples ({type(error).__name__}: {error})") from error
    found = np.flatnonzero(np.isclose(stored, temperature, rtol=1e-6))
    if len(found) == 0:
        there = ", ".join(f"{each:g}" for each in stored)
        raise ValueError(f"{path.name} has no samples at temperature {temperature:g}: there are {there}")
    i = int(found[0])
    x = positions[i].astype(np.float32) * np.float32(unit)
    if x.ndim == 4:  # rounding has moved the centre of mass
        x -= x.mean(axis=-2, keepdims=True, dtype=np.float64).astype(np.float32)
    return ReferenceSet(x, energies[i], float(stored[i]), metadata)


def from_frames(
    system: Any, x: Any, temperature: Any, described: Mapping[str, Any], *, num_sets: int = 5
) -> ReferenceSet:
    """Configurations of the user's own simulation, as sets: consecutive parts, as independent as can be had.

    Args:
      system: what they are configurations of.
      x: (n, *system.shape), in the system's units, in the order of the simulation; what is left over at the end of
        equal parts is dropped.
      temperature: of the simulation, in the system's unit.
      described: the system's kind and arguments, as `rnejax.systems.build` takes them.
      num_sets: parts.

    Raises:
      ValueError: for frames of another shape, NaN or infinite coordinates, units other than the system's, clashes of
        infinite energy, fewer frames than parts, or a temperature that is no positive number.
    """
    system.thermal_energy(temperature)
    x = check_frames(system, x)
    each = len(x) // num_sets
    if each == 0:
        raise ValueError(f"{len(x)} frames do not make {num_sets} sets")
    x = x[: each * num_sets].reshape(num_sets, each, *system.shape)
    energy = np.stack([energies(system, part) for part in x])
    clashing = np.flatnonzero(~np.isfinite(energy.ravel()))
    if clashing.size:
        raise ValueError(
            f"{clashing.size} of {energy.size} frames have an infinite energy, the first is {clashing[0]}: particles "
            "in one place, or another unit of length"
        )
    return ReferenceSet(x, energy, float(temperature), {"command": "frames", "config": {"system": dict(described)}})


def check_frames(system: Any, x: Any) -> np.ndarray:
    """Configurations (n, *system.shape) as float32 without a centre of mass, where the system has none.

    Raises:
      ValueError: for another shape, NaN or infinite coordinates (with their number and the first), or bonds whose
        length says that these are other units than the system's, other atoms, or a molecule that is not whole.
    """
    x = np.asarray(x)
    if x.ndim != 1 + len(system.shape) or x.shape[1:] != tuple(system.shape) or len(x) == 0:
        raise ValueError(f"frames must have shape (n, {', '.join(map(str, system.shape))}), got {x.shape}")
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"coordinates must be floating-point numbers, got {x.dtype}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=tuple(range(1, x.ndim))))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(x)} frames have coordinates that are NaN or infinite, the first is {bad[0]}"
        )
    if hasattr(system, "bonds"):
        _check_bonds(system, x)
    if len(system.shape) == 2:
        x = x - x.mean(axis=-2, keepdims=True, dtype=np.float64)
    return np.asarray(x, np.float32)


def _check_bonds(system: Any, x: np.ndarray) -> None:
    """ValueError where bonds of a frame are less than 0.6 or more than 1.6 of their length: at 1,200 K, six standard
    deviations are a third."""
    atoms, lengths = system.bonds
    found = np.linalg.norm(x[:, atoms[:, 0]] - x[:, atoms[:, 1]], axis=-1)
    ratios = found / lengths
    bad = np.flatnonzero(((ratios < 0.6) | (ratios > 1.6)).any(axis=1))
    if bad.size == 0:
        return
    ratio = float(np.median(ratios[bad]))
    unit = system.length_unit
    if not 0.7 < ratio < 1.4:
        raise ValueError(
            f"in {bad.size} of {len(x)} frames, the first is {bad[0]}, bonds are {ratio:.3g} times as long as this "
            f"molecule's, whose unit of length is {unit}"
            + ("; ångström? divide by 10" if 7 < ratio < 14 else "; is it this molecule, in this order of atoms?")
        )
    worst = int(np.argmax(np.abs(np.log(np.maximum(ratios[bad[0]], 1e-6)))))
    first, second = (system.atom_names[i] for i in atoms[worst])
    raise ValueError(
        f"{bad.size} of {len(x)} frames have bonds that are torn or crushed: in frame {bad[0]}, {first} and {second} "
        f"are {found[bad[0], worst]:.3g} {unit} apart, and their bond is {lengths[worst]:.3g} {unit} long; are the "
        "atoms in this order, and the molecule whole (not cut by a periodic box)?"
    )


def find_reference(name_or_path: str | os.PathLike[str]) -> Path:
    """The file; FileNotFoundError where there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = _folder() / f"{name_or_path}.npz"
    if shipped.is_file():
        return shipped
    raise FileNotFoundError(
        f"there is no file {str(name_or_path)!r}, and no shipped samples of that name; shipped: "
        f"{', '.join(shipped_references()) or 'none'}; `rnejax reference CONFIG.yaml --output FOLDER` makes "
        "FOLDER/reference.npz"
    )


def _folder() -> Path:
    return Path(str(resources.files("rnejax") / "systems" / "data" / "references"))
