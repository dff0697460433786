"""Posteriors of the shipped digits under a classifier: fine-tuned once, or steered every time.

    rnejax finetune digits_posterior --output outputs/digits_posterior
    python scripts/benchmark_finetuned_digits.py outputs/digits_posterior/model.safetensors [--samples 20]
    python scripts/benchmark_finetuned_digits.py outputs/digits_even_odd/model.safetensors --config digits_even_odd

For each of the ten classes y, or for even and odd digits, samples of p(x) P(y | x) / Z(y), with the model that is told
no class and the classifier "reward", by

- untuned: the model as it is
- guided: its denoiser moved by the gradient of log P(y | x_0), ``--strength`` times the shift that tilts a Gaussian, no
  weights: what is done in practice
- tuned: the network of `rnejax finetune CONFIG`, whose condition is y
- REINFORCE: another one, tuned by the score function with as many paths, all generated (``--reinforce MODEL``, made
  by ``--train-reinforce``)
- steered: one of N particles of `rnejax.steer`, by weight, for N = 1, 8, 64
- tuned and steered: one of eight particles that the tuned network proposes

and, for comparison, the model when it is told the class (of ten), and real images (test against validation).

Every method has the same grid. "Evaluations" are those of a network for one sample. Judged by the classifier "judge",
which no method has seen: log-probability of the class and share of samples that it takes for it; the energy distance
(relative, squared) of its features between samples and test images of the class; and the root mean square distance of
two samples of a class, per pixel. Means over ten batches, and standard errors of these: one batch of each class, or
five of even and five of odd digits.

Writes docs/tables/finetuned_{digits,even_odd}.{json,md} and docs/pictures/finetuned_digits.png.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reinforce import reinforce_loss
from scipy.special import logsumexp

import rnejax as rj
from rnejax import plot
from rnejax.config import FinetuneRun, load_config
from rnejax.runs import finetune
from rnejax.runs.finetuning import build_problem
from rnejax.runs.steer import diversity
from rnejax.systems import digits
from rnejax.systems.metrics import relative_energy_distance
from rnejax.training import Guidance, Guided

Sampler = Callable[[Any, int, int], np.ndarray]
"""sampler(key, label, count) -> images"""


def steered(problem: Any, label: int, particles: int, key: Any, count: int, proposal: Any = None) -> np.ndarray:
    """One particle, by weight, of each of ``count`` groups."""
    condition = jnp.int32(label)
    options: dict[str, Any] = {}
    target = rj.tilt(problem.prior, jax.tree_util.Partial(_of_label, problem.classifier, condition))
    if proposal is not None:
        target = problem.target(condition)
        first = max(1, len(problem.times) // 5)
        options = {"proposal": proposal, "window": (float(problem.times[0]), float(problem.times[first]))}
    out = []
    for i in range(count):
        result = rj.steer(
            jax.random.fold_in(key, i), target, problem.times, particles, warn=False, progress=False, **options
        )
        chosen = jax.random.categorical(jax.random.fold_in(key, count + i), result.log_weights)
        out.append(np.asarray(result.particles[chosen]))
    return np.stack(out)


def _of_label(log_probabilities: Any, label: Any, x: Any) -> Any:
    return log_probabilities(x)[label]


def samplers(problem: Any, tuned: Any, reinforced: Any, strength: float) -> dict[str, tuple[float, Sampler]]:
    """Evaluations per sample, and the sampler, by name."""
    steps = len(problem.times) - 1

    def plain(model: Any) -> Sampler:
        sample = jax.jit(lambda key, model, count: rj.sample(key, model, problem.times, count).x, static_argnums=2)
        return lambda key, label, count: np.asarray(sample(key, model(label), count))

    def log_reward(x: Any, y: Any) -> Any:
        return problem.classifier(x)[y]

    # A network of zeros: with none, the prior's own would be told the class.
    guided = Guided(problem.prior, lambda params, x, t, y: 0.0 * x, log_reward, trust=1e6)
    guided_model = guided.model(Guidance(jnp.zeros(()), jnp.asarray(strength)), condition=jnp.zeros((), jnp.int32))
    told = problem.prior

    def with_guidance(label: int) -> Any:
        return guided_model.with_condition(jnp.int32(label))

    found: dict[str, tuple[float, Sampler]] = {
        "untuned": (steps, plain(lambda label: problem.prior)),
        f"guided ({strength:g})": (steps, plain(with_guidance)),
    }
    if problem.num_classes == 10:
        found["told the class"] = (steps, plain(lambda label: told.with_condition(jnp.int32(label))))
    found["tuned"] = (steps, plain(lambda label: tuned.with_condition(jnp.int32(label))))
    if reinforced is not None:
        found["REINFORCE"] = (steps, plain(lambda label: reinforced.with_condition(jnp.int32(label))))
    for n in (1, 8, 64):
        found[f"steered, N = {n}"] = (n * steps, lambda key, label, count, n=n: steered(problem, label, n, key, count))
    found["tuned and steered, N = 8"] = (
        16 * steps,
        lambda key, label, count: steered(problem, label, 8, key, count, tuned.with_condition(jnp.int32(label))),
    )
    return found


def judge(problem: Any, x: np.ndarray, label: int, real: np.ndarray) -> dict[str, float]:
    """What is said of samples of one class."""
    judging = digits.load_classifier("judge")

    def features(images: np.ndarray) -> np.ndarray:
        return np.asarray(jax.lax.map(lambda each: judging(each, features=True), jnp.asarray(images), batch_size=64))

    said = np.asarray(jax.lax.map(judging, jnp.asarray(x), batch_size=64))
    rewards = np.asarray(jax.lax.map(problem.classifier, jnp.asarray(x), batch_size=64))
    return {
        "log_reward": float(rewards[:, label].mean()),
        "log_judge": float(logsumexp(said[:, problem.groups[label]], axis=1).mean()),
        "as_wanted": float(np.isin(said.argmax(-1), problem.groups[label]).mean()),
        "distance": relative_energy_distance(features(x), features(real)),
        "diversity": diversity(x, np.full(len(x), 1 / len(x))),
    }


def real_images(split: str, group: tuple[int, ...]) -> np.ndarray:
    data = digits.load(split)
    return np.asarray(digits.dequantise(jax.random.key(0), data.images[np.isin(data.labels, group)]))


def encode(images: np.ndarray) -> str:
    """Images in [-1, 1] as grey levels, to be shown."""
    levels = np.clip(np.round(127.5 * (images + 1)), 0, 255).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 28, 28, 1) / 127.5 - 1


def table(report: dict[str, Any]) -> str:
    columns = {
        "log_reward": "log r",
        "log_judge": "judge: log P(class)",
        "as_wanted": "seen as the class",
        "distance": "feature distance",
        "diversity": "diversity",
    }
    lines = [
        f"Ten batches of {report['samples']} samples, {report['steps']} steps.",
        "",
        "| | evaluations per sample | " + " | ".join(columns.values()) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for name, row in report["rows"].items():
        cells = []
        for key in columns:
            values = [each[key] for each in row["classes"]]
            cells.append(f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}")
        lines.append(f"| {name} | {row['evaluations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tuned", help="model.safetensors of rnejax finetune digits_posterior")
    parser.add_argument("--reinforce", default=None, help="the model of REINFORCE")
    parser.add_argument("--train-reinforce", default=None, metavar="MODEL", help="make it, and stop")
    parser.add_argument("--config", choices=["digits_posterior", "digits_even_odd"], default="digits_posterior")
    parser.add_argument("--samples", type=int, default=20, help="of a batch")
    parser.add_argument("--strength", type=float, default=4.0)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    config: Any = load_config(FinetuneRun, arguments.config, [])
    problem: Any = build_problem(config)
    if arguments.train_reinforce:
        only_generated = config.model_copy(update={"sources": {"generated": 1.0}})
        problem.config = only_generated
        fitted = finetune.tune(only_generated, problem, loss=reinforce_loss(only_generated, problem))
        for report in fitted.metrics:
            print(report, flush=True)
        model = problem.prior.with_params(problem.merge(fitted.average.weights))
        name, network = rj.persistence.stored_network("digits")
        gate = {} if problem.above is None else {"classes_above": problem.above}
        rj.save_model(arguments.train_reinforce, model, network=(name, network | gate))
        return
    tuned = rj.load_model(arguments.tuned)
    reinforced = None if arguments.reinforce is None else rj.load_model(arguments.reinforce)
    methods = samplers(problem, tuned, reinforced, arguments.strength)
    name = {"digits_posterior": "finetuned_digits", "digits_even_odd": "finetuned_even_odd"}[arguments.config]
    path = arguments.output / f"{name}.json"
    # Ten, whatever there are of conditions: each class once, even and odd digits five times.
    batches = [condition for condition in range(problem.num_classes) for _ in range(10 // problem.num_classes)]
    report: dict[str, Any] = {"samples": arguments.samples, "steps": len(problem.times) - 1, "rows": {}}
    if path.exists() and (stored := json.loads(path.read_text()))["samples"] == arguments.samples:
        report = stored
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (evaluations, sampler) in methods.items():
        if name in report["rows"] or (arguments.methods is not None and name not in arguments.methods):
            continue
        rows, some = [], []
        for i, label in enumerate(batches):
            x = sampler(jax.random.fold_in(jax.random.key(7), i), label, arguments.samples)
            rows.append(judge(problem, x, label, real_images("test", problem.groups[label])))
            some.append(x[:2])
        shown = encode(np.stack(some))
        report["rows"][name] = {"evaluations": evaluations, "classes": rows, "shown": shown}
        path.write_text(json.dumps(report) + "\n")
        print(name, {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}, flush=True)
    real = []
    for i, label in enumerate(batches):
        parts = 10 // problem.num_classes
        some = real_images("validation", problem.groups[label])
        some = some[np.random.default_rng(0).permutation(len(some))[i % parts :: parts]]  # they are sorted by class
        real.append(judge(problem, some[: arguments.samples], label, real_images("test", problem.groups[label])))
    report["rows"]["real images"] = {"evaluations": "", "classes": real}
    path.write_text(json.dumps(report) + "\n")
    path.with_suffix(".md").write_text(table(report))
    if problem.num_classes < 10:
        return
    groups = {
        name.replace(" and ", "\nand ").replace(", N", ",\nN"): decode(row["shown"])
        for name, row in report["rows"].items()
        if "shown" in row
    }
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    figure = plot.compare_sheets(groups, columns=2, rows=10, row_labels=[str(label) for label in range(10)])
    plot.save(figure, arguments.pictures / "finetuned_digits.png")


if __name__ == "__main__":
    main()
