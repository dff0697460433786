"""Tokens to train on: digits as patches with prompts, verses, or a text of the user's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ConfigError, TextData
from ..kernels import FullSpace
from ..transforms import Identity
from .folder import RunFolder, summary

SHOWN_PROMPTS = (
    "a bold slanted seven",
    "a thin upright three",
    "a medium backslanted five",
    "a bold digit",
    "an eight",
    "a digit",
)


class Tokens:
    """What all of them share."""

    subspace: Any = FullSpace()
    transform: Any = Identity()
    condition: Any = None
    null_label: Any = None
    train: Any
    held_out: tuple[Any, Any]
    shape: tuple[int, ...]

    def __init__(self, vocab_size: int, length: int):
        self.vocab_size, self.length = vocab_size, length
        self.shape = (length,)

    def prepare(self, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        return batch, None

    def bound(self, nats: float) -> dict[str, float]:
        return {"validation_bits_per_token_bound": float(nats / self.length / np.log(2))}

    def record_density(self, folder: RunFolder, samples: Any) -> None:
        bits = -np.asarray(samples) / self.length / np.log(2)
        folder.record(samples_bits_per_token=summary(bits))


class DigitTokens(Tokens):
    """Binary digits in patches, with a condition that says which digit it is, how wide and how slanted."""

    def __init__(self, label_dropout: float):
        from ..systems import digit_tokens

        self.digit_tokens = digit_tokens
        self.label_dropout = label_dropout
        super().__init__(digit_tokens.VOCAB_SIZE, digit_tokens.LENGTH)
        self.train = digit_tokens.load("train")
        held_out = digit_tokens.load("validation")
        self.held_out = (jnp.asarray(held_out.tokens), jnp.asarray(held_out.conditions))
        self.condition = jnp.asarray(digit_tokens.NULL, jnp.int32)

    def prepare(self, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        return self.digit_tokens.training_batch(key, batch, drop=self.label_dropout)

    def draw(self, folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: jax.Array) -> None:
        """Samples of a few prompts in turn."""
        x = np.zeros((n, *self.shape), np.int32)
        log_density = np.zeros(n, np.float32)
        prompts = SHOWN_PROMPTS[:n]
        for i, prompt in enumerate(prompts):
            chosen = slice(i, None, len(prompts))
            each = model.with_condition(jnp.asarray(self.digit_tokens.parse(prompt)))
            samples = rj.sample(jax.random.fold_in(key, i), each, times, num_samples=len(x[chosen]))
            x[chosen], log_density[chosen] = samples.x, samples.log_density
        folder.arrays("samples.npz", x=x, log_density=log_density)
        self.record_density(folder, log_density)
        images = self.digit_tokens.decode(x)
        title = ", ".join(prompts)
        folder.picture(
            "samples.png",
            plot.sample_sheet(images, columns=2 * len(prompts), value_range=(0.0, 1.0), title=title),
        )


class Text(Tokens):
    """Sentences."""

    def __init__(self, data: Any):
        from ..systems import text

        self.text = text
        super().__init__(text.VOCAB_SIZE, text.LENGTH)
        if isinstance(data, TextData):
            sentences = text.read_corpus(data.corpus)
            if len(sentences) < 2:
                raise ConfigError(f"data.corpus = {data.corpus} has one sentence: none is left to validate on")
            order = np.random.default_rng(0).permutation(len(sentences))
            held_out = max(1, len(sentences) // 20)
            self.train, validation = sentences[order[held_out:]], sentences[order[:held_out]]
        else:
            self.train, validation = text.load("train"), text.load("validation")
        self.held_out = (jnp.asarray(validation), None)

    def draw(self, folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: jax.Array) -> None:
        """Samples, as sentences in a file."""
        samples = rj.sample(key, model, times, num_samples=n)
        folder.arrays("samples.npz", x=samples.x, log_density=samples.log_density)
        self.record_density(folder, samples.log_density)
        lines = [self.text.decode(each) for each in np.asarray(samples.x)]
        folder.text("samples.txt", "\n".join(lines) + "\n")
