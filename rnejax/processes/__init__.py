"""Forward (noising) processes: what noise does, exactly."""

from .gaussian import GaussianProcess, GaussianTransition, NoiseLevel
from .grids import time_grid
from .schedules import Cosine, DiscreteVariancePreserving, RectifiedFlow, VarianceExploding, VariancePreserving

__all__ = [
    "Cosine",
    "DiscreteVariancePreserving",
    "GaussianProcess",
    "GaussianTransition",
    "NoiseLevel",
    "RectifiedFlow",
    "VarianceExploding",
    "VariancePreserving",
    "time_grid",
]
