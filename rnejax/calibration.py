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
    weakest: float = 1e-3,
    least: float = 1e-3,
    tolerance: float = 1e-3,
) -> DiffusionModel:
    """The model with the covariance of an elastic network, :class:`rnejax.covariance.ElasticNetwork`.

    Its numbers c, a and b minimise the mean KL divergence of N(D, C) from N(D, C'), C the covariance of x_0 given x_t
    that the denoiser's Jacobian says, C' that of the network: they maximise

        E [log det(C'^{-1}) / 2 - v^T C'^{-1} C v / 2],    C v = (sigma^2 / alpha) (dD/dx) v,

    which is concave in them; v is random, of independent signs, and C v takes one JVP.

    Args:
      key: a typed key.
      model: of configurations (n, space) whose particles' pairs say all there is to say, on any subspace.
      times: the times of the table; in between it is interpolated in log-SNR.
      data: clean points in the user's coordinates, (m, n, space). Default: a pilot run of ``num_samples`` on ``times``.
      kinds: the kind of each particle, integers; pairs of equal kinds share their springs. Default: all alike.
      num_knots: of the functions of distance of every class of pairs, at quantiles of the data's distances.
      num_samples: points used, each with one noise and one JVP at every time.
      weakest: where the variance of x_0 is a smaller share of sigma^2 / alpha^2 than this, there are no springs, and
        the variance is that of :func:`rnejax.calibrate`: a network's Jacobian is a difference of large numbers there.
      least: share of the reference's variance that is added to all variances for the fit and taken off again, so that
        what does not move has a spring of finite stiffness.
      tolerance: nats per point by which the likelihood may still rise where the fit of a level ends.

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
    key_pilot, key_noise, key_error, key_probe = jax.random.split(key, 4)
    x0 = clean_states(key_pilot, model, times, data, num_samples)[:num_samples]
    knots = _knots(np.asarray(x0), classes, num_knots)
    network = ElasticNetwork(*(jnp.zeros(0),) * 3, jnp.asarray(knots, x0.dtype), jnp.asarray(classes), least)
    size = (2, len(knots), num_knots)
    log_snr, ratio = _analytic(key_error, model, x0, times)

    subspace = model.process.subspace

    @jax.jit
    def measure(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> tuple[Array, Array, Array]:
        """Denoised configurations, and for each one random v and (Cov[x_0 | x_t] + least) v."""
        key_noise, key_probe = jax.random.split(key)
        noise = jax.vmap(subspace.project)(jax.random.normal(key_noise, x0.shape, x0.dtype))
        v = jax.vmap(subspace.project)(jax.random.rademacher(key_probe, x0.shape, x0.dtype))
        x = level.alpha * x0 + level.sigma * noise
        excess, moved = jax.jvp(lambda x: model._excess(x, level), (x,), (v,))
        unit = level.sigma**2 / level.alpha**2
        y = (1 + least) * level.reference_posterior_variance * v
        return level.denoised(x, excess), v, y + level.alpha * unit * jax.vmap(subspace.project)(moved)

    @jax.jit
    def newton(found: Array, keys: Array, clean: Array, v: Array, y: Array, level: NoiseLevel) -> tuple[Array, ...]:
        """Sums over points: the objective, two estimates of its gradient, one of minus its Hessian.

        The second gradient takes v for the trace of the network's covariance too: no gradient of anything, but without
        noise where the network is right.
        """

        def one(key: Array, clean: Array, v: Array, y: Array) -> tuple[Array, Array, Array, Array]:
            values, basis = network.spectrum(clean, found[0], found[1:].reshape(size), level, subspace)
            positive = jnp.all(values > 0)
            values = jnp.where(values > 0, values, 1.0)
            root = (basis / jnp.sqrt(values)) @ basis.T
            inside = jax.vmap(lambda row: subspace.project(row.reshape(clean.shape)).reshape(-1))(root)
            seen = _moments(network, clean, jnp.outer(v, y))
            objective = jnp.where(positive, 0.5 * jnp.sum(jnp.log(values)) - 0.5 * found @ seen, -jnp.inf)
            probe = inside.T @ jax.random.rademacher(key, (v.size,), v.dtype)
            features = root @ _features(network, clean, probe.reshape(clean.shape))
            covariance = inside.T @ inside
            whole, paired = (
                0.5 * (_moments(network, clean, each) - seen)
                for each in (covariance, jnp.outer(v, covariance @ v.reshape(-1)))
            )
            return objective, whole, paired, features

        objective, whole, paired, features = jax.vmap(one)(keys, clean, v, y)
        features = features.reshape(-1, features.shape[-1])
        return objective.sum(), whole.sum(axis=0), paired.sum(axis=0), 0.5 * features.T @ features

    def sums(found: np.ndarray, points: tuple[Array, ...], level: NoiseLevel) -> tuple[Any, ...]:
        parts = [
            newton(jnp.asarray(found, x0.dtype), *(each[first : first + 64] for each in points), level)
            for first in range(0, len(x0), 64)
        ]
        return tuple(np.sum([np.asarray(part[k], np.float64) for part in parts], axis=0) for k in range(4))

    levels = model.process.level(times)
    keys = jax.random.split(key_probe, len(x0))
    rows: list[np.ndarray] = []
    start: np.ndarray | None = None
    # From little noise, where every spring is seen, to much, where the stiff ones are all alike: each level starts from
    # the one before it.
    for i, of_reference in zip(np.flatnonzero(np.isfinite(levels.log_snr)), np.asarray(ratio)[::-1], strict=True):
        level = jax.tree.map(lambda leaf, i=i: leaf[i], levels)
        variance, signal = (
            float(each) for each in (of_reference * level.reference_posterior_variance, level.alpha**2 / level.sigma**2)
        )
        found = np.zeros(1 + 2 * len(knots) * num_knots)
        found[0] = 1 / variance - signal
        if signal * variance > weakest:
            points = (keys, *measure(model, x0, jax.random.fold_in(key_noise, i), level))
            if not all(bool(jnp.all(jnp.isfinite(each))) for each in points[1:]):
                raise ValueError(f"the network returned NaN or infinity at t = {times[i]:.6g}, or its derivative did")
            start = found = _maximise(lambda found: sums(found, points, level), found, start, tolerance * len(x0))  # noqa: B023
        rows.append(found)
    rows.reverse()
    table = jnp.asarray(np.stack(rows), x0.dtype)
    stiffness = table[:, 1:].reshape(-1, *size)
    return model.with_covariance(ElasticNetwork(log_snr, stiffness, table[:, 0], network.knots, network.classes, least))


def _maximise(
    sums: Callable[[np.ndarray], tuple[Any, ...]],
    safe: np.ndarray,
    start: np.ndarray | None,
    tolerance: float,
    ridge: float = 1e-6,
    most: int = 30,
) -> np.ndarray:
    """The maximum of a concave function by Newton's method; ``safe`` is inside its domain, ``start`` may be better.

    ``sums`` returns the value (-inf outside), two gradients and the negative Hessian. The first gradient leads to where
    half the Newton decrement, by which the value could still rise, is below ``tolerance``; two steps of the second one,
    which has less noise, follow.
    """

    def step(gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.maximum(np.diag(curvature), 1e-12 * np.diag(curvature).max()))
        scaled = curvature / scale[:, None] / scale + ridge * np.eye(len(scale))
        return np.asarray(np.linalg.solve(scaled, gradient / scale) / scale)

    found, there = safe, sums(safe)
    for share in (1.0, 0.9, 0.5):
        if start is not None and (at := sums(safe + share * (start - safe)))[0] > there[0]:
            found, there = safe + share * (start - safe), at
            break
    for _ in range(most):
        move = step(there[1], there[3])
        if 0.5 * there[1] @ move < tolerance:
            break
        for halving in range(12):
            if (at := sums(found + move / 2**halving))[0] > there[0]:
                found, there = found + move / 2**halving, at
                break
        else:
            break
    for _ in range(2):
        move = step(there[2], there[3])
        if not np.isfinite((at := sums(found + move))[0]):
            break
        found, there = found + move, at
    return found


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


def _moments(network: ElasticNetwork, clean: Array, matrix: Array) -> Array:
    """tr(F M) of a matrix on the subspace, for F = what c, and each a and b, contributes: (1 + 2 classes knots,)."""
    n, space = clean.shape
    direction, shares = pair_directions(clean, network.knots, network.classes)
    blocks = jnp.moveaxis(matrix.reshape(n, space, n, space), 2, 1)
    own = jnp.einsum("iist->ist", blocks)
    relative = own[:, None] + own[None] - blocks - jnp.swapaxes(blocks, 0, 1)
    along = jnp.einsum("ijs,ijst,ijt->ij", direction, relative, direction)
    across = jnp.einsum("ijss->ij", relative) - along
    of_class = jax.nn.one_hot(network.classes, len(network.knots), dtype=clean.dtype)
    parts = 0.5 * jnp.einsum("aij,ijc,ijk->ack", jnp.stack([along, across]), of_class, shares)
    return jnp.concatenate([jnp.trace(matrix)[None], parts.reshape(-1)])


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
