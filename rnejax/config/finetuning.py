"""rnejax finetune: what is tuned into the posterior of what, by which paths, and how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .basics import Condition, Grid, Integer, Number, Positive, PositiveInt, Real, Run, Section
from .targets import Label, Rewards

Source = Literal["generated", "inflated", "noised", "back_and_forth", "renoised"]


class Modes(Section):
    """25 modes in the plane, of which nine stay, in new proportions: a posterior of which everything is known."""

    kind: Literal["modes"]
    hidden: PositiveInt = 64
    """width of the network that is added to the prior's denoiser"""
    depth: PositiveInt = 3
    """its residual blocks"""
    t_max: Positive = 1.0
    """of the cosine process: 1, where no signal is left"""


class EachClassReward(Section):
    """The log-probability of the class that is the condition: the posteriors of all ten, as one network's. Or those of
    groups of classes."""

    kind: Literal["each_class"]
    groups: Annotated[list[Annotated[list[Label], Field(min_length=1)]], Field(min_length=2, max_length=10)] | None = (
        None
    )
    """lists of classes, of which any will do; the condition is the number of a list. null for each class by itself"""
    strength: Number = 1.0
    """multiplies the log-probability"""
    classifier: Literal["reward", "judge"] = "reward"
    """which of the shipped classifiers of digits"""


class Pretrained(Section):
    """A model that is there, and a reward."""

    kind: Literal["model"]
    model: str
    """the name of a shipped model, or the path of a saved one"""
    condition: Condition | None = None
    """of the prior: a class or a prompt, or null for the model without a condition"""
    reward: Annotated[Rewards | EachClassReward, Field(discriminator="kind")]
    """log r; of functions in JAX"""
    rank: PositiveInt | None = None
    """tune changes of the weights of so low a rank; null for the weights themselves"""
    parts: Annotated[list[str], Field(min_length=1)] | None = None
    """tune these parts of the network alone, by their names in model.safetensors, such as class_embedding"""
    data: str | None = None
    """what noised paths begin with instead of the buffer: digits_train, digits_validation, digits_test, or an .npz file
    with an array x; where the condition is a class, each is there with one by the classifier's probabilities, and with
    any"""
    prior_samples: PositiveInt | None = None
    """so many samples of the model as it was are added to these data: where it goes wrong, it must be told so, too"""
    above: Real | None = None
    """classes count at larger times only, where they are decided, and up to this one the model stays what it was; with
    parts: [class_embedding] and reward_gradient: false"""


class Infilling(Section):
    """The middle of sentences, which a token model fills in: told what comes before, and rewarded for what follows."""

    kind: Literal["infilling"]
    model: str = "verses"
    """the name of a shipped model of sentences, or the path of a saved one"""
    left: PositiveInt = 12
    """tokens before the gap"""
    middle: PositiveInt = 8
    """tokens of the gap"""
    strength: Positive = 1.0
    """multiplies the log-likelihood of what follows, under the shipped autoregressive model"""
    test_split: Literal["validation", "test"] = "test"
    """where the sentences come from that are looked at in the end"""


class Policy(Section):
    """A policy cloned from logged data, towards exp((Q - V) / temperature): offline reinforcement learning."""

    kind: Literal["policy"]
    model: str
    """the cloned policy: a model of actions whose condition is the observation; scripts/train_policies.py makes some"""
    q_function: str
    """a file of rnejax.policies.save_q_function"""
    data: str
    """an .npz file of transitions, whose observations are learned from, or minari: and the name of a data set"""
    temperature: Positive = 1.0
    """in units of reward: log r = (Q - V) / temperature"""
    environment: str | None = None
    """the name of a gymnasium environment, in which policies are tried in the end"""
    num_episodes: PositiveInt = 20
    """of each policy"""


class Buffer(Section):
    """Clean data for paths that begin with some: chains that follow the posterior, by samples of the tuned model."""

    size: PositiveInt = 1024
    """chains"""
    renew_every: PositiveInt = 100
    """optimiser steps until each of them is proposed to again"""


class Tuning(Section):
    """The optimiser's part."""

    num_steps: PositiveInt = 1000
    """optimiser steps in all"""
    batch_size: PositiveInt = 256
    """paths per step"""
    learning_rate: Positive = 1e-3
    """of Adam, at its largest"""
    normalizer_learning_rate: Positive = 0.05
    """of log Z, where it is learned"""
    warmup_steps: Annotated[Integer, Field(ge=0)] = 20
    """steps of linear growth at the start"""
    decay_steps: Annotated[Integer, Field(ge=0)] | None = None
    """steps of cosine decay at the end; null for all after the warm-up"""
    clip_norm: Positive = 1.0
    """largest norm of a gradient"""
    ema_decay: Annotated[Real, Field(ge=0, lt=1)] = 0.99
    """the share of the moving average that one step keeps"""
    steps_per_call: PositiveInt = 10
    """optimiser steps in one compiled call"""
    report_every: PositiveInt = 100
    """steps between reports"""
    save_every: PositiveInt = 500
    """steps between saved states, from which an interrupted run goes on"""


class FinetuneRun(Run):
    """rnejax finetune: a model into its own posterior p(x) r(x) / Z, by relative trajectory balance."""

    problem: Annotated[Modes | Pretrained | Infilling | Policy, Field(discriminator="kind")]
    """the prior, the reward, and the network"""
    sources: dict[Source, Positive] = {"generated": 1.0}  # noqa: RUF012 - pydantic copies it
    """shares of the paths of a batch: the model's own, those with inflated noise, noised data of the buffer, there and
    back again, and own samples that are noised again"""
    reward_gradient: bool | None = None
    """add a learned multiple of the reward's gradient to the denoiser; by default wherever there is one, which is not
    of tokens. Such a model has no form in a file: false leaves model.safetensors behind"""
    trust: Positive = 1.0
    """nats by which that may move a denoised state"""
    normalizer: Literal["learned", "batch"] = "batch"
    """log Z: a weight of its own, or what the batch says (VarGrad)"""
    normalizer_paths: PositiveInt = 256
    """paths of the model before it is tuned that say what a learned log Z begins with"""
    paths_per_condition: PositiveInt = 1
    """so many paths of each of the first conditions of a batch, for normalizer = batch where none would come twice"""
    inflation: Positive = 2.0
    """of the variance of the steps of inflated paths"""
    turn: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """the part of the steps after which paths turn round that go there and back again"""
    bound: Positive | None = 5.0
    """of a residual, in nats, beyond which the loss grows linearly; null for none"""
    least_log_reward: Number = -100.0
    """what log r counts as where it is less"""
    gradient_steps: PositiveInt | None = None
    """the gradient is of so many steps of each path, drawn at random; null for all"""
    averaged: bool = False
    """the gradient of noised paths is averaged over the last draw of each step: less noise"""
    buffer: Buffer = Buffer()
    """where noised data come from"""
    training: Tuning = Tuning()
    """how long"""
    covariance: Literal["reference", "hutchinson", "diagonal", "full"] | None = None
    """of the reverse kernels of prior and posterior; by default the stored model's; of the modes calibrated"""
    grid: Grid = Grid(num_steps=30, kind="uniform")
    """the time grid of the paths"""
    num_samples: PositiveInt = 20000
    """of the tuned model, which the numbers in metrics.json are of"""
    num_particles: PositiveInt | None = 1024
    """particles of a group when the tuned model proposes for the posterior, which corrects it; null to do without"""
    num_groups: PositiveInt = 16
    """independent groups of them"""
    resampling_share: Annotated[Real, Field(gt=0, le=1)] = 0.2
    """the part of the steps, at the end, in which they may be resampled"""
    chunk_size: PositiveInt = 5000
    """paths that are looked at together at the end"""
