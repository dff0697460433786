"""What a run leaves: one folder with its configuration, numbers, arrays and pictures, written as they come."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from ..config import ConfigError, Run, dump_config


class RunFolder:
    """One folder per run: ``config.yaml``, ``metrics.json``, arrays and pictures.

    ``metrics.json`` says ``"finished": false`` until the run ends, and lists the files that belong to it, so that the
    next run in the same folder can remove them.

    Raises:
      ConfigError: if the folder cannot be made or written, or holds what must not be lost: the run's own input, or a
        model that was trained there. Nothing has been touched then.
    """

    def __init__(self, path: str | Path, command: str, config: Run):
        self.path = Path(path)
        self._metrics: dict[str, Any] = {"command": command, "finished": False, "files": []}
        self._check_what_is_there(command, config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self._remove_previous()
            (self.path / "config.yaml").write_text(dump_config(config))
            self._write()
        except OSError as error:
            raise ConfigError(f"cannot write into output = {self.path}: {error.strerror or error}") from None

    def record(self, **metrics: Any) -> None:
        """Add numbers to ``metrics.json``; arrays become lists, and what is not finite becomes null."""
        self._metrics |= {name: _as_json(value) for name, value in metrics.items()}
        self._write()

    def arrays(self, name: str, **arrays: Any) -> None:
        """Write a compressed ``.npz``."""
        plain = {key: np.asarray(value) for key, value in arrays.items()}
        np.savez_compressed(self.path / name, allow_pickle=False, **plain)
        self.add(name)

    def text(self, name: str, words: str) -> None:
        """Write a text."""
        (self.path / name).write_text(words, encoding="utf-8")
        self.add(name)

    def picture(self, name: str, figure: Any) -> None:
        """Write a figure."""
        plot.save(figure, self.path / name)
        self.add(name)

    def finish(self) -> None:
        """Say that nothing is missing."""
        self.record(finished=True)

    @contextmanager
    def timed(self, name: str = "seconds") -> Iterator[None]:
        """Record the wall-clock of a block, compilation included."""
        started = time.perf_counter()
        yield
        self.record(**{name: round(time.perf_counter() - started, 2)})

    @property
    def files(self) -> list[str]:
        """What is there, config.yaml and metrics.json first; of training also the state to go on from."""
        states = [name for name in ("state.safetensors", "metrics.jsonl") if (self.path / name).exists()]
        return ["config.yaml", "metrics.json", *self._metrics["files"], *states]

    @property
    def pictures(self) -> list[Path]:
        return [self.path / name for name in self._metrics["files"] if name.endswith(".png")]

    def add(self, name: str) -> None:
        """A file in the folder that the run has written itself, and that the next run there may remove."""
        if name not in self._metrics["files"]:
            self._metrics["files"].append(name)
        self._write()

    def _write(self) -> None:
        part = self.path / ".metrics.json"
        part.write_text(json.dumps(self._metrics, indent=2) + "\n")
        os.replace(part, self.path / "metrics.json")

    def _check_what_is_there(self, command: str, config: Run) -> None:
        problem = getattr(config, "problem", None)  # of what is fine-tuned
        inputs = {key: getattr(config, key, None) for key in ("model", "data")}
        inputs |= {f"problem.{key}": getattr(problem, key, None) for key in ("model", "data")}
        for key, given in inputs.items():
            file = Path(given if isinstance(given, str) else "")
            if file.is_file() and file.resolve().parent == self.path.resolve():
                raise ConfigError(
                    f"{key} = {file} lies in output = {self.path}, whose files the run would replace: choose another"
                )
        before = self._previous().get("command")
        if before in ("train", "finetune") and command != before:
            raise ConfigError(
                f"output = {self.path} holds a trained model, which the run would replace: choose another"
            )

    def _previous(self) -> dict[str, Any]:
        """``metrics.json`` of the run before in this folder, if there was one."""
        try:
            metrics = json.loads((self.path / "metrics.json").read_text())
        except (OSError, ValueError):
            return {}
        return metrics if isinstance(metrics, dict) else {}

    def _remove_previous(self) -> None:
        """A picture of an earlier run among those of this one would be a lie."""
        names = self._previous().get("files")
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and Path(name).name == name:
                (self.path / name).unlink(missing_ok=True)


@dataclass
class Output:
    """Where a run will write. It is untouched until the run opens it, when only computing is left to go wrong."""

    path: Path
    command: str
    config: Run
    folder: RunFolder | None = None

    def open(self) -> RunFolder:
        self.folder = RunFolder(self.path, self.command, self.config)
        return self.folder


def require_pictures() -> None:
    """Raises ConfigError where pictures could not be drawn at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a run draws pictures: pip install matplotlib (rnejax's extra 'plot')")


def require_molecules() -> None:
    """Raises ConfigError where samples of molecules could not be compared at the end."""
    packages = {"ot": "pot", "pymbar": "pymbar"}  # by what they are imported as
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"samples of molecules are compared by optimal transport and MBAR: pip install {' '.join(missing)} "
            "(rnejax's extra 'molecules')"
        )


def summary(values: Any) -> dict[str, float]:
    """Mean and its standard error of independent values; NaN becomes null in ``metrics.json``."""
    values = np.asarray(values, np.float64).ravel()
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return {"mean": float(values.mean()), "standard_error": float(error)}


def _as_json(value: Any) -> Any:
    """Plain lists and numbers; JSON knows no NaN and no infinity, so they are null."""
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if hasattr(value, "tolist"):
        return _as_json(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
