"""Is a reward tilt exact when the network is wrong? Brute force says.

The network here returns the score of a two-component mixture plus a smooth error of the same size, and generation
takes only a few steps, so that the model's law has little to do with the data. `tilt(exact=True)` promises the
*generated* law times e^r all the same: exp(log Z) and exp(log Z) times weighted means are unbiased, whatever the
proposal, the intermediate rewards and the times of resampling. The truth is computed by reweighting the model's own
samples, drawn by the chain below, which shares no code with the library. `tilt(exact=False)` has less variance and no
such promise.

    python scripts/benchmark_exactness.py [--output docs/tables] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rnejax as rj

BETA_MIN, BETA_MAX = 0.1, 20.0
MEANS, WEIGHTS, STD = np.array([[-1.0, 0.3], [0.9, -0.4]]), np.array([0.3, 0.7]), 0.4


def noise_level(t: Any, xp: Any) -> tuple[Any, Any]:
    """alpha and sigma of the variance-preserving process with linear beta."""
    log_alpha = -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN
    return xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))


def wrong_score(x: Any, t: Any, xp: Any = jax.numpy) -> Any:
    """The score of the noised mixture at one point or many, (..., 2), plus an error that is smooth and not small."""
    alpha, sigma = noise_level(t, xp)
    variance = (alpha * STD) ** 2 + sigma**2
    residuals = x[..., None, :] - alpha * MEANS
    logits = xp.log(WEIGHTS) - 0.5 * xp.sum(residuals**2, -1) / variance
    weights = xp.exp(logits - xp.max(logits, -1, keepdims=True))
    weights = weights / xp.sum(weights, -1, keepdims=True)
    score = -xp.sum(weights[..., None] * residuals, -2) / variance
    error = xp.stack([xp.sin(2 * x[..., 1] + 1), xp.cos(1.5 * x[..., 0]) - 0.3], -1)
    return score + alpha * error


def reward(x: Any) -> Any:
    """r(x), at one point or many."""
    return -0.7 * (x[..., 0] - 1.2) ** 2 - 0.3 * (x[..., 1] - 0.5) ** 2


STATISTICS = {"1": lambda x: 1.0 + 0 * x[..., 0], "x1": lambda x: x[..., 0], "x2^2": lambda x: x[..., 1] ** 2}


def brute_force(seed: int, times: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """E[e^r f] of every statistic f under the generated law and its standard error, from independent samples.

    The chain is that of the model: x ~ N(0, I) at t_max, then x_s ~ N((x_t + v score) / a, v I), whose mean is
    Tweedie's formula and whose covariance is that of the unit Gaussian reference, V_s v / V_t with V_s = V_t = 1.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_samples, 2))
    for t, s in zip(times[:0:-1], times[-2::-1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = noise_level(t, np), noise_level(s, np)
        a = alpha_t / alpha_s
        v = sigma_t**2 - (a * sigma_s) ** 2
        x = (x + v * wrong_score(x, t, np)) / a + np.sqrt(v) * rng.standard_normal(x.shape)
    values = np.stack([np.exp(reward(x)) * f(x) for f in STATISTICS.values()])
    return values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(num_samples)


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    exact: bool
    gradient: bool
    ess_threshold: float
    at: str = "x"


SETTINGS = (
    *(Setting(True, gradient, threshold) for gradient in (True, False) for threshold in (0.0, 0.5, 1.01)),
    Setting(True, True, 0.5, at="x0"),
    *(Setting(False, True, threshold) for threshold in (0.0, 0.5, 1.01)),
)


def process() -> rj.processes.VariancePreserving:
    return rj.processes.VariancePreserving(beta_min=BETA_MIN, beta_max=BETA_MAX)


def estimates(key: Any, setting: Setting, times: np.ndarray, num_particles: int, num_groups: int) -> np.ndarray:
    """exp(log Z) times the weighted mean of every statistic, one per independent run: (statistics, num_groups)."""
    model = rj.DiffusionModel(process(), wrong_score, shape=(2,))
    target = rj.tilt(model, reward, exact=setting.exact, gradient=setting.gradient, at=setting.at)
    result = rj.steer(
        key, target, times, num_particles, setting.ess_threshold, num_groups=num_groups, warn=False, progress=False
    )
    log_weights = np.asarray(result.log_weights, np.float64) + np.asarray(result.log_normalizer, np.float64)[:, None]
    x = np.asarray(result.particles, np.float64)
    return np.stack([(np.exp(log_weights) * f(x)).mean(axis=1) for f in STATISTICS.values()])


def z_scores(values: np.ndarray, truth: np.ndarray, truth_error: np.ndarray) -> np.ndarray:
    """Distance of the mean over runs from the truth, in standard errors of their difference: (statistics,)."""
    error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    return (values.mean(axis=1) - truth) / np.hypot(error, truth_error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/tables"), help="folder of exactness.md and .json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer samples: whether it runs, not what it says")
    arguments = parser.parse_args()
    num_steps, num_particles, num_groups = 8, 256, 40 if arguments.quick else 200
    num_samples = 10**5 if arguments.quick else 4 * 10**6

    begin = time.perf_counter()
    times = rj.time_grid(process(), num_steps)
    truth, truth_error = brute_force(arguments.seed, times, num_samples)
    rows = []
    for i, setting in enumerate(SETTINGS):
        key = jax.random.fold_in(jax.random.key(arguments.seed), i)
        values = estimates(key, setting, times, num_particles, num_groups)
        z = z_scores(values, truth, truth_error)
        relative = values[0] / truth[0]
        rows.append({**vars(setting), "z": z.tolist(), "mean": relative.mean(), "sd": relative.std(ddof=1)})
        print(markdown_row(rows[-1]), flush=True)
    report = {
        "num_steps": num_steps,
        "num_particles": num_particles,
        "num_groups": num_groups,
        "num_samples": num_samples,
        "seed": arguments.seed,
        "truth": truth.tolist(),
        "truth_error": truth_error.tolist(),
        "rows": rows,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    text = markdown(report)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "exactness.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "exactness.md").write_text(text)


def markdown(report: dict[str, Any]) -> str:
    names = " | ".join(f"z of Z E[{name}]" if name != "1" else "z of Z" for name in STATISTICS)
    lines = [
        f"Reward tilt of a model with a wrong score, {report['num_steps']} steps: {report['num_groups']} independent "
        f"runs of {report['num_particles']} particles each, against {report['num_samples']:,} samples of the model "
        f"reweighted by e^r. Z = {report['truth'][0]:.5f} ± {report['truth_error'][0]:.5f}. |z| < 4 where unbiased.",
        "",
        f"| scheme | gradient | reward at | ESS threshold | {names} | Z / truth: mean | sd of a run |",
        "|---|---|---|---|" + "---|" * (len(STATISTICS) + 2),
        *(markdown_row(row) for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


def markdown_row(row: dict[str, Any]) -> str:
    cells = ["exact" if row["exact"] else "low variance", "yes" if row["gradient"] else "no", row["at"]]
    cells += [f"{row['ess_threshold']:g}", *(f"{z:+.1f}" for z in row["z"]), f"{row['mean']:.4f}", f"{row['sd']:.3f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
