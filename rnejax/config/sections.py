"""The keys that a configuration may have: their types, defaults and meanings."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # which would be taken for 0 or 1
        raise PydanticCustomError("no_truth_value", "input should be a number, not a truth value")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Real = Annotated[float, BeforeValidator(_no_truth_value)]
PositiveInt = Annotated[Integer, Field(ge=1)]
Number = Annotated[Real, Field(allow_inf_nan=False)]
Atom = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]


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
    memory_fraction: Annotated[Real, Field(gt=0, le=1)] | None = None
    """of a GPU's memory, reserved at the start; by default JAX's own"""
    num_cpu_devices: PositiveInt | None = None
    """split the CPU into this many devices"""


class Grid(Section):
    """The time grid."""

    num_steps: PositiveInt = 100
    """network evaluations per sample"""
    kind: Literal["uniform", "quadratic", "edm", "log_snr", "survival", "geometric", "one_token"] | None = None
    """spacing; by default the process's own. one_token: of masked tokens, one per step, whatever num_steps is"""
    t_min: Number | None = None
    """where generation ends; by default the process's"""
    t_max: Number | None = None
    """where generation starts; by default the process's"""


class Run(Section):
    """What every run has."""

    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """of all random numbers"""
    output: str | None = None
    """the folder for what the run makes; by default outputs/ and the configuration's name"""
    device: Device = Device()
    """where and how JAX computes"""

    @field_validator("output", mode="before")
    @classmethod
    def _a_folder_may_be_a_number_or_a_date(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, date)) and not isinstance(value, bool) else value


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

    condition: Integer | Annotated[list[Integer | None], Field(min_length=1)] | None = None
    """a class, several classes that take turns, or null for the model without a condition"""
    num_samples: PositiveInt = 64
    """how many"""


class DensityRun(ModelRun):
    """rnejax density: log-densities of given points."""

    data: str = "digits_test"
    """digits_train, digits_validation, digits_test, or an .npz file with an array x in the model's units"""
    condition: Integer | None = None
    """a class, or null for the model without a condition"""
    num_points: PositiveInt | None = 64
    """how many of the points, from the first; null for all"""
    num_paths: PositiveInt = 2
    """independent noisings of each point"""
    probability_flow: bool = False
    """also by the probability-flow differential equation, for comparison"""
    tolerance: Positive = 1e-3
    """of its solver, in nats and in the model's units"""
    num_probes: Annotated[Integer, Field(ge=0)] = 1
    """random probes of its divergence; 0 for the exact one, which costs a derivative per dimension"""


# -------------------------------------------------------------------------------------------------------- molecules


class DistanceBias(Section):
    """A harmonic potential on the distance of two atoms, stiffness / 2 (distance - centre)^2."""

    kind: Literal["distance"]
    atoms: tuple[Atom, Atom]
    """numbered from 0"""
    stiffness: Number
    """in the system's units"""
    centre: Number
    """in the system's unit of length"""


class TorsionBias(Section):
    """A potential on a torsion angle, strength (1 - cos(angle - centre))."""

    kind: Literal["torsion"]
    atoms: tuple[Atom, Atom, Atom, Atom]
    """numbered from 0"""
    strength: Number
    """in the system's unit of energy"""
    centre: Number
    """in radians"""


Bias = Annotated[DistanceBias | TorsionBias, Field(discriminator="kind")]


class Particles(Section):
    """What systems of particles share."""

    biases: list[Bias] = []
    """potentials that are added to the energy"""


class MullerBrownSystem(Section):
    """Three wells in the plane."""

    kind: Literal["muller_brown"]
    scale: Positive = 1.0
    """multiplies the energy"""


class DoubleWellSystem(Particles):
    """Particles whose pairs sit in double wells; DW-4 by default."""

    kind: Literal["double_well"]
    num_particles: PositiveInt = 4
    """how many"""
    dimension: PositiveInt = 2
    """of the space they live in"""


class LennardJonesSystem(Particles):
    """A cluster of Lennard-Jones particles in a harmonic trap; LJ-13 by default."""

    kind: Literal["lennard_jones"]
    num_particles: PositiveInt = 13
    """how many"""
    dimension: PositiveInt = 3
    """of the space they live in"""
    strength: Positive = 2.0
    """depth of a pair's well; 2 is the convention of DEM and PITA"""


class AlanineDipeptideSystem(Particles):
    """22 atoms in implicit solvent; nm, kJ/mol, K."""

    kind: Literal["alanine_dipeptide"]


System = Annotated[
    MullerBrownSystem | DoubleWellSystem | LennardJonesSystem | AlanineDipeptideSystem, Field(discriminator="kind")
]


class MoleculeComparison(Section):
    """A molecular system at one temperature, to hold particles against."""

    system: System
    """the system that the model was trained on"""
    temperature: Positive
    """that of the target, in the system's unit"""
    reference: str | None = None
    """the name of shipped samples at this temperature, a file that rnejax reference wrote, or an .npz file with x"""
    reweight: bool = True
    """also weigh the particles for the true energy, at the last step"""


# ---------------------------------------------------------------------------------------------------------------- steer


class ClassReward(Section):
    """The log-probability of a class under a classifier of digits."""

    kind: Literal["class"]
    label: Annotated[Integer, Field(ge=0, le=9)]
    """the class"""
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


Reward = Annotated[ClassReward | InkReward | FunctionReward, Field(discriminator="kind")]


class Plain(Section):
    """The model under a condition, as it is; a base for others."""

    kind: Literal["model"]
    condition: Integer | None = None
    """a class, or null for the model without a condition"""


class Temper(Section):
    """A power of the model: colder or warmer."""

    kind: Literal["temper"]
    exponent: Number
    """beta: the inverse temperature"""
    condition: Integer | None = None
    """a class, or null for the model without a condition"""


class Product(Section):
    """A product of the model under several conditions, and of other models."""

    kind: Literal["product"]
    conditions: Annotated[list[Integer | None], Field(min_length=1)] = [None]
    """one class, or null, per factor of the model; by default the model once, as it is"""
    models: list[str] = []
    """further factors: names of shipped models, or paths, of the same process, shape and units"""
    exponents: list[Number] | None = None
    """one per factor, those of `conditions` first; all 1 by default"""


class Guide(Section):
    """Classifier-free guidance, corrected."""

    kind: Literal["guide"]
    condition: Integer
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
    ess_threshold: Annotated[Real, Field(ge=0)] = 0.5
    """resample below this fraction of the particles; 0 never, above 1 at every step"""
    proposal: Literal["symmetric", "feynman_kac"] | tuple[Number, Number] = "symmetric"
    """how particles move: a name, or the coefficients [c_a, c_b] of the two kernels"""
    pilot_particles: PositiveInt | None = None
    """tune the proposal on two pilot runs of so many particles; by default it is taken as it is"""
    compare_uncorrected: bool = False
    """also run the same proposal without weights: what is done in practice"""
    judge: Literal["judge", "reward"] | None = None
    """a shipped classifier that judges the result, and is no part of it"""
    judge_label: Annotated[Integer, Field(ge=0, le=9)] | None = None
    """the class the judge should see; by default the one the target asks for"""
    molecule: MoleculeComparison | None = None
    """what the particles should be samples of: metrics, energies and distances against a reference"""


# ------------------------------------------------------------------------------------------------------- reference


class ReferenceRun(Run):
    """rnejax reference: samples of a system at several temperatures, by parallel tempering with Hamiltonian moves."""

    system: System
    """what is sampled"""
    temperatures: Annotated[list[Positive], Field(min_length=1)]
    """the ladder, in strict order, in the system's unit (K for molecules)"""
    keep: list[Positive] | None = None
    """those whose samples are stored; all by default"""
    num_sets: PositiveInt = 2
    """independent runs, each with a key of its own: one against another is the floor of every metric"""
    num_chains: PositiveInt = 16
    """replicas of the whole ladder in each run; an even number"""
    num_samples: PositiveInt = 500
    """of each chain at each temperature"""
    rounds_between: PositiveInt = 10
    """moves and swaps from one sample to the next"""
    burn_in: PositiveInt = 1000
    """rounds before the first sample, and of the hot start"""
    integration_steps: PositiveInt = 10
    """leapfrog steps per move"""
    step_size: Positive = 0.01
    """of the integrator, before it is tuned; in units of length"""
    target_acceptance: Annotated[Real, Field(gt=0, lt=1)] = 0.8
    """where tuning aims"""
    batch_size: PositiveInt | None = None
    """configurations that move at a time; all by default, a few where a CPU's cache is small"""


# ---------------------------------------------------------------------------------------------------------------- train


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
    """How the network is fitted: denoising score matching, Adam, a moving average of the weights."""

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
