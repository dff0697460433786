"""What runs on tokens have to know of what the tokens stand for: pictures with prompts, or sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ConfigError, LengthReward, PromptReward, TopicReward, WordReward
from ..persistence import training_data_of
from .folder import RunFolder

TOKEN_DATA = tuple(
    f"{name}_{split}" for name in ("digit_tokens", "verses") for split in ("train", "validation", "test")
)
"""Shipped data of tokens, by name."""

TokenReward = PromptReward | WordReward | LengthReward | TopicReward


def kind_of(name: str) -> str | None:
    """What a stored model's tokens stand for: ``digit_tokens``, ``text``, or None where its file does not say."""
    data = training_data_of(name)
    if data == "digit_tokens":
        return "digit_tokens"
    return "text" if data == "verses" or (isinstance(data, dict) and "corpus" in data) else None


def show(folder: RunFolder, kind: str | None, name: str, x: np.ndarray, columns: int = 16, title: str = "") -> None:
    """Token sequences as a sheet of pictures ``name``.png, or as lines of a text ``name``.txt."""
    if kind == "digit_tokens":
        from ..systems import digit_tokens

        images = digit_tokens.decode(x[:256])
        folder.picture(f"{name}.png", plot.sample_sheet(images, columns=columns, value_range=(0.0, 1.0), title=title))
    elif kind == "text":
        folder.text(f"{name}.txt", "\n".join(sentences(x)) + "\n")


def sentences(x: np.ndarray) -> list[str]:
    from ..systems import text

    return [text.decode(each) for each in np.asarray(x)]


def condition_of(model: rj.DiffusionModel, prompt: str) -> jax.Array:
    """A prompt as the condition of a model.

    Raises:
      ConfigError: for a word outside the grammar, or a model that takes no prompt.
    """
    from ..systems import digit_tokens

    if model.condition is None or np.shape(model.condition) != (3,):
        raise ConfigError(f"condition = {prompt!r} is a prompt, but this model takes none")
    try:
        return jnp.asarray(digit_tokens.parse(prompt))
    except ValueError as error:
        raise ConfigError(f"condition: {error}") from error


def build_token_reward(reward: TokenReward) -> Any:
    """A reward of tokens without its strength.

    Raises:
      ConfigError: for a prompt, word or topic that does not exist.
    """
    try:
        if isinstance(reward, PromptReward):
            from ..systems import digit_tokens, prompt_matchers

            condition = digit_tokens.parse(reward.prompt)
            if tuple(condition) == digit_tokens.NULL:
                raise ValueError(f"the prompt {reward.prompt!r} says nothing that could be rewarded")
            return prompt_matchers.Match(prompt_matchers.load_matcher(reward.matcher), condition)
        from ..systems import text_rewards

        if isinstance(reward, WordReward):
            return text_rewards.ContainsWord(reward.word, reward.penalty)
        if isinstance(reward, LengthReward):
            return text_rewards.Length(reward.length, reward.spread)
        return text_rewards.Topic(text_rewards.load_text_classifier(reward.classifier), reward.topic)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"target.reward: {error}") from error


def judge_of_prompt(name: str, prompt: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """judge(x, shares): a prompt's log-probability, and what of it is right, of pictures made of tokens, by weight.

    Raises:
      ConfigError: for a prompt that does not exist, or another judge than the one who also measures.
    """
    from ..systems import digit_tokens, prompt_matchers

    if name != "judge":
        raise ConfigError(
            f"judge = {name}: of pictures made of tokens only judge is a judge; they may have been steered by reward"
        )
    try:
        condition = digit_tokens.parse(prompt)
    except ValueError as error:
        raise ConfigError(f"judge_prompt: {error}") from error

    def judge(x: np.ndarray, shares: np.ndarray) -> dict[str, float]:
        verdict = prompt_matchers.judge(x, condition)
        return {f"judged_{name}": float(shares @ np.asarray(value)) for name, value in verdict._asdict().items()}

    return judge


def judge_of_sentences(name: str) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
    """judge(x, shares): which part of the corpus sentences look to be from, by weight."""
    from ..systems import text_rewards

    classifier = text_rewards.load_text_classifier(name)

    def judge(x: np.ndarray, shares: np.ndarray) -> dict[str, Any]:
        seen = np.asarray(classifier(jnp.asarray(x))).argmax(-1)
        found = np.bincount(seen, weights=shares, minlength=len(text_rewards.GROUPS))
        return {"judged_groups": dict(zip(text_rewards.GROUPS, found.tolist(), strict=True))}

    return judge


def fill_in(model: rj.DiffusionModel, template: str, one_by_one: bool) -> tuple[rj.DiffusionModel, int | None]:
    """The model of what stands in the blanks of a template, and their number where they are filled in one by one.

    Raises:
      ConfigError: for a template that is none.
    """
    from ..systems import text

    try:
        tokens = text.encode_template(template)
        return rj.infill(model, tokens), int(np.sum(tokens == text.MASK)) if one_by_one else None
    except ValueError as error:
        raise ConfigError(f"template: {error}") from error


def load_tokens(data: str) -> tuple[Any, Any]:
    """Shipped tokens by name, and their conditions where they have any."""
    name, _, split = data.rpartition("_")
    if name == "digit_tokens":
        from ..systems import digit_tokens

        loaded = digit_tokens.load(split)
        return loaded.tokens, loaded.conditions
    from ..systems import text

    return text.load(split), None


def diversity_of_tokens(x: np.ndarray, shares: np.ndarray) -> float:
    """The probability that two draws by weight differ at a position, averaged over positions."""
    agree = 0.0
    for token in np.unique(x):
        agree += np.mean((shares @ (x == token)) ** 2)
    return float(1 - agree)
