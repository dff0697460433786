"""The keys that the configuration of each command may have: their types, defaults and meanings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .basics import Condition, Integer, ModelRun, Number, Positive, PositiveInt, Real, Run
from .molecules import MoleculeComparison, System
from .targets import Target


class SampleRun(ModelRun):
    """rnejax sample: draw from the model."""

    condition: Condition | Annotated[list[Condition | None], Field(min_length=1)] | None = None
    """a class or a prompt, several that take turns, or null for the model without a condition"""
    template: str | None = None
    """of text: a sentence with blanks, _ for each token that is to be filled in; ... at its end leaves the rest open"""
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


class SteerRun(ModelRun):
    """rnejax steer: sample a target that is not the model's own law."""

    target: Target
    """the law to sample"""
    template: str | None = None
    """of text: a sentence with blanks, as for sample, that the target's law is given"""
    num_particles: PositiveInt = 64
    """particles per group"""
    num_groups: PositiveInt | None = None
    """independent groups of particles, for honest errors"""
    ess_threshold: Annotated[Real, Field(ge=0)] = 0.5
    """resample below this fraction of the particles; 0 never, above 1 at every step"""
    proposal: Literal["symmetric", "feynman_kac", "locally_optimal", "base"] | tuple[Number, Number] | None = None
    """how particles move: a name, or the coefficients [c_a, c_b] of the two kernels; by default symmetric, or, of
    tokens, locally_optimal (the other one is base)"""
    candidates: PositiveInt = 1
    """draws of the proposal among which every particle takes one by its reward, at no cost of network evaluations"""
    remask: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """of masked tokens: the probability with which each is masked again after each step"""
    pilot_particles: PositiveInt | None = None
    """tune the proposal on two pilot runs of so many particles; by default it is taken as it is"""
    compare_uncorrected: bool = False
    """also run the same proposal without weights: what is done in practice"""
    judge: Literal["judge", "reward"] | None = None
    """a shipped classifier that judges the result, and is no part of it"""
    judge_label: Annotated[Integer, Field(ge=0, le=9)] | None = None
    """the class the judge should see; by default the one the target asks for"""
    judge_prompt: str | None = None
    """of pictures made of tokens: what the judge should see; by default what the target asks for"""
    molecule: MoleculeComparison | None = None
    """what the particles should be samples of: metrics, energies and distances against a reference"""


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
