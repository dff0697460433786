"""Covariances that are measured once and kept with the model: the denoising loss, and springs between particles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_count, check_key
from .covariance import Analytic, ElasticNetwork, pair_directions
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
    return model.with_covariance(Analytic(*_analytic(key_noise, model, x0, times)))


def _analytic(key: Array, model: DiffusionModel, x0: Array, times: np.ndarray) -> tuple[Array, Array]:
    """log-SNR, and the mean squared error per dimension of the denoiser as a ratio to the reference's variance."""
    dimension = model.process.subspace.dimension(model.shape)

    @jax.jit
    def ratio(model: DiffusionModel, x0: Array, key: Array, level: Any) -> Array:
        squares = residuals(model, x0, key, level) ** 2
        return jnp.mean(squares) * (x0[0].size / dimension) / level.reference_posterior_variance

    return tabulate(key, model, x0, times, ratio)


def calibrate_elastic_network(
    key: Array,
    model: DiffusionModel,
    times: Any,
    data: Any = None,
    *,
    kinds: Sequence[int] | None = None,
    num_knots: int = 12,
    num_samples: int = 512,
    num_iterations: int = 2,
    weakest: float = 1e-3,
    ridge: float = 1e-6,
) -> DiffusionModel:
    """The model with the covariance of an elastic network, :class:`rnejax.covariance.ElasticNetwork`.

    Its numbers c, a and b solve a linear least-squares problem: with y = Cov[x_0 | x_t] v for random v, which one JVP
    of the denoiser gives (Cov = (sigma^2 / alpha) dD/dx), the network's precision applied to y has to be v.

    Args:
      key: a typed key.
      model: of configurations (n, space) whose particles' pairs say all there is to say, on any subspace.
      times: the times of the table; in between it is interpolated in log-SNR.
      data: clean points in the user's coordinates, (m, n, space). Default: a pilot run of ``num_samples`` on ``times``.
      kinds: the kind of each particle, integers; pairs of equal kinds share their springs. Default: all alike.
      num_knots: of the functions of distance of every class of pairs, at quantiles of the data's distances.
      num_samples: points used, each with one noise and one JVP at every time.
      num_iterations: of the least squares; each weighs errors of the precision as errors of the covariance that the one
        before has found.
      weakest: where the variance of x_0 is a smaller share of sigma^2 / alpha^2 than this, there are no springs, and
        the variance is that of :func:`rnejax.calibrate`: a network's Jacobian is a difference of large numbers there.
      ridge: of the least squares, relative to the mean square of a feature.

    Costs about two evaluations per point and time, and a pilot run where there are no data.

    Raises:
      ValueError: for unsuitable times, data or kinds, states that are no configurations of two or more particles, a
        network that returned NaN or infinity, or numbers that are not integers of at least 1.
      TypeError: for a key that is not a single typed one.
    """
    check_key(key)
    times = check_times(model, times)
    num_samples, num_knots = check_count("num_samples", num_samples), check_count("num_knots", num_knots)
    classes = classes_of_pairs(model.shape, kinds)
    key_pilot, key_noise, key_error = jax.random.split(key, 3)
    x0 = clean_states(key_pilot, model, times, data, num_samples)[:num_samples]
    knots = _knots(np.asarray(x0), classes, num_knots)
    network = ElasticNetwork(*(jnp.zeros(0),) * 3, jnp.asarray(knots, x0.dtype), jnp.asarray(classes))
    size = (2, len(knots), num_knots)
    log_snr, ratio = _analytic(key_error, model, x0, times)

    @jax.jit
    def noised(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> tuple[Array, Array, Array]:
        """Denoised configurations, y = Cov[x_0 | x_t] v, and v - (alpha^2 / sigma^2) y."""
        key_noise, key_probe = jax.random.split(key)
        project = jax.vmap(model.process.subspace.project)
        noise = project(jax.random.normal(key_noise, x0.shape, x0.dtype))
        probe = project(jax.random.rademacher(key_probe, x0.shape, x0.dtype))
        x = level.alpha * x0 + level.sigma * noise
        excess, moved = jax.jvp(lambda x: model._excess(x, level), (x,), (probe,))
        y = level.reference_posterior_variance * probe + level.sigma**2 / level.alpha * project(moved)
        return level.denoised(x, excess), y, probe - level.alpha**2 / level.sigma**2 * y

    @jax.jit
    def equations(found: Array, clean: Array, y: Array, left: Array, level: NoiseLevel) -> tuple[Array, Array]:
        """The normal equations of some points, of errors of the covariance; ``found`` is the network so far."""

        def one(clean: Array, y: Array, left: Array) -> tuple[Array, Array]:
            values, basis = network.spectrum(clean, found[0], found[1:].reshape(size), level, model.process.subspace)
            covariance = (basis / values) @ basis.T
            return covariance @ _features(network, clean, y), covariance @ left.reshape(-1)

        features, left = jax.vmap(one)(clean, y, left)
        features = features.reshape(-1, features.shape[-1])
        return features.T @ features, features.T @ left.reshape(-1)

    levels = model.process.level(times)
    rows = []
    for i, of_reference in zip(np.flatnonzero(np.isfinite(levels.log_snr))[::-1], np.asarray(ratio), strict=True):
        level = jax.tree.map(lambda leaf, i=i: leaf[i], levels)
        variance, signal = (
            float(of_reference * level.reference_posterior_variance),
            float(level.alpha**2 / level.sigma**2),
        )
        found = np.zeros(1 + np.prod(size))
        found[0] = 1 / variance - signal
        if signal * variance > weakest:
            points = noised(model, x0, jax.random.fold_in(key_noise, i), level)
            for _ in range(num_iterations):
                square, right = np.zeros((len(found), len(found))), np.zeros(len(found))
                for first in range(0, len(x0), 64):
                    some = (each[first : first + 64] for each in points)
                    parts = equations(jnp.asarray(found, x0.dtype), *some, level)
                    square, right = square + np.asarray(parts[0]), right + np.asarray(parts[1])
                if not (np.all(np.isfinite(square)) and np.all(np.isfinite(right))):
                    raise ValueError(
                        f"the network returned NaN or infinity at t = {times[i]:.6g}, or its derivative did"
                    )
                scale = np.sqrt(np.maximum(np.diag(square), 1e-30))
                scaled = square / scale[:, None] / scale + ridge * np.eye(len(square))
                found = np.linalg.solve(scaled, right / scale) / scale
        rows.append(found)
    table = jnp.asarray(np.stack(rows), x0.dtype)
    stiffness = table[:, 1:].reshape(-1, *size)
    return model.with_covariance(ElasticNetwork(log_snr, stiffness, table[:, 0], network.knots, network.classes))


def classes_of_pairs(shape: tuple[int, ...], kinds: Sequence[int] | None) -> np.ndarray:
    """A number for every unordered pair of kinds, of every pair of particles (n, n)."""
    if len(shape) != 2 or shape[0] < 2:
        raise ValueError(f"an elastic network connects two or more particles, shape (n, space): got {tuple(shape)}")
    own = np.zeros(shape[0], int) if kinds is None else np.asarray(kinds)
    if own.shape != shape[:1] or not np.issubdtype(own.dtype, np.integer):
        raise ValueError(f"kinds must be {shape[0]} integers, one per particle: got {kinds}")
    low, high = np.minimum(own[:, None], own), np.maximum(own[:, None], own)
    _, classes = np.unique(np.stack([low, high], -1).reshape(-1, 2), axis=0, return_inverse=True)
    classes = np.asarray(classes).reshape(low.shape)
    # A class that only a particle's pair with itself has is none.
    used = np.unique(classes[~np.eye(len(own), dtype=bool)])
    return np.searchsorted(used, np.where(np.eye(len(own), dtype=bool), used[0], classes))


def _knots(x: np.ndarray, classes: np.ndarray, num_knots: int) -> np.ndarray:
    """Quantiles of the distances of every class, strictly increasing: (classes, num_knots)."""
    first, second = np.triu_indices(x.shape[1], k=1)
    distances = np.linalg.norm(x[:, first] - x[:, second], axis=-1)
    # Neighbours are few among all pairs, and what acts between them changes fast with distance.
    shares = np.linspace(0.0, 1.0, num_knots) ** 2 if num_knots > 1 else np.array([0.5])
    of_pairs = classes[first, second]
    rows = [np.quantile(distances[:, of_pairs == c], shares) for c in range(classes.max() + 1)]
    return np.asarray(rows) + 1e-6 * np.arange(num_knots)


def _features(network: ElasticNetwork, clean: Array, y: Array) -> Array:
    """What c, and each a and b, contributes to the precision applied to y: (n space, 1 + 2 classes knots)."""
    direction, shares = pair_directions(clean, network.knots, network.classes)
    differences = y[:, None] - y[None]
    along = direction * jnp.sum(direction * differences, axis=-1, keepdims=True)
    count = network.knots.shape[0]
    of_class = jax.nn.one_hot(network.classes, count, dtype=y.dtype) * (1 - jnp.eye(len(y), dtype=y.dtype))[..., None]
    parts = [jnp.einsum("ijs,ijc,ijk->isck", part, of_class, shares) for part in (along, differences - along)]
    return jnp.concatenate([y.reshape(-1, 1), jnp.stack(parts, 2).reshape(y.size, -1)], axis=1)


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
