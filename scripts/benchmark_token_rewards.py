"""Pictures from prompts: what N particles are worth, by a judge that no reward has seen.

    python scripts/benchmark_token_rewards.py [--prompts 6] [--runs 16] [--particles 1 2 4 8 16 32]

The shipped model of digits in tokens is given the digit of a prompt and nothing of how it is drawn; how wide and how
slanted it is has to come from a reward, a network that scores pictures against prompts. N particles of 49 steps per
sample; every method evaluates the model N times per step and returns one sample per run. The judge is another network,
and measures width and slant.

- best of N: N samples of the model, the one of largest reward
- Feynman-Kac steering (Singhal et al. 2025): the model's own kernel, rewards of four completions, resampling at every
  fifth step; the particle of largest reward
- ours: base (four completions), gradient and candidates (eight, of four completions each), weighted, resampled below
  half the effective sample size; one particle by weight or, to compare with the others, the one of largest reward

Equal is what the model costs. The reward is a network too, a smaller one: with completions it is called four times per
evaluation of the model, of candidates 32 times, and its gradient costs about three calls.

For comparison, without any reward: the model when it is given the whole prompt, the same with guidance (two evaluations
per particle and step), and pictures that somebody wrote, those of the validation and test images that fit (by
measurement, so that their width and slant are right by construction). All means are over prompts, each with the same
weight; standard errors are those of the samples of each prompt.

"Diversity" is the probability that two samples of one prompt differ at a position: steering that sends all runs to
one picture has none. The sheet docs/pictures/digits_tokens_prompts.png shows samples of each prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax import plot
from rnejax.systems import digit_tokens, digits, prompt_matchers

PROMPTS = (
    "a bold slanted seven",
    "a thin upright three",
    "a bold upright zero",
    "a thin slanted five",
    "a bold backslanted two",
    "a thin backslanted eight",
)
SCALE = 2.0
GUIDANCE = 2.0
DIGIT_SAID, PROMPT_SAID = "model told the digit", "model told the prompt"
SHOWN = 4
"""samples of a prompt and a method on the sheet"""


@dataclass(frozen=True)
class Problem:
    """The model, what the prompt says, and how well a picture fits it."""

    model: rj.DiffusionModel
    condition: np.ndarray
    reward: Any

    def told(self, *entries: int) -> rj.DiffusionModel:
        """The model given these entries of the prompt."""
        given = np.array(digit_tokens.NULL, np.int32)
        given[list(entries)] = self.condition[list(entries)]
        return self.model.with_condition(jnp.asarray(given))


Method = Callable[[jax.Array, Problem, np.ndarray, int, int], np.ndarray]


def whole_prompt(key: Any, problem: Problem, times: Any, n: int, runs: int) -> np.ndarray:
    return np.asarray(rj.sample(key, problem.told(0, 1, 2), times, runs, progress=False).x)


def guided(ess_threshold: float) -> Method:
    def method(key: Any, problem: Problem, times: Any, n: int, runs: int) -> np.ndarray:
        target = rj.guide(problem.told(), problem.told(0, 1, 2), GUIDANCE)
        options = {"ess_threshold": ess_threshold, "num_groups": runs, "warn": False, "progress": False}
        return one_each(key, target, times, n, runs, weighted=ess_threshold > 0, **options)

    return method


def one_each(key: Any, target: Any, times: Any, n: int, runs: int, weighted: bool = True, **options: Any) -> np.ndarray:
    """One particle of each run, by weight or the first."""
    key_run, key_choose = jax.random.split(key)
    result = rj.steer(key_run, target, times, n, **options)
    x, log_weights = np.asarray(result.particles), np.asarray(result.log_weights)
    gumbel = np.asarray(jax.random.gumbel(key_choose, log_weights.shape))
    chosen = (log_weights + gumbel).argmax(axis=1) if weighted else 0
    return x[np.arange(runs), chosen]


def best_of_n(key: Any, problem: Problem, times: Any, n: int, runs: int) -> np.ndarray:
    model, reward = problem.told(0), problem.reward
    x = np.asarray(rj.sample(key, model, times, n * runs, progress=False).x)
    values = np.asarray(jax.lax.map(reward, jnp.asarray(x), batch_size=256)).reshape(runs, n)
    return x.reshape(runs, n, -1)[np.arange(runs), values.argmax(axis=1)]


def steered(best: bool = False, proposal: Any = "base", **options: Any) -> Method:
    tilt = {name: options.pop(name) for name in ("gradient", "draws") if name in options}

    def method(key: Any, problem: Problem, times: Any, n: int, runs: int) -> np.ndarray:
        target = rj.tilt(problem.told(0), problem.reward, at="x0", scale=SCALE, **tilt)
        settings = {"proposal": proposal, "num_groups": runs, "warn": False, "progress": False, **options}
        if not best:
            return one_each(key, target, times, n, runs, **settings)
        x = np.asarray(rj.steer(key, target, times, n, **settings).particles)
        score = np.asarray(jax.lax.map(problem.reward, jnp.asarray(x.reshape(runs * n, -1)), batch_size=256))
        return x[np.arange(runs), score.reshape(runs, n).argmax(axis=1)]

    return method


METHODS: dict[str, Method] = {
    "best of N": best_of_n,
    "Feynman-Kac steering": steered(best=True, draws=4, ess_threshold=0.0, every=5),
    "base": steered(draws=4),
    "base, best particle": steered(best=True, draws=4),
    "gradient": steered(gradient=True, proposal="locally_optimal"),
    "gradient, best particle": steered(best=True, gradient=True, proposal="locally_optimal"),
    "8 candidates": steered(draws=4, proposal=rj.control.Candidates(8)),
    "8 candidates of the gradient": steered(
        gradient=True, proposal=rj.control.Candidates(8, rj.control.TokenProposal())
    ),
}


def real_pictures(prompts: list[str]) -> list[np.ndarray]:
    """Of those that neither the model nor any matcher was trained on."""
    parts = [digit_tokens.load(split) for split in ("validation", "test")]
    tokens, conditions = (np.concatenate(each) for each in zip(*parts, strict=True))
    return [tokens[(conditions == digit_tokens.parse(prompt)).all(axis=1)] for prompt in prompts]


def judge(x: list[np.ndarray], prompts: list[str]) -> dict[str, Any]:
    """Of samples of each prompt, (runs, length): means over prompts, with the standard errors of their samples."""
    conditions = [np.broadcast_to(digit_tokens.parse(prompt), (len(each), 3)) for prompt, each in zip(prompts, x)]
    verdict = prompt_matchers.judge(np.concatenate(x), np.concatenate(conditions))
    row: dict[str, Any] = {"samples": [len(each) for each in x]}
    ends = np.cumsum(row["samples"])[:-1]
    for name, values in verdict._asdict().items():
        parts = np.split(np.asarray(values, np.float64), ends)
        row[name] = float(np.mean([part.mean() for part in parts]))
        row[f"{name}_error"] = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts))
    pairs = [np.mean(each[:, None] != each[None]) * len(each) / (len(each) - 1) for each in x if len(each) > 1]
    row["diversity"] = float(np.mean(pairs))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits_tokens")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    parser.add_argument("--runs", type=int, default=8, help="per prompt")
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    times = rj.time_grid(model.process, arguments.steps)
    prompts = list(PROMPTS[: arguments.prompts])
    matcher = prompt_matchers.load_matcher("reward")
    key = jax.random.key(arguments.seed)
    path = arguments.output / "token_rewards.json"
    settings = {name: getattr(arguments, name) for name in ("model", "prompts", "runs", "steps", "seed")}
    report: dict[str, Any] = {"settings": settings, "prompts": prompts, "rows": [], "shown": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            report = stored  # what it has is not measured again
    arguments.output.mkdir(parents=True, exist_ok=True)

    def run(name: str, method: Method, n: int, shown: str = "") -> None:
        has_it = any((row["method"], row["particles"]) == (name, n) for row in report["rows"])
        if has_it and (not shown or shown in report["shown"]):
            return
        found = []
        for i, prompt in enumerate(prompts):
            condition = digit_tokens.parse(prompt)
            problem = Problem(model, condition, prompt_matchers.Match(matcher, condition))
            found.append(method(jax.random.fold_in(key, i), problem, times, n, arguments.runs))
        if not has_it:
            report["rows"].append({"method": name, "particles": n, **judge(found, prompts)})
            print(report["rows"][-1], flush=True)
        if shown:
            report["shown"][shown] = np.stack(found)[:, :SHOWN].tolist()
        path.write_text(json.dumps(report) + "\n")

    largest = max(arguments.particles)
    run("given the whole prompt", whole_prompt, 1, PROMPT_SAID)
    run(f"guided ({GUIDANCE:g}), uncorrected", guided(0.0), 1)  # two evaluations for each particle
    run(f"guided ({GUIDANCE:g})", guided(0.5), largest // 2, f"guided: one of {largest // 2}")
    for name, method in METHODS.items():
        for n in arguments.particles:
            shown = {("best of N", 1): DIGIT_SAID, ("gradient, best particle", largest): f"rewarded: best of {largest}"}
            run(name, method, n, shown.get((name, n), ""))
    real = {"method": "real pictures that fit", "particles": None, **judge(real_pictures(prompts), prompts)}
    report["rows"] = [row for row in report["rows"] if row["particles"]] + [real]
    path.write_text(json.dumps(report) + "\n")
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    draw(report["shown"], prompts, arguments.pictures / "digits_tokens_prompts.png")
    text = "\n".join(markdown(report))
    (arguments.output / "token_rewards.md").write_text(text + "\n")
    print(text)


def draw(shown: dict[str, Any], prompts: list[str], path: Path) -> None:
    """A row for each prompt, and in it a few samples of each way to make them."""
    order = (DIGIT_SAID, PROMPT_SAID, "guided", "rewarded")
    sheet = {name: np.asarray(shown[name])[:, :SHOWN] for start in order for name in shown if name.startswith(start)}
    groups = {name: digit_tokens.decode(x).reshape(-1, *digits.IMAGE_SHAPE) for name, x in sheet.items()}
    figure = plot.compare_sheets(groups, columns=SHOWN, rows=len(prompts), value_range=(0.0, 1.0), row_labels=prompts)
    plot.save(figure, path)


def markdown(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    lines = [
        f"{len(report['prompts'])} prompts, {settings['runs']} runs of each, {settings['steps']} steps; guidance "
        "evaluates the model twice for each particle.",
        "",
        "| particles | method | judge: log p(prompt) | all right | digit | width | slant | diversity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = list(METHODS)

    def place(row: dict[str, Any]) -> tuple[float, int]:
        method = row["method"]
        return (row["particles"], names.index(method)) if method in METHODS else (np.inf, 0)

    for r in sorted(report["rows"], key=place):
        cells = [f"{r[name]:.2f} ± {r[f'{name}_error']:.2f}" for name in ("log_prob", "all", "digit", "width", "slant")]
        lines.append(f"| {r['particles'] or ''} | {r['method']} | {' | '.join(cells)} | {r['diversity']:.3f} |")
    return lines


if __name__ == "__main__":
    main()
