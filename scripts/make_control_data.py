"""Logged data of mixed quality for offline reinforcement learning, and the returns that normalise its results.

    python scripts/make_control_data.py {pendulum,half_cheetah} [--output data]

- pendulum (Pendulum-v1): a controller that swings up by energy and balances by proportional and derivative feedback,
  with Gaussian noise of three sizes on its torque, and uniform torques; a quarter each.
- half_cheetah (HalfCheetah-v5): what augmented random search (Mania et al. 2018) tried on its way to a linear policy,
  from its first to its last episode, ``--iterations`` in all.

Writes NAME.npz (`rnejax.policies.Transitions`) and NAME.json: the mean returns of uniform actions and of the best
policy known to the script (the controller without noise; the last linear policy), between which returns are normalised,
and of the data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from rnejax.policies import Transitions, collect, evaluate, save_transitions
from rnejax.policies.environments import make_environments

NAMES = {"pendulum": "Pendulum-v1", "half_cheetah": "HalfCheetah-v5"}


def uniform(name: str, seed: int) -> Any:
    """Uniform actions."""
    environments = make_environments(name, 1)
    space = environments.single_action_space
    environments.close()
    random = np.random.default_rng(seed)
    return lambda key, observations: random.uniform(space.low, space.high, (len(observations), *space.shape))


def swing_up(noise: float, seed: int) -> Any:
    """Torques for the pendulum; its angle is 0 where it stands, its energy there is 5."""
    random = np.random.default_rng(seed)

    def policy(key: Any, observations: np.ndarray) -> np.ndarray:
        cosine, sine, speed = observations.T
        angle = np.arctan2(sine, cosine)
        energy = speed**2 / 6 + 5 * cosine
        pumping = np.where(speed >= 0, 1.0, -1.0) * np.clip(2.0 * (5.0 - energy), -2, 2)
        balancing = -10.0 * angle - 2.0 * speed
        torque = np.where((np.abs(angle) < 0.6) & (np.abs(speed) < 4), balancing, pumping)
        return np.clip(torque + noise * random.normal(size=torque.shape), -2, 2)[:, None].astype(np.float32)

    return policy


def pendulum(steps: int, seed: int) -> tuple[Transitions, Any]:
    name = NAMES["pendulum"]
    behaviours = [swing_up(noise, seed + i) for i, noise in enumerate((0.5, 1.5, 3.0))] + [uniform(name, seed)]
    parts = [collect(name, each, num_steps=steps // 4, num_envs=10, seed=seed + i) for i, each in enumerate(behaviours)]
    return Transitions(*[np.concatenate(arrays) for arrays in zip(*parts, strict=True)]), swing_up(0.0, seed)


def half_cheetah(steps: int, seed: int, iterations: int) -> tuple[Transitions, Any]:
    """Augmented random search, version V2 (states standardised), 8 directions of which the best 4 count."""
    name, directions, best, spread, rate = NAMES["half_cheetah"], 8, 4, 0.03, 0.02
    random = np.random.default_rng(seed)
    environments = make_environments(name, 2 * directions)
    size, actions = environments.single_observation_space.shape[0], environments.single_action_space.shape[0]
    linear, mean, square, count = np.zeros((actions, size)), np.zeros(size), np.ones(size), 1e-4
    kept: list[Transitions] = []
    for iteration in range(iterations):
        noise = random.normal(size=(directions, actions, size))
        tried = np.concatenate([linear + spread * noise, linear - spread * noise])
        scale = np.sqrt(np.maximum(square / count - (mean / count) ** 2, 1e-4)) if iteration else np.ones(size)
        centre = mean / count if iteration else np.zeros(size)
        observations, _ = environments.reset(seed=seed + iteration)
        totals, rows = np.zeros(2 * directions), []
        for _ in range(1000):
            chosen = np.clip(np.einsum("nao,no->na", tried, (observations - centre) / scale), -1, 1)
            following, rewards, ended, timed_out, info = environments.step(chosen.astype(np.float32))
            last = following.copy()
            for i in np.flatnonzero(ended | timed_out):
                last[i] = info["final_obs"][i]
            rows.append((observations, chosen, rewards, last, ended))
            totals += rewards
            observations = following
        episode = Transitions(*[np.concatenate(arrays) for arrays in zip(*rows, strict=True)])
        mean, square = mean + episode.observations.sum(axis=0), square + (episode.observations**2).sum(axis=0)
        count += len(episode.rewards)
        chosen_rows = random.choice(len(episode.rewards), max(1, steps // iterations), replace=False)
        kept.append(Transitions(*[array[chosen_rows] for array in episode]))
        plus, minus = totals[:directions], totals[directions:]
        order = np.argsort(-np.maximum(plus, minus))[:best]
        used = np.concatenate([plus[order], minus[order]])
        linear = linear + rate / (best * used.std()) * np.einsum("n,nao->ao", plus[order] - minus[order], noise[order])
        print(f"iteration {iteration}: mean return {totals.mean():.0f}, best {totals.max():.0f}", flush=True)
    environments.close()
    final = np.sqrt(np.maximum(square / count - (mean / count) ** 2, 1e-4)), mean / count

    def policy(key: Any, observations: np.ndarray) -> np.ndarray:
        return np.clip((observations - final[1]) / final[0] @ linear.T, -1, 1).astype(np.float32)

    return Transitions(*[np.concatenate(arrays) for arrays in zip(*kept, strict=True)]), policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(NAMES))
    parser.add_argument("--steps", type=int, default=None, help="transitions kept; default 40,000 and 200,000")
    parser.add_argument("--iterations", type=int, default=120, help="of the random search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    steps = arguments.steps or {"pendulum": 40_000, "half_cheetah": 200_000}[arguments.name]
    if arguments.name == "pendulum":
        data, best = pendulum(steps, arguments.seed)
    else:
        data, best = half_cheetah(steps, arguments.seed, arguments.iterations)
    save_transitions(arguments.output / f"{arguments.name}.npz", data)
    name = NAMES[arguments.name]
    returns = {
        who: float(evaluate(name, policy, num_episodes=20, seed=1000).mean())
        for who, policy in {"random": uniform(name, 1), "best": best}.items()
    }
    described = {"environment": name, "transitions": len(data.rewards), "seed": arguments.seed, "returns": returns}
    described |= {"mean_reward": float(data.rewards.mean())}
    (arguments.output / f"{arguments.name}.json").write_text(json.dumps(described, indent=1) + "\n")
    print(described)


if __name__ == "__main__":
    main()
