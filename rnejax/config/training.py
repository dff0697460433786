"""rnejax train: processes, networks, data, and how a network is fitted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .basics import Grid, Integer, Number, Positive, PositiveInt, Real, Run, Section
from .molecules import System


class CosineProcess(Section):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    kind: Literal["cosine"]
    t_min: Positive | None = None
    """smallest time; by default the process's"""


class RectifiedFlowProcess(Section):
    """alpha = 1 - t, sigma = t."""

    kind: Literal["rectified_flow"]
    t_min: Positive | None = None
    """smallest time; by default the process's"""


class VariancePreservingProcess(Section):
    """The linear schedule of DDPM in continuous time."""

    kind: Literal["variance_preserving"]
    t_min: Positive | None = None
    """smallest time; by default the process's"""
    beta_min: Positive = 0.1
    """rate of noising at t = 0"""
    beta_max: Positive = 20.0
    """rate of noising at t = 1"""


class VarianceExplodingProcess(Section):
    """alpha = 1, sigma = t."""

    kind: Literal["variance_exploding"]
    sigma_min: Positive = 1e-3
    """smallest noise level"""
    sigma_max: Positive = 10.0
    """largest noise level"""


Survival = Literal["linear", "cosine", "log_linear"]


class MaskedProcess(Section):
    """Masked tokens; their number and the length of a sequence are those of the data."""

    kind: Literal["masked"]
    schedule: Survival = "linear"
    """the probability that a token has survived until time t"""


class UniformProcess(Section):
    """Tokens that are drawn anew; their number and the length of a sequence are those of the data."""

    kind: Literal["uniform"]
    schedule: Survival = "linear"
    """the probability that a token has survived until time t"""


Process = Annotated[
    CosineProcess
    | RectifiedFlowProcess
    | VariancePreservingProcess
    | VarianceExplodingProcess
    | MaskedProcess
    | UniformProcess,
    Field(discriminator="kind"),
]


class Network(Section):
    """Which network, and what it is built with."""

    name: str = "unet"
    """one of rnejax.networks.NETWORKS"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """of its constructor"""


class MoleculeData(Section):
    """Samples of a molecular system at one temperature."""

    system: System
    """what they are samples of"""
    reference: str
    """the name of shipped samples, a file that rnejax reference wrote, of which the last set validates and the others
    train, or an .npz file with an array x (n, atoms, 3) of your own simulation, of which the last fifth validates"""
    temperature: Positive
    """one of those stored there, or that of your simulation"""
    scale: Positive | None = None
    """the network's unit of length, in the system's; by default the data get a mean square of 1. Models that are to be
    multiplied must agree on it"""


class TextData(Section):
    """A text of your own."""

    corpus: str
    """a file with one sentence per line; a twentieth of them validates"""


Term = Literal["score", "rne", "rne_euler", "fokker_planck", "prior"]


class Training(Section):
    """How the network is fitted: denoising score matching, Adam or Muon, a moving average of the weights."""

    optimizer: Literal["adam", "muon"] = "adam"
    """Adam for all, or Muon for the hidden matrices, which a transformer learns faster with"""
    num_steps: PositiveInt = 6000
    """optimiser steps in all"""
    batch_size: PositiveInt = 32
    """examples per step"""
    microbatch_size: PositiveInt | None = None
    """gradients over so many at a time, a divisor of batch_size, added up; all at once by default"""
    learning_rate: Positive = 1e-3
    """its largest value"""
    warmup_steps: Annotated[Integer, Field(ge=0)] = 200
    """steps of linear growth at the start"""
    decay_steps: Annotated[Integer, Field(ge=0)] | None = 1000
    """steps of cosine decay at the end; null for all after the warm-up"""
    clip_norm: Positive = 1.0
    """largest norm of a gradient"""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """decoupled"""
    ema_decay: Annotated[Real, Field(ge=0, lt=1)] = 0.999
    """the share of the moving average that one step keeps"""
    label_dropout: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """share of the images whose class is hidden: what guidance needs; of digit_tokens, of each of the three things that
    a prompt can say; molecules and text have none"""
    dropout: bool = True
    """whether the network's dropout is on"""
    weighting: Literal["x0", "epsilon", "score", "v", "velocity"] | None = None
    """the quantity whose squared error is the loss; by default the one that is predicted"""
    log_snr_share: Annotated[Real, Field(ge=0, le=1)] = 0.5
    """share of the noise levels drawn uniformly in log-SNR, as the likelihood weighs them; the rest uniform in t"""
    log_snr_range: tuple[Number, Number] | None = (-2.0, 12.8)
    """where those are drawn; null for the whole range"""
    antithetic: bool = False
    """take every noise and its opposite, two evaluations per example: less noise in gradients where noise is small"""
    discrete_steps: PositiveInt | None = None
    """of tokens: the bound of a grid of so many steps; by default that of continuous time"""
    terms: dict[Term, Positive] | None = None
    """of an energy's loss, with their weights; by default score matching alone"""
    residual_covariance: Literal["reference", "hutchinson", "diagonal", "full"] = "full"
    """of the reverse kernel in the residual rne"""
    steps_per_call: PositiveInt = 1
    """optimiser steps in one compiled call; more is faster on an accelerator"""
    report_every: PositiveInt = 200
    """steps between reports, which evaluate the moving average on validation examples"""
    save_every: PositiveInt = 200
    """steps between saved states, from which an interrupted run goes on"""


class TrainRun(Run):
    """rnejax train: make a diffusion model."""

    data: Literal["digits", "digit_tokens", "verses"] | MoleculeData | TextData = "digits"
    """what it is a model of"""
    process: Process = CosineProcess(kind="cosine")
    """what noise does"""
    prediction: Literal["score", "x0", "epsilon", "v", "velocity", "energy", "logits", "concrete_score"] = "v"
    """what the network returns; of tokens, logits or a concrete score"""
    network: Network = Network()
    """which network"""
    training: Training = Training()
    """how it is fitted"""
    calibration_steps: PositiveInt = 100
    """times at which the covariance of the reverse kernel is tabulated, on validation examples"""
    calibration: Literal["analytic", "elastic_network"] = "analytic"
    """of the covariance: one number per time, or that of springs between particles"""
    calibration_knots: PositiveInt = 12
    """of the springs' functions of distance, for every pair of kinds of particles"""
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the stored weights"""
    num_samples: PositiveInt = 100
    """drawn at the end: digits in ten classes in turn, molecules to be compared with the reference, sentences"""
    grid: Grid = Grid()
    """of those samples"""
