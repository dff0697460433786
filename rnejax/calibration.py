"""Covariances that are measured once and kept with the model: the denoising loss, and springs between particles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_count, check_key, check_number
from .covariance import Analytic, ElasticNetwork, pair_directions
from .density import check_points, check_times, generate
from .kernels import Array
from .model import DiffusionModel
from .processes import NoiseLevel
from .processes.gaussian import require_scalar


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
    if model.process.is_discrete:
        raise ValueError(f"{type(model.process).__name__} is a process of tokens, which have no covariance to measure")
    times = check_times(model, times)
    num_samples, repeats = check_count("num_samples", num_samples), check_count("repeats", repeats)
    key_pilot, key_noise = jax.random.split(key)
    x0 = jnp.repeat(clean_states(key_pilot, model, times, data, num_samples), repeats, axis=0)
    return model.with_covariance(Analytic(*_analytic(key_noise, model, x0, times)))


def _analytic(key: Array, model: DiffusionModel, x0: Array, times: np.ndarray) -> tuple[Array, Array]:
    """log-SNR, and the mean squared error per dimension of the denoiser as a ratio to the reference's variance."""
    dimension = model.process.subspace.dimension(x0.shape[1:])

    @jax.jit
    def ratio(model: DiffusionModel, x0: Array, key: Array, level: Any) -> Array:
        errors = jax.vmap(level.in_posterior_std)(residuals(model, x0, key, level))
        return jnp.mean(errors**2) * (x0[0].size / dimension)

    return tabulate(key, model, x0, times, ratio)


def calibrate_elastic_network(
    key: Array,
    model: DiffusionModel,
    times: Any,
    data: Any = None,
    *,
    kinds: Sequence[int] | None = None,
    num_knots: int = 12,
    num_samples: int = 128,
    weakest: float = 1e-3,
    least: float = 1e-3,
    tolerance: float = 1e-6,
) -> DiffusionModel:
    """The model with the covariance of an elastic network, `rnejax.covariance.ElasticNetwork`.

    Its numbers c, a and b minimise the mean KL divergence of N(D, C) from N(D, C'), C the covariance of x_0 given x_t
    that the denoiser's Jacobian says, C' that of the network: they maximise

        E [log det(C'^{-1}) / 2 - tr(C'^{-1} C) / 2],    C = (sigma^2 / alpha) dD/dx, its negative eigenvalues set to 0,

    which is concave in them. Newton's method finds the maximum, with the best step along each of its directions: the
    eigenvalues of the change say it at once. (A network's Jacobian is no covariance where noise is large and bonds are
    stiff; without the zeros there is no maximum.)

    Args:
      key: a typed key.
      model: of configurations (n, space) whose particles' pairs say all there is to say, on any subspace.
      times: the times of the table; in between it is interpolated in log-SNR.
      data: clean points in the user's coordinates, (m, n, space). Default: a pilot run of ``num_samples`` on ``times``.
      kinds: the kind of each particle, integers; pairs of equal kinds share their springs. Default: all alike.
      num_knots: of the functions of distance of every class of pairs, at quantiles of the data's distances.
      num_samples: points used, each with one noise at every time, and one JVP per coordinate.
      weakest: where the variance of x_0 is a smaller share of sigma^2 / alpha^2 than this, there are no springs, and
        the variance is that of `rnejax.calibrate`: a network's Jacobian is a difference of large numbers there.
      least: share of the reference's variance that is added to all variances for the fit and taken off again, so that
        what does not move has a spring of finite stiffness.
      tolerance: nats per point by which the likelihood may still rise where the fit of a level ends.

    Costs about two evaluations per point, coordinate and time, and a pilot run where there are no data.

    Source: Atilgan et al. 2001 for the anisotropic elastic network; the fit is that of a Gaussian by its covariance.

    Raises:
      ValueError: for unsuitable times, data or kinds, states that are no configurations of two or more particles, a
        network that returned NaN or infinity, counts that are not integers of at least 1, weakest or least below 0, or
        a tolerance that is not positive.
      TypeError: for a key that is not a single typed one.
    """
    check_key(key)
    times = check_times(model, times)
    num_samples, num_knots = check_count("num_samples", num_samples), check_count("num_knots", num_knots)
    if min(check_number("weakest", weakest), check_number("least", least)) < 0:
        raise ValueError(f"weakest and least must not be negative: got {weakest:g} and {least:g}")
    tolerance = check_number("tolerance", tolerance, positive=True)
    require_scalar(model.process, "the covariance of a denoiser")
    classes = classes_of_pairs(model.shape, kinds)
    key_pilot, key_noise, key_error = jax.random.split(key, 3)
    x0 = clean_states(key_pilot, model, times, data, num_samples)[:num_samples]
    knots = _knots(np.asarray(x0), classes, num_knots)
    network = ElasticNetwork(*(jnp.zeros(0),) * 3, jnp.asarray(knots, x0.dtype), jnp.asarray(classes), least)
    size = (2, len(knots), num_knots)
    log_snr, ratio = _analytic(key_error, model, x0, times)
    subspace = model.process.subspace
    project = jax.vmap(subspace.project)
    d = int(x0[0].size)
    on = project(jnp.eye(d, dtype=x0.dtype).reshape(d, *model.shape)).reshape(d, d)

    @jax.jit
    def measure(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> tuple[Array, Array]:
        """Denoised configurations, and Cov[x_0 | x_t] + least of each, (n, d, d)."""
        noise = project(jax.random.normal(key, x0.shape, x0.dtype))
        x = level.alpha * x0 + level.sigma * noise
        excess, jvp = jax.linearize(lambda x: model._excess(x, level), x)
        rows = jax.lax.map(lambda v: jvp(jnp.broadcast_to(v.reshape(model.shape), x0.shape)).reshape(-1, d), on)
        moved = on @ jnp.moveaxis(rows, 0, 1) * (level.sigma**2 / level.alpha)
        covariance = 0.5 * (moved + jnp.swapaxes(moved, 1, 2)) + level.reference_posterior_variance * on
        values, basis = jnp.linalg.eigh(covariance)
        covariance = (basis * jnp.maximum(values, 0.0)[:, None]) @ jnp.swapaxes(basis, 1, 2)
        return level.denoised(x, excess), covariance + least * level.reference_posterior_variance * on

    def precision_root(found: Array, clean: Array, level: NoiseLevel) -> tuple[Array, Array]:
        """Eigenvalues of the precision, and the root of its inverse."""
        values, basis = network.spectrum(clean, found[0], found[1:].reshape(size), level, subspace)
        return values, (basis / jnp.sqrt(jnp.where(values > 0, values, 1.0))) @ basis.T

    @jax.jit
    def newton(found: Array, points: tuple[Array, ...], level: NoiseLevel) -> tuple[Array, ...]:
        """Sums over points: the objective, its gradient, an estimate of minus its Hessian."""

        def one(key: Array, clean: Array, covariance: Array) -> tuple[Array, Array, Array]:
            values, root = precision_root(found, clean, level)
            inside = root @ on
            moments = _moments(network, clean, covariance)
            objective = 0.5 * jnp.sum(jnp.log(jnp.where(values > 0, values, 1.0))) - 0.5 * found @ moments
            objective = jnp.where(jnp.all(values > 0), objective, -jnp.inf)
            probe = inside.T @ jax.random.rademacher(key, (d,), clean.dtype)
            features = root @ _features(network, clean, probe.reshape(clean.shape))
            return objective, 0.5 * (_moments(network, clean, inside.T @ inside) - moments), features

        objective, gradient, features = jax.vmap(one)(*points)
        features = features.reshape(-1, features.shape[-1])
        return objective.sum(), gradient.sum(axis=0), 0.5 * features.T @ features

    @jax.jit
    def stretch(found: Array, move: Array, points: tuple[Array, ...], level: NoiseLevel) -> tuple[Array, Array]:
        """Along ``move``: eigenvalues of its change of the precision in terms of the precision, and the linear part."""

        def one(key: Array, clean: Array, covariance: Array) -> tuple[Array, Array]:
            _, root = precision_root(found, clean, level)
            change = (
                on @ (network.springs(clean, move[1:].reshape(size)) + move[0] * jnp.eye(d, dtype=clean.dtype)) @ on
            )
            change = root @ change @ root
            return jnp.linalg.eigvalsh(0.5 * (change + change.T)), move @ _moments(network, clean, covariance)

        changes, linear = jax.vmap(one)(*points)
        return changes, linear.sum()

    def in_parts(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        *numbers, points, level = arguments
        return [
            function(
                *(jnp.asarray(each, x0.dtype) for each in numbers),
                jax.tree.map(lambda leaf: leaf[first : first + 64], points),  # noqa: B023
                level,
            )
            for first in range(0, len(x0), 64)
        ]

    def sums(found: np.ndarray, points: tuple[Array, ...], level: NoiseLevel) -> tuple[Any, ...]:
        parts = in_parts(newton, found, points, level)
        return tuple(np.sum([np.asarray(part[k], np.float64) for part in parts], axis=0) for k in range(3))

    def along(found: np.ndarray, move: np.ndarray, points: tuple[Array, ...], level: NoiseLevel) -> tuple[Any, Any]:
        parts = in_parts(stretch, found, move, points, level)
        return np.concatenate([np.asarray(part[0], np.float64) for part in parts]), sum(
            float(part[1]) for part in parts
        )

    levels = model.process.level(times)
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
            key_level, key_newton = jax.random.split(jax.random.fold_in(key_noise, i))
            points = (jax.random.split(key_newton, len(x0)), *measure(model, x0, key_level, level))
            if not all(bool(jnp.all(jnp.isfinite(each))) for each in points[1:]):
                raise ValueError(f"the network returned NaN or infinity at t = {times[i]:.6g}, or its derivative did")
            start = found = _maximise(
                lambda found: sums(found, points, level),  # noqa: B023
                lambda found, move: along(found, move, points, level),  # noqa: B023
                found,
                start,
                tolerance * len(x0),
            )
        rows.append(found)
    rows.reverse()
    table = jnp.asarray(np.stack(rows), x0.dtype)
    stiffness = table[:, 1:].reshape(-1, *size)
    return model.with_covariance(ElasticNetwork(log_snr, stiffness, table[:, 0], network.knots, network.classes, least))


def _maximise(
    sums: Callable[[np.ndarray], tuple[Any, ...]],
    along: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]],
    safe: np.ndarray,
    start: np.ndarray | None,
    tolerance: float,
    ridge: float = 1e-6,
    most: int = 30,
) -> np.ndarray:
    """The maximum of sum log det(precision) / 2 - linear by Newton's method; ``safe`` is inside its domain.

    ``sums`` returns the value (-inf outside), the gradient and the negative Hessian; ``along`` what `_best_step`
    needs. It ends where half the Newton decrement, by which the value could still rise, is below ``tolerance``.
    """

    def step(gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.maximum(np.diag(curvature), 1e-12 * np.diag(curvature).max()))
        scaled = curvature / scale[:, None] / scale + ridge * np.eye(len(scale))
        return np.asarray(np.linalg.solve(scaled, gradient / scale) / scale)

    found = safe
    if start is not None:
        found = safe + _best_step(*along(safe, start - safe)) * (start - safe)
    there = sums(found)
    for _ in range(most):
        move = step(there[1], there[2])
        if 0.5 * there[1] @ move < tolerance:
            return found + move
        share = _best_step(*along(found, move))
        at = sums(found + share * move)
        if not np.isfinite(at[0]):  # rounding, at the end of the domain
            break
        found, there = found + share * move, at
    return found


def _best_step(changes: np.ndarray, linear: float, longest: float = 4.0) -> float:
    """The s in [0, longest] that maximises sum log(1 + s changes) / 2 - s linear / 2, concave, by bisection.

    An end of the domain is not approached by more than 0.95 of the way.
    """
    lowest = float(changes.min())
    low, high = 0.0, longest if lowest >= 0 else min(longest, -0.95 / lowest)
    for _ in range(40):
        middle = 0.5 * (low + high)
        if np.sum(changes / (1 + middle * changes)) > linear:
            low = middle
        else:
            high = middle
    return low


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
    """Clean data in the network's coordinates: those of the states given, else of a pilot run."""
    if data is None:
        pilot = model.with_covariance("reference") if model.covariance.euler else model
        data = generate(key, pilot, times, num_samples).x
    return jax.vmap(lambda x: model.process.data_of(model.transform.to_model(x)))(check_points(model, data))


def residuals(model: DiffusionModel, x0: Array, key: Array, level: NoiseLevel) -> Array:
    """x_0 - D(x_t, t) of clean data (n, ...), each noised once to one level."""
    noise = jax.random.normal(key, (len(x0), *model.shape), x0.dtype)
    x = jax.vmap(level.noised)(x0, jax.vmap(model.process.subspace.project)(noise))
    return x0 - jax.vmap(level.denoised)(x, model._excess(x, level))


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
