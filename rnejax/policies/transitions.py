"""Logged data of reinforcement learning: what was observed, done, and earned."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Transitions(NamedTuple):
    """Steps in any order.

    Attributes:
      observations: (n, o).
      actions: (n, a).
      rewards: (n,).
      next_observations: (n, o).
      terminals: (n,), True where the environment ended and nothing was to be earned any more; not where time was up.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminals: np.ndarray


def check_transitions(data: Transitions) -> Transitions:
    """The same in float32 and bool.

    Raises:
      ValueError: for arrays that do not fit together, no steps, or numbers that are not finite.
    """
    observations, actions = np.asarray(data.observations, np.float32), np.asarray(data.actions, np.float32)
    following = np.asarray(data.next_observations, np.float32)
    rewards, terminals = np.asarray(data.rewards, np.float32), np.asarray(data.terminals, bool)
    n = len(rewards)
    if observations.ndim != 2 or actions.ndim != 2 or rewards.ndim != 1 or n == 0:
        raise ValueError(
            f"observations and actions must have shapes (n, size) and rewards (n,), n at least 1: got "
            f"{observations.shape}, {actions.shape} and {rewards.shape}"
        )
    if following.shape != observations.shape or terminals.shape != (n,) or len(observations) != n or len(actions) != n:
        raise ValueError(
            f"transitions must agree on their number: got observations {observations.shape}, actions {actions.shape}, "
            f"rewards {rewards.shape}, next_observations {following.shape}, terminals {terminals.shape}"
        )
    for name, values in (
        ("observations", observations), ("actions", actions), ("rewards", rewards), ("next_observations", following),
    ):  # fmt: skip
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, and {np.sum(~np.isfinite(values))} of their numbers are not")
    return Transitions(observations, actions, rewards, following, terminals)


def save_transitions(path: str | os.PathLike[str], data: Transitions) -> None:
    """Write an .npz file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **check_transitions(data)._asdict())


def load_transitions(path: str | os.PathLike[str]) -> Transitions:
    """Read what `save_transitions` wrote, or any .npz with these arrays.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is none of transitions.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: scripts/make_control_data.py makes some")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in Transitions._fields if name in file}
    except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    missing = [name for name in Transitions._fields if name not in arrays]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}")
    return check_transitions(Transitions(**arrays))


def from_minari(dataset_id: str, *, download: bool = False) -> Transitions:
    """A data set of Minari (Farama Foundation), for those who have it: all steps of all episodes.

    Args:
      dataset_id: such as "mujoco/hopper/medium-v0".
      download: fetch it, where it is not there.

    Raises:
      ImportError: without the package minari.
      ValueError: for observations or actions that are no vectors.
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError("data sets of Minari need the package: pip install minari") from error
    return from_episodes(minari.load_dataset(dataset_id, download=download).iterate_episodes())


def from_episodes(episodes: Any) -> Transitions:
    """Of episodes with one more observation than actions, as Minari has them.

    Raises:
      ValueError: for no episodes, or observations or actions that are no vectors.
    """
    parts: list[Transitions] = []
    for episode in episodes:
        observations = episode.observations
        if isinstance(observations, Mapping):
            raise ValueError("observations must be vectors; this data set has dictionaries of them")
        observations = np.asarray(observations).reshape(len(observations), -1)
        actions = np.asarray(episode.actions).reshape(len(episode.actions), -1)
        parts.append(Transitions(observations[:-1], actions, episode.rewards, observations[1:], episode.terminations))
    if not parts:
        raise ValueError("there is no episode in the data set")
    return check_transitions(Transitions(*[np.concatenate(arrays) for arrays in zip(*parts, strict=True)]))
