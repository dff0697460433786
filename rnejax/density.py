"""Log-densities of what a diffusion model generates: along its samples for free, and at given points.

On any path from x_{t_min} to x_{t_max}

    log p(x_{t_min}) = log prior(x_{t_max}) + sum of RNE increments,

exactly if the reverse kernels are the true ones. On a finite grid they are not, and the number on a generated path is
unbiased for no finite grid: look at the error against the number of steps. At a given point, exp(.) averaged over
independent noisings estimates the density of the law *that the reverse chain generates*, without bias for any kernels.

The law is that at t_min, the noise level the grid ends with: p_{t_min} = p_data convolved with noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_count, is_traced
from .increments import ESTIMATORS, get_estimator, transitions
from .infilling import Template, check_grid
from .kernels import Array, FullSpace, draw, log_ratio
from .model import DiffusionModel
from .processes import Level, Process, TokenProcess, Transition
from .processes.grids import check_signal, validate_times
from .smc import Resampling, SMCInfo, run
from .smc.weights import CompensatedSum, log_mean_exp, relative_error_of_mean


class Samples(NamedTuple):
    """Generated samples.

    Attributes:
      x: (num_samples, *shape), in the user's coordinates.
      log_density: of each, in nats, along its own path: (num_samples,).
      info: per-step information in order of execution, t_max to t_min; what ``save`` asked for is in ``info.saved``.
    """

    x: Array
    log_density: Array
    info: SMCInfo


class LogDensity(NamedTuple):
    """Log-densities at given points.

    Attributes:
      log_density: log-mean-exp over the paths, in nats: (n,).
      standard_error: of log_density by the delta method, (n,); NaN with one path, for one number has no spread.
      per_path: the estimate of each path, (n, num_paths).
    """

    log_density: Array
    standard_error: Array
    per_path: Array


class Walkers(NamedTuple):
    """States on their way, with their log-density relative to the reference, log p_t(x) - log ref_t(x)."""

    x: Array
    excess_log_density: CompensatedSum


def sample(
    key: Array,
    model: DiffusionModel,
    times: Any,
    num_samples: int = 1,
    *,
    estimator: str | None = None,
    save: tuple[str, ...] = (),
    progress: bool | None = None,
) -> Samples:
    """Draw from the model by its reverse kernels; log-densities come along for free.

    Args:
      key: a typed key.
      model: the model.
      times: increasing times (``rnejax.time_grid``); generation runs from the last to the first.
      num_samples: how many.
      estimator: of the log-densities: ``exact``; with euler covariance also ``reference`` (the default there),
        ``plain``, ``ito``.
      save: ``("particles",)`` to keep every state in ``info.saved``; by default nothing grows with the steps.
      progress: a bar; by default on a terminal only.

    Costs one network evaluation per sample and step. Warns (`SignalAtEndWarning`) where the grid ends too early
    for the model's default prior.

    Raises:
      ValueError: for times that do not increase, lie outside the process's domain, or do not suit the prediction type;
        for a number of samples that is not an integer of at least 1.
      SMCError: where the network returned NaN or infinity, naming the step and the time.
    """
    times = check_times(model, times)
    num_samples = check_count("num_samples", num_samples)
    warn_of_signal(model, times)
    return generate(key, model, times, num_samples, estimator=estimator, save=save, progress=progress)


def generate(
    key: Array,
    model: DiffusionModel,
    times: np.ndarray,
    num_samples: int,
    *,
    estimator: str | None = None,
    save: tuple[str, ...] = (),
    progress: bool | None = None,
) -> Samples:
    """`sample` with arguments that have been checked."""
    problem = Generate(
        model, model.process.level(times[-1]), model.process.level(times[0]), get_estimator(estimator, model)
    )
    result = run(
        key,
        problem,
        transitions(model.process, times),
        num_particles=num_samples,
        resampling=Resampling(ess_threshold=0.0),
        save=save,
        progress=progress,
        describe=blame_network(model.process, times[::-1][:-1]),
    )
    return Samples(result.particles, problem.log_density(result.state), result.info)


def log_density(
    key: Array,
    model: DiffusionModel,
    x: Array,
    times: Any,
    num_paths: int = 16,
    *,
    estimator: str | None = None,
    progress: bool | None = None,
) -> LogDensity:
    """Log-density of given points under the model, from independent noisings of each.

    Args:
      key: a typed key.
      model: the model.
      x: points in the user's coordinates, with a batch axis: (n, *shape), on the process's subspace. Other precisions
        are converted to JAX's default floating type before anything is computed: a log-density has no place in 8 or 11
        bits.
      times: increasing times; the density is that of p_{times[0]}, so x is a state at times[0].
      num_paths: noisings per point. The average is of densities, so the estimate is consistent and its bias (low, about
        half the variance of one path over ``num_paths``) falls with their number.
      estimator: as for `sample`.
      progress: a bar; by default on a terminal only.

    Costs one network evaluation per point, path and step. Warns as `sample` does.

    Raises:
      ValueError: for points of another shape, not floating, not finite or off the subspace, no points, fewer than one
        path, or unsuitable times.
      SMCError: where the network returned NaN or infinity.
    """
    times = check_times(model, times)
    x = check_points(model, x, times)
    num_paths = check_count("num_paths", num_paths)
    if isinstance(model._own_prior, Template):
        raise ValueError(
            "log_density noises all tokens, and those of a template are given: log p(blanks | given) is the difference "
            "of the log-densities of two sequences of the model without it, or what sample says of its own"
        )
    warn_of_signal(model, times)
    states = jnp.repeat(jax.vmap(model.transform.to_model)(x), num_paths, axis=0)
    bottom, top = model.process.level(times[0]), model.process.level(times[-1])
    problem = Noise(model, states, top, get_estimator(estimator, model))
    result = run(
        key,
        problem,
        transitions(model.process, times, towards_noise=True),
        num_particles=len(states),
        resampling=Resampling(ess_threshold=0.0),
        progress=progress,
        describe=blame_network(model.process, times[1:]),
    )
    per_path = problem.log_density(result.state, bottom).reshape(len(x), num_paths)
    return LogDensity(log_mean_exp(per_path), relative_error_of_mean(per_path), per_path)


# ---------------------------------------------------------------------------- the two walks, as Feynman-Kac problems


@partial(jax.tree_util.register_dataclass, data_fields=["model", "top", "bottom", "start"], meta_fields=["estimator"])
@dataclass(frozen=True)
class Generate:
    """From noise to data by the model's reverse kernels; never weighted. From given states at the first level, if any:
    then the log-densities are relative to theirs.
    """

    model: DiffusionModel
    top: Level
    bottom: Level
    estimator: str
    start: Array | None = None

    def init(self, key: Array, num_particles: int) -> tuple[Walkers, Array]:
        if self.start is not None:
            zeros = jnp.zeros(num_particles, jnp.result_type(float))
            return Walkers(self.start, CompensatedSum.of(zeros)), zeros
        prior = self.model.prior_at(self.top)
        x = jax.vmap(prior.sample)(jax.random.split(key, num_particles))
        start = jax.vmap(partial(prior_excess, prior, self.model, self.top))(x)
        return Walkers(x, CompensatedSum.of(start)), jnp.zeros_like(start)

    def step(self, key: Array, walkers: Walkers, step: Transition) -> tuple[Walkers, Array, None]:
        key_model, key_move = jax.random.split(key)
        x_t = walkers.x
        evaluation = self.model.evaluate(key_model, x_t, step.t)

        def move(key: Array, x_t: Array, evaluation: Any) -> tuple[Array, Array]:
            kernel = self.model.kernel(step, x_t, evaluation)
            x_s, coordinates = draw(kernel, key)
            made = {"kernel": kernel, "coordinates": coordinates} if self.estimator == "exact" else {}
            return x_s, ESTIMATORS[self.estimator](self.model, step, x_s, x_t, evaluation, **made)

        x_s, increments = jax.vmap(move)(jax.random.split(key_move, len(x_t)), x_t, evaluation)
        faults = fault_weight(increments, step.t.is_valid(evaluation.excess))
        return Walkers(x_s, walkers.excess_log_density.add(increments)), faults, None

    def position(self, walkers: Walkers) -> Array:
        return jax.vmap(self.model.transform.to_data)(walkers.x)

    def log_density(self, walkers: Walkers) -> Array:
        return jax.vmap(partial(to_user_log_density, self.model, self.bottom))(
            walkers.x, walkers.excess_log_density.value
        )


@partial(jax.tree_util.register_dataclass, data_fields=["model", "start", "top"], meta_fields=["estimator"])
@dataclass(frozen=True)
class Noise:
    """From given points to noise by the forward kernels."""

    model: DiffusionModel
    start: Array
    top: Level
    estimator: str

    def init(self, key: Array, num_particles: int) -> tuple[Walkers, Array]:
        zeros = jnp.zeros(num_particles, jnp.result_type(float))
        return Walkers(self.start, CompensatedSum.of(zeros)), zeros

    def step(self, key: Array, walkers: Walkers, step: Transition) -> tuple[Walkers, Array, None]:
        key_model, key_move = jax.random.split(key)
        x_s = walkers.x
        x_t = jax.vmap(lambda key, x: step.forward(x).sample(key))(jax.random.split(key_move, len(x_s)), x_s)
        evaluation = self.model.evaluate(key_model, x_t, step.t)
        increments = jax.vmap(partial(ESTIMATORS[self.estimator], self.model, step))(x_s, x_t, evaluation)
        faults = fault_weight(increments, step.t.is_valid(evaluation.excess))
        return Walkers(x_t, walkers.excess_log_density.add(increments)), faults, None

    def position(self, walkers: Walkers) -> Array:
        return jax.vmap(self.model.transform.to_data)(walkers.x)

    def log_density(self, walkers: Walkers, bottom: Level) -> Array:
        prior = self.model.prior_at(self.top)
        end = jax.vmap(partial(prior_excess, prior, self.model, self.top))(walkers.x)
        return jax.vmap(partial(to_user_log_density, self.model, bottom))(
            self.start, walkers.excess_log_density.add(end).value
        )


# ------------------------------------------------------------------------------------------ shared with rnejax.control


def prior_excess(prior: Any, model: DiffusionModel, top: Level, x: Array) -> Array:
    """log prior(x) - log ref_{t_max}(x)."""
    return log_ratio(prior, model.process.reference_at(top, x.shape), x)


def to_user_log_density(model: DiffusionModel, bottom: Level, x: Array, excess: Array) -> Array:
    """log p(y) of y = to_data(x), from log p(x) - log ref_{t_min}(x)."""
    reference = model.process.reference_at(bottom, x.shape)
    return excess + reference.log_prob(x) - model.transform.log_det(x, model.process.subspace)


def fault_weight(increments: Array, is_valid: Array) -> Array:
    """Log-weights of paths that are never weighted: 0, or NaN for a path on which the network failed.

    That a path is impossible (an increment of -inf, where a token has no probability) is no failure.
    """
    return jnp.where(is_valid & (increments < jnp.inf), 0.0, jnp.nan).astype(increments.dtype)


def check_times(model: DiffusionModel, times: Any) -> np.ndarray:
    """The times as float64, if they suit the model."""
    times = validate_times(model.process, times)
    check_signal(model.process, times, model.prediction)
    if float(model.process.alpha(times[-1])) == 0 and model.covariance.euler:
        raise ValueError(
            f"at t = {times[-1]:g} alpha = 0 and the drift that euler freezes is infinite: end the grid earlier"
        )
    check_grid(model, times)
    between = np.flatnonzero(times != np.round(times)) if model.noise_level == "index" else np.zeros(0, int)
    if between.size:
        raise ValueError(
            f"noise_level='index' asks the network for step numbers, but times[{between[0]}] = {times[between[0]]:g} "
            "lies between two: use rnejax.time_grid(process, num_steps), or, for a network that interpolates, "
            "noise_level=lambda level: level.t - 1"
        )
    return times


def check_points(model: DiffusionModel, x: Any, times: np.ndarray | None = None) -> Array:
    """Points with a batch axis, of the model's shape: finite, on its subspace, in JAX's default floating type; or
    tokens of its vocabulary, MASK only if some are masked at the first time (default: the process's).
    """
    try:
        x = jnp.asarray(x)
    except TypeError:
        raise TypeError(f"x must be an array of numbers, got {np.asarray(x).dtype} in a {type(x).__name__}") from None
    if x.ndim != len(model.shape) + 1 or x.shape[1:] != model.shape:
        hint = "; add a batch axis: x[None]" if x.shape == model.shape else ""
        if getattr(model.process, "is_hybrid", False) and x.shape[1:] == model.shape[1:]:
            hint = "; a state has the data as its first row, and others for what noise goes through: give whole states"
        raise ValueError(f"x must have shape (n, {', '.join(map(str, model.shape))}), got {x.shape}{hint}")
    if len(x) == 0:
        raise ValueError("x holds no points: its batch axis has length 0")
    if isinstance(model.process, TokenProcess):
        start = model.process.t_min if times is None else times[0]
        return model.process.check_tokens("x", x, clean=float(model.process.alpha(start)) == 1)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating, got {x.dtype}; dequantise integers and scale them to the model's units first"
        )
    x = x.astype(jnp.result_type(float))
    if not is_traced(x):
        _check_values(model, x)
    return x


def _check_values(model: DiffusionModel, x: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(np.asarray(x).reshape(len(x), -1)).all(axis=1))
    if bad.size:
        raise ValueError(f"x must be finite, but {bad.size} of {len(x)} points are not, the first of them x[{bad[0]}]")
    if isinstance(model.process.subspace, FullSpace):
        return
    states = jax.vmap(model.transform.to_model)(x)
    offsets = np.abs(np.asarray(states - jax.vmap(model.process.subspace.project)(states))).reshape(len(x), -1)
    largest = np.abs(np.asarray(states)).max()
    # What projecting in this precision leaves behind: a sum over d numbers, each of them rounded.
    rounding = offsets.shape[1] * float(jnp.finfo(x.dtype).eps) * largest
    i = int(offsets.max(axis=1).argmax())
    if offsets[i].max() > rounding:
        raise ValueError(
            f"x must lie on {model.process.subspace}, where the model has its density, but x[{i}] is off it by "
            f"{offsets[i].max():.3g}: project it first (jax.vmap(process.subspace.project)(x), in the network's "
            "coordinates)"
        )


class SignalAtEndWarning(UserWarning):
    """Generation starts from noise, but at the end of the grid much of the data is still there."""


def warn_of_signal(
    model: DiffusionModel, times: np.ndarray, max_fraction: float = 0.1, *, own_prior_helps: bool = True
) -> None:
    """Warn where the grid is too coarse for the process, or where the signal's share is above ``max_fraction`` at the
    last time of a model without a prior of its own, or of any where that does not help.

    The share is alpha^2 data_std^2 / V_t of the reference's variance, or alpha_t of the tokens. The default prior is
    the reference there. It knows nothing of the data but their variance, or their vocabulary, and the larger the
    share that is signal, the more the law of the samples and their densities is the reference's.
    """
    model.process.warn_of_grid(times)
    if model.has_prior and own_prior_helps:
        return
    last = times[-1]
    fraction = float(model.process.signal_fraction(last))
    if fraction > max_fraction:
        what = "tokens" if model.process.is_discrete else "reference's variance"
        end = f"end it near t_max = {model.process.t_max:g}"
        advice = (
            f"the default prior is no good stand-in for the data: {end}, or give the model a prior"
            if own_prior_helps
            else f"what is generated still depends on where it starts, and the tilt of that law is missing: {end}"
        )
        warnings.warn(
            f"the grid ends at t = {last:.6g}, where {fraction:.0%} of the {what} is signal, so that {advice}",
            SignalAtEndWarning,
            stacklevel=3,
        )


def blame_network(process: Process, times: np.ndarray) -> Callable[[int], str]:
    """Words for a faulty step where nothing but the network can be at fault: the time that it was asked at."""
    return lambda step: f"the network returned {process.failure} at t = {times[step]:.6g}"
