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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.covariance import Analytic
from rnejax.systems.mixture import GaussianMixture, many_modes, random_mixture

BETA = 2.0
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
PROCESSES: dict[str, Any] = {
    "VP": rj.processes.VariancePreserving,
    "VE": rj.processes.VarianceExploding,
    "flow": rj.processes.RectifiedFlow,
}


@dataclass(frozen=True)
class Problem:
    """A target, and what is known about it.

    Attributes:
      name, process: as printed.
      target: what steer gets.
      times: the grid.
      log_normalizer: the truth, in nats.
      modes: a mixture whose components are the modes, with their true weights and as many exact samples as one likes.
      mean: the true mean of the target.
    """

    name: str
    process: str
    target: Any
    times: np.ndarray
    log_normalizer: float
    modes: tuple[GaussianMixture, np.ndarray] | None = None
    mean: np.ndarray | None = None


# ---------------------------------------------------------------------------------------------------------- problems


@lru_cache
def eight_modes(dimension: int) -> GaussianMixture:
    """Eight separated modes of uneven weights 1 : 2 : ... : 8."""
    means = random_mixture(jax.random.key(8), 8, dimension, std=1.0).means
    return GaussianMixture(means, std=0.3, weights=np.arange(1, 9))


def anneal(
    mixture: GaussianMixture, name: str, process: str, num_steps: int, covariance: str, beta: Any = BETA
) -> Problem:
    """p^beta, with beta a number or a function of time that ends at a number."""
    noising = PROCESSES[process](data_std=mixture.std)
    model, times = tabulated(mixture, noising, num_steps, covariance)
    final = float(beta(times[0])) if callable(beta) else float(beta)
    at_end, log_normalizer, weights = truth_of_power(mixture, noising, final)
    return Problem(name, process, rj.temper(model, beta), times, log_normalizer, (at_end, weights))


def tabulated(mixture: GaussianMixture, process: Any, num_steps: int, covariance: str) -> tuple[Any, np.ndarray]:
    """The exact model on a grid, with the analytic covariance, or the reference's as a table of ones (one program)."""
    model, times = calibrated(mixture, process, num_steps)
    if covariance == "analytic":
        return model, times
    return model.with_covariance(Analytic(model.covariance.log_snr, jnp.ones_like(model.covariance.ratio))), times


@lru_cache
def calibrated(mixture: GaussianMixture, process: Any, num_steps: int) -> tuple[Any, np.ndarray]:
    times = rj.time_grid(process, num_steps)
    data = draw(mixture, jax.random.split(jax.random.key(1), 4096))
    return rj.calibrate(jax.random.key(2), mixture.model(process), times, data), times


@lru_cache
def truth_of_power(mixture: GaussianMixture, process: Any, beta: float) -> tuple[GaussianMixture, float, np.ndarray]:
    """The law at the grid's end, log of the integral of its power, and the share of each mode in that."""
    mixture = mixture.noised(process.level(process.t_min))
    x, log_weights = draw_power(mixture, jax.random.key(3), beta)
    weights = np.asarray(mode_weights(mixture, x[None], log_weights[None])[0], np.float64)
    if beta == int(beta) and mixture.num_components**beta < 10**4:
        return mixture, mixture.log_normalizer(int(beta)), weights
    return mixture, float(rj.smc.log_mean_exp(log_weights)), weights


@jax.jit
def draw(mixture: GaussianMixture, keys: Any) -> Any:
    return jax.vmap(mixture.sample)(keys)


@partial(jax.jit, static_argnames=("beta", "num_samples"))
def draw_power(mixture: GaussianMixture, key: Any, beta: float, num_samples: int = 400_000) -> Any:
    return mixture.sample_power(key, beta, num_samples)


@jax.jit
def mode_weights(mixture: GaussianMixture, x: Any, log_weights: Any) -> Any:
    """Of every group."""
    return jax.vmap(mixture.mode_weights)(x, log_weights)


@lru_cache
def plane_mixtures() -> tuple[GaussianMixture, GaussianMixture]:
    first = GaussianMixture([[-1.0, 0.0], [1.0, 0.6], [0.2, -1.0]], std=[0.35, 0.3, 0.4], weights=[3, 4, 3])
    second = GaussianMixture([[-0.8, 0.4], [0.9, 0.2]], std=[0.4, 0.35], weights=[1, 2])
    return first, second


def quadrature(
    log_density: Callable[[Any], Any], half_width: float = 5.0, points: int = 1001
) -> tuple[float, np.ndarray]:
    """log of the integral over a square, and the mean, of exp(log_density); spectrally accurate for smooth decay."""
    axis = np.linspace(-half_width, half_width, points)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    values = np.asarray(jax.vmap(log_density)(jnp.asarray(grid, float)), np.float64)
    weights = np.exp(values - values.max())
    cell = (axis[1] - axis[0]) ** 2
    return math.log(weights.sum() * cell) + values.max(), weights @ grid / weights.sum()


def pull(x: Any) -> Any:
    """A quadratic reward."""
    return -2.0 * jnp.sum((x - jnp.array([0.8, -0.2])) ** 2)


def plane_cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name: the target made of two models, and its log-density made of theirs."""
    return {
        "product": (lambda a, b: rj.product([a, b]), lambda p, q, r: p + q),
        "guidance, scale 2": (lambda a, b: rj.guide(a, b, 2.0), lambda p, q, r: 2 * q - p),
        "quadratic reward, exact": (lambda a, b: rj.tilt(a, pull), lambda p, q, r: p + r),
        "quadratic reward, low variance": (lambda a, b: rj.tilt(a, pull, exact=False), lambda p, q, r: p + r),
        "p^1.5 q^0.5 e^r": (
            lambda a, b: rj.tilt(rj.product([a, b], [1.5, 0.5]), pull, exact=False),
            lambda p, q, r: 1.5 * p + 0.5 * q + r,
        ),
        "(p^-0.5 q^1.5)^1.3 e^r": (
            lambda a, b: rj.tilt(rj.temper(rj.guide(a, b, 1.5), 1.3), pull, exact=False),
            lambda p, q, r: 1.3 * (1.5 * q - 0.5 * p) + r,
        ),
    }


def plane_problem(name: str, process: str, num_steps: int) -> Problem:
    """Products, guidance, tilts and all of them together in two dimensions, where quadrature knows the answers."""
    first, second = plane_mixtures()
    noising = PROCESSES[process](data_std=first.std)
    (a, times), (b, _) = (tabulated(mixture, noising, num_steps, "analytic") for mixture in (first, second))
    p, q = (mixture.noised(noising.level(times[0])).log_prob for mixture in (first, second))
    make_target, log_density = plane_cases()[name]
    log_normalizer, mean = quadrature(lambda x: log_density(p(x), q(x), pull(x)))
    return Problem(name, process, make_target(a, b), times, log_normalizer, mean=mean)


def reward_problem(scale: float, process: str, num_steps: int, coefficient: float) -> Problem:
    """One of the models in two dimensions, tilted by the quadratic reward, mild or steep, in the exact scheme."""
    mixture, _ = plane_mixtures()
    noising = PROCESSES[process](data_std=mixture.std)
    model, times = tabulated(mixture, noising, num_steps, "analytic")
    p = mixture.noised(noising.level(times[0])).log_prob
    log_normalizer, mean = quadrature(lambda x: p(x) + scale * pull(x))
    target = rj.tilt(model, pull, scale=scale, gradient=coefficient > 0)
    return Problem(f"reward times {scale:g}", process, target, times, log_normalizer, mean=mean)


def observation_problem(noise_std: float, process: str, num_steps: int, coefficient: float) -> Problem:
    """Half of eight coordinates observed with noise: a reward at predicted x_0, and evidence in closed form."""
    means = 0.7 * np.random.default_rng(0).normal(size=(8, 8))
    mixture, half = GaussianMixture(means, 0.3), 4
    model, times = tabulated(mixture, PROCESSES[process](data_std=0.8), num_steps, "analytic")
    y = means[2, :half] + 0.1
    noised = mixture.noised(model.process.level(times[0]))
    variance = noise_std**2 + float(noised.variances[0, 0])
    squares = np.sum((y - np.asarray(noised.means, np.float64)[:, :half]) ** 2, axis=1) / variance
    log_evidence = np.logaddexp.reduce(-0.5 * squares) - math.log(8) - half / 2 * math.log(2 * math.pi * variance)
    target = rj.observe(model, lambda x: x[:half], y, noise_std)
    if coefficient == 0:
        target = replace(target, rewards=tuple(replace(reward, gradient=False) for reward in target.rewards))
    return Problem(f"noise {noise_std:g}", process, target, times, float(log_evidence))


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


def growing(t: Any) -> Any:
    """1 at pure noise, 2 at the data's end (to 1e-4, the grid's own noise level)."""
    process = PROCESSES["VP"]()
    return 1 + float(process.alpha(t) / process.alpha(process.t_min)) ** 2


@lru_cache
def scaled_many_modes() -> GaussianMixture:
    """GMM40 in units of 40, so that the variance-preserving process sees data of size 1."""
    mixture = many_modes(jax.random.key(40))
    return GaussianMixture(mixture.means / 40, std=float(jnp.sqrt(mixture.variances[0, 0])) / 40)


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
