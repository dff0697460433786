"""Make the two classifiers of digits that rnejax ships, and their model cards.

    python scripts/train_digits_classifiers.py [reward] [judge] [--output rnejax/checkpoints]

The reward classifier learns from the first half of the training images, the judge from the second, with another
architecture and another seed. Both see shifted, turned and scaled digits; the reward classifier also sees blurred,
faded and noisy ones, because predicted x_0 looks like that at high noise levels. Takes two to five minutes on two CPU
cores.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from rnejax.networks import build, functional, num_weights, save_network
from rnejax.systems import digits
from rnejax.training import fit, make_optimizer

RECIPES: dict[str, dict[str, Any]] = {
    "reward": {
        "network": "strided_classifier",
        "arguments": {"channels": [32, 64, 128]},
        "half": 0,
        "seed": 1,
        "degrade": True,
        "num_steps": 4000,
    },
    "judge": {
        "network": "pooled_classifier",
        "arguments": {"channels": [16, 32], "hidden": 64},
        "half": 1,
        "seed": 2,
        "degrade": False,
        "num_steps": 2000,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which ones; default, both")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "rnejax" / "checkpoints")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"there is no classifier {unknown[0]!r}: there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        train(name, RECIPES[name], options.output)


def train(name: str, recipe: dict[str, Any], output: Path, batch_size: int = 64) -> None:
    started, num_steps = time.perf_counter(), recipe["num_steps"]
    init_key, fit_key, test_key = jax.random.split(jax.random.key(recipe["seed"]), 3)
    apply, params = functional(build(recipe["network"], init_key, **recipe["arguments"]))
    everything = digits.load("train")
    middle = len(everything.labels) // 2
    half = slice(middle) if recipe["half"] == 0 else slice(middle, None)
    data = digits.Digits(everything.images[half], everything.labels[half])

    def loss(key: jax.Array, params: Any, batch: digits.Digits) -> jax.Array:
        keys = jax.random.split(key, len(batch.labels))
        x = jax.vmap(lambda key, image: augment(key, image, recipe["degrade"]))(keys, batch.images)
        return -jnp.take_along_axis(apply(params, x), batch.labels[:, None], axis=1)[:, 0]

    result = fit(
        fit_key,
        loss,
        params,
        data,
        make_optimizer(2e-3, num_steps=num_steps, warmup_steps=min(100, num_steps // 2)),
        num_steps=num_steps,
        batch_size=batch_size,
        ema_decay=0.99,
        evaluate=lambda weights: {"validation_accuracy": accuracy(apply, weights, test_key, "validation")},
        report_every=500,
        save_every=500,
        on_report=lambda report: print(name, report, flush=True),
    )
    seconds = time.perf_counter() - started
    scores = {
        "validation_accuracy": accuracy(apply, result.average, test_key, "validation"),
        "test_accuracy": accuracy(apply, result.average, test_key, "test"),
    }
    command = f"python scripts/train_digits_classifiers.py {name}"
    made = {"command": command, "batch_size": batch_size, "seconds": round(seconds)}
    metadata = {"training": recipe | made | scores}
    path = output / f"digits_{name}.safetensors"
    save_network(path, recipe["network"], recipe["arguments"], result.average, metadata)
    path.with_suffix(".md").write_text(card(name, recipe, made, scores, num_weights(result.average)))
    print(f"{name}: {scores}, {path.stat().st_size} bytes in {path}")


def augment(key: jax.Array, image: jax.Array, degrade: bool) -> jax.Array:
    """One dequantised image, shifted by up to 2 pixels, turned by up to 0.2 rad, scaled by up to 10 %; and degraded."""
    dequantise_key, place_key, degrade_key = jax.random.split(key, 3)
    x = digits.dequantise(dequantise_key, image)[..., 0]
    down, right, turn, scale = jax.random.uniform(place_key, (4,), minval=-1.0)
    centre = (jnp.array(x.shape) - 1.0) / 2.0
    angle, factor = 0.2 * turn, 1.0 + 0.1 * scale
    rotation = factor * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(x.shape[0]), jnp.arange(x.shape[1]), indexing="ij"), axis=-1)
    source = (grid - centre) @ rotation.T + centre + 2.0 * jnp.stack([down, right])
    x = map_coordinates(x, jnp.moveaxis(source, -1, 0), order=1, cval=-1.0)
    return (spoil(degrade_key, x) if degrade else x)[..., None]


def spoil(key: jax.Array, x: jax.Array) -> jax.Array:
    """Half of the images: blurred (up to 2 pixels), faded towards the background (to 40 %), with noise (up to 0.3)."""
    whether_key, blur_key, fade_key, level_key, noise_key = jax.random.split(key, 5)
    width = jax.random.uniform(blur_key, minval=0.1, maxval=2.0)
    offsets = jnp.arange(-4, 5)
    kernel = jnp.exp(-0.5 * jnp.square(offsets / width))
    kernel = kernel / jnp.sum(kernel)
    blurred = jax.vmap(lambda row: jnp.convolve(row, kernel, mode="same"))(x + 1.0)
    blurred = jax.vmap(lambda column: jnp.convolve(column, kernel, mode="same"), 1, 1)(blurred) - 1.0
    faded = jax.random.uniform(fade_key, minval=0.4) * (blurred + 1.0) - 1.0
    noise = 0.3 * jax.random.uniform(level_key) * jax.random.normal(noise_key, x.shape)
    return jnp.where(jax.random.bernoulli(whether_key), faded + noise, x)


def accuracy(apply: Callable[..., jax.Array], params: Any, key: jax.Array, split: str) -> float:
    part = digits.load(split)
    log_probabilities = jax.jit(apply)(params, digits.dequantise(key, part.images))
    return float(jnp.mean(jnp.argmax(log_probabilities, axis=1) == part.labels))


def card(name: str, recipe: dict[str, Any], made: dict[str, Any], scores: dict[str, float], size: int) -> str:
    purpose = {
        "reward": "a reward for inference-time control, at x near the data or at predicted x_0",
        "judge": "judging generated digits, and nothing else: it shares neither architecture, seed nor training images "
        "with the reward classifier",
    }[name]
    seen = "shifted, turned and scaled" + ("; half of them also blurred, faded and noisy" if recipe["degrade"] else "")
    return f"""# digits_{name}

Log-probabilities of the ten digits for an image (28, 28, 1) in model coordinates:
`rnejax.systems.digits.load_classifier("{name}")`. For {purpose}.

| | |
|---|---|
| network | `{recipe["network"]}`, {size:,} weights, float32 |
| data | the {"first" if recipe["half"] == 0 else "second"} half of the 4,000 training images, {seen} |
| seed | {recipe["seed"]} |
| training | {recipe["num_steps"]} steps of {made["batch_size"]} images, Adam, averaged weights |
| made by | `{made["command"]}` |
| time | {made["seconds"]} s on two CPU cores shared with other work |
| validation accuracy | {scores["validation_accuracy"]:.1%} of 500 |
| test accuracy | {scores["test_accuracy"]:.1%} of 500 (standard error about 0.7 %) |
"""


if __name__ == "__main__":
    main()
