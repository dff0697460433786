"""Pictures from prompts: what N particles are worth, by a judge that no reward has seen.

    python scripts/benchmark_token_rewards.py [--prompts 6] [--runs 16] [--particles 1 2 4 8 16 32]

The shipped model of digits in tokens is given the digit of a prompt and nothing of how it is drawn; how wide and how
slanted it is has to come from a reward, a network that scores pictures against prompts. (What the model itself can do
when it is given the whole prompt is the last row.) N particles of 49 steps per sample; every method evaluates the
model N times per step and returns one sample per run. The judge is another network, and measures width and slant.

- best of N: N samples of the model, the one of largest reward
- Feynman-Kac steering (Singhal et al. 2025): the model's own kernel, reward of a completion, resampling at every fifth
  step; the particle of largest reward
- ours: base, gradient and candidates, weighted, resampled below half the effective sample size; one particle by weight

"Diversity" is the probability that two samples of one prompt differ at a position: steering that sends all runs to
one picture has none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.systems import digit_tokens

PROMPTS = (
    "a bold slanted seven",
    "a thin upright three",
    "a bold upright zero",
    "a thin slanted five",
    "a bold backslanted two",
    "a thin backslanted eight",
)
SCALE = 2.0

Method = Callable[[jax.Array, rj.DiffusionModel, Any, np.ndarray, int, int], np.ndarray]


def best_of_n(key: Any, model: Any, reward: Any, times: Any, n: int, runs: int) -> np.ndarray:
    x = np.asarray(rj.sample(key, model, times, n * runs, progress=False).x)
    values = np.asarray(jax.lax.map(reward, jnp.asarray(x), batch_size=256)).reshape(runs, n)
    return x.reshape(runs, n, -1)[np.arange(runs), values.argmax(axis=1)]


def steered(best: bool = False, proposal: Any = "base", **options: Any) -> Method:
    tilt = {name: options.pop(name) for name in ("gradient", "draws") if name in options}

    def method(key: Any, model: Any, reward: Any, times: Any, n: int, runs: int) -> np.ndarray:
        key_run, key_choose = jax.random.split(key)
        target = rj.tilt(model, reward, at="x0", scale=SCALE, **tilt)
        result = rj.steer(
            key_run, target, times, n, proposal=proposal, num_groups=runs, warn=False, progress=False, **options
        )
        x, log_weights = np.asarray(result.particles), np.asarray(result.log_weights)
        if best:
            score = np.asarray(jax.lax.map(reward, jnp.asarray(x.reshape(runs * n, -1)), batch_size=256))
            chosen = score.reshape(runs, n).argmax(axis=1)
        else:
            gumbel = np.asarray(jax.random.gumbel(key_choose, log_weights.shape))
            chosen = (log_weights + gumbel).argmax(axis=1)
        return x[np.arange(runs), chosen]

    return method


METHODS: dict[str, Method] = {
    "best of N": best_of_n,
    "Feynman-Kac steering": steered(best=True, ess_threshold=0.0, every=5),
    "base": steered(draws=4),
    "gradient": steered(gradient=True, proposal="locally_optimal"),
    "8 candidates": steered(draws=4, proposal=rj.control.Candidates(8)),
    "8 candidates of the gradient": steered(
        gradient=True, proposal=rj.control.Candidates(8, rj.control.TokenProposal())
    ),
}


def judge(x: np.ndarray, prompts: list[str]) -> dict[str, Any]:
    """Of samples (prompts, runs, length): means over all, with standard errors over samples."""
    conditions = np.stack([digit_tokens.parse(prompt) for prompt in prompts])
    verdict = digit_tokens.judge(x.reshape(-1, x.shape[-1]), np.repeat(conditions, x.shape[1], axis=0))
    row: dict[str, Any] = {}
    for name, values in verdict._asdict().items():
        values = np.asarray(values, np.float64)
        row[name] = float(values.mean())
        row[f"{name}_error"] = float(values.std(ddof=1) / np.sqrt(values.size))
    pairs = [np.mean(each[:, None] != each[None]) * len(each) / (len(each) - 1) for each in x]
    row["diversity"] = float(np.mean(pairs))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits_tokens")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    parser.add_argument("--runs", type=int, default=16, help="per prompt")
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    times = rj.time_grid(model.process, arguments.steps)
    prompts = list(PROMPTS[: arguments.prompts])
    matcher = digit_tokens.load_matcher("reward")
    key = jax.random.key(arguments.seed)
    rows = []

    def run(name: str, method: Method, n: int, whole: bool) -> None:
        begin = time.perf_counter()
        found = []
        for i, prompt in enumerate(prompts):
            condition = digit_tokens.parse(prompt)
            given = condition if whole else np.asarray([condition[0], *digit_tokens.NULL[1:]])
            conditional = model.with_condition(jnp.asarray(given, jnp.int32))
            reward = digit_tokens.Match(matcher, condition)
            found.append(method(jax.random.fold_in(key, i), conditional, reward, times, n, arguments.runs))
        rows.append({"method": name, "particles": n, **judge(np.stack(found), prompts)})
        rows[-1]["seconds"] = round(time.perf_counter() - begin, 1)
        print(rows[-1], flush=True)

    for n in arguments.particles:
        for name, method in METHODS.items():
            run(name, method, n, whole=False)
    run("the model, given the whole prompt", best_of_n, 1, whole=True)
    real = digit_tokens.load("test")
    fits = [real.tokens[(real.conditions == digit_tokens.parse(prompt)).all(axis=1)] for prompt in prompts]
    settings = {name: str(value) for name, value in vars(arguments).items()}
    report = {"settings": settings, "prompts": prompts, "real": [len(each) for each in fits], "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "token_rewards.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n".join(markdown(report))
    (arguments.output / "token_rewards.md").write_text(text + "\n")
    print(text)


COLUMNS = ("log_prob", "all", "digit", "width", "slant")


def markdown(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    lines = [
        f"{len(report['prompts'])} prompts, {settings['runs']} runs of each, {settings['steps']} steps.",
        "",
        "| particles | method | judge: log p(prompt) | all right | digit | width | slant | diversity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        cells = [
            f"{r[name]:.2f} ± {r[f'{name}_error']:.2f}" for name in ("log_prob", "fits", "digit", "width", "slant")
        ]
        lines.append(f"| {r['particles']} | {r['method']} | {' | '.join(cells)} | {r['diversity']:.3f} |")
    return lines


if __name__ == "__main__":
    main()
