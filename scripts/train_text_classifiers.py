"""Make the two classifiers of sentences that rnejax ships, and their model cards.

    python scripts/train_text_classifiers.py [reward] [judge] [--output rnejax/checkpoints]

The reward classifier learns from the first half of the training sentences, the judge from the second, with another
architecture and another seed. Both see sentences of which few or many tokens are masked: that keeps them from learning
the sentences by heart, and from being sure of what is only half known. Together they take
one to two minutes on two CPU cores.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnejax.checkpoint import save_arrays
from rnejax.networks import num_weights
from rnejax.systems import text, text_rewards
from rnejax.training import fit, make_optimizer

RECIPES: dict[str, dict[str, Any]] = {
    "reward": {"network": "pairs", "half": 0, "seed": 1, "num_steps": 3000, "weight_decay": 0.3},
    "judge": {"network": "windows", "half": 1, "seed": 2, "num_steps": 3000, "weight_decay": 0.3},
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


class Labelled(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray


def load(split: str) -> Labelled:
    sentences = text.load_with_books(split)
    return Labelled(sentences.tokens, text_rewards.group_labels(sentences.books))


def initial_pairs(key: jax.Array, width: int = 96, hidden: int = 64) -> dict[str, Any]:
    keys = jax.random.split(key, 5)
    tables = {
        name: scale * jax.random.normal(keys[i], (text.VOCAB_SIZE, width))
        for i, (name, scale) in enumerate({"pieces": 0.5, "first": 0.7, "second": 0.7}.items())
    }
    return tables | {
        "hidden": dense(keys[3], 2 * width, hidden),
        "head": dense(keys[4], hidden, len(text_rewards.GROUPS)),
    }


def initial_windows(key: jax.Array, width: int = 64, features: int = 256) -> dict[str, Any]:
    pieces_key, convolution_key, head_key = jax.random.split(key, 3)
    convolution = dense(convolution_key, 3 * width, features)
    return {
        "pieces": 0.3 * jax.random.normal(pieces_key, (text.VOCAB_SIZE, width)),
        "convolution": convolution | {"kernel": convolution["kernel"].reshape(3, width, features)},
        "head": dense(head_key, features, len(text_rewards.GROUPS)),
    }


def dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs), "bias": jnp.zeros(outputs)}


INITIAL = {"pairs": initial_pairs, "windows": initial_windows}


def train(name: str, recipe: dict[str, Any], output: Path, batch_size: int = 128, learning_rate: float = 3e-3) -> None:
    started, num_steps = time.perf_counter(), recipe["num_steps"]
    init_key, fit_key = jax.random.split(jax.random.key(recipe["seed"]))
    network = text_rewards.NETWORKS[recipe["network"]]
    everything = load("train")
    middle = len(everything.labels) // 2
    half = slice(middle) if recipe["half"] == 0 else slice(middle, None)

    def loss(key: jax.Array, params: Any, batch: Labelled) -> jax.Array:
        share_key, where_key = jax.random.split(key)
        share = jnp.square(jax.random.uniform(share_key, (len(batch.labels), 1)))
        is_masked = jax.random.uniform(where_key, batch.tokens.shape) < share
        log_probabilities = network(params, jnp.where(is_masked, text.MASK, batch.tokens))
        return -jnp.take_along_axis(log_probabilities, batch.labels[:, None], axis=1)[:, 0]

    result = fit(
        fit_key,
        loss,
        INITIAL[recipe["network"]](init_key),
        jax.tree.map(lambda leaf: leaf[half], everything),
        make_optimizer(
            learning_rate, num_steps=num_steps, warmup_steps=100, decay_steps=num_steps - 100,
            weight_decay=recipe["weight_decay"],
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        steps_per_call=50,
        ema_decay=0.99,
        evaluate=lambda weights: {"validation_accuracy": scores(network, weights, "validation")["accuracy"]},
        report_every=500,
        save_every=500,
        on_report=lambda report: print(name, report, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    found = {split: scores(network, result.average, split) for split in ("validation", "test")}
    made = {
        "command": f"python scripts/train_text_classifiers.py {name}",
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seconds": round(seconds),
    }
    path = output / f"text_{name}.safetensors"
    save_arrays(path, result.average, {"network": recipe["network"], "training": recipe | made | found})
    path.with_suffix(".md").write_text(card(name, recipe, made, found, num_weights(result.average)))
    print(f"{name}: {found}, {path.stat().st_size} bytes in {path}, {seconds:.0f} s")


def scores(network: Any, params: Any, split: str) -> dict[str, float]:
    """Accuracy and cross-entropy in nats, with standard errors, of whole sentences; and of no knowledge of them."""
    part = load(split)
    log_probabilities = np.asarray(jax.jit(network)(params, part.tokens), np.float64)
    is_sure = np.max(log_probabilities, axis=1) > np.log(0.9)
    is_right = np.argmax(log_probabilities, axis=1) == part.labels
    losses = -np.take_along_axis(log_probabilities, part.labels[:, None], axis=1)[:, 0]
    shares = np.bincount(load("train").labels) / len(load("train").labels)
    return {
        "number": len(part.labels),
        "accuracy": float(np.mean(is_right)),
        "accuracy_error": float(np.std(is_right) / np.sqrt(len(is_right))),
        "cross_entropy": float(np.mean(losses)),
        "cross_entropy_error": float(np.std(losses) / np.sqrt(len(losses))),
        "sure": float(np.mean(is_sure)),
        "accuracy_sure": float(np.mean(is_right[is_sure])),
        "majority": float(np.mean(part.labels == np.argmax(shares))),
        "cross_entropy_of_shares": float(np.mean(-np.log(shares)[part.labels])),
    } | {f"accuracy_{group}": float(np.mean(is_right[part.labels == i])) for i, group in enumerate(text_rewards.GROUPS)}


def card(name: str, recipe: dict[str, Any], made: dict[str, Any], found: dict[str, Any], size: int) -> str:
    purpose = {
        "reward": "A reward for inference-time control, of sentences or of predicted ones.",
        "judge": """Only for judging generated sentences: it shares neither architecture, seed nor training sentences
with the reward classifier (though the halves are of the same chapters).""",
    }[name]
    groups = ", ".join(f"{group} {found['test'][f'accuracy_{group}']:.0%}" for group in text_rewards.GROUPS)
    sure = f"{found['test']['sure']:.0%}; right about {found['test']['accuracy_sure']:.1%} of them"
    rows = "\n".join(
        f"| {split} accuracy | {of['accuracy']:.1%} of {of['number']:,} (standard error {of['accuracy_error']:.1%}); "
        f"always the largest group, {of['majority']:.1%} |\n"
        f"| {split} cross-entropy | {of['cross_entropy']:.3f} nats (standard error {of['cross_entropy_error']:.3f}); "
        f"the groups' shares, {of['cross_entropy_of_shares']:.3f} |"
        for split, of in found.items()
    )
    half = ("first", "second")[recipe["half"]]
    number = len(text.load("train"))
    data = (
        f"the {half} half of the {number:,} training sentences, a third of their tokens masked (a share u^2, u uniform)"
    )
    steps, decay = f"{recipe['num_steps']} steps of {made['batch_size']} sentences", recipe["weight_decay"]
    training = f"{steps}, Adam with weight decay {decay}, averaged weights"
    return f"""# text_{name}

Log-probabilities of the part of the King James text that a sentence ({text.LENGTH} tokens of `rnejax.systems.text`) is
from, law and history, poetry and wisdom, prophets, or gospels and letters:
`rnejax.systems.text_rewards.load_text_classifier("{name}")`.

{purpose}

| | |
|---|---|
| network | `text_rewards.{recipe["network"]}`, {size:,} weights, float32 |
| data | {data} |
| seed | {recipe["seed"]} |
| training | {training} |
| made by | `{made["command"]}` |
| time | {made["seconds"]} s on two CPU cores shared with other work |
{rows}
| test accuracy by group | {groups} |
| test sentences of which it is 90% sure | {sure} |

Widths, steps and weight decay were chosen on the validation sentences. The groups are of different sizes, and the
classifier knows it: what it cannot tell, it takes for history. Many sentences, such as "and he said unto him,", could
be from anywhere.
"""


if __name__ == "__main__":
    main()
