"""Forward (noising) processes: what noise does, exactly."""

from .gaussian import GaussianProcess
from .gaussian_steps import GaussianTransition, NoiseLevel
from .grids import time_grid
from .langevin import CriticallyDamped, PhaseSpaceLangevin
from .linear import CoarseGridWarning, LinearProcess, PrecisionWarning
from .linear_sde import LinearSDE
from .linear_steps import LinearLevel, LinearTransition
from .nonreversible import NonReversible
from .process import Level, Process, Transition
from .schedules import Cosine, DiscreteVariancePreserving, RectifiedFlow, VarianceExploding, VariancePreserving
from .token_steps import AnyOrderTransition, MaskedLevel, MaskedTransition, UniformLevel, UniformTransition
from .tokens import AnyOrder, Masked, TokenProcess, Uniform

__all__ = [
    "AnyOrder",
    "AnyOrderTransition",
    "CoarseGridWarning",
    "Cosine",
    "CriticallyDamped",
    "DiscreteVariancePreserving",
    "GaussianProcess",
    "GaussianTransition",
    "Level",
    "LinearLevel",
    "LinearProcess",
    "LinearSDE",
    "LinearTransition",
    "Masked",
    "MaskedLevel",
    "MaskedTransition",
    "NoiseLevel",
    "NonReversible",
    "PhaseSpaceLangevin",
    "PrecisionWarning",
    "Process",
    "RectifiedFlow",
    "TokenProcess",
    "Transition",
    "Uniform",
    "UniformLevel",
    "UniformTransition",
    "VarianceExploding",
    "VariancePreserving",
    "time_grid",
]
