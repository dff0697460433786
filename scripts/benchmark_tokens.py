"""Tokens in a world that can be counted: what falls with the number of steps, what proposals are worth, and rewards.

    python scripts/benchmark_tokens.py [steps] [proposals] [auxiliary] [remasking] [rewards] [--output docs/tables]
        [--quick]

Random laws over all sequences of V = 3 tokens with exact conditionals, so that every error is that of the method.

- **steps**: log Z and the total variation to the target against the number of steps, for temper, product, guidance and
  tilt, masked and uniform; the sums over all paths are exact (`rnejax.systems.token_law.path_sum`), so that there is no
  noise in them.
- **proposals**: how uncertain log Z is at equal evaluations: the models' own kernel, the locally optimal one, the same
  without weighing (and resampling) before it proposes, and one that draws from the product which tokens are revealed.
- **auxiliary**: of uniform tokens, the noising kernel as B, on the default grid and on one uniform in t, against
  one that noises towards the target; exact path sums.
- **remasking**: log Z against the number of steps, when tokens that were revealed are masked again: with one
  probability for any number of steps, and with one that falls like one over it.
- **rewards**: the law of the sample that a run returns against the exactly tilted law, and its mean reward, for N = 1
  to 32 particles at equal evaluations: best of N, potentials as in Feynman-Kac steering (Singhal et al. 2025), ours.

Takes about a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.kernels import Categorical, OneToken, log_product
from rnejax.systems.token_law import TokenLaw, path_sum

Rows = list[dict[str, Any]]


# --------------------------------------------------------------------------------------------------------------- steps

EXPONENTS = {
    "temper 2": (2.0,),
    "product": (1.0, 1.0),
    "guidance 1.5": (-0.5, 1.5),
    "tilt": (1.0,),
    "tempered product, tilted": (1.5, 0.5),
}


def worth(x: Any) -> Any:
    """A reward: what its tokens are worth, and a bonus for neighbours that agree."""
    values = jnp.asarray([0.8, -0.6, 0.1, 0.0])[x]
    return jnp.sum(values, axis=-1) + 0.7 * jnp.sum((x[..., 1:] == x[..., :-1]) & (x[..., 1:] < 3), axis=-1)


def relaxed_worth(rows: Any) -> Any:
    """The same of rows of token probabilities."""
    return jnp.sum(rows @ jnp.asarray([0.8, -0.6, 0.1])) + 0.7 * jnp.sum(rows[1:] * rows[:-1])


def steps(seed: int, quick: bool) -> Rows:
    rows = []
    counts = (5, 20) if quick else (5, 10, 20, 40, 80, 160, 320)
    for family in ("masked", "uniform"):
        # The flatter laws are those of the uniform process, whose K / F of two changes at once has a heavy tail.
        length, spread = (5, 1.5) if family == "masked" else (3, 0.7)
        laws = [TokenLaw.random(seed + i, 3, length, spread) for i in range(2)]
        models = [getattr(law, family)() for law in laws]
        process: Any = models[0].process
        ends = laws if family == "masked" else [law.marginal(float(process.alpha(process.t_min))) for law in laws]
        reward = np.asarray(worth(jnp.asarray(laws[0].sequences)), np.float64)
        for name, exponents in EXPONENTS.items():
            tilt = reward if "tilt" in name else 0.0
            target = sum(beta * law.log_probs for beta, law in zip(exponents, ends, strict=False)) + tilt
            log_z = np.logaddexp.reduce(target)
            for num_steps in counts:
                found = path_sum(models[: len(exponents)], exponents, rj.time_grid(process, num_steps)) + tilt
                rows.append(
                    {
                        "process": family,
                        "target": name,
                        "steps": num_steps,
                        "log_normalizer": float(np.logaddexp.reduce(found)),
                        "error": float(np.logaddexp.reduce(found) - log_z),
                        "total_variation": distance(found, target),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def distance(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Total variation between two laws given by unnormalised logarithms."""
    p, q = (np.exp(each - np.logaddexp.reduce(each)) for each in (log_p, log_q))
    return float(0.5 * np.abs(p - q).sum())


# ----------------------------------------------------------------------------------------------------------- proposals


@jax.tree_util.register_static
@dataclass(frozen=True)
class WeighAfterwards(rj.control.TokenProposal):
    """The locally optimal proposal, whose weight is not counted before the step is made."""

    def lookahead(self, transition: Any, at_t: Any, kernels: Any) -> Any:
        return jnp.zeros(())


@jax.tree_util.register_static
@dataclass(frozen=True)
class ChoosePositions(rj.control.TokenProposal):
    """Draws from the product which tokens are revealed, too: the weight of a step depends on where it starts only."""

    def reverse(self, transition: Any, at_t: Any, exponent: Any, kernels: Any) -> Any:
        shift = log_product(at_t.exponents_ahead, jnp.stack([kernel.shift for kernel in kernels]))
        base = transition.reference_reverse(at_t.x)
        axes = -1 if isinstance(base, Categorical) else (-2, -1)
        normalised = shift - jax.nn.logsumexp(base.anchor + shift, axis=axes, keepdims=True)
        if isinstance(base, Categorical):
            return Categorical(base.anchor, normalised)
        return OneToken(base.state, base.anchor, normalised)


PROPOSALS: dict[str, Any] = {
    "base": "base",
    "locally optimal": "locally_optimal",
    "the same, weighed afterwards": WeighAfterwards(),
    "positions from the product": ChoosePositions(),
}


def proposals(seed: int, quick: bool) -> Rows:
    rows = []
    groups = 40 if quick else 400
    for exponent, spread in ((2.0, 1.5), (3.0, 2.0), (4.0, 2.5)):
        law = TokenLaw.random(seed, 3, 6, spread)
        log_z = np.logaddexp.reduce(exponent * law.log_probs)
        for family in ("one token per step", "masked, 30 steps"):
            model = law.one_by_one() if family.startswith("one") else law.masked()
            times = rj.time_grid(model.process, 6 if family.startswith("one") else 30)
            for name, proposal in PROPOSALS.items():
                result = rj.steer(
                    jax.random.key(seed), rj.temper(model, exponent), times, 64, 0.5, proposal,
                    num_groups=groups, warn=False, progress=False,
                )  # fmt: skip
                error = np.asarray(result.log_normalizer, np.float64) - log_z
                ratio = np.exp(error)
                distances = [
                    law.total_variation(exponent * law.log_probs, x, w)
                    for x, w in zip(np.asarray(result.particles), np.asarray(result.log_weights), strict=True)
                ]
                rows.append(
                    {
                        "exponent": exponent,
                        "family": family,
                        "proposal": name,
                        "sd_log_z": float(error.std(ddof=1)),
                        "sd_log_z_error": float(error.std(ddof=1) / np.sqrt(2 * groups)),
                        "mean_ratio": float(ratio.mean()),
                        "mean_ratio_error": float(ratio.std(ddof=1) / np.sqrt(groups)),
                        "total_variation": float(np.mean(distances)),
                        "total_variation_error": float(np.std(distances) / np.sqrt(groups)),
                        "resamplings": float(np.mean(result.info.num_resamplings)),
                    }
                )
                print(rows[-1], flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------- auxiliary


def towards_target(exponent: float, coefficient: float) -> Callable[..., Any]:
    """log B / F for B(x_t | x_s) ~ F (q(x_t) / q(x_s))^c, token by token, q from the model's concrete score at x_s."""

    def log_ratio(step: Any, x: Any, at_s: Any) -> Any:
        size = step.vocabulary.size
        rest = (1 - step.s.alpha) / size

        def one(x_s: Any, excess: Any) -> Any:
            own = step.vocabulary.own(x_s)
            over = jnp.exp(excess) / size / (step.s.alpha * own + rest)
            score = jnp.log(step.s.alpha * over + rest * jnp.sum(over, axis=-1, keepdims=True))
            shift = coefficient * exponent * jnp.where(own, 0.0, score)
            anchor = step.forward(x_s).anchor
            shift = shift - jax.nn.logsumexp(anchor + shift, axis=-1, keepdims=True)
            return jax.vmap(lambda x_t: jnp.sum(jnp.take_along_axis(shift, x_t[:, None], axis=-1)))(x)

        return jax.vmap(one)(x, at_s[0].excess).T

    return log_ratio


def auxiliary(seed: int, quick: bool) -> Rows:
    rows = []
    for spread, exponent in ((0.7, 2.0), (1.5, 2.0), (2.0, 3.0)):
        law = TokenLaw.random(seed, 3, 4, spread)
        for grid in ("geometric", "uniform, to alpha = 1"):
            model = law.uniform() if grid == "geometric" else law.uniform(t_min=1e-6)
            process: Any = model.process
            end = law.marginal(float(process.alpha(process.t_min)))
            exact = np.logaddexp.reduce(exponent * end.log_probs)
            for name, other in (("F", None), ("towards the target", towards_target(exponent, 0.5 - 0.5 / exponent))):
                for num_steps in (10, 40) if quick else (10, 40, 160, 640):
                    times = rj.time_grid(process, num_steps, "geometric" if grid == "geometric" else "uniform")
                    found = np.logaddexp.reduce(path_sum([model], [exponent], times, other))
                    rows.append(
                        {
                            "spread": spread,
                            "exponent": exponent,
                            "grid": grid,
                            "auxiliary": name,
                            "steps": num_steps,
                            "error": float(found - exact),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------- remasking


def remasking(seed: int, quick: bool) -> Rows:
    law = TokenLaw.random(seed, 3, 4)
    model = law.masked()
    exact = np.logaddexp.reduce(2 * law.log_probs)
    groups = 40 if quick else 400
    rows = []
    for num_steps in (8, 16) if quick else (8, 16, 32, 64, 128):
        for name, probability in (("0", 0.0), ("0.8 / n", 0.8 / num_steps), ("1.6 / n", 1.6 / num_steps), ("0.2", 0.2)):
            result = rj.steer(
                jax.random.key(seed), rj.temper(model, 2.0), rj.time_grid(model.process, num_steps), 64,
                renoise=rj.control.Remask(probability) if probability else None, num_groups=groups, warn=False,
                progress=False,
            )  # fmt: skip
            ratio = np.exp(np.asarray(result.log_normalizer, np.float64) - exact)
            rows.append(
                {
                    "probability": name,
                    "steps": num_steps,
                    "error": float(np.log(ratio.mean())),
                    "error_error": float(ratio.std(ddof=1) / np.sqrt(groups) / ratio.mean()),
                }
            )
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------- rewards

SCALE = 2.0


def rewards(seed: int, quick: bool) -> Rows:
    """N particles, 12 steps, masked: what one sample of each of many runs is worth, and how far its law is off."""
    law = TokenLaw.random(seed, 3, 6, 1.0)
    model = law.masked()
    times = rj.time_grid(model.process, 12)
    generated = path_sum([model], [1.0], times)
    target = generated + SCALE * np.asarray(worth(jnp.asarray(law.sequences)), np.float64)
    parts = 1 if quick else 4
    at_once = 500 if quick else 1_000  # candidates and completions of 32 particles each fill gigabytes
    runs = parts * at_once
    rows = []
    for n in (1, 2, 4, 8, 16, 32):
        for name, method in METHODS.items():
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), n), parts)
            x = np.concatenate([method(key, model, times, n, at_once) for key in keys])
            values = np.asarray(worth(jnp.asarray(x)), np.float64)
            rows.append(
                {
                    "particles": n,
                    "method": name,
                    "reward": float(values.mean()),
                    "reward_error": float(values.std(ddof=1) / np.sqrt(runs)),
                    "total_variation": law.total_variation(target, x),
                    "distinct": len(np.unique(law.index(x))),
                }
            )
            print(rows[-1], flush=True)
    probabilities = np.exp(target - np.logaddexp.reduce(target))
    exact = np.random.default_rng(seed).choice(len(probabilities), size=runs, p=probabilities)
    x = law.sequences[exact]
    values = np.asarray(worth(jnp.asarray(x)), np.float64)
    rows.append(
        {
            "particles": 0,
            "method": "exact draws",
            "reward": float(values.mean()),
            "reward_error": float(values.std(ddof=1) / np.sqrt(runs)),
            "total_variation": law.total_variation(target, x),
            "distinct": len(np.unique(exact)),
        }
    )
    return rows


def best_of_n(key: Any, model: Any, times: Any, n: int, runs: int) -> np.ndarray:
    x = np.asarray(rj.sample(key, model, times, n * runs, progress=False).x).reshape(runs, n, -1)
    best = np.asarray(worth(jnp.asarray(x))).argmax(axis=1)
    return x[np.arange(runs), best]


def one_by_weight(key: Any, result: Any) -> np.ndarray:
    log_weights = np.asarray(result.log_weights)
    gumbel = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1))).gumbel(size=log_weights.shape)
    chosen = (log_weights + gumbel).argmax(axis=1)
    return np.asarray(result.particles)[np.arange(len(chosen)), chosen]


def steered(**options: Any) -> Callable[..., np.ndarray]:
    """``ess_threshold`` and ``proposal`` of the run; the rest are the reward's."""

    def method(key: Any, model: Any, times: Any, n: int, runs: int) -> np.ndarray:
        run = {name: options[name] for name in ("ess_threshold", "proposal", "every", "best") if name in options}
        tilt = {name: value for name, value in options.items() if name not in run}
        best = run.pop("best", False)
        function = relaxed_worth if tilt.get("gradient") else worth
        target = rj.tilt(model, function, scale=SCALE, **tilt)
        result = rj.steer(key, target, times, n, num_groups=runs, warn=False, progress=False, **run)
        if best:
            x = np.asarray(result.particles)
            return x[np.arange(runs), np.asarray(worth(jnp.asarray(x))).argmax(axis=1)]
        return one_by_weight(jax.random.fold_in(key, 1), result)

    return method


METHODS: dict[str, Callable[..., np.ndarray]] = {
    "best of N": best_of_n,
    "Feynman-Kac steering: every third step, best particle": steered(
        at="x0", draws=8, ess_threshold=0.0, every=3, proposal="base", best=True
    ),
    "base, reward at x0": steered(at="x0", proposal="base"),
    "base, 8 completions": steered(at="x0", draws=8, proposal="base"),
    "the same, best particle": steered(at="x0", draws=8, proposal="base", best=True),
    "gradient at x0": steered(at="x0", gradient=True, proposal="locally_optimal"),
    "8 candidates, 8 completions": steered(at="x0", draws=8, proposal=rj.control.Candidates(8)),
    "8 candidates of the gradient": steered(
        at="x0", gradient=True, proposal=rj.control.Candidates(8, rj.control.TokenProposal())
    ),
}


# -------------------------------------------------------------------------------------------------------------- tables


def markdown_steps(rows: Rows) -> list[str]:
    """A row for each target; the last column is the power of n with which the last two entries fall."""
    counts = sorted({r["steps"] for r in rows})
    lines = [
        f"| process | target | | {' | '.join(f'n = {n}' for n in counts)} | power |",
        "|---" * (len(counts) + 4) + "|",
    ]
    for process, target in dict.fromkeys((r["process"], r["target"]) for r in rows):
        chosen = {r["steps"]: r for r in rows if (r["process"], r["target"]) == (process, target)}
        for title, key, form in (("log Z", "error", "+.4f"), ("TV", "total_variation", ".4f")):
            values = [chosen[n][key] for n in counts]
            power = np.log(abs(values[-1] / values[-2])) / np.log(counts[-1] / counts[-2])
            cells = " | ".join(format(value, form) for value in values)
            lines.append(f"| {process} | {target} | {title} | {cells} | {power:.2f} |")
    return lines


def markdown_proposals(rows: Rows) -> list[str]:
    lines = [
        "| exponent | steps | proposal | sd of log Z | mean of Z / truth | total variation | resamplings |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['exponent']:g} | {r['family']} | {r['proposal']} | {r['sd_log_z']:.3f} ± {r['sd_log_z_error']:.3f} | "
        f"{r['mean_ratio']:.2f} ± {r['mean_ratio_error']:.2f} | {r['total_variation']:.3f} ± "
        f"{r['total_variation_error']:.3f} | {r['resamplings']:.1f} |"
        for r in rows
    ]


def markdown_auxiliary(rows: Rows) -> list[str]:
    counts = sorted({r["steps"] for r in rows})
    lines = [
        "| spread | exponent | grid | B | " + " | ".join(f"{n} steps" for n in counts) + " |",
        "|---|---|---|---|" + "---|" * len(counts),
    ]
    for start in range(0, len(rows), len(counts)):
        each = rows[start : start + len(counts)]
        r = each[0]
        cells = " | ".join(f"{e['error']:+.3g}" for e in each)
        lines.append(f"| {r['spread']:g} | {r['exponent']:g} | {r['grid']} | {r['auxiliary']} | {cells} |")
    return lines


def markdown_remasking(rows: Rows) -> list[str]:
    counts = sorted({r["steps"] for r in rows})
    columns = " | ".join(f"n = {n}" for n in counts)
    lines = [f"| masked again with probability | {columns} |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(r["probability"] for r in rows):
        found = [r for n in counts for r in rows if (r["probability"], r["steps"]) == (name, n)]
        cells = " | ".join(f"{r['error']:+.3f} ± {r['error_error']:.3f}" for r in found)
        lines.append(f"| {name} | {cells} |")
    return lines


def markdown_rewards(rows: Rows) -> list[str]:
    lines = ["| particles | method | reward | total variation | sequences seen |", "|---|---|---|---|---|"]
    return lines + [
        f"| {r['particles'] or '-'} | {r['method']} | {r['reward']:.2f} ± {r['reward_error']:.2f} | "
        f"{r['total_variation']:.3f} | {r['distinct']} |"
        for r in rows
    ]


SECTIONS: dict[str, tuple[Callable[..., Rows], Callable[[Rows], list[str]], str]] = {
    "steps": (
        steps,
        markdown_steps,
        "Exact path sums. Masked: 5 tokens, spread of the logits 1.5; uniform: 3 tokens, spread 0.7, geometric grid.",
    ),
    "proposals": (proposals, markdown_proposals, "6 tokens; 64 particles, 400 runs."),
    "auxiliary": (auxiliary, markdown_auxiliary, "Error of log Z of p^exponent, 4 uniform tokens; exact path sums."),
    "remasking": (
        remasking,
        markdown_remasking,
        "Error of log of the mean of Z, p^2, 4 masked tokens; 64 particles, 400 runs.",
    ),
    "rewards": (
        rewards,
        markdown_rewards,
        f"6 tokens, 12 steps, reward times {SCALE:g}; the law of one sample from each of 4,000 runs against the "
        "tilt of what 12 steps of the model generate. All methods evaluate the network N times per step; of the "
        "reward, 8 completions are 8 calls, and 8 candidates eight times as many. One particle by weight, where the "
        "best is not said to be taken.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="which; default, all")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"), help="folder of tokens.json and tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="less of everything: whether it runs, not what it says")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "tokens.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.sections or SECTIONS:
        measure, markdown, caption = SECTIONS[name]
        begin = time.perf_counter()
        rows = measure(arguments.seed, arguments.quick)
        report[name] = {"seed": arguments.seed, "seconds": round(time.perf_counter() - begin, 1), "rows": rows}
        path.write_text(json.dumps(report, indent=1) + "\n")
        text = "\n".join([caption, "", *markdown(rows)]) + "\n"
        (arguments.output / f"tokens_{name}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
