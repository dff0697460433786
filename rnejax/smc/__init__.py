"""Sequential Monte Carlo for any Feynman-Kac model: weights, resampling, the loop over time, diagnostics.

Knows nothing of diffusion. Everything in the library that runs over time, weighted or not, runs through `run`.
"""

from rnejax.smc.contract import FeynmanKac, SMCInfo, SMCResult
from rnejax.smc.diagnostics import diagnose, pareto_k
from rnejax.smc.estimates import WeightedParticles, log_normalizer_with_error, resample, weighted_mean
from rnejax.smc.faults import Fault, FaultCode, SMCError
from rnejax.smc.loop import run
from rnejax.smc.resampling import SCHEMES, Resampling
from rnejax.smc.weights import CompensatedSum, effective_ancestors, effective_sample_size, log_mean_exp, normalize

__all__ = [
    "SCHEMES",
    "CompensatedSum",
    "Fault",
    "FaultCode",
    "FeynmanKac",
    "Resampling",
    "SMCError",
    "SMCInfo",
    "SMCResult",
    "WeightedParticles",
    "diagnose",
    "effective_ancestors",
    "effective_sample_size",
    "log_mean_exp",
    "log_normalizer_with_error",
    "normalize",
    "pareto_k",
    "resample",
    "run",
    "weighted_mean",
]
