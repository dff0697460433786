"""The analytic covariance: the denoising loss, measured once and kept with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_count, check_key
from .covariance import Analytic
from .density import check_points, check_times, generate
from .kernels import Array
from .model import DiffusionModel
from .processes import NoiseLevel


def calibrate(
    key: Array,
    model: DiffusionModel,
    times: Any,
    data: Any = None,
    *,
    num_samples: int = 1024,
    repeats: int = 1,
) -> DiffusionModel:
    r"""The model with the analytic covariance, Cov[x_0 | x_t] = (E|x_0 - D(x_t, t)|^2 / d) I, tabulated over ``times``.

    Args:
      key: a typed key.
      model: any diffusion model; its present covariance generates the pilot run (if that is euler, the reference's
        does).
      times: the times of the table; in between it is interpolated in log-SNR.
      data: clean points in the user's coordinates, (n, *shape). Default: a pilot run of ``num_samples`` on
        ``times``, which makes the table one of the *generated* law.
      num_samples: of the pilot run.
      repeats: noisings of every point at every time.

    Costs ``repeats`` evaluations per point and time, and a pilot run. Source: Bao et al. 2022 (Analytic-DPM).

    Raises:
      ValueError: for unsuitable times or data, or numbers that are not integers of at least 1.
      TypeError: for a key that is not a single typed one.
    """
    check_key(key)
    times = check_times(model, times)
    num_samples, repeats = check_count("num_samples", num_samples), check_count("repeats", repeats)
    key_pilot, key_noise = jax.random.split(key)
    x0 = jnp.repeat(clean_states(key_pilot, model, times, data, num_samples), repeats, axis=0)
    process = model.process
    dimension = process.subspace.dimension(model.shape)

    @jax.jit
    def ratio(model: DiffusionModel, x0: Array, key: Array, level: Any) -> Array:
        squares = residuals(model, x0, key, level) ** 2
        return jnp.mean(squares) * (x0[0].size / dimension) / level.reference_posterior_variance

    return model.with_covariance(Analytic(*tabulate(key_noise, model, x0, times, ratio)))


def clean_states(key: Array, model: DiffusionModel, times: np.ndarray, data: Any, num_samples: int) -> Array:
    """Clean states in the network's coordinates: those of the data given, else of a pilot run."""
    if data is None:
        pilot = model.with_covariance("reference") if model.covariance.euler else model
        data = generate(key, pilot, times, num_samples).x
    return jax.vmap(model.transform.to_model)(check_points(model, data))


def residuals(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> Array:
    """x_0 - D(x_t, t) of clean states (n, *shape), each noised once to one level."""
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    x = level.alpha * x0 + level.sigma * jax.vmap(model.process.subspace.project)(noise)
    return x0 - level.denoised(x, model._excess(x, level))


def tabulate(
    key: Array, model: DiffusionModel, x0: Array, times: np.ndarray, measure: Callable[..., Array]
) -> tuple[Array, Array]:
    """log-SNR (increasing, finite) and ``measure(model, x0, key, level)`` at the times of a grid.

    Raises:
      ValueError: where the network returned NaN or infinity, naming the time; for a grid whose every time has no signal
        or no noise.
    """
    levels = model.process.level(times)
    keys = jax.random.split(key, len(times))
    # log-SNR falls with time; interpolation wants it increasing, and finite: not where alpha or sigma vanish.
    keep = np.flatnonzero(np.isfinite(levels.log_snr))[::-1]
    if keep.size == 0:
        raise ValueError(
            f"no time of the grid has both signal and noise, between {times[0]:g} and {times[-1]:g}: nothing to measure"
        )
    table = jnp.stack([measure(model, x0, keys[i], jax.tree.map(lambda leaf, i=i: leaf[i], levels)) for i in keep])
    failed = times[keep[~np.isfinite(np.asarray(table))]]
    if failed.size:
        where = f"at t = {failed.min():.6g}"
        raise ValueError(f"the network returned NaN or infinity {where} while its errors were measured")
    return levels.log_snr[keep], table
