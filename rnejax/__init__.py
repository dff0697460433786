"""rnejax: the density of what diffusion models generate, and control over it.

One fact carries everything: for a diffusion and its time reversal the density ratio of the two path measures is 1, so
marginal densities follow from transition kernels that every model already has (He et al., ICLR 2026).
"""

from . import processes
from .processes import time_grid

__version__ = "0.1.0"

__all__ = ["processes", "time_grid"]
