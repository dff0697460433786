"""The keys that a configuration may have: their types, defaults and meanings."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a configuration. Unknown keys are errors; values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------------ what runs share


class Device(Section):
    """Where and how JAX computes."""

    platform: Literal["cpu", "gpu", "cuda", "rocm", "tpu"] | None = None
    """the kind of device; by default whatever JAX finds first"""
    float64: bool = False
    """compute in double precision"""
    matmul_precision: Literal["default", "high", "highest"] | None = None
    """of matrix products on accelerators; JAX's own default there is fast and rounds to about three digits"""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """of a GPU's memory, reserved at the start; by default JAX's own"""
    num_cpu_devices: PositiveInt | None = None
    """split the CPU into this many devices"""


class Grid(Section):
    """The time grid."""

    num_steps: PositiveInt = 100
    """network evaluations per sample"""
    kind: Literal["uniform", "quadratic", "edm", "log_snr"] | None = None
    """spacing; by default the process's own"""
    t_min: Number | None = None
    """where generation ends; by default the process's"""
    t_max: Number | None = None
    """where generation starts; by default the process's"""


class Run(Section):
    """What every run has."""

    seed: Annotated[int, Field(ge=0)] = 0
    """of all random numbers"""
    output: str | None = None
    """the folder for what the run makes; by default outputs/ and the configuration's name"""
    device: Device = Device()
    """where and how JAX computes"""


class ModelRun(Run):
    """A run of a model that exists."""

    model: str
    """the name of a shipped model, or the path of a saved one"""
    covariance: Literal["euler", "reference", "hutchinson", "diagonal", "full"] | None = None
    """of the reverse kernel; by default the one that was saved with the model"""
    grid: Grid = Grid()
    """the time grid"""


# ----------------------------------------------------------------------------------------------------- sample, density


class SampleRun(ModelRun):
    """rnejax sample: draw from the model."""

    condition: int | list[int | None] | None = None
    """a class, several classes that take turns, or null for the model without a condition"""
    num_samples: PositiveInt = 64
    """how many"""


class DensityRun(ModelRun):
    """rnejax density: log-densities of given points."""

    data: str = "digits_test"
    """digits_train, digits_validation, digits_test, or an .npz file with an array x in the model's units"""
    condition: int | None = None
    """a class, or null for the model without a condition"""
    num_points: PositiveInt | None = 64
    """how many of the points, from the first; null for all"""
    num_paths: PositiveInt = 2
    """independent noisings of each point"""
    probability_flow: bool = False
    """also by the probability-flow differential equation, for comparison"""


# ---------------------------------------------------------------------------------------------------------------- steer


class ClassReward(Section):
    """The log-probability of a class under a classifier of digits."""

    kind: Literal["class"]
    label: Annotated[int, Field(ge=0, le=9)]
    """the class"""
    strength: Number = 1.0
    """multiplies the log-probability"""
    classifier: str = "digits_reward"
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


Reward = Annotated[ClassReward | InkReward | FunctionReward, Field(discriminator="kind")]


class Plain(Section):
    """The model under a condition, as it is; a base for others."""

    kind: Literal["model"]
    condition: int | None = None
    """a class, or null for the model without a condition"""


class Temper(Section):
    """A power of the model: colder or warmer."""

    kind: Literal["temper"]
    exponent: Number
    """beta: the inverse temperature"""
    condition: int | None = None
    """a class, or null for the model without a condition"""


class Product(Section):
    """A product of the model under several conditions."""

    kind: Literal["product"]
    conditions: Annotated[list[int | None], Field(min_length=1)]
    """one class, or null, per factor"""
    exponents: list[Number] | None = None
    """one per factor; all 1 by default"""


class Guide(Section):
    """Classifier-free guidance, corrected."""

    kind: Literal["guide"]
    condition: int
    """the class"""
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
    """let the proposal follow the reward's gradient; by default wherever there is one"""


Target = Annotated[Union[Plain, Temper, Product, Guide, Tilt], Field(discriminator="kind")]  # noqa: UP007 - recursive
Tilt.model_rebuild()


class SteerRun(ModelRun):
    """rnejax steer: sample a target that is not the model's own law."""

    target: Target
    """the law to sample"""
    num_particles: PositiveInt = 64
    """particles per group"""
    num_groups: PositiveInt | None = None
    """independent groups of particles, for honest errors"""
    ess_threshold: Annotated[float, Field(ge=0)] = 0.5
    """resample below this fraction of the particles; 0 never, above 1 at every step"""
    proposal: Literal["symmetric", "feynman_kac"] | tuple[Number, Number] = "symmetric"
    """how particles move: a name, or the coefficients [c_a, c_b] of the two kernels"""
    compare_uncorrected: bool = False
    """also run the same proposal without weights: what is done in practice"""
    judge: str | None = None
    """a shipped classifier that judges the result, and is no part of it"""
    judge_label: int | None = None
    """the class the judge should see; by default the one the target asks for"""
