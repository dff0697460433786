"""rnejax: the density of what diffusion models generate, and control over it.

One fact carries everything: for a diffusion and its time reversal the density ratio of the two path measures is 1, so
marginal densities follow from transition kernels that every model already has (He et al., ICLR 2026).
"""

from importlib import import_module
from typing import Any

from . import control, covariance, increments, kernels, processes, smc, transforms
from .calibration import calibrate, calibrate_elastic_network
from .control import guide, observe, product, reweight, steer, temper, tilt, tune_proposal
from .density import log_density, sample
from .increments import increment
from .infilling import infill
from .model import DiffusionModel
from .persistence import load_model, save_model
from .probability_flow import probability_flow_log_density
from .processes import time_grid
from .smc import resample, weighted_mean

__version__ = "0.1.0"

__all__ = [
    "DiffusionModel",
    "calibrate",
    "calibrate_elastic_network",
    "control",
    "covariance",
    "guide",
    "increment",
    "increments",
    "infill",
    "kernels",
    "load_model",
    "log_density",
    "networks",
    "observe",
    "plot",
    "probability_flow_log_density",
    "processes",
    "product",
    "regimes",
    "resample",
    "reweight",
    "sample",
    "save_model",
    "smc",
    "steer",
    "systems",
    "temper",
    "tilt",
    "time_grid",
    "training",
    "transforms",
    "tune_proposal",
    "weighted_mean",
]

_ON_DEMAND = ("networks", "plot", "regimes", "systems", "training")  # what needs flax, optax, matplotlib or data


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
