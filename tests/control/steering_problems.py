"""What the tests of steer() share: Gaussians and mixtures whose kernels or answers are known."""

import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.systems import GaussianMixture

STD = 0.6
VP = rj.processes.VariancePreserving(data_std=STD, t_min=0.02)
TIMES = rj.time_grid(VP, 12)
QUIET = {"warn": False, "progress": False}


def gaussian(mean=(0.0, 0.0), process=VP, **options):
    """Gaussian data as wide as the process's reference: reverse kernels are exact, so that any steps are."""
    return GaussianMixture([mean], STD).model(process, **options)


def variance_at_end(process, times):
    return float(process.alpha(times[0]) ** 2 * STD**2 + process.sigma(times[0]) ** 2)


def z_of_normalizer(result, truth):
    """exp(log Z) over groups against exp(truth), in standard errors."""
    relative = np.exp(np.asarray(result.log_normalizer, np.float64) - truth)
    return (relative.mean() - 1) / (relative.std(ddof=1) / np.sqrt(relative.size))


FIRST = GaussianMixture([[-0.8, 0.2], [0.7, -0.4]], 0.4, weights=[1, 2])
SECOND = GaussianMixture([[0.5, 0.5], [-0.2, -0.6]], 0.5, weights=[1, 1])


def growing(t):
    return 2.0 - t


def pull(x):
    return -0.5 * jnp.sum((x - 0.3) ** 2)


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2).sum(-1) / variance - 0.5 * x.shape[-1] * np.log(2 * np.pi * variance)
