"""Fine-tuning 25 modes into nine: ways to take paths and to know log Z, against what needs no training.

    python scripts/benchmark_trajectory_balance.py [--seeds 5] [--methods NAME ...] [--override KEY VALUE ...]

configs/trajectory_balance_mixture.yaml with other sources of paths. Every method has the same network, the same guided
denoiser (the prior's, the network, and a learned multiple of the reward's gradient), the same grid and as many pairs of
network evaluations (prior's and posterior's, of one state) for its paths, the replay buffer's included.

- generated: the model's own paths (on-policy); log Z learned, or VarGrad
- inflated: a fifth of the paths with twice the variance
- noised: a fifth of the paths are noised data of the replay buffer (off-policy)
- back and forth: a fifth go half-way up from data of the buffer and down again, or all the way
- REINFORCE: the gradient of E[log r - log K_phi / K] by the score function, with the batch's mean as baseline; the same
  in expectation as VarGrad on-policy, but for the bound on residuals
- not tuned: the guided denoiser to begin with
- importance sampling from the prior, and `steer` with a tilt by the default schedule (rewards count as far as the
  denoised state is known) or a later one, without any training: as many paths as training has had

Samples are of the tuned model as it is; "corrected" are the same by their importance weights, and the particles of
`steer` with the tuned model as the proposal. Floors: draws from the posterior itself, and the exact model of the
posterior on the same grid, which no training can be expected to beat by much.

Means over seeds and their standard errors; modes found are the fewest of any seed. Writes
docs/tables/trajectory_balance.{json,md}; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reinforce import reinforce_loss

import rnejax as rj
from rnejax.config import FinetuneRun, load_config
from rnejax.runs import finetune
from rnejax.runs.finetuning import build_problem

NOT_TUNED = "guided by the reward's gradient, not tuned"
TRAINED: dict[str, dict[str, Any]] = {
    NOT_TUNED: {"sources": {"generated": 1.0}},
    "generated, log Z learned": {"sources": {"generated": 1.0}, "normalizer": "learned"},
    "generated, VarGrad": {"sources": {"generated": 1.0}},
    "generated and inflated, VarGrad": {"sources": {"generated": 0.8, "inflated": 0.2}},
    "generated and noised, VarGrad": {"sources": {"generated": 0.8, "noised": 0.2}},
    "generated, and back and forth": {"sources": {"generated": 0.8, "back_and_forth": 0.2}, "turn": 0.5},
    "generated, and all the way back and forth": {
        "sources": {"generated": 0.8, "back_and_forth": 0.2},
        "turn": 1.0,
    },
    "REINFORCE + KL": {"sources": {"generated": 1.0}},
}
UNTRAINED = ("importance sampling from the prior", "steer, default schedule", "steer, late schedule")
FLOORS = ("draws from the posterior", "exact model of the posterior")


def train(name: str, config: FinetuneRun, seed: int) -> dict[str, Any]:
    """One network by one method, and all that is said of it."""
    changes = {"seed": seed, **TRAINED[name]}
    config = config.model_copy(update=changes)
    budget = finetune.evaluations(config.model_copy(update={"sources": {"generated": 1.0}}), build_problem(config))
    problem = build_problem(config)
    settings = config.training
    spent = sum(finetune.evaluations(config, problem).values())
    # Renewals of the buffer cost what paths cost: fewer optimiser steps leave the sum as it is.
    steps = round(settings.num_steps * sum(budget.values()) / spent / settings.report_every) * settings.report_every
    config = config.model_copy(update={"training": settings.model_copy(update={"num_steps": steps})})
    problem.config = config
    started = time.perf_counter()
    model, learned = problem.posterior, None
    if name != NOT_TUNED:
        loss = reinforce_loss(config, problem) if name == "REINFORCE + KL" else None
        fitted = finetune.tune(config, problem, loss=loss)
        model = model.with_params(fitted.average.weights)
        learned = float(fitted.average.log_normalizer) if config.normalizer == "learned" else None
    seconds = time.perf_counter() - started
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)
    paths = finetune.sample_paths(keys[0], config, problem, model)
    noised = finetune.sample_paths(keys[1], config, problem, model, exact=True)
    found, _ = finetune.steer(keys[2], config, problem, model)
    return {
        "seconds": seconds,
        "optimiser_steps": 0 if name == NOT_TUNED else steps,
        "evaluations": {"training": 0} if name == NOT_TUNED else finetune.evaluations(config, problem),
        "log_normalizer_learned": learned,
        "tuned": finetune.describe(problem, paths, noised, None),
        "corrected": found,
    }


def importance_sampling(config: FinetuneRun, seed: int) -> dict[str, Any]:
    """The prior's own samples, weighted by r."""
    problem = build_problem(config)
    count = config.training.num_steps * config.training.batch_size
    size = min(count, 2**14)
    sample = jax.jit(lambda key: rj.sample(key, problem.prior, problem.times, num_samples=size, progress=False).x)
    keys = jax.random.split(jax.random.key(seed), count // size)
    x = np.concatenate([np.asarray(sample(key)) for key in keys])
    log_weights = np.asarray(jax.lax.map(problem.log_reward, x, batch_size=size), np.float64)
    weights = np.exp(log_weights)
    error = weights.std(ddof=1) / weights.mean() / np.sqrt(len(weights))
    return {
        "evaluations": {"paths": len(x) * (len(problem.times) - 1)},
        "log_normalizer": {"value": float(np.log(weights.mean())), "standard_error": float(error)},
        "effective_sample_share": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
        "weighted": problem.describe(x, log_weights, None),
    }


def late(t: float) -> float:
    """A schedule of the reward, on a process whose times end at 1e-3.

    Of a reward as steep as this one, what the prior's denoised state says early is misleading.
    """
    return min(1.0, ((1 - t) / (1 - 1e-3)) ** 8)


def steering(config: FinetuneRun, seed: int, schedule: Callable[[float], float] | None) -> dict[str, Any]:
    """The same target by `steer`, with the reward's gradient and no tuned model."""
    problem = build_problem(config)
    particles, together = config.num_particles or 1024, 50
    parts = max(1, config.training.num_steps * config.training.batch_size // (particles * together))
    target = rj.tilt(problem.prior, problem.log_reward, schedule=schedule)
    results = [
        rj.steer(
            jax.random.fold_in(jax.random.key(seed), i),
            target,
            problem.times,
            particles,
            num_groups=together,
            warn=False,
            progress=False,
        )
        for i in range(parts)
    ]
    groups = parts * together
    result = jax.tree.map(lambda *leaves: np.concatenate([np.atleast_1d(leaf) for leaf in leaves]), *results)
    x = result.particles.reshape(-1, 2)
    log_weights = (result.log_weights + result.log_normalizer[:, None]).astype(np.float64).ravel()
    values = result.log_normalizer.astype(np.float64)
    ones = [
        problem.describe(result.particles[i], result.log_weights[i].astype(np.float64), None) for i in range(together)
    ]
    ratios = np.exp(values)
    return {
        "evaluations": {"paths": groups * particles * (len(problem.times) - 1)},
        "log_normalizer": {
            "value": float(np.log(ratios.mean())),
            "standard_error": float(ratios.std(ddof=1) / ratios.mean() / np.sqrt(groups)),
        },
        "effective_sample_share": float(np.mean(result.info.ess[:, -1]) / particles),
        "weighted": problem.describe(x, log_weights, None),
        "one_group_total_variation": float(np.mean([one["total_variation"] for one in ones])),
    }


def floor(name: str, config: FinetuneRun, seed: int) -> dict[str, Any]:
    """Draws from the posterior, and its exact model on the same grid."""
    problem: Any = build_problem(config)
    key = jax.random.key(seed)
    if name == "draws from the posterior":
        x = np.asarray(problem.exact(key, config.num_samples))
        return {"tuned": problem.describe(x, None, None)}
    model = problem.modes.posterior.model(problem.prior.process, "x0", problem.prior.covariance)
    paths = finetune.sample_paths(key, config, problem, model)
    noised = finetune.sample_paths(jax.random.fold_in(key, 1), config, problem, model, exact=True)
    return {"tuned": finetune.describe(problem, paths, noised, None)}


def measure(name: str, config: FinetuneRun, seed: int) -> dict[str, Any]:
    if name in TRAINED:
        return train(name, config, seed)
    if name in FLOORS:
        return floor(name, config, seed)
    if name == UNTRAINED[0]:
        return importance_sampling(config, seed)
    return steering(config, seed, None if name == UNTRAINED[1] else late)


# --------------------------------------------------------------------------------------------------------------- table


def with_error(values: list[float], digits: int = 3) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if not np.all(np.isfinite(values)):
        return f"inf in {np.sum(~np.isfinite(values))} of {len(values)}"
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def rows_of(results: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [result[part] for result in results if part in result]


def line(name: str, results: list[dict[str, Any]], parts: list[dict[str, Any]], log_z: list[float]) -> str:
    total = [sum(result["evaluations"].values()) / 1e6 for result in results if "evaluations" in result]
    return (
        " | ".join(
            [
                f"| {name}",
                with_error([part["total_variation"] for part in parts]),
                with_error([part["kl_divergence"] for part in parts]),
                f"{min(part['modes_found'] for part in parts)} of {parts[0]['modes_expected']}",
                with_error(log_z),
                f"{np.mean(total):.0f}" if total else "",
            ]
        )
        + " |"
    )


def table(report: dict[str, Any]) -> str:
    settings = report["settings"]
    methods: dict[str, dict[str, Any]] = report["methods"]
    seeds = max((len(found) for found in methods.values()), default=0)
    out = [
        f"{seeds} seeds, {settings['steps']} steps of the grid, {settings['num_samples']} samples of every network; "
        "log Z = 0.",
        "",
        "| | mode weights, TV | KL (nats) | modes found | log Z (nats) | evaluations (millions) |",
        "|---|---|---|---|---|---|",
    ]
    second = [
        "| | lower bound (nats) | log Z as learned | importance sampling (nats) | upper bound (nats) | "
        "effective sample share | residual variance | steered with it: log Z | TV | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (*FLOORS, *TRAINED, *UNTRAINED):
        results = list(methods.get(name, {}).values())
        if not results:
            continue
        label = name if len(results) == seeds else f"{name} ({len(results)} seeds)"
        if name in UNTRAINED:
            log_z = [result["log_normalizer"]["value"] for result in results]
            out.append(line(label, results, rows_of(results, "weighted"), log_z))
            continue
        tuned = rows_of(results, "tuned")
        importance = [part.get("log_normalizer_importance", {}).get("value") for part in tuned]
        out.append(line(label, results, tuned, importance))
        if name in TRAINED:
            weighted = [part["weighted"] for part in tuned]
            out.append(line(f"{label}, corrected by weights", results, weighted, importance))
        if name == FLOORS[0]:
            continue

        def values(key: str, tuned: list[Any] = tuned) -> list[float]:
            return [part[key]["value"] if isinstance(part[key], dict) else part[key] for part in tuned]

        corrected = rows_of(results, "corrected")
        second.append(
            " | ".join(
                [
                    f"| {label}",
                    with_error(values("log_normalizer_lower_bound")),
                    with_error([result.get("log_normalizer_learned") for result in results]),
                    with_error(importance),
                    with_error(values("log_normalizer_upper_bound")),
                    with_error(values("effective_sample_share"), 2),
                    with_error(values("residual_variance"), 2),
                    with_error([part["log_normalizer"]["value"] for part in corrected]),
                    with_error([part["total_variation"] for part in corrected]),
                    with_error([result.get("seconds") for result in results], 0),
                ]
            )
            + " |"
        )
    return "\n".join([*out, "", *second]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=[*FLOORS, *UNTRAINED, *TRAINED])
    parser.add_argument("--override", nargs="+", default=[], help="keys and values of the configuration")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    pairs = zip(arguments.override[::2], arguments.override[1::2], strict=True)
    overrides = [word for key, value in pairs for word in (f"--{key}", value)]
    config: Any = load_config(FinetuneRun, "trajectory_balance_mixture", overrides)
    settings = {
        "steps": config.grid.num_steps,
        "num_steps": config.training.num_steps,
        "batch_size": config.training.batch_size,
        "num_samples": config.num_samples,
        "override": arguments.override,
    }
    path = arguments.output / "trajectory_balance.json"
    report: dict[str, Any] = {"settings": settings, "methods": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            report = stored
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for name in arguments.methods:
            found = report["methods"].setdefault(name, {})
            if str(seed) in found:
                continue
            found[str(seed)] = json.loads(json.dumps(measure(name, config, seed), default=lambda value: value.tolist()))
            path.write_text(json.dumps(report) + "\n")
            (arguments.output / "trajectory_balance.md").write_text(table(report))
            part = found[str(seed)].get("tuned", found[str(seed)].get("weighted"))
            print(seed, name, f"TV {part['total_variation']:.4f}", found[str(seed)].get("seconds"), flush=True)


if __name__ == "__main__":
    main()
