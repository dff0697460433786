"""Make the two autoregressive models of sentences that rnejax ships, and their model cards.

    python scripts/train_language_models.py [reward] [judge] [--output rnejax/checkpoints]

Each learns from another half of the training sentences, with another size and seed. About ten minutes each on one CPU
core.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnejax.networks import build, functional, num_weights, save_network
from rnejax.systems import text
from rnejax.systems.language import next_token_log_probs, until_the_end
from rnejax.training import fit, make_optimizer

RECIPES: dict[str, dict[str, Any]] = {
    "reward": {"half": 0, "seed": 1, "width": 128, "num_layers": 3, "num_heads": 4},
    "judge": {"half": 1, "seed": 2, "width": 144, "num_layers": 2, "num_heads": 6},
}
NUM_STEPS, BATCH_SIZE, LEARNING_RATE, DROPOUT = 2500, 64, 3e-3, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which ones; default, both")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "rnejax" / "checkpoints")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}: there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        train(name, RECIPES[name], options.output, options.num_steps)


def train(name: str, recipe: dict[str, Any], output: Path, num_steps: int) -> None:
    started = time.perf_counter()
    sizes = {key: recipe[key] for key in ("width", "num_layers", "num_heads")}
    arguments = {"vocab_size": text.VOCAB_SIZE, "length": text.LENGTH, "causal": True, "dropout_rate": DROPOUT, **sizes}
    key_init, key_fit = jax.random.split(jax.random.key(recipe["seed"]))
    apply, params = functional(build("token_transformer", key_init, **arguments))
    sentences = text.load("train")
    middle = len(sentences) // 2
    half = sentences[:middle] if recipe["half"] == 0 else sentences[middle:]

    def log_probs(params: Any, x: jax.Array, key: Any = None) -> jax.Array:
        return next_token_log_probs(lambda tokens: apply(params, tokens, jnp.zeros(()), key=key), x)

    def loss(key: jax.Array, params: Any, batch: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(batch))
        found = jax.vmap(lambda x, key: log_probs(params, x, key))(batch, keys)
        return -jnp.sum(jnp.where(jax.vmap(until_the_end)(batch), found, 0.0), axis=1)

    @jax.jit
    def nats(params: Any, batch: jax.Array) -> jax.Array:
        found = jax.lax.map(lambda x: log_probs(params, x), batch, batch_size=128)
        return -jnp.sum(jnp.where(jax.vmap(until_the_end)(batch), found, 0.0), axis=1)

    def scores(params: Any, split: str) -> dict[str, float]:
        found = np.asarray(nats(params, jnp.asarray(text.load(split))), np.float64)
        return {"nats": float(found.mean()), "error": float(found.std(ddof=1) / np.sqrt(len(found)))}

    result = fit(
        key_fit,
        loss,
        params,
        half,
        make_optimizer(
            LEARNING_RATE, num_steps=num_steps, warmup_steps=num_steps // 25, decay_steps=num_steps // 2, method="muon",
            weight_decay=0.1,
        ),
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        ema_decay=0.99,
        steps_per_call=10,
        evaluate=lambda params: {"validation_nats": scores(params, "validation")["nats"]},
        report_every=num_steps // 5,
        save_every=num_steps // 5,
        on_report=lambda report: print(name, report, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    found = {split: scores(result.average, split) for split in ("validation", "test")}
    made = {
        "command": f"python scripts/train_language_models.py {name}",
        "num_steps": num_steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "seconds": round(seconds),
    }
    path = output / f"language_{name}.safetensors"
    save_network(
        path, "token_transformer", arguments, result.average, metadata=recipe | made | found, dtype=jnp.bfloat16
    )
    path.with_suffix(".md").write_text(card(name, recipe, made, found, num_weights(result.average)))
    print(f"{name}: {found}, {path.stat().st_size} bytes in {path}, {seconds:.0f} s")


def card(name: str, recipe: dict[str, Any], made: dict[str, Any], found: dict[str, Any], size: int) -> str:
    part = ("first", "second")[recipe["half"]]
    return f"""# language_{name}

An autoregressive model of English sentences (`rnejax.systems.language`): a causal transformer, {recipe["num_layers"]}
layers of width {recipe["width"]}, {size:,} weights, stored in bfloat16.

- Data: the {part} half of the training sentences of `rnejax.systems.text`.
- Made by `{made["command"]}`: {made["num_steps"]} steps of {made["batch_size"]} sentences, Muon at
  {made["learning_rate"]:g}, dropout {DROPOUT:g}, seed {recipe["seed"]}; {made["seconds"]} s on one CPU core.
- Validation: {found["validation"]["nats"]:.1f} +- {found["validation"]["error"]:.1f} nats per sentence, its end
  included. Test: {found["test"]["nats"]:.1f} +- {found["test"]["error"]:.1f}.
"""


if __name__ == "__main__":
    main()
