"""The middle of sentences: a token model into its posterior under an autoregressive model of what follows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from ...config import ConfigError, FinetuneRun, Infilling
from ...systems import text
from ...systems.language import load_language_model, until_the_end
from ..build import load_named, make_times
from ..folder import RunFolder
from ..tokens import kind_of
from .problem import Problem, save_tuned

NUM_STEERED = 16  # sentences for which the tuned model proposes


@jax.tree_util.register_static
@dataclass(frozen=True)
class Middle:
    """A network for whole sentences as one for their middle, fn(params, x, t, sentence) -> logits (middle, V).

    Attributes:
      fn: of whole sentences, fn(params, tokens, t, None).
      left, middle: numbers of tokens.
      sees_right: whether it is given what follows; MASK stands there otherwise.
    """

    fn: Callable[..., Any]
    left: int
    middle: int
    sees_right: bool

    def __call__(self, params: Any, x: Any, t: Any, sentence: Any) -> Any:
        end = self.left + self.middle
        right = sentence[end:] if self.sees_right else jnp.full_like(sentence[end:], text.MASK)
        tokens = jnp.concatenate([sentence[: self.left], x.astype(sentence.dtype), right])
        return self.fn(params, tokens, t, None)[self.left : end]


@partial(jax.tree_util.register_dataclass, data_fields=["log_probs", "strength"], meta_fields=["left"])
@dataclass(frozen=True)
class RightSide:
    """The reward (x, sentence) -> strength * log p(right | left, x), in nats, up to the sentence's end.

    Attributes:
      log_probs: of the tokens of a whole sentence, given those before.
      strength: a number.
      left: tokens before the gap.
    """

    log_probs: Callable[[Any], Any]
    strength: Any
    left: int

    def __call__(self, x: Any, sentence: Any) -> Any:
        end = self.left + len(x)
        whole = jnp.concatenate([sentence[: self.left], x.astype(sentence.dtype), sentence[end:]])
        # Where the sentence ends is what the right side says; a PAD that is filled in ends nothing.
        counted = until_the_end(sentence) & (jnp.arange(len(sentence)) >= end)
        return self.strength * jnp.sum(jnp.where(counted, self.log_probs(whole), 0.0))


@dataclass
class InfillingProblem(Problem):
    """Sentences with a gap; the condition is the sentence, of which the networks see what they are to see."""

    settings: Infilling | None = None
    sentences: Any = None  # to learn from
    held_out: Any = None

    def conditions(self, count: int) -> Any:
        rows = np.arange(count) % len(self.sentences)
        return jnp.asarray(self.sentences[rows])

    def test_conditions(self, count: int) -> Any:
        return jnp.asarray(self.held_out[np.arange(count) % len(self.held_out)])

    prior_takes_condition = True
    brings_data = True

    def steered_conditions(self) -> list[Any]:
        return list(self.test_conditions(NUM_STEERED))

    def data(self, key: Any) -> Any:
        """What was written in the gaps."""
        from ...training import Examples

        assert self.settings is not None
        left, end = self.settings.left, self.settings.left + self.settings.middle
        sentences = jnp.asarray(self.sentences)
        return Examples(sentences[:, left:end], sentences, sentences)

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        assert self.settings is not None
        sentences = np.asarray(condition)
        return junctions(x, sentences, self.settings.left) | bleu(x, sentences, self.settings.left)

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        assert self.settings is not None
        left, middle = self.settings.left, self.settings.middle
        lines = []
        for row, sentence in list(zip(x, np.asarray(condition), strict=True))[:64]:
            lines += [show_gap(row, sentence, left), f"    ({text.decode(sentence[left : left + middle])})"]
        folder.text("samples.txt", "\n".join(lines) + "\n")

    def save(self, folder: RunFolder, weights: Any) -> None:
        """The network for whole sentences, to be used by `rnejax.infill`."""
        assert self.settings is not None
        save_tuned(folder, self.config, self.settings.model, load_named(self.settings.model).with_params(weights))


def build_infilling(config: FinetuneRun, settings: Infilling) -> InfillingProblem:
    """Left side given: the prior. Both sides given: what is tuned.

    Raises:
      ConfigError: for a model that is none of sentences, or a gap that does not fit.
    """
    model = load_named(settings.model)
    if kind_of(settings.model) != "text" or not isinstance(model.process, (rj.processes.Masked, rj.processes.AnyOrder)):
        raise ConfigError(f"problem.model = {settings.model} is no model of masked sentences")
    left, middle = settings.left, settings.middle
    if left + middle >= text.LENGTH:
        raise ConfigError(
            f"problem.left + problem.middle = {left + middle} must leave something of {text.LENGTH} tokens on the right"
        )
    if config.reward_gradient:
        raise ConfigError("reward_gradient is of models of numbers: leave it out for tokens")
    process = rj.processes.AnyOrder(text.VOCAB_SIZE, middle)
    grid = config.grid.model_copy(update={"kind": "one_token"})
    times = make_times(grid, process)
    sentence = jnp.zeros(text.LENGTH, jnp.int32)

    def of_middle(sees_right: bool) -> rj.DiffusionModel:
        fn = Middle(model.fn, left, middle, sees_right)
        return rj.DiffusionModel(process, fn, "logits", shape=(middle,), params=model.params, condition=sentence)

    log_reward = RightSide(load_language_model("reward"), settings.strength, left)
    if importlib.util.find_spec("sacrebleu") is None:  # before, and not after, everything is done
        raise ConfigError("what is filled in is compared by BLEU: pip install sacrebleu (rnejax's extra 'text')")
    try:
        train, test = text.load("train"), text.load(settings.test_split)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"problem: {error}") from error
    return InfillingProblem(
        config,
        of_middle(False),
        of_middle(True),
        log_reward,
        times,
        settings=settings,
        sentences=with_right_side(train, left + middle),
        held_out=with_right_side(test, left + middle),
    )


def with_right_side(sentences: np.ndarray, end: int) -> np.ndarray:
    """Those that go on after the gap."""
    return sentences[sentences[:, end] != text.PAD]


def show_gap(x: np.ndarray, sentence: np.ndarray, left: int) -> str:
    """left [middle] right."""
    end = left + len(x)
    parts = text.decode(sentence[:left]), text.decode(np.asarray(x)), text.decode(sentence[end:])
    return f"{parts[0]} [{parts[1]}] {parts[2]}"


def junctions(x: np.ndarray, sentences: np.ndarray, left: int) -> dict[str, float]:
    """Nats per token, by a judge that nobody has asked: of the middle given the left side, and of the right side given
    all before it.
    """
    judge = load_language_model("judge")
    end = left + x.shape[1]
    whole = jnp.asarray(np.concatenate([sentences[:, :left], x, sentences[:, end:]], axis=1))
    log_probs = np.asarray(jax.lax.map(judge, whole, batch_size=64), np.float64)
    right = np.asarray(jax.vmap(until_the_end)(jnp.asarray(sentences))) & (np.arange(sentences.shape[1]) >= end)
    return {
        "judge_middle": float(log_probs[:, left:end].mean()),
        "judge_right": float(log_probs[right].sum() / right.sum()),
    }


def bleu(x: np.ndarray, sentences: np.ndarray, left: int) -> dict[str, float]:
    """BLEU of the middles, as words, against what was written there (sacrebleu; 0 to 100)."""
    import sacrebleu

    end = left + x.shape[1]
    found = [text.decode(row) for row in x]
    written = [text.decode(row[left:end]) for row in sentences]
    return {"bleu": float(sacrebleu.corpus_bleu(found, [written]).score)}
