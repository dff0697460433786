"""Make the two networks that score digits of tokens against prompts, which rnejax ships, and their model cards.

    python scripts/train_prompt_matchers.py [reward] [judge] [--output rnejax/checkpoints]

Both are classifiers with 16 outputs, for ten digits, three widths and three slants, and learn the sum of the three
cross entropies. The reward learns from the first half of the training images, the judge from the second, with another
architecture and another seed. Both see ink from 0 (paper) to 1, and pictures that are warped and shifted without a
change of their words; the reward also sees pictures that are only partly known, because that is what the expected ink
of predicted tokens looks like.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import affine_transform

from rnejax.networks import build, functional, num_weights, save_network
from rnejax.systems import digit_tokens, digits, prompt_matchers
from rnejax.systems.ink import binarise
from rnejax.training import fit, make_optimizer

RECIPES: dict[str, dict[str, Any]] = {
    "reward": {
        "network": "strided_classifier",
        "arguments": {"num_classes": 16, "channels": [32, 64, 128, 128]},
        "half": 0,
        "seed": 11,
        "soft": True,
        "drawn": 0.25,
        "warps": 15,
        "num_steps": 8000,
    },
    "judge": {
        "network": "pooled_classifier",
        "arguments": {"num_classes": 16, "channels": [16, 32], "hidden": 64},
        "half": 1,
        "seed": 12,
        "soft": False,
        "drawn": 0.0,
        "warps": 15,
        "num_steps": 3000,
    },
}
SHIFT = 2
"""Pixels."""


class Pictures(NamedTuple):
    """Ink, shape (n, variants, 28, 28, 1), bool, first the pictures as they are; conditions, shape (n, 3), of all of
    its variants; number, shape (n,).
    """

    ink: np.ndarray
    conditions: np.ndarray
    number: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which ones; default, both")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "rnejax" / "checkpoints")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"there is no matcher {unknown[0]!r}: there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        train(name, RECIPES[name], options.output)


def train(name: str, recipe: dict[str, Any], output: Path, batch_size: int = 64) -> dict[str, Any]:
    started, num_steps = time.perf_counter(), recipe["num_steps"]
    init_key, fit_key = jax.random.split(jax.random.key(recipe["seed"]))
    apply, params = functional(build(recipe["network"], init_key, **recipe["arguments"]))
    data = pictures(recipe["half"], recipe["warps"], recipe["seed"])
    others = jnp.asarray(data.ink[:, 0, ..., 0], jnp.float32)

    def see(key: jax.Array, variants: jax.Array, number: jax.Array, others: jax.Array) -> jax.Array:
        which_key, whether_key, shift_key, soft_key = jax.random.split(key, 4)
        ink = variants[jax.random.randint(which_key, (), 0, len(variants))][..., 0].astype(jnp.float32)
        seen = shift(shift_key, ink)
        if recipe["soft"]:
            softened = soften(soft_key, ink, number, others, recipe["drawn"])
            seen = jnp.where(jax.random.bernoulli(whether_key), softened, seen)
        return seen[..., None]

    def loss(key: jax.Array, params: Any, batch: Pictures) -> jax.Array:
        keys = jax.random.split(key, len(batch.number))
        # The barrier keeps XLA from spending minutes on arithmetic with these constants.
        hidden = jax.lax.optimization_barrier(others)
        ink = jax.vmap(see, (0, 0, 0, None))(keys, batch.ink, batch.number, hidden)
        return -said(prompt_matchers.Matcher(apply, params)(ink), batch.conditions).sum(0)

    def evaluate(weights: Any) -> dict[str, float]:
        found = score(prompt_matchers.Matcher(apply, weights), "validation")
        return {part: found[part]["accuracy"] for part in ENTRIES}

    result = fit(
        fit_key,
        loss,
        params,
        data,
        make_optimizer(2e-3, num_steps=num_steps, warmup_steps=min(100, num_steps // 2)),
        num_steps=num_steps,
        batch_size=batch_size,
        ema_decay=0.99,
        evaluate=evaluate,
        report_every=500,
        save_every=500,
        on_report=lambda report: print(name, report, flush=True),
    )
    seconds = time.perf_counter() - started
    matcher = prompt_matchers.Matcher(apply, result.average)
    scores: dict[str, Any] = {split: score(matcher, split) for split in ("validation", "test")}
    if recipe["soft"]:
        scores["partly_known"] = partly_known(matcher)
    command = f"python scripts/train_prompt_matchers.py {name}"
    made = {"command": command, "batch_size": batch_size, "seconds": round(seconds)}
    path = output / f"digit_tokens_{name}.safetensors"
    save_network(
        path, recipe["network"], recipe["arguments"], result.average, {"training": recipe | made, "scores": scores}
    )
    path.with_suffix(".md").write_text(card(name, recipe, made, scores, num_weights(result.average)))
    print(f"{name}: {scores}, {path.stat().st_size} bytes in {path}")
    return scores


# What they see


def pictures(half: int, warps: int, seed: int) -> Pictures:
    """Half of the training images, binary, each with versions of itself that the same words fit."""
    everything = digits.load("train")
    middle = len(everything.labels) // 2
    half_of_them = slice(middle) if half == 0 else slice(middle, None)
    images, labels = everything.images[half_of_them], everything.labels[half_of_them]
    conditions = digit_tokens.classify(images, labels)
    rng = np.random.default_rng(seed)
    variants = [binarise(images)]
    for _ in range(warps):
        warped = np.stack([warp(rng, image[..., 0]) for image in images])[..., None]
        # Slant and width are measured again: a version of which other words hold gives way to the image itself.
        same = (digit_tokens.classify(warped, labels) == conditions).all(1)
        variants.append(np.where(same[:, None, None, None], warped, variants[0]))
    return Pictures(np.stack(variants, axis=1), conditions, np.arange(len(images)))


def warp(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Turned and sheared by up to 0.2, scaled by up to 10 % each way, then cut at a grey level from 80 to 176."""
    turn, shear = rng.uniform(-0.2, 0.2, 2)
    down, right = rng.uniform(0.9, 1.1, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[down, 0.0], [shear, right]])
    centre = (np.array(image.shape) - 1) / 2
    grey = affine_transform(image.astype(float), matrix, centre - matrix @ centre, order=1)
    return grey >= rng.uniform(80, 176)


def shift(key: jax.Array, ink: jax.Array) -> jax.Array:
    """A picture shifted by whole pixels, as far as no ink is lost: no word changes."""
    shifts = []
    for axis, number in enumerate(jax.random.randint(key, (2,), -SHIFT, SHIFT + 1)):
        occupied = jnp.any(ink > 0, axis=1 - axis)
        shifts.append(jnp.clip(number, -jnp.argmax(occupied), jnp.argmax(occupied[::-1])))
    return jnp.roll(ink, jnp.stack(shifts), axis=(0, 1))


def soften(key: jax.Array, ink: jax.Array, number: jax.Array, others: jax.Array, drawn: float) -> jax.Array:
    """A picture of which a random share of the patches is known (of every other at most a quarter), the rest guessed.

    Two of three guesses are what a model may expect: a mean of the ``others``, without the one of this number, weighted
    with exp(-beta * (pixels that differ from what is known)), and up to a part, the larger the more is known, the
    truth. The third is between what shows where nothing is known (the mean ink of the training images) and a blur, by
    0.5 to 3 pixels, of the truth. Some of the guesses are ``drawn``: each pixel is ink with the probability that was
    guessed, as in completions of tokens that know nothing of each other.
    """
    share_key, patch_key, *keys = jax.random.split(key, 8)
    share = jnp.square(jnp.maximum(jax.random.uniform(share_key, minval=-0.1), 0.0))
    known = jax.random.bernoulli(patch_key, share, digit_tokens.GRID)
    known = jnp.repeat(jnp.repeat(known, digit_tokens.PATCH, axis=0), digit_tokens.PATCH, axis=1)

    beta = jnp.exp(jax.random.uniform(keys[0], minval=jnp.log(0.15), maxval=jnp.log(1.5)))
    differ = jnp.sum(known * ink) + jnp.tensordot(others, known * (1.0 - 2.0 * ink), 2)
    weights = jax.nn.softmax(jnp.where(jnp.arange(len(others)) == number, -jnp.inf, -beta * differ))
    truth = share * jax.random.uniform(keys[1])
    expected = (1.0 - truth) * jnp.tensordot(weights, others, 1) + truth * ink

    width = jax.random.uniform(keys[2], minval=0.5, maxval=3.0)
    places = jnp.arange(len(ink))
    kernel = jnp.exp(-0.5 * jnp.square((places[:, None] - places) / width))
    kernel = kernel / jnp.sum(jnp.exp(-0.5 * jnp.square(jnp.arange(-len(ink), len(ink) + 1) / width)))
    mix = jnp.clip(jax.random.uniform(keys[3], minval=-0.5, maxval=1.5), 0.0, 1.0)
    blurred = mix * digit_tokens.mean_ink()[..., 0] + (1.0 - mix) * kernel @ ink @ kernel.T

    which, whether = jax.random.bernoulli(keys[4], jnp.array([2 / 3, drawn]))
    guess = jnp.where(which, expected, blurred)
    guess = jnp.where(whether, jax.random.bernoulli(keys[5], guess), guess)
    return jnp.where(known, ink, guess)


# What they know

ENTRIES = ("digit", "width", "slant")


def said(found: prompt_matchers.LogProbs, conditions: jax.Array) -> jax.Array:
    """Log-probabilities of the right options, shape (3, n)."""
    parts = [jnp.take_along_axis(part, conditions[:, i, None], axis=1)[:, 0] for i, part in enumerate(found)]
    return jnp.stack(parts)


def score(matcher: Callable[[jax.Array], Any], split: str) -> dict[str, Any]:
    """Accuracy of each part with its standard error, and which share of the errors is by two classes."""
    data = digit_tokens.load(split)
    found = jax.jit(matcher)(digit_tokens.ink_of(data.tokens))
    scores: dict[str, Any] = {}
    right = np.ones(len(data.tokens), bool)
    for i, (entry, part) in enumerate(zip(ENTRIES, found, strict=True)):
        distance = np.abs(np.argmax(np.asarray(part), axis=1) - data.conditions[:, i])
        scores[entry] = with_error(distance == 0)
        if entry != "digit":
            scores[entry] |= {"errors": int((distance > 0).sum()), "opposite": int((distance == 2).sum())}
        right &= distance == 0
    return scores | {"all three": with_error(right)}


def with_error(right: np.ndarray) -> dict[str, Any]:
    accuracy = float(right.mean())
    return {"accuracy": accuracy, "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(right)))}


def partly_known(matcher: Callable[[jax.Array], Any]) -> list[dict[str, Any]]:
    """On validation images with MASK in a random share of their patches: mean log p of each part, in nats."""
    data = digit_tokens.load("validation")
    rng = np.random.default_rng(0)
    rows = []
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        tokens = np.where(rng.random(data.tokens.shape) < share, digit_tokens.MASK, data.tokens)
        log_probs = said(jax.jit(matcher)(digit_tokens.ink_of(tokens)), jnp.asarray(data.conditions)).mean(1)
        rows.append({"masked": share} | dict(zip(ENTRIES, log_probs.tolist(), strict=True)))
    trained = digit_tokens.load("train").conditions
    nothing = [np.log(np.bincount(trained[:, i]) / len(trained))[data.conditions[:, i]].mean().item() for i in range(3)]
    return [*rows, {"masked": "no picture"} | dict(zip(ENTRIES, nothing, strict=True))]


def card(name: str, recipe: dict[str, Any], made: dict[str, Any], scores: dict[str, Any], size: int) -> str:
    purpose = {
        "reward": "For a reward (`Match`), of tokens or of the expected ink of predicted x_0.",
        "judge": "For judging generated digits (`judge`), and nothing else: it shares neither architecture, seed nor "
        "training images with the reward.",
    }[name]
    seen = "binary, warped and shifted without a change of their words"
    if recipe["soft"]:
        seen += (
            "; half of the time only a random share of the 2 x 2 patches is known and the rest guessed: as the mean of "
            "others like it, or between the mean ink of the training images and a blur of the picture; "
            f"{recipe['drawn']:.0%} of the guesses are drawn, each pixel ink or paper"
        )
    text = f"""# digit_tokens_{name}

Log-probabilities of the ten digits, three widths and three slants for ink (28, 28, 1) from 0 (paper) to 1:
`rnejax.systems.prompt_matchers.load_matcher("{name}")`. {purpose}

| | |
|---|---|
| network | `{recipe["network"]}`, {size:,} weights, float32; its 16 outputs are normalised in groups of 10, 3 and 3 |
| data | the {"first" if recipe["half"] == 0 else "second"} half of the 4,000 training images, {seen} |
| labels | the digit, and width and slant as `digit_tokens.classify` measures them |
| loss | the sum of the three cross entropies |
| seed | {recipe["seed"]} |
| training | {recipe["num_steps"]} steps of {made["batch_size"]} images, Adam, averaged weights |
| made by | `{made["command"]}` |
| time | {made["seconds"]} s on two CPU cores shared with other work |

How often the most probable option is the right one, on 500 images each, with standard errors; and of the errors, how
many are by two classes (thin for bold, backslanted for slanted, or the other way round):

| | validation | test | opposite, validation | opposite, test |
|---|---|---|---|---|
"""
    for entry in (*ENTRIES, "all three"):
        both = [scores[split][entry] for split in ("validation", "test")]
        accuracies = [f"{each['accuracy']:.1%} ± {each['standard_error']:.1%}" for each in both]
        opposite = [f"{each['opposite']} of {each['errors']}" if "opposite" in each else "" for each in both]
        text += f"| {' | '.join([entry, *accuracies, *opposite])} |\n"
    if "partly_known" in scores:
        text += """
Mean log-probability of the right option in nats, on the validation images with MASK in a random share of the tokens,
shown as the mean ink; the last line is what one knows without a picture, how frequent the options are:

| masked | digit | width | slant |
|---|---|---|---|
"""
        for row in scores["partly_known"]:
            shares = [row["masked"] if isinstance(row["masked"], str) else f"{row['masked']:.0%}"]
            text += f"| {' | '.join(shares + [f'{row[entry]:.2f}' for entry in ENTRIES])} |\n"
    return text


if __name__ == "__main__":
    main()
