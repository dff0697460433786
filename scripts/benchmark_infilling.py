"""The middle of sentences, by a token model that is tuned, steered, or neither.

    rnejax finetune verses_middle --output outputs/verses_middle
    python scripts/benchmark_infilling.py outputs/verses_middle/model.safetensors [--sentences 400]

Test sentences of the King James text, of which eight tokens after the first twelve are missing. The posterior is what
the shipped token model says after the left side, times the likelihood of the right side under an autoregressive model.

- left side only: the prior, which knows nothing of what follows
- both sides, untuned: the token model's own way to fill in
- tuned: the network of `rnejax finetune verses_middle`, which starts as that
- steered: one of N particles of the prior, by weight (completions of what is still masked are rewarded)
- tuned and steered: one of N that the tuned network proposes
- what was written

"Evaluations" are those of the token model for one sample. By another autoregressive model, which no method has seen:
nats per token of the middle after the left side, and of the right side after both; BLEU of the words of the middle
against what was written (sacrebleu). Standard errors over sentences. Writes docs/tables/infilling.{json,md}.
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
        "| | evaluations per sample | log r (nats) | judge: middle (nats per token) | judge: right side | BLEU |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        cells = []
        for key in ("log_reward", "judge_middle", "judge_right"):
            values = np.asarray(row[key])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}")
        lines.append(f"| {name} | {row['evaluations']} | {' | '.join(cells)} | {row['bleu']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tuned", help="model.safetensors of rnejax finetune verses_middle")
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    config: Any = load_config(FinetuneRun, "verses_middle", [])
    problem: Any = build_problem(config)
    left, middle = config.problem.left, config.problem.middle
    sentences = np.asarray(problem.test_conditions(arguments.sentences))
    tuned = problem.posterior.with_params(rj.load_model(arguments.tuned).params)
    methods: dict[str, tuple[Any, Sampler]] = {
        "left side only": (middle, plain(problem.prior, problem.times)),
        "both sides, untuned": (middle, plain(problem.posterior, problem.times)),
        "tuned": (middle, plain(tuned, problem.times)),
    }
    for n in arguments.particles:
        methods[f"steered, N = {n}"] = (n * middle, steered(problem, None, n))
    few = min(arguments.particles)
    methods[f"tuned and steered, N = {few}"] = (2 * few * middle, steered(problem, tuned, few))
    methods["what was written"] = ("", lambda key, rows: rows[:, left : left + middle])
    path = arguments.output / "infilling.json"
    report: dict[str, Any] = {"sentences": arguments.sentences, "rows": {}, "shown": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (evaluations, sampler) in methods.items():
        x = sampler(jax.random.key(3), sentences)
        row = judge(x, sentences, left, problem.log_reward)
        report["rows"][name] = {"evaluations": evaluations, **row}
        report["shown"][name] = [show_gap(*pair, left) for pair in zip(x[:8], sentences[:8], strict=True)]
        path.write_text(json.dumps(report, indent=1) + "\n")
        (arguments.output / "infilling.md").write_text(table(report))
        print(name, {key: round(float(np.mean(value)), 3) for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
