r"""Relative trajectory balance: fine-tuning a diffusion model into its own posterior p(x) r(x) / Z.

With the prior's reverse kernels K and those of the model that is tuned, K_phi, every path x_{t_max}, ..., x_{t_min} has

    residual = log Z + sum over steps of log (K_phi / K)(x_s | x_t) - log r(x_{t_min}),

which vanishes for all paths where K_phi is the posterior's: the kernel ratio that steers by weights is a loss here. The
path is a constant, whoever has made it: no gradient passes through sampling, and that of residual^2 / 2 is residual
times the gradient of the sum (`rnejax.training.paths`, with the memory of one step, whatever their number).

Paths start from the law that generation starts from, which must know nothing of x_{t_min}: otherwise its own tilt is
missing from the residual.

Sources: Venkatraman et al. 2024 (arXiv 2405.20971); for the batch estimate of log Z, VarGrad, Richter et al. 2020;
mathematics.md, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..checks import check_count, check_key, check_number
from ..density import check_times, warn_of_signal
from ..kernels import Array
from ..model import DiffusionModel
from .paths import make_walk, path_log_ratio


class Trajectories(NamedTuple):
    """What is left of paths: where they end near the data, and what they say.

    Attributes:
      x: at the smallest time, in the user's coordinates, (n, *shape).
      log_ratio: sum over steps of log K_phi(x_s | x_t) - log K(x_s | x_t), in nats, (n,).
      log_reward: log r(x), in nats, (n,).
      residual: log Z + log_ratio - log_reward, (n,); +inf where the reward is zero.
    """

    x: Array
    log_ratio: Array
    log_reward: Array
    residual: Array


def trajectory_balance_residual(
    key: Array,
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: Any,
    log_reward: Callable[[Array], Array],
    log_normalizer: Any = 0.0,
    *,
    num_paths: int = 1,
    x: Any = None,
    inflation: Any = 1.0,
    num_steps: int | None = None,
) -> Trajectories:
    """Residuals of relative trajectory balance, differentiable in the weights of ``posterior`` and in log Z.

    Args:
      key: a typed key.
      posterior: the model that is tuned; gradients are those of its ``params``, through the means of its kernels (or
        their probabilities). Covariances that a network has (`diagonal`, `full`) count with what they are.
      prior: the model that it started from, of the same process and covariance.
      times: increasing times; paths have their steps.
      log_reward: log r of one example in the user's coordinates, in nats; -inf where r is zero.
      log_normalizer: the estimate of log Z, a number or (n,).
      num_paths: n, where paths are generated: by the kernels of ``posterior`` from noise.
      x: clean data, (n, *shape) in the user's coordinates: paths are those that noise makes of them instead.
      inflation: generated paths draw from kernels of so many times the variance, a number or (n,): more is explored,
        and what is evaluated are the kernels as they are. Numbers that diffuse only.
      num_steps: of the gradient: so many steps, drawn at random and counted for all. Unbiased, cheaper, and it keeps
        the states of these steps.

    Costs an evaluation of both models per path and step, and of the gradient's pass another one and its derivative.

    Raises:
      ValueError: for models of different processes or shapes, times or points that do not suit, a posterior without
        weights, an inflation that is not positive or of tokens, or counts that are not integers of at least 1.
    """
    _check_models(key, posterior, prior)
    times = check_times(posterior, times)
    warn_of_signal(prior, times)
    num_paths = check_count("num_paths", num_paths)
    walk = make_walk(key, posterior, prior, times, num_paths, x, inflation, num_steps)
    end, ratio = path_log_ratio(posterior.params, walk)
    return _weighed(prior, walk.start if walk.towards_noise else end, ratio, log_reward, log_normalizer)


def back_and_forth_residual(
    key: Array,
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: Any,
    log_reward: Callable[[Array], Array],
    x: Any,
    *,
    num_steps: int | None = None,
) -> tuple[Array, Trajectories]:
    """The difference of two residuals that share the upper part of their path, and with it log Z: down less up.

    Clean data are noised along ``times``, which may end anywhere, and what they have become is denoised again.

    Args:
      key, posterior, prior, log_reward, num_steps: as for `trajectory_balance_residual`.
      times: increasing; the last is where paths turn round.
      x: clean data, (n, *shape) in the user's coordinates.

    Returns:
      the differences, (n,), and the paths down, with log Z = 0.
    """
    key_up, key_down = jax.random.split(key)
    _check_models(key, posterior, prior)
    times = check_times(posterior, times)
    up = make_walk(key_up, posterior, prior, times, 1, x, 1.0, num_steps)
    top, ratio_up = path_log_ratio(posterior.params, up)
    start = jax.lax.stop_gradient(top)
    down = make_walk(key_down, posterior, prior, times, len(start), None, 1.0, num_steps, start)
    end, ratio_down = path_log_ratio(posterior.params, down)
    there = _weighed(prior, up.start, ratio_up, log_reward, 0.0)
    back = _weighed(prior, end, ratio_down, log_reward, 0.0)
    return back.residual - there.residual, back


def _weighed(
    prior: DiffusionModel, state: Array, ratio: Array, log_reward: Callable[[Array], Array], log_normalizer: Any
) -> Trajectories:
    x = jax.vmap(prior.transform.to_data)(jax.lax.stop_gradient(state))
    rewards = jax.lax.stop_gradient(jax.vmap(log_reward)(x))
    return Trajectories(x, ratio, rewards, log_normalizer + ratio - rewards)


def _check_models(key: Array, posterior: DiffusionModel, prior: DiffusionModel) -> None:
    check_key(key)
    if posterior.process != prior.process or posterior.shape != prior.shape:
        raise ValueError(
            f"posterior and prior must be models of one process and shape: {posterior.process} with {posterior.shape}, "
            f"{prior.process} with {prior.shape}"
        )
    if posterior.params is None:
        raise ValueError("posterior has no weights to tune: DiffusionModel(process, fn, ..., params=weights)")


def batch_log_normalizer(paths: Trajectories) -> Array:
    """VarGrad's estimate of log Z: the mean of log r - log_ratio over the paths of a batch, which the loss holds fixed.

    residual^2 / 2 with it is half the variance of the residuals, whose gradient does not depend on log Z.
    """
    return jax.lax.stop_gradient(jnp.mean(paths.log_reward - paths.log_ratio))


class Assessment(NamedTuple):
    """How far a tuned model is from the posterior, from paths of its own.

    Attributes:
      lower_bound: mean of log r - log_ratio <= log Z in expectation, in nats, and its standard error.
      log_normalizer: log Z by importance sampling, log of the mean of exp(log r - log_ratio); consistent, and too low
        on average by half the squared error.
      standard_error: of it, to first order; meaningless where the effective sample size is a few.
      effective_sample_size: of the paths as importance samples of the posterior, between 1 and their number.
      residual_variance: of log_ratio - log r, in nats^2: zero for the posterior, whatever log Z.
      upper_bound: mean of log r - log_ratio over paths that noise makes of samples of the posterior >= log Z in
        expectation, and its standard error; None without such samples.
    """

    lower_bound: tuple[float, float]
    log_normalizer: float
    standard_error: float
    effective_sample_size: float
    residual_variance: float
    upper_bound: tuple[float, float] | None


def assess(generated: Trajectories, noised: Trajectories | None = None) -> Assessment:
    """Bounds on log Z, importance sampling and the residual's variance.

    Args:
      generated: paths by the model's own kernels, not inflated, of `trajectory_balance_residual`.
      noised: paths of samples of the posterior itself (``x`` of the same function), where there are any.

    Raises:
      ValueError: for fewer than two paths, or none of a reward above zero.
    """
    log_weights = np.asarray(generated.log_reward - generated.log_ratio, np.float64)
    if len(log_weights) < 2 or not np.isfinite(log_weights).any():
        raise ValueError("two paths or more, and one of a reward above zero, are needed to say anything")
    relative = np.exp(log_weights - log_weights.max())
    count = len(relative)
    sample_size = relative.sum() ** 2 / (relative**2).sum()

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    possible = log_weights[np.isfinite(log_weights)]
    return Assessment(
        lower_bound=mean(log_weights) if len(possible) == count else (-math.inf, math.nan),
        log_normalizer=float(log_weights.max() + np.log(relative.mean())),
        standard_error=float(relative.std(ddof=1) / relative.mean() / math.sqrt(count)),
        effective_sample_size=float(sample_size),
        residual_variance=float(log_weights.var(ddof=1)) if len(possible) == count else math.inf,
        upper_bound=None if noised is None else mean(np.asarray(noised.log_reward - noised.log_ratio, np.float64)),
    )


class Tuned(NamedTuple):
    """What fine-tuning learns: the weights of the posterior, and log Z."""

    weights: Any
    log_normalizer: Array


SOURCES = ("generated", "inflated", "noised", "back_and_forth")


def trajectory_balance_loss(
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: Any,
    log_reward: Callable[[Array], Array],
    *,
    sources: Mapping[str, float] = MappingProxyType({"generated": 1.0}),
    normalizer: str = "learned",
    inflation: float = 2.0,
    turn: float = 0.5,
    bound: float = math.inf,
    least_log_reward: float = -100.0,
    num_steps: int | None = None,
) -> Callable[[Array, Tuned, Any], tuple[Array, dict[str, Array]]]:
    r"""loss(key, Tuned, x) -> (residual^2 / 2 of as many paths as x, what to report of them), for `fit`.

    Which paths a batch of n has is a mixture of

        generated       by the posterior's own kernels, as it is (on-policy)
        inflated        by these kernels with ``inflation`` times the variance
        noised          what noise makes of the batch's x: data, or a replay buffer (off-policy)
        back_and_forth  the batch's x, noised a part of the way and denoised: the difference of both residuals

    Args:
      posterior: the model to be tuned; its weights are replaced by those of `Tuned`.
      prior, times, log_reward, num_steps: as for `trajectory_balance_residual`.
      sources: shares of the batch, by name; they are made to sum to one.
      normalizer: "learned", log Z as a weight of its own; "batch", VarGrad: what the paths of the batch say, all but
        ``back_and_forth``, which know nothing of it.
      inflation: of the variance.
      turn: share of the steps after which ``back_and_forth`` turns round.
      bound: of a residual, in nats, beyond which the loss grows linearly (Huber 1964). Reported is the share there.
      least_log_reward: what log r counts as where it is less: a reward of zero teaches avoidance, and no infinity.

    The report has ``log_reward`` and ``residual`` (means), ``squared_residual``, ``beyond_bound``, and
    ``log_normalizer`` (the batch's estimate, over paths generated without inflation if there are any).

    Raises:
      ValueError: for unknown or no sources, a negative share, an unknown normalizer, a bound or an inflation that is
        not positive, a turn outside (0, 1], or what `trajectory_balance_residual` refuses.
    """
    shares = _check_sources(sources)
    if normalizer not in ("learned", "batch"):
        raise ValueError(f"normalizer must be 'learned' or 'batch', got {normalizer!r}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, math.inf for none: got {bound}")
    if not 0 < check_number("turn", turn) <= 1:
        raise ValueError(f"turn must be a share of the steps, above 0 and at most 1: got {turn}")
    check_number("inflation", inflation, positive=True)
    times = check_times(posterior, times)
    part = times[: max(2, round(turn * (len(times) - 1)) + 1)]

    def reward(x: Array) -> Array:
        return jnp.maximum(log_reward(x), least_log_reward)

    def loss(key: Array, tuned: Tuned, x: Array) -> tuple[Array, dict[str, Array]]:
        model = posterior.with_params(tuned.weights)
        counts = _split_batch(shares, len(x))
        found: list[Trajectories] = []
        differences = None
        first = 0
        for name, key_source in zip(SOURCES, jax.random.split(key, len(SOURCES)), strict=True):
            count = counts.get(name, 0)
            some, first = x[first : first + count], first + count
            if count == 0:
                continue
            if name == "back_and_forth":
                differences, _ = back_and_forth_residual(
                    key_source, model, prior, part, reward, some, num_steps=num_steps
                )
                continue
            options: dict[str, Any] = {"num_paths": count, "inflation": inflation if name == "inflated" else 1.0}
            if name == "noised":
                options = {"x": some}
            found.append(
                trajectory_balance_residual(key_source, model, prior, times, reward, num_steps=num_steps, **options)
            )
        if found:
            paths: Trajectories = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
            log_normalizer = batch_log_normalizer(paths) if normalizer == "batch" else tuned.log_normalizer
            residual = log_normalizer + paths.residual
            estimate = batch_log_normalizer(found[0])
            rewards = paths.log_reward
        else:
            assert differences is not None
            residual, estimate, rewards = differences[:0], jnp.full((), jnp.nan), jnp.full(1, jnp.nan)
        if differences is not None:
            residual = jnp.concatenate([residual, differences])
        report = {
            "log_reward": jnp.mean(rewards),
            "log_normalizer": estimate,
            "residual": jnp.mean(residual),
            "squared_residual": jnp.mean(residual**2),
            "beyond_bound": jnp.mean(jnp.abs(residual) > bound),
        }
        values = optax.huber_loss(residual, delta=bound) if math.isfinite(bound) else 0.5 * residual**2
        return values, {name: jnp.broadcast_to(value, values.shape) for name, value in report.items()}

    return loss


def _check_sources(sources: Mapping[str, float]) -> dict[str, float]:
    unknown = [name for name in sources if name not in SOURCES]
    if unknown:
        raise ValueError(f"sources must be among {', '.join(SOURCES)}: got {', '.join(map(str, unknown))}")
    wrong = [f"{name}: {share}" for name, share in sources.items() if not 0 <= share < math.inf]
    total = sum(sources.values())
    if wrong or not total > 0:
        raise ValueError(f"shares of sources must not be negative, and one must be positive: got {dict(sources)}")
    return {name: share / total for name, share in sources.items() if share > 0}


def _split_batch(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers of paths, as near to the shares as their order allows; their sum is the batch."""
    ends = np.round(np.cumsum([shares.get(name, 0.0) for name in SOURCES]) * count).astype(int)
    return dict(zip(SOURCES, np.diff(ends, prepend=0).tolist(), strict=True))
