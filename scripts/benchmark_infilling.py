"""The middle of sentences, by a token model that is tuned, steered, or neither.

    rnejax finetune verses_middle --output outputs/verses_middle
    python scripts/benchmark_infilling.py outputs/verses_middle/model.safetensors [--sentences 200]

Test sentences of the King James text, of which eight tokens after the first twelve are missing. The posterior is what
the shipped token model says after the left side, times the likelihood of the right side under an autoregressive model.

- left side only: the prior, which knows nothing of what follows
- both sides, untuned: the token model's own way to fill in
- tuned: the network of `rnejax finetune verses_middle`, which starts as that
- steered: one of N particles of the prior, by weight (completions of what is still masked are rewarded)
- both sides, or tuned, and steered: one of N that this network proposes for the same posterior
- what was written

"Evaluations" are those of the token model for one sample. Sentences differ much more than methods do, so that rewards
are given against those of the untuned model with both sides, sentence by sentence. The bound on log Z is the mean of
log r - log q/p over the model's own paths, q being the model and p the prior: it is as high as log Z where the model is
the posterior. By another autoregressive model, which no method has seen: nats per token of the middle after the left
side, and of the right side after both; BLEU of the words of the middle against what was written (sacrebleu). Standard
errors over sentences. Writes docs/tables/infilling.{json,md}; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.config import FinetuneRun, load_config
from rnejax.runs.finetuning import build_problem
from rnejax.runs.finetuning.infilling import bleu, junctions, show_gap
from rnejax.runs.finetuning.problem import under
from rnejax.training import trajectory_balance_residual

UNTUNED = "both sides, untuned"

Sampler = Callable[[Any, np.ndarray], np.ndarray]
"""sampler(key, sentences) -> middles, one of each"""


def plain(model: rj.DiffusionModel, times: np.ndarray) -> Sampler:
    """One sample of every sentence's gap."""
    one = jax.jit(jax.vmap(lambda key, sentence: rj.sample(key, model.with_condition(sentence), times, 1).x[0]))

    def sampler(key: Any, sentences: np.ndarray) -> np.ndarray:
        keys = jax.random.split(key, len(sentences))
        parts = [one(keys[i : i + 50], jnp.asarray(sentences[i : i + 50])) for i in range(0, len(sentences), 50)]
        return np.concatenate([np.asarray(part) for part in parts])

    return sampler


def steered(problem: Any, model: Any, particles: int) -> Sampler:
    """One particle of each sentence's group, by weight."""
    times = problem.times
    first = max(1, len(times) // 4)

    def one(key: Any, sentence: Any) -> Any:
        key_run, key_choose = jax.random.split(key)
        options: dict[str, Any] = {}
        target = problem.target(sentence)
        if model is None:
            reward = target.rewards[0].data
            target = rj.tilt(problem.prior.with_condition(sentence), reward, gradient=False)
        else:
            options = {
                "proposal": model.with_condition(sentence),
                "window": (float(times[0]), float(times[first])),
            }
        result = rj.steer(key_run, target, times, particles, warn=False, progress=False, **options)
        chosen = jax.random.categorical(key_choose, result.log_weights)
        return result.particles[chosen]

    compiled = jax.jit(one)

    def sampler(key: Any, sentences: np.ndarray) -> np.ndarray:
        keys = jax.random.split(key, len(sentences))
        return np.stack([np.asarray(compiled(*pair)) for pair in zip(keys, jnp.asarray(sentences), strict=True)])

    return sampler


def bound(problem: Any, model: Any, sentences: np.ndarray, paths: int = 16) -> list[float]:
    """Of log Z, for each sentence: the mean of log r - log q/p over paths of the model, in nats."""

    @jax.jit
    def one(key: Any, sentence: Any) -> Any:
        found = trajectory_balance_residual(
            key,
            model.with_condition(sentence),
            problem.prior.with_condition(sentence),
            problem.times,
            jax.tree_util.Partial(under, problem.log_reward, sentence),
            num_paths=paths,
        )
        return jnp.mean(found.log_reward - found.log_ratio)

    keys = jax.random.split(jax.random.key(4), len(sentences))
    return [float(one(*pair)) for pair in zip(keys, jnp.asarray(sentences), strict=True)]


def judge(x: np.ndarray, sentences: np.ndarray, left: int, log_reward: Any) -> dict[str, Any]:
    """Means over sentences, and their errors where sentences count for themselves."""
    rows = [junctions(x[i : i + 1], sentences[i : i + 1], left) for i in range(len(x))]
    rewards = np.asarray(
        jax.lax.map(lambda pair: log_reward(*pair), (jnp.asarray(x), jnp.asarray(sentences)), batch_size=64)
    )
    found: dict[str, Any] = {"log_reward": rewards.astype(float).tolist()}
    for name in rows[0]:
        found[name] = [row[name] for row in rows]
    return found | bleu(x, sentences, left)


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['sentences']} test sentences.",
        "",
        "| | evaluations per sample | log r (nats) | against untuned | bound on log Z, against untuned | "
        "judge: middle (nats per token) | judge: right side | BLEU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = report["rows"][UNTUNED]
    for name, row in report["rows"].items():
        cells = [row["evaluations"], mean(row["log_reward"])]
        cells.append("" if row is start else difference(row["log_reward"], start["log_reward"]))
        no_bound = row is start or row["bound"] is None
        cells.append("" if no_bound else difference(row["bound"], start["bound"]))
        cells += [mean(row["judge_middle"]), mean(row["judge_right"]), f"{row['bleu']:.1f}"]
        lines.append("| " + " | ".join(map(str, [name, *cells])) + " |")
    return "\n".join(lines) + "\n"


def mean(values: Any) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


def difference(values: Any, others: Any) -> str:
    return mean(np.subtract(values, others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tuned", help="model.safetensors of rnejax finetune verses_middle")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    config: Any = load_config(FinetuneRun, "verses_middle", [])
    problem: Any = build_problem(config)
    left, middle = config.problem.left, config.problem.middle
    sentences = np.asarray(problem.test_conditions(arguments.sentences))
    tuned = problem.posterior.with_params(rj.load_model(arguments.tuned).params)
    models = {"left side only": problem.prior, UNTUNED: problem.posterior, "tuned": tuned}
    methods: dict[str, tuple[Any, Sampler]] = {
        name: (middle, plain(model, problem.times)) for name, model in models.items()
    }
    for n in arguments.particles:
        methods[f"steered, N = {n}"] = (n * middle, steered(problem, None, n))
        methods[f"both sides, steered, N = {n}"] = (2 * n * middle, steered(problem, problem.posterior, n))
        methods[f"tuned and steered, N = {n}"] = (2 * n * middle, steered(problem, tuned, n))
    methods["what was written"] = ("", lambda key, rows: rows[:, left : left + middle])
    path = arguments.output / "infilling.json"
    report: dict[str, Any] = {"sentences": arguments.sentences, "rows": {}, "shown": {}}
    if path.exists() and (stored := json.loads(path.read_text()))["sentences"] == arguments.sentences:
        report = stored
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (evaluations, sampler) in methods.items():
        if name in report["rows"]:
            continue
        x = sampler(jax.random.key(3), sentences)
        row = judge(x, sentences, left, problem.log_reward)
        row["bound"] = bound(problem, models[name], sentences) if name in models else None
        report["rows"][name] = {"evaluations": evaluations, **row}
        report["shown"][name] = [show_gap(*pair, left) for pair in zip(x[:8], sentences[:8], strict=True)]
        path.write_text(json.dumps(report, indent=1) + "\n")
        if UNTUNED in report["rows"]:
            (arguments.output / "infilling.md").write_text(table(report))
        print(
            name, {key: round(float(np.mean(value)), 3) for key, value in row.items() if value is not None}, flush=True
        )


if __name__ == "__main__":
    main()
