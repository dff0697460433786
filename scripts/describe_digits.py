"""The numbers and the picture of the digits model's card, for the shipped model or another one.

    python scripts/describe_digits.py [--model digits]

Prints, as markdown, the network's error by noise level on images that it saw and on images that it did not, the
variational bound on bits per dimension that these imply, and how often the judge sees the class that was asked for in
a hundred samples, which it draws into docs/pictures/digits_samples.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax import plot
from rnejax.systems import digits
from rnejax.training import denoising_evaluator

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--images", type=int, default=500, help="of each part of the data")
    parser.add_argument("--steps", type=int, default=100, help="of the samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DOCS / "pictures")
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    key_noise, key_samples = jax.random.split(jax.random.key(arguments.seed))

    # ----- errors, labels given; the same noise for all, so that differences are the images'
    evaluator = denoising_evaluator(model.process, model.fn, prediction=model.prediction)

    def errors(part: str, with_labels: bool = True) -> Any:
        data = digits.load(part)
        x, labels = digits.training_batch(key_noise, jax.tree.map(lambda leaf: leaf[: arguments.images], data))
        null = jnp.full_like(labels, digits.NUM_CLASSES)
        return evaluator(key_noise, model.params, x, labels if with_labels else null)

    held_out, seen, unlabelled = errors("validation"), errors("train"), errors("validation", with_labels=False)
    print("| log-SNR | validation | training |\n|---|---|---|")
    for i, (low, high) in enumerate(zip(held_out.edges[:-1], held_out.edges[1:], strict=True)):
        cells = [f"{part.epsilon_error[i]:.4f} ({part.standard_error[i]:.4f})" for part in (held_out, seen)]
        print(f"| {low:.1f} to {high:.1f} | {cells[0]} | {cells[1]} |")
    for name, part in (("validation", held_out), ("validation, no labels", unlabelled), ("training", seen)):
        bound = digits.bits_per_dimension(jnp.asarray(-part.bound * np.prod(digits.IMAGE_SHAPE)))
        print(f"\nbound, {name}: {float(bound):.3f} bits per dimension")

    # ----- samples, ten of each class
    judge = digits.load_classifier("judge")
    times = rj.time_grid(model.process, arguments.steps)
    rows, agreed = [], 0
    for label in range(digits.NUM_CLASSES):
        chosen = model.with_condition(jnp.int32(label))
        x = rj.sample(jax.random.fold_in(key_samples, label), chosen, times, num_samples=10).x
        agreed += int(np.sum(np.argmax(np.asarray(judge(x)), axis=-1) == label))
        rows.append(np.asarray(x))
    print(f"\nthe judge sees the class that was asked for in {agreed} of 100 samples ({arguments.steps} steps)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    in_turn = np.stack(rows, axis=1).reshape(-1, *model.shape)
    plot.save(plot.sample_sheet(in_turn, columns=2 * digits.NUM_CLASSES), arguments.output / "digits_samples.png")


if __name__ == "__main__":
    main()
