"""Inference-time control on mixtures with exact scores, against closed forms, quadrature and importance sampling.

Which proposal, how many steps: the error of log Z, the total variation between the mode weights and the true ones, and
the number of resamplings, for annealing (10-D, 8 modes, beta = 2; 40-D; the 2-D GMM40), products, guidance, tilts, a
composition of all of them, and scheduled exponents. All targets are those at t_min, the noise level that a grid ends
with. Standard errors are over independent groups of particles; "floor" is the total variation of as many exact samples.

    python scripts/benchmark_control.py [--output docs/tables] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from control_problems import (
    PROCESSES,
    Problem,
    anneal,
    eight_modes,
    growing,
    mode_weights,
    observation_problem,
    plane_cases,
    plane_problem,
    reward_problem,
    scaled_many_modes,
)

import rnejax as rj

PROPOSALS: dict[str, Any] = {
    "(1, 0)": (1.0, 0.0),
    "symmetric": "symmetric",
    "leading order": rj.control.Drift(None, matched=False),
    "Feynman-Kac": "feynman_kac",
}
REWARD_COEFFICIENTS = (0.0, 0.25, 0.5, 1.0)
TRUSTS = (0.1, 1.0)
GRADIENTS = {
    **{f"gradient times {c:g}": rj.control.Drift(reward_coefficient=c, trust=math.inf) for c in REWARD_COEFFICIENTS},
    **{f"gradient times 0.5, trust {c:g}": rj.control.Drift(trust=c) for c in TRUSTS},
}
PROPOSALS |= GRADIENTS


# ------------------------------------------------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Run:
    """One row of a table. The problem is made when it is needed; the rest says which row it is."""

    section: str
    make: Callable[[], Problem]
    name: str
    process: str
    steps: int
    proposal: str
    covariance: str
    particles: int
    groups: int

    def is_row(self, row: dict[str, Any]) -> bool:
        shared = ("process", "steps", "proposal", "covariance", "particles", "groups")
        return row["problem"] == self.name and all(row[key] == getattr(self, key) for key in shared)


def measure(planned: Run, seed: int) -> dict[str, Any]:
    """One row: errors over independent groups."""
    problem, num_particles, num_groups = planned.make(), planned.particles, planned.groups
    result = rj.steer(
        jax.random.key(seed),
        problem.target,
        problem.times,
        num_particles,
        proposal=PROPOSALS[planned.proposal],
        num_groups=num_groups,
        warn=False,
        progress=False,
    )
    errors = np.asarray(result.log_normalizer, np.float64) - problem.log_normalizer
    row = {
        "problem": problem.name,
        "process": problem.process,
        "steps": len(problem.times) - 1,
        "proposal": planned.proposal,
        "covariance": planned.covariance,
        "particles": num_particles,
        "groups": num_groups,
        "error": float(errors.mean()),
        "sd": float(errors.std(ddof=1)),
        "standard_error": float(errors.std(ddof=1) / math.sqrt(num_groups)),
        "resamplings": float(np.asarray(result.info.resampled).sum(axis=-1).mean()),
    }
    if problem.modes is not None:
        mixture, weights = problem.modes
        shares = np.asarray(mode_weights(mixture, result.particles, result.log_weights))
        row["tv"] = float(total_variation(shares, weights).mean())
        rng = np.random.default_rng(seed)
        exact = rng.multinomial(num_particles, weights / weights.sum(), size=1000) / num_particles
        row["tv_floor"] = float(total_variation(exact, weights).mean())
    if problem.mean is not None:
        mean, mean_error = rj.weighted_mean(lambda x: x, result)
        row["mean_error"] = float(np.abs(np.asarray(mean) - problem.mean).max())
        row["mean_standard_error"] = float(np.max(mean_error))
    return row


def total_variation(shares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return 0.5 * np.abs(shares - weights).sum(axis=-1)


def experiments(quick: bool) -> Iterator[Run]:
    """Everything, in the order of the tables."""
    groups, particles = (4, 256) if quick else (16, 1024)

    section = "Annealing: 10-D, 8 modes, beta = 2"
    every, some, once = (25, 50, 100, 200, 500), (50, 200), (200,)
    wanted = {
        ("symmetric", "analytic"): {"VP": every, "VE": some, "flow": some},
        ("symmetric", "reference"): {"VP": every, "VE": some, "flow": some},
        ("leading order", "analytic"): {"VP": every, "VE": some, "flow": some},
        ("(1, 0)", "analytic"): {"VP": every, "VE": once, "flow": once},
        ("(1, 0)", "reference"): {"VP": every, "VE": once, "flow": once},
        ("Feynman-Kac", "none"): {"VP": every},
    }
    for process in ("VP",) if quick else PROCESSES:
        for (proposal, covariance), by_process in wanted.items():
            for steps in (25, 50) if quick else by_process.get(process, ()):
                make = partial(anneal, eight_modes(10), "anneal", process, steps, covariance)
                yield Run(section, make, "anneal", process, steps, proposal, covariance, particles, groups)

    section = "Scheduled exponents: the same target by another path"
    for name, beta in {"beta = 2": 2.0, "beta(t) = 1 + alpha(t)^2": growing}.items():
        make = partial(anneal, eight_modes(10), name, "VP", 50, "analytic", beta)
        yield Run(section, make, name, "VP", 50, "symmetric", "analytic", particles, groups)

    section = "Two dimensions: products, guidance, rewards, compositions"
    for name in plane_cases():
        for proposal in ("symmetric", "(1, 0)") if name == "product" else ("symmetric",):
            for steps in (50,) if quick else (50, 200):
                make = partial(plane_problem, name, "VP", steps)
                yield Run(section, make, name, "VP", steps, proposal, "analytic", particles, groups)
    if quick:
        return

    section = "Rewards: how far the exact scheme follows the gradient"
    for scale in (1.0, 2.0, 4.0):
        for steps in (25, 50, 200):
            for proposal, drift in GRADIENTS.items():
                make = partial(reward_problem, scale, "VP", steps, drift.reward_coefficient)
                name = f"reward times {scale:g}"
                yield Run(section, make, name, "VP", steps, proposal, "analytic", 256, 64)

    for process in ("VE", "flow"):
        for steps in (50, 200):
            make = partial(reward_problem, 1.0, process, steps, 0.5)
            proposal = "gradient times 0.5, trust 1"
            yield Run(section, make, "reward times 1", process, steps, proposal, "analytic", 256, 64)

    section = "Observations: how far the exact scheme follows the gradient"
    for noise_std in (0.3, 0.05):
        for steps in (50, 200):
            for proposal, drift in GRADIENTS.items():
                make = partial(observation_problem, noise_std, "VP", steps, drift.reward_coefficient)
                name = f"noise {noise_std:g}"
                yield Run(section, make, name, "VP", steps, proposal, "analytic", 128, 64)

    section = "Annealing: 40-D, 8 modes, beta = 2"
    for steps, count in ((200, 1024), (500, 1024), (200, 4096)):
        make = partial(anneal, eight_modes(40), "anneal", "VP", steps, "analytic")
        yield Run(section, make, "anneal", "VP", steps, "symmetric", "analytic", count, 8)

    section = "Annealing: GMM40 (2-D, 40 modes), beta = 8/3"
    for proposal, covariance in (("symmetric", "analytic"), ("(1, 0)", "analytic"), ("Feynman-Kac", "none")):
        make = partial(anneal, scaled_many_modes(), "anneal", "VP", 200, covariance, 8 / 3)
        yield Run(section, make, "anneal", "VP", 200, proposal, covariance, 2000, 8)


# ----------------------------------------------------------------------------------------------------------- output


OPTIONAL = ("tv", "mean_error")
COLUMNS = ("problem", "process", "steps", "proposal", "covariance", "particles")


def markdown(sections: dict[str, list[dict[str, Any]]]) -> str:
    blocks = []
    for section, rows in sections.items():
        optional = [name for name in OPTIONAL if name in rows[0]]
        titles = {"tv": "mode-weight TV (floor)", "mean_error": "largest error of the mean"}
        head = [*COLUMNS, "log Z error (± s.e.)", "sd", *(titles[name] for name in optional), "resamplings"]
        lines = [f"### {section}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cells(row, optional)) + " |" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def cells(row: dict[str, Any], optional: list[str]) -> list[str]:
    out = [str(row[name]) for name in COLUMNS]
    out += [f"{row['error']:+.3f} ± {row['standard_error']:.3f}", f"{row['sd']:.3f}"]
    written = {
        "tv": lambda: f"{row['tv']:.3f} ({row['tv_floor']:.3f})",
        "mean_error": lambda: f"{row['mean_error']:.4f} ± {row['mean_standard_error']:.4f}",
    }
    return [*out, *(written[name]() for name in optional), f"{row['resamplings']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("docs/tables"), help="folder of control.md and control.json"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the rows that control.json has")
    parser.add_argument("--only", default="", help="a part of a section's title: run that section alone")
    parser.add_argument(
        "--quick", action="store_true", help="few particles and steps: whether it runs, not what it says"
    )
    arguments = parser.parse_args()

    sections: dict[str, list[dict[str, Any]]] = {}
    path = arguments.output / "control.json"
    if arguments.resume and path.exists():
        sections = json.loads(path.read_text())["sections"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    plan = list(experiments(arguments.quick))
    for planned in plan:
        rows = sections.setdefault(planned.section, [])
        if arguments.only not in planned.section or any(planned.is_row(row) for row in rows):
            continue
        row = measure(planned, arguments.seed)
        rows.append(row)
        print(planned.section, *cells(row, [name for name in OPTIONAL if name in row]), sep="  ", flush=True)
        # Written after every row: what is finished survives an interruption, and --resume goes on from there.
        report = {"seed": arguments.seed, "sections": {title: found for title, found in sections.items() if found}}
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report["sections"]))
    print("\n" + markdown({title: found for title, found in sections.items() if found}))


if __name__ == "__main__":
    main()
