"""Behaviour cloning and implicit Q-learning: the prior and the reward of offline reinforcement learning.

    python scripts/make_control_data.py pendulum
    python scripts/train_policies.py pendulum [--data data] [--seed 0] [--output data]

Reads NAME.npz (`rnejax.policies.load_transitions`) and writes NAME_policy.safetensors, a diffusion model of actions
whose condition is the observation, and NAME_q.safetensors, a Q-function that only the same data have taught.
`rnejax finetune NAME` takes both from there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax

import rnejax as rj
from rnejax import policies
from rnejax.policies.diffusion_policy import network_arguments

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "pendulum": {
        "network": {"hidden": 128, "depth": 3},
        "clone": {"num_steps": 10_000},
        "q": {
            "discount": 0.97,
            "expectile": 0.8,
            "averaging": 0.03,
            "learning_rate": 1e-3,
            "hidden": 128,
            "num_steps": 10_000,
        },
    },
    "half_cheetah": {
        "network": {"hidden": 256, "depth": 3},
        "clone": {"num_steps": 10_000},
        "q": {"discount": 0.99, "expectile": 0.8, "averaging": 0.01, "hidden": 256, "num_steps": 30_000},
    },
}


def train(name: str, data: policies.Transitions, seed: int) -> tuple[rj.DiffusionModel, policies.QFunction]:
    """A cloned policy and a Q-function."""
    settings = SETTINGS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    # Until no signal is left: paths of trajectory balance begin with a law that knows nothing of where they end.
    process = rj.processes.Cosine(t_max=1.0)
    model = policies.policy_model(keys[0], process, data, **settings["network"])
    return policies.clone(keys[1], model, data, **settings["clone"]), policies.fit_q_function(
        keys[2], data, **settings["q"]
    )


def save(folder: Path, name: str, data: Any, seed: int, model: rj.DiffusionModel, q: policies.QFunction) -> None:
    """Both, with what has made them."""
    settings = SETTINGS[name]
    made = {"settings": {"data": name, **settings}, "seed": seed}
    network = ("mlp", network_arguments(data, **settings["network"]))
    rj.save_model(folder / f"{name}_policy.safetensors", model, network=network, metadata=made)
    policies.save_q_function(folder / f"{name}_q.safetensors", q, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    data = policies.load_transitions(arguments.data / f"{arguments.name}.npz")
    started = time.perf_counter()
    save(arguments.output, arguments.name, data, arguments.seed, *train(arguments.name, data, arguments.seed))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
