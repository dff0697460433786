"""Offline reinforcement learning: a cloned policy, what a Q-function makes of it while sampling, and fine-tuned.

    python scripts/make_control_data.py NAME
    python scripts/benchmark_policies.py [--names pendulum half_cheetah] [--seeds 3]

Every seed clones the same logged data, learns a Q-function from them (`scripts/train_policies.py`), and fine-tunes the
clone by configs/NAME.yaml. All policies have the same grid:

- cloned: the clone as it is
- best of N: of N actions of the clone, the one that Q takes for the best
- guided: the clone's denoiser moved by the gradient of (Q - V) / temperature, times a strength; at most by the
  configuration's trust, as the policy that is tuned is where it begins, or without a limit
- tuned: relative trajectory balance towards p(a | s) exp((Q - V) / temperature)

"Evaluations" are those of a diffusion network for one action. Returns of 20 episodes from the same starts, normalised
(Fu et al. 2020): 0 for uniform actions and 100 for the best policy known to scripts/make_control_data.py; means over
seeds, and their standard errors.

Writes docs/tables/policies.{json,md}; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_policies import save, train

from rnejax import policies
from rnejax.config import FinetuneRun, load_config
from rnejax.runs import finetune
from rnejax.runs.finetuning import build_problem
from rnejax.training import Guidance, Guided

NUM_EPISODES = 20
CANDIDATES = {"pendulum": (8, 64), "half_cheetah": (8,)}
GUIDED = {"guided": (1.0, True), "guided, strength 4": (4.0, True), "guided without a limit": (1.0, False)}


def measure(name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Normalised returns of all policies of one seed."""
    transitions = policies.load_transitions(data / f"{name}.npz")
    started = time.perf_counter()
    save(folder, name, transitions, seed, *train(name, transitions, seed))
    seconds = {"clone and Q": time.perf_counter() - started}
    files = {"model": "policy.safetensors", "q_function": "q.safetensors"}
    overrides = [word for key, end in files.items() for word in (f"--problem.{key}", str(folder / f"{name}_{end}"))]
    config: Any = load_config(
        FinetuneRun, name, ["--seed", str(seed), "--problem.data", str(data / f"{name}.npz"), *overrides]
    )
    problem: Any = build_problem(config)
    started = time.perf_counter()
    fitted = finetune.tune(config, problem)
    seconds["fine-tuning"] = time.perf_counter() - started
    tuned = problem.posterior.with_params(fitted.average.weights)
    q, times = problem.log_reward.function, problem.times
    steps = len(times) - 1
    policy = {"cloned": (steps, policies.act(problem.prior, times))}
    for count in CANDIDATES[name]:
        policy[f"best of {count}"] = (
            count * steps,
            policies.act(problem.prior, times, num_candidates=count, score=q),
        )
    for method, (strength, limited) in GUIDED.items():
        trust = config.trust if limited else float(np.finfo(np.float32).max)
        guided = Guided(problem.prior, log_reward=problem.log_reward, trust=trust)
        weights = Guidance(problem.prior.params, jnp.asarray(strength))
        model = guided.model(weights, condition=problem.prior.condition)
        policy[method] = (steps, policies.act(model, times))
    policy["tuned"] = (steps, policies.act(tuned, times))

    known = json.loads((data / f"{name}.json").read_text())
    low, high = known["returns"]["random"], known["returns"]["best"]
    rows = {}
    for method, (evaluations, each) in policy.items():
        started = time.perf_counter()
        earned = policies.evaluate(known["environment"], each, num_episodes=NUM_EPISODES, seed=1000)
        normalised = 100 * (earned - low) / (high - low)
        rows[method] = {
            "evaluations": evaluations,
            "normalised": normalised.tolist(),
            "returns": earned.tolist(),
            "seconds": time.perf_counter() - started,
        }
        print(name, seed, method, f"{earned.mean():.0f}, normalised {normalised.mean():.1f}", flush=True)
    residuals = [report["squared_residual"] for report in fitted.metrics]
    return {"policies": rows, "seconds": seconds, "squared_residual": residuals, "behaviour": behaviour(transitions)}


def behaviour(data: policies.Transitions) -> dict[str, float]:
    return {"transitions": len(data.rewards), "mean_reward": float(data.rewards.mean())}


def table(report: dict[str, Any]) -> str:
    lines = ["| | | normalised return | return | evaluations per action |", "|---|---|---|---|---|"]
    for name, seeds in report.items():
        first = next(iter(seeds.values()))
        for method in first["policies"]:
            rows = [found["policies"][method] for found in seeds.values()]
            cells = []
            for key, digits in (("normalised", 1), ("returns", 0)):
                means = [float(np.mean(row[key])) for row in rows]
                error = np.std(means, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.nan
                cells.append(f"{np.mean(means):.{digits}f} ± {error:.{digits}f}")
            lines.append(f"| {name} | {method} | {' | '.join(cells)} | {rows[0]['evaluations']} |")
        tuning = np.mean([found["seconds"]["fine-tuning"] for found in seeds.values()])
        lines.append(f"| {name} | {len(seeds)} seeds; fine-tuning took {tuning:.0f} s | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--models", type=Path, default=Path("outputs/policies"), help="where clones and Q-functions go")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    path = arguments.output / "policies.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        for seed in range(arguments.seeds):
            found = report.setdefault(name, {})
            if str(seed) in found:
                continue
            found[str(seed)] = measure(name, seed, arguments.data, arguments.models / str(seed))
            path.write_text(json.dumps(report) + "\n")
            (arguments.output / "policies.md").write_text(table(report))
            jax.clear_caches()


if __name__ == "__main__":
    main()
