"""Posterior sampling on the shipped digits model: inpainting and deblurring, as docs/posterior.md describes.

    python scripts/posterior_digits.py [--particles 64] [--steps 100]
    python scripts/posterior_digits.py --compare-gradients [--particles 16] [--steps 50] [--groups 8]

Writes docs/pictures/posterior_digits.png and docs/tables/posterior_digits.{json,md}, and prints the rows: how far the
pictures are from the observation (in units of its noise: about 1 is right), what the judge sees in them, the
evidence, and the effective sample size.

With --compare-gradients: how far a proposal may follow a gradient through the network, on the first image, its lower
half covered; writes docs/tables/posterior_gradients.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_digits import standard_error, table

import rnejax as rj
from rnejax import plot
from rnejax.systems import digits

DOCS = Path(__file__).parent.parent / "docs"


def upper_half(x: jax.Array) -> jax.Array:
    """What is left of a picture whose lower half is covered."""
    return x[:14]


def blurred(x: jax.Array, width: float = 2.0) -> jax.Array:
    """A Gaussian blur of the given standard deviation in pixels, seen at every second pixel."""
    offsets = jnp.arange(28)[:, None] - jnp.arange(28)[None, :]
    kernel = jnp.exp(-0.5 * (offsets / width) ** 2)
    kernel = (kernel / kernel.sum(axis=1, keepdims=True))[::2]
    return jnp.einsum("ih,hwc,jw->ijc", kernel, x, kernel)


OPERATORS = {"lower half covered": upper_half, "blurred": blurred}


def measure_error(seed: int, model: Any, operator: Any) -> rj.control.PredictionError:
    """How far off observations of predicted digits are, on validation images, at 25 noise levels."""
    key_data, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), 10**6))
    images = digits.dequantise(key_data, digits.load("validation").images[:200])
    times = rj.time_grid(model.process, 24)
    return rj.control.prediction_error(key_noise, model, operator, times, images)


def compare_gradients(model: Any, image: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The evidence of one observation by proposals that follow the gradient more or less; groups are independent."""
    key = jax.random.fold_in(jax.random.key(arguments.seed), image)
    key_data, key_noise, key_run, _ = jax.random.split(key, 4)
    clean = upper_half(digits.dequantise(key_data, digits.load("test").images[image]))
    y = clean + arguments.noise_std * jax.random.normal(key_noise, clean.shape)
    error = measure_error(arguments.seed, model, upper_half)
    target = rj.observe(model, upper_half, y, arguments.noise_std, error=error)
    blind = replace(target, rewards=tuple(replace(reward, gradient=False) for reward in target.rewards))
    naive = rj.observe(model, upper_half, y, arguments.noise_std)
    bounds = {"0.1 nats a step": 0.1, "1 nat a step": 1.0, "without bound": math.inf}
    proposals: dict[str, tuple[Any, Any]] = {"no gradient": (blind, "symmetric")}
    proposals |= {f"gradient, {name}": (target, rj.control.Drift(trust=bound)) for name, bound in bounds.items()}
    proposals["gradient, 1 nat a step, errors taken for independent"] = (naive, "symmetric")
    times = rj.time_grid(model.process, arguments.steps)
    rows = []
    for name, (chosen, proposal) in proposals.items():
        options = {"num_groups": arguments.groups, "proposal": proposal, "warn": False}
        result = rj.steer(key_run, chosen, times, arguments.particles, **options)
        log_normalizers = np.asarray(result.log_normalizer, np.float64)
        rows.append(
            {
                "proposal": name,
                "log_evidence_nats": float(log_normalizers.mean()),
                "log_evidence_nats_se": standard_error(log_normalizers),
                "sd_of_a_run": float(log_normalizers.std(ddof=1)),
                "smallest_ess": float(np.asarray(result.info.ess).min(axis=-1).mean()),
                "unique_ancestors": float(np.asarray(result.info.unique_ancestors)[..., -1].mean()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--noise-std", type=float, default=0.3)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 7], help="numbers of test images")
    parser.add_argument("--compare-gradients", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DOCS)
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    (arguments.output / "tables").mkdir(parents=True, exist_ok=True)
    if arguments.compare_gradients:
        rows = compare_gradients(model, arguments.images[0], arguments)
        names = ("particles", "steps", "groups", "noise_std", "seed")
        settings = {name: getattr(arguments, name) for name in names} | {"image": arguments.images[0]}
        path = arguments.output / "tables" / "posterior_gradients.json"
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        options = f"--particles {arguments.particles} --steps {arguments.steps} --groups {arguments.groups}"
        command = f"python scripts/posterior_digits.py --compare-gradients {options}"
        path.with_suffix(".md").write_text(table(rows, command))
        return
    judge = digits.load_classifier("judge")
    times = rj.time_grid(model.process, arguments.steps)
    test = digits.load("test")
    rows = []
    pictures = []
    for name, operator in OPERATORS.items():
        error = measure_error(arguments.seed, model, operator)
        for i in arguments.images:
            key = jax.random.fold_in(jax.random.key(arguments.seed), i)
            key_data, key_noise, key_run, key_draw = jax.random.split(key, 4)
            truth = digits.dequantise(key_data, test.images[i])
            clean = operator(truth)
            y = clean + arguments.noise_std * jax.random.normal(key_noise, clean.shape)
            start = time.time()
            target = rj.observe(model, operator, y, arguments.noise_std, error=error)
            result = rj.steer(key_run, target, times, arguments.particles, num_groups=arguments.groups)
            seconds = time.time() - start
            x = rj.resample(key_draw, result)[: 7 * 2]
            residual = jax.vmap(lambda x, y=y, operator=operator: jnp.sqrt(jnp.mean((operator(x) - y) ** 2)))(x)
            seen = np.asarray(jnp.exp(jax.vmap(judge)(x)).mean(axis=0))
            rows.append(
                {
                    "observation": name,
                    "label": int(test.labels[i]),
                    "judged_as_label": float(seen[int(test.labels[i])]),
                    "residual_over_noise": float(residual.mean() / arguments.noise_std),
                    "residual_of_truth_over_noise": float(jnp.sqrt(jnp.mean((clean - y) ** 2)) / arguments.noise_std),
                    "log_evidence_of_groups_nats": np.round(np.asarray(result.log_normalizer), 1).tolist(),
                    "ess_fraction": float(jnp.mean(result.info.ess[:, -1]) / arguments.particles),
                    "unique_ancestors": np.asarray(result.info.unique_ancestors)[:, -1].tolist(),
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
            pictures.append([truth, as_picture(y), *x[:7]])
    (arguments.output / "pictures").mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "images")}
    record = json.dumps({"settings": settings, "rows": rows}, indent=1)
    path = arguments.output / "tables" / "posterior_digits.json"
    path.write_text(record + "\n")
    path.with_suffix(".md").write_text(observations_table(rows))
    sheet = np.asarray(jnp.concatenate([jnp.stack(row) for row in pictures]))
    figure = plot.sample_sheet(sheet, columns=9, title="truth, observation, seven draws from the posterior")
    plot.save(figure, arguments.output / "pictures" / "posterior_digits.png")


def observations_table(rows: list[dict[str, Any]]) -> str:
    """The rows without their seconds, which are those of the machine and of what else it did."""
    shown = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    for row in shown:
        for name in ("unique_ancestors", "log_evidence_of_groups_nats"):
            row[name] = " and ".join(map(str, row[name]))
    return table(shown, "python scripts/posterior_digits.py")


def as_picture(y: jax.Array) -> jax.Array:
    """An observation in the size of a picture; what was not observed is grey."""
    if y.shape[:2] == (14, 14):
        return jnp.repeat(jnp.repeat(y, 2, axis=0), 2, axis=1)
    return jnp.zeros((28, 28, 1)).at[: y.shape[0]].set(y)


if __name__ == "__main__":
    main()
