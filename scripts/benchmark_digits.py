"""The shipped digits model: bits per dimension, guidance, rewards. Writes docs/tables/digits.json and digits_*.md.

    python scripts/benchmark_digits.py [--parts likelihood closed_form guidance tilt tilt_strength] [--quick]

Every row states its network evaluations. What judges (``digits_judge``) is another classifier than what rewards.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.control import SteeringWarning
from rnejax.systems import GaussianMixture, digits

TABLES = Path(__file__).parent.parent / "docs" / "tables"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a hundredth of the work, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SteeringWarning)  # few particles are the subject here
    path = TABLES / ("digits_quick.json" if arguments.quick else "digits.json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.parts:
        start = time.time()
        rows = PARTS[part](jax.random.key(arguments.seed), arguments.quick)
        results[part] = {"rows": rows, "seconds": round(time.time() - start, 1), "seed": arguments.seed}
        TABLES.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(markdown(part, results[part]), flush=True)
    for part, result in results.items():
        path.with_name(f"{path.stem}_{part}.md").write_text(markdown(part, result))


# ---------------------------------------------------------------------------------------------------------- likelihood


def likelihood(key: jax.Array, quick: bool) -> list[dict[str, Any]]:
    """Test images, conditional on their class: RNE with one and several paths, and the probability flow."""
    model = rj.load_model("digits")
    test = digits.load("test")
    n = 10 if quick else 100
    images, labels = test.images[:n], test.labels[:n]
    key_data, key = jax.random.split(key)
    x = digits.dequantise(key_data, images)

    def row(name: str, log_density: np.ndarray, evaluations: float, seconds: float, **more: Any) -> dict[str, Any]:
        bits = np.asarray(digits.bits_per_dimension(log_density))
        return {
            "method": name,
            "bits_per_dimension": float(bits.mean()),
            "standard_error": float(bits.std(ddof=1) / np.sqrt(n)),
            "evaluations_per_image": evaluations,
            "seconds": round(seconds, 1),
            "t_min": float(model.process.t_min),
            **more,
        }

    rows = []
    for covariance in ("analytic", "euler"):
        chosen = model if covariance == "analytic" else model.with_covariance(covariance)
        wanted = [(50, 1)] if quick else [(50, 1), (200, 1), (50, 8)]
        if covariance == "analytic" and not quick:
            wanted.insert(2, (800, 1))  # where the grid hardly matters: what is left is no error of it
        for steps, paths in wanted:
            times = rj.time_grid(model.process, steps, "log_snr")  # where bits per dimension are decided
            start = time.time()
            densities = by_label(chosen, labels, lambda m, i, t=times, p=paths: rj.log_density(
                jax.random.fold_in(key, int(i[0])), m, x[i], t, p).log_density)  # fmt: skip
            name = f"RNE, {covariance}, {steps} steps, {paths} path{'s' * (paths > 1)}"
            rows.append(row(name, densities, steps * paths, time.time() - start))
            print(rows[-1], flush=True)
    start = time.time()
    times = rj.time_grid(model.process, 2)
    counts = []

    def flow(m: Any, i: np.ndarray) -> np.ndarray:
        result = rj.probability_flow_log_density(
            jax.random.fold_in(key, 10_000 + int(i[0])), m, x[i], times, divergence="hutchinson", rtol=1e-3, atol=1e-3
        )
        counts.append(float(np.mean(result.num_evaluations)))
        return result.log_density

    densities = by_label(model, labels, flow)
    rows.append(row("probability flow, Hutchinson divergence", densities, float(np.mean(counts)), time.time() - start))
    return rows


def by_label(model: Any, labels: np.ndarray, density: Callable[[Any, np.ndarray], Any]) -> np.ndarray:
    """Densities of images, each under its own class: one call per class, compiled once (classes are of equal size)."""
    out = np.zeros(len(labels))
    for label in range(digits.NUM_CLASSES):
        chosen = np.flatnonzero(labels == label)
        out[chosen] = np.asarray(density(model.with_condition(jnp.int32(label)), chosen))
    return out


# --------------------------------------------------------------------------------------------------------- closed form


def closed_form(key: jax.Array, quick: bool) -> list[dict[str, Any]]:
    """Two models of digits whose density is known: where RNE and the flow differ here, no network is to blame.

    Gaussian mixtures with one component per class, fitted to the training images: isotropic ones, for which the
    analytic covariance is all there is to know, and ones with the covariance of their class, whose spectrum is that of
    digits. Differences from the truth are paired, image by image.
    """
    process = rj.load_model("digits").process
    train = digits.load("train")
    key_data, key_points, key_table, key = jax.random.split(key, 4)
    x = np.asarray(digits.dequantise(key_data, train.images), np.float64).reshape(len(train.labels), -1)
    classes = [x[train.labels == label] for label in range(digits.NUM_CLASSES)]
    means = np.stack([members.mean(0) for members in classes])
    std = float(np.sqrt(np.mean([members.var(0).mean() for members in classes])))
    # The covariance of 400 images in 784 dimensions is singular: what is missing is as wide as a grey level.
    floor = digits.BIN_WIDTH**2 / 12 * np.eye(x.shape[1])
    covariances = [np.cov(members.T) + floor for members in classes]
    mixtures = {
        "isotropic components": GaussianMixture(means, std),
        "components with covariances": GaussianMixture(means, covariances=np.stack(covariances)),
    }
    n = 4 if quick else 50
    rows = []
    for name, mixture in mixtures.items():
        noised = mixture.noised(process.level(process.t_min))
        points = jax.vmap(noised.sample)(jax.random.split(key_points, n))
        truth = np.asarray(jax.lax.map(noised.log_prob, points, batch_size=10), np.float64)
        model = mixture.model(process, "x0")
        samples = jax.vmap(mixture.sample)(jax.random.split(key_table, 64 if quick else 512))
        methods: dict[str, Callable[[], tuple[Any, float]]] = {}
        for steps in (20,) if quick else (50, 200, 800):
            times = rj.time_grid(process, steps, "log_snr")
            table = rj.calibrate(key_table, model, times, data=samples)
            methods[f"RNE, analytic, {steps} steps, 1 path"] = lambda m=table, x=points, t=times, k=steps: (
                rj.log_density(key, m, x, t).log_density, k)  # fmt: skip

        def flow(m: Any = model, x: jax.Array = points) -> tuple[Any, float]:
            result = rj.probability_flow_log_density(
                key, m, x, rj.time_grid(process, 2), divergence="hutchinson", num_probes=4, rtol=1e-4, atol=1e-4
            )
            return result.log_density, float(np.mean(result.num_evaluations))

        methods["probability flow, Hutchinson divergence, 4 probes"] = flow
        for method, estimate in methods.items():
            start = time.time()
            log_density, evaluations = estimate()
            bits = np.asarray(digits.bits_per_dimension(np.asarray(log_density, np.float64)))
            excess = bits - np.asarray(digits.bits_per_dimension(truth))
            rows.append(
                {
                    "mixture of": name,
                    "method": method,
                    "bits_per_dimension": float(bits.mean()),
                    "error": float(excess.mean()),
                    "error_se": standard_error(excess),
                    "evaluations_per_image": evaluations,
                    "seconds": round(time.time() - start, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------ guidance


def guidance(key: jax.Array, quick: bool) -> list[dict[str, Any]]:
    """Classifier-free guidance without weights, and corrected; every class, judged by the judge."""
    model = rj.load_model("digits")
    judge = digits.load_classifier("judge")
    particles, steps = (4, 10) if quick else (16, 50)
    classes = range(2) if quick else range(digits.NUM_CLASSES)
    times = rj.time_grid(model.process, steps)
    rows = []
    for scale in (1.0, 2.0, 4.0):
        for name, threshold in (("uncorrected", 0.0), ("corrected", 0.5)):
            scores, correct, spreads, ess = [], [], [], []
            for label in classes:
                target = rj.guide(model, model.with_condition(jnp.int32(label)), scale)
                seed = jax.random.fold_in(key, label)
                result = rj.steer(seed, target, times, particles, ess_threshold=threshold, num_groups=2)
                x = result.particles.reshape(-1, *model.shape)
                if name == "corrected":
                    weights = np.asarray(jax.nn.softmax(result.log_weights, axis=-1)).ravel() / 2
                else:
                    weights = np.full(len(x), 1 / len(x))
                log_p = np.asarray(jax.lax.map(judge, x, batch_size=64))
                scores.append(weights @ log_p[:, label])
                correct.append(weights @ (log_p.argmax(1) == label))
                spreads.append(diversity(np.asarray(x), weights))
                ess.append(float(np.mean(np.asarray(result.info.ess)[..., -1])) / particles)
            rows.append(
                {
                    "scale": scale,
                    "samples": name,
                    "judge_accuracy": float(np.mean(correct)),
                    "judge_accuracy_se": standard_error(correct),
                    "judge_log_probability": float(np.mean(scores)),
                    "judge_log_probability_se": standard_error(scores),
                    "diversity": float(np.mean(spreads)),
                    "ess_fraction": float(np.mean(ess)),
                    "evaluations_per_particle": 2 * steps,
                }
            )
            print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------- tilt


def tilt(key: jax.Array, quick: bool) -> list[dict[str, Any]]:
    """The unconditional model tilted towards each class by the reward classifier, N = 1, 4, 16, 64, against best-of-N.

    Each run ends in one picture: a draw by weight from the N particles, or the best of N samples by the reward. Both
    cost N times the steps. Best-of-N maximises the reward, so beside the judge stands the diversity of the pictures.
    What the draw shows on average is computed from all N weights (less noise, the same law); errors are over runs.
    """
    model = rj.load_model("digits")
    reward_classifier, judge = digits.load_classifier("reward"), digits.load_classifier("judge")
    steps = 10 if quick else 50
    times = rj.time_grid(model.process, steps)
    sizes = (1, 4) if quick else (1, 4, 16, 64)
    classes = (3,) if quick else (3, 7)
    rows = []
    for n in sizes:
        runs = 4 if quick else {1: 64, 4: 64, 16: 32, 64: 16}[n]
        finals: dict[str, list[dict[str, Any]]] = {}
        for label in classes:
            reward = jax.tree_util.Partial(class_log_probability, reward_classifier, jnp.int32(label))
            seed = jax.random.fold_in(jax.random.fold_in(key, n), label)
            pool = rj.sample(seed, model, times, n * runs).x.reshape(runs, n, *model.shape)
            values = np.asarray(in_batches(reward, pool.reshape(-1, *model.shape))).reshape(runs, n)
            is_best = (np.arange(n) == values.argmax(1)[:, None]).astype(np.float64)
            finals.setdefault("best of N", []).append(describe(pool, is_best, label, reward, judge))
            for name, gradient in (("steer, reward at x0, black box", False), ("steer, reward at x0, gradient", True)):
                target = rj.tilt(model, reward, at="x0", gradient=gradient)
                result = rj.steer(seed, target, times, n, num_groups=runs)
                weights = np.asarray(jax.nn.softmax(result.log_weights, axis=-1), np.float64)
                finals.setdefault(name, []).append(describe(result.particles, weights, label, reward, judge))
        for name, parts in finals.items():
            row = {"N": n, "method": name, "runs": sum(len(part["reward"]) for part in parts)} | summarise(parts)
            row |= {
                "evaluations_per_picture": n * steps,
                "backward_passes_per_picture": n * steps if "gradient" in name else 0,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def tilt_strength(key: jax.Array, quick: bool) -> list[dict[str, Any]]:
    """p(x) P(class | x)^strength itself, by reweighting many samples, and what 16 and 64 particles make of it.

    The target of strength 1 is the class as the reward classifier sees it, ambiguous pictures included; who wants the
    reward as large as best-of-N makes it asks for more strength.
    """
    model = rj.load_model("digits")
    reward_classifier, judge = digits.load_classifier("reward"), digits.load_classifier("judge")
    steps = 10 if quick else 50
    times = rj.time_grid(model.process, steps)
    count, sizes = (64, {4: 4}) if quick else (2048, {16: 64, 64: 32})
    classes = (3,) if quick else (3, 7)
    pool = np.asarray(rj.sample(jax.random.fold_in(key, 0), model, times, count).x)
    log_p = np.asarray(in_batches(judge, pool), np.float64)
    log_rewards = np.asarray(in_batches(reward_classifier, pool), np.float64)
    rows = []
    for strength in (1.0, 4.0):
        parts = []
        for label in classes:
            weights = np.asarray(jax.nn.softmax(strength * log_rewards[:, label]), np.float64)
            values = {
                "reward": log_rewards[:, label],
                "judge_accuracy": (log_p.argmax(1) == label).astype(np.float64),
                "judge_log_probability": log_p[:, label],
            }
            found: dict[str, float] = {}
            for name, value in values.items():
                mean = weights @ value
                found |= {name: mean, f"{name}_se": float(np.sqrt(np.sum((weights * (value - mean)) ** 2)))}
            parts.append(found | {"diversity": diversity(pool, weights), "ess": float(1 / np.sum(weights**2))})
        names = [name for name in parts[0] if not name.endswith("_se")]
        row = {name: float(np.mean([part[name] for part in parts])) for name in names}
        errors = {f"{name}_se": [part[f"{name}_se"] for part in parts] for name in names if f"{name}_se" in parts[0]}
        row |= {name: float(np.sqrt(np.sum(np.square(each))) / len(each)) for name, each in errors.items()}
        ess = row.pop("ess")
        method = f"target, by reweighting {count} samples (ESS {ess:.0f})"
        rows.append({"strength": strength, "method": method} | row)
        print(rows[-1], flush=True)
    for n, runs in sizes.items():
        finals = []
        for label in classes:
            seed = jax.random.fold_in(jax.random.fold_in(key, n), label)
            reward = jax.tree_util.Partial(class_log_probability, reward_classifier, jnp.int32(label))
            target = rj.tilt(model, reward, at="x0", gradient=False, scale=4.0)
            result = rj.steer(seed, target, times, n, num_groups=runs)
            weights = np.asarray(jax.nn.softmax(result.log_weights, axis=-1), np.float64)
            finals.append(describe(result.particles, weights, label, reward, judge))
        rows.append({"strength": 4.0, "method": f"steer, {n} particles, one picture per run"} | summarise(finals))
        print(rows[-1], flush=True)
    return rows


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all runs of all classes, with their errors."""
    by_run = {field: np.concatenate([part[field] for part in parts]) for field in ("reward", "log_p", "correct")}
    return {
        "reward": float(by_run["reward"].mean()),
        "reward_se": standard_error(by_run["reward"]),
        "judge_accuracy": float(by_run["correct"].mean()),
        "judge_accuracy_se": standard_error(by_run["correct"]),
        "judge_log_probability": float(by_run["log_p"].mean()),
        "judge_log_probability_se": standard_error(by_run["log_p"]),
        "diversity": float(np.mean([part["diversity"] for part in parts])),
    }


def class_log_probability(classifier: Any, label: jax.Array, x: jax.Array) -> jax.Array:
    """log P(label | x) by a classifier, in nats."""
    return classifier(x)[label]


def describe(pictures: jax.Array, weights: np.ndarray, label: int, reward: Any, judge: Any) -> dict[str, Any]:
    """Of the picture that each run draws by its weights (runs, n): mean reward and judgement, and their diversity."""
    flat = pictures.reshape(-1, *pictures.shape[2:])
    log_p = np.asarray(in_batches(judge, flat), np.float64)
    rewards = np.asarray(in_batches(reward, flat), np.float64)

    def per_run(values: np.ndarray) -> np.ndarray:
        return np.sum(weights * values.reshape(weights.shape), axis=1)

    return {
        "reward": per_run(rewards),
        "log_p": per_run(log_p[:, label]),
        "correct": per_run(log_p.argmax(1) == label),
        "diversity": between_runs(np.asarray(pictures), weights),
    }


def in_batches(function: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(function, x, batch_size=64)


def between_runs(x: np.ndarray, weights: np.ndarray) -> float:
    """Root mean squared distance per pixel of the pictures of two different runs: E|a - b|^2, a and b independent.

    With m_r and s_r a run's mean and mean square, the mean over pairs of runs r != q of s_r + s_q - 2 m_r . m_q.
    """
    flat = x.reshape(*weights.shape, -1).astype(np.float64)
    means = np.einsum("rn,rnd->rd", weights, flat)
    squares = np.einsum("rn,rn->r", weights, np.mean(flat**2, axis=-1))
    runs, pixels = means.shape
    cross = (np.sum(means.sum(axis=0) ** 2) - np.sum(means**2)) / (runs * (runs - 1) * pixels)
    return float(np.sqrt(2 * (squares.mean() - cross)))


def diversity(x: np.ndarray, weights: np.ndarray) -> float:
    """Root mean squared distance per pixel of two independent draws by weight; copies add nothing."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    return float(np.sqrt(2 * weights @ np.mean((flat - weights @ flat) ** 2, axis=1)))


def standard_error(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def markdown(part: str, result: dict[str, Any]) -> str:
    return table(result["rows"], f"python scripts/benchmark_digits.py --parts {part} --seed {result['seed']}")


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Rows as Markdown, each value with its standard error in one cell, and the command that made them."""
    errors = {name for name in rows[0] if name.endswith(("_se", "standard_error"))}
    names = [name for name in rows[0] if name not in errors]

    def cell(row: dict[str, Any], name: str) -> str:
        value = row[name]
        if not isinstance(value, float):
            return str(value)
        error = row.get(f"{name}_se", row.get("standard_error") if name == "bits_per_dimension" else None)
        if error is None:
            return f"{value:.4g}"
        digits_shown = min(4, max(0, 1 - math.floor(math.log10(error)))) if error and math.isfinite(error) else 3
        return f"{value:.{digits_shown}f} ± {error:.{digits_shown}f}"

    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row, name) for name in names) + " |" for row in rows]
    lines += ["", f"`{command}`"]
    return "\n".join([*lines, ""])


PARTS = {
    "likelihood": likelihood,
    "closed_form": closed_form,
    "guidance": guidance,
    "tilt": tilt,
    "tilt_strength": tilt_strength,
}

if __name__ == "__main__":
    main()
