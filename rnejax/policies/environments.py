"""Gymnasium environments: data from a policy, and what a policy earns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .transitions import Transitions, check_transitions

Policy = Callable[[Any, np.ndarray], Any]
"""policy(key, observations (n, o)) -> actions (n, a)"""


def make_environments(name: str, num_envs: int) -> Any:
    """So many copies, stepped together; an episode that ends is followed by the next within the same step.

    Raises:
      ImportError: without gymnasium.
      ValueError: for an environment that is not there, or has no vectors of numbers as observations and actions.
    """
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode
    except ImportError as error:
        raise ImportError("environments need gymnasium: pip install gymnasium (rnejax's extra 'control')") from error
    try:
        environments = gymnasium.make_vec(
            name,
            num_envs=num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )
    except gymnasium.error.Error as error:
        raise ValueError(f"environment {name!r}: {error}") from error
    for space in (environments.single_observation_space, environments.single_action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"environment {name!r} must have vectors as observations and actions, and has {space}")
    return environments


def evaluate(name: str, policy: Policy, *, num_episodes: int = 10, seed: int = 0) -> np.ndarray:
    """What the policy earns in whole episodes, side by side, the sum of rewards of each: (num_episodes,).

    Args:
      name: of a gymnasium environment with vectors as observations and actions.
      policy: policy(key, observations) -> actions, clipped to what the environment allows.
      num_episodes: each begins as gymnasium seeds it.
      seed: of the environments and of the policy's keys.

    An episode that ends early earns nothing more; without a limit of time, one that never ends is never done. Raises
    what `make_environments` does, and ValueError for actions that are not finite.
    """
    environments = make_environments(name, num_episodes)
    try:
        observations, _ = environments.reset(seed=seed)
        key = jax.random.key(seed)
        totals, running = np.zeros(num_episodes), np.ones(num_episodes, bool)
        step = 0
        while running.any():
            actions = _actions(environments, policy(jax.random.fold_in(key, step), observations), name)
            observations, rewards, ended, timed_out, _ = environments.step(actions)
            totals += np.where(running, rewards, 0.0)
            running &= ~(ended | timed_out)
            step += 1
    finally:
        environments.close()
    return totals


def collect(name: str, policy: Policy, *, num_steps: int, num_envs: int = 8, seed: int = 0) -> Transitions:
    """At least ``num_steps`` steps of a policy in ``num_envs`` environments at a time."""
    environments = make_environments(name, num_envs)
    kept: list[tuple[np.ndarray, ...]] = []
    try:
        observations, _ = environments.reset(seed=seed)
        key = jax.random.key(seed)
        for step in range(-(-num_steps // num_envs)):
            actions = _actions(environments, policy(jax.random.fold_in(key, step), observations), name)
            following, rewards, ended, timed_out, info = environments.step(actions)
            last = following.copy()
            for i in np.flatnonzero(ended | timed_out):  # what was seen last, before the next episode began
                last[i] = info["final_obs"][i]
            kept.append((observations, actions, rewards, last, ended))
            observations = following
    finally:
        environments.close()
    return check_transitions(Transitions(*[np.concatenate(arrays) for arrays in zip(*kept, strict=True)]))


def _actions(environments: Any, actions: Any, name: str) -> np.ndarray:
    actions = np.asarray(actions, np.float32)
    space = environments.action_space
    if actions.shape != space.shape:
        raise ValueError(f"the policy must return actions of shape {space.shape} in {name}, got {actions.shape}")
    if not np.isfinite(actions).all():
        raise ValueError(f"the policy returned actions that are not finite in {name}")
    clipped: np.ndarray = np.clip(actions, space.low, space.high)
    return clipped
