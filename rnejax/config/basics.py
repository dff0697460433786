"""What all configurations share: the types of values, the device, the time grid."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # which would be taken for 0 or 1
        raise PydanticCustomError("no_truth_value", "input should be a number, not a truth value")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Real = Annotated[float, BeforeValidator(_no_truth_value)]
PositiveInt = Annotated[Integer, Field(ge=1)]
Condition = Integer | str  # a class, or a prompt
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
    kind: Literal["uniform", "quadratic", "edm", "log_snr", "log_time", "survival", "geometric", "one_token"] | None = (
        None
    )
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
