"""What a run samples instead of the model's own law: rewards and targets."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field

from .basics import Condition, Integer, Number, Positive, PositiveInt, Section

Label = Annotated[Integer, Field(ge=0, le=9)]


class ClassReward(Section):
    """The log-probability of a class, or of any of several, under a classifier of digits."""

    kind: Literal["class"]
    label: Label | Annotated[list[Label], Field(min_length=1)]
    """the class, or several of which any will do"""
    strength: Number = 1.0
    """multiplies the log-probability"""
    classifier: Literal["reward", "judge"] = "reward"
    """which of the shipped classifiers"""


class InkReward(Section):
    """The thickness of the strokes, measured by image processing on the host: a reward without a gradient."""

    kind: Literal["ink"]
    strength: Number = 1.0
    """nats per pixel of thickness; negative for thin strokes"""


class FunctionReward(Section):
    """A reward of the user's own."""

    kind: Literal["function"]
    function: str
    """package.module:name of a function of one example, a scalar in nats"""
    host: bool = False
    """it is a numpy function of a batch"""
    strength: Number = 1.0
    """multiplies it"""


class PromptReward(Section):
    """How well a picture made of tokens fits a prompt: a log-probability under a network that has learned to tell."""

    kind: Literal["prompt"]
    prompt: str
    """such as: a bold slanted seven"""
    strength: Number = 1.0
    """multiplies the log-probability"""
    matcher: Literal["reward", "judge"] = "reward"
    """which of the shipped networks"""


class WordReward(Section):
    """Whether a sentence contains a word."""

    kind: Literal["word"]
    word: str
    """a whole word"""
    penalty: Positive = 10.0
    """nats that a sentence without it loses"""
    strength: Number = 1.0
    """multiplies that"""


class LengthReward(Section):
    """How near a sentence's number of tokens is to one that is wanted: -(n - length)^2 / (2 spread^2)."""

    kind: Literal["length"]
    length: PositiveInt
    """in tokens"""
    spread: Positive = 1.0
    """in tokens"""
    strength: Number = 1.0
    """multiplies it"""


class TopicReward(Section):
    """The log-probability of a part of the corpus under a classifier of sentences."""

    kind: Literal["topic"]
    topic: str
    """one of rnejax.systems.text_rewards.GROUPS: history, poetry, prophets, gospels"""
    strength: Number = 1.0
    """multiplies the log-probability"""
    classifier: Literal["reward", "judge"] = "reward"
    """which of the shipped classifiers"""


Rewards = ClassReward | InkReward | FunctionReward | PromptReward | WordReward | LengthReward | TopicReward
Reward = Annotated[Rewards, Field(discriminator="kind")]


class Plain(Section):
    """The model under a condition, as it is; a base for others."""

    kind: Literal["model"]
    condition: Condition | None = None
    """a class or a prompt, or null for the model without a condition"""


class Temper(Section):
    """A power of the model: colder or warmer."""

    kind: Literal["temper"]
    exponent: Number
    """beta: the inverse temperature"""
    condition: Condition | None = None
    """a class or a prompt, or null for the model without a condition"""


class Product(Section):
    """A product of the model under several conditions, and of other models."""

    kind: Literal["product"]
    conditions: Annotated[list[Condition | None], Field(min_length=1)] = [None]  # noqa: RUF012 - pydantic copies it
    """one class or prompt, or null, per factor of the model; by default the model once, as it is"""
    models: list[str] = []  # noqa: RUF012 - pydantic copies it
    """further factors: names of shipped models, or paths, of the same process, shape and units"""
    exponents: list[Number] | None = None
    """one per factor, those of `conditions` first; all 1 by default"""


class Guide(Section):
    """Classifier-free guidance, corrected."""

    kind: Literal["guide"]
    condition: Condition
    """the class or the prompt"""
    scale: Number = 2.0
    """1 is the conditional model itself"""


class Tilt(Section):
    """Another target, tilted by a reward."""

    kind: Literal["tilt"]
    base: Target = Plain(kind="model")
    """what is tilted"""
    reward: Reward
    """what is preferred"""
    exact: bool = True
    """exact for any network (needs one model with exponent 1), or lower variance"""
    at: Literal["x", "x0"] = "x0"
    """where rewards before the last step are evaluated: the noisy state, or the predicted clean one"""
    gradient: bool | None = None
    """let the proposal follow the reward's gradient; by default wherever there is one, but not for tokens"""
    draws: PositiveInt = 1
    """of tokens at x0: completions that a reward is averaged over, where it is not given probabilities"""


Target = Annotated[Union[Plain, Temper, Product, Guide, Tilt], Field(discriminator="kind")]  # noqa: UP007 - recursive
Tilt.model_rebuild()
