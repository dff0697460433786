r"""Relative trajectory balance: fine-tuning a diffusion model into its own posterior p(x) r(x) / Z.

With the prior's reverse kernels K and those of the model that is tuned, K_phi, every path x_{t_max}, ..., x_{t_min} has

    residual = log Z + sum over steps of log (K_phi / K)(x_s | x_t) - log r(x_{t_min}),

which vanishes for all paths where K_phi is the posterior's: the kernel ratio that steers by weights is a loss here. The
path is a constant, whoever has made it: no gradient passes through sampling, and that of residual^2 / 2 is residual
times the gradient of the sum. So it is computed in two passes, neither of which keeps a path: the first walks it and
adds up, the second walks the same path again and adds up the gradients of its steps, weighted by what the first has
found. Memory is that of one step, whatever their number.

Paths start from the law that generation starts from, which must know nothing of x_{t_min}: otherwise its own tilt is
missing from the residual.

Sources: Venkatraman et al. 2024 (arXiv 2405.20971); for the batch estimate of log Z, VarGrad, Richter et al. 2020;
mathematics.md, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..checks import check_count, check_key, check_number
from ..density import check_points, check_times, warn_of_signal
from ..increments import transitions
from ..kernels import Array, log_ratio
from ..model import DiffusionModel
from ..smc import CompensatedSum


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
    walk = _walk(key, posterior, prior, times, num_paths, x, inflation, num_steps)
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
    up = _walk(key_up, posterior, prior, times, 1, x, 1.0, num_steps)
    top, ratio_up = path_log_ratio(posterior.params, up)
    start = jax.lax.stop_gradient(top)
    down = _walk(key_down, posterior, prior, times, len(start), None, 1.0, num_steps, start)
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


# ------------------------------------------------------------------------------------------------------------ the walk


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "posterior", "prior", "steps", "start", "inflation", "chosen"],
    meta_fields=["towards_noise"],
)
@dataclass(frozen=True)
class Walk:
    """All that paths are made of, but for the weights.

    Attributes:
      key: every step has a key of its own, so that a path can be walked again.
      posterior, prior: the models.
      steps: stacked, in order of execution.
      start: states in the network's coordinates, (n, *shape).
      inflation: factors on the variance of the kernels that paths are drawn from, (n,), or None.
      chosen: the steps that the gradient is of, (k,), or None for all.
      towards_noise: whether paths go up by the noising kernels.
    """

    key: Array
    posterior: DiffusionModel
    prior: DiffusionModel
    steps: Any
    start: Array
    inflation: Array | None
    chosen: Array | None
    towards_noise: bool


def _walk(
    key: Array,
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: np.ndarray,
    num_paths: int,
    x: Any,
    inflation: Any,
    num_steps: int | None,
    start: Array | None = None,
) -> Walk:
    key_start, key_steps, key_chosen = jax.random.split(key, 3)
    count = len(times) - 1
    if x is not None:
        start = jax.vmap(prior.transform.to_model)(check_points(prior, x, times))
        factors = None
    else:
        if start is None:
            law = prior.prior_at(prior.process.level(times[-1]))
            start = jax.vmap(law.sample)(jax.random.split(key_start, num_paths))
        factors = _inflation(inflation, prior, num_paths)
    chosen = None
    if num_steps is not None and check_count("num_steps", num_steps) < count:
        chosen = jax.random.choice(key_chosen, count, (num_steps,), replace=False)
    return Walk(
        key=key_steps,
        posterior=posterior.with_params(jax.lax.stop_gradient(posterior.params)),
        prior=prior,
        steps=transitions(prior.process, times, towards_noise=x is not None),
        start=jax.lax.stop_gradient(start),
        inflation=factors,
        chosen=chosen,
        towards_noise=x is not None,
    )


def _inflation(inflation: Any, prior: DiffusionModel, num_paths: int) -> Array | None:
    is_number = isinstance(inflation, (int, float))
    if is_number and check_number("inflation", inflation, positive=True) == 1:
        return None
    if prior.process.is_discrete:
        raise ValueError(f"inflation is of Gaussian kernels, and states of {type(prior.process).__name__} are tokens")
    factors = jnp.asarray(inflation, jnp.result_type(float))
    if factors.shape not in ((), (num_paths,)):
        raise ValueError(f"inflation must be a number or of shape ({num_paths},), got {factors.shape}")
    return jnp.broadcast_to(factors, (num_paths,))


def _step(params: Any, walk: Walk, index: Array, step: Any, x: Array) -> tuple[Array, tuple[Array, Array]]:
    """log K_phi / K of one step of every path, and both its ends (x_t, x_s); one of them is x."""
    key_model, key_move = jax.random.split(jax.random.fold_in(walk.key, index))
    keys = jax.random.split(key_move, len(x))
    x = jax.lax.stop_gradient(x)
    x_t = jax.vmap(lambda key, x: step.forward(x).sample(key))(keys, x) if walk.towards_noise else x
    ratios, x_s = _ratios(params, walk, key_model, keys, step, x_t, x if walk.towards_noise else None)
    return ratios, (x_t, x_s)


def _ratios(
    params: Any, walk: Walk, key_model: Array, keys: Array, step: Any, x_t: Array, x_s: Array | None
) -> tuple[Array, Array]:
    """log K_phi(x_s | x_t) / K(x_s | x_t); x_s is drawn from K_phi, inflated, where it is not given."""
    posterior, prior = walk.posterior.with_params(params), walk.prior
    ours = posterior.evaluate(key_model, x_t, step.t)
    # Covariances are taken as they are: eigenvectors have no derivative where eigenvalues are equal.
    ours = jax.lax.stop_gradient(ours)._replace(excess=ours.excess)
    theirs = prior.evaluate(key_model, x_t, step.t, after=jax.lax.stop_gradient(ours.excess))

    def one(key: Array, x_t: Array, ours: Any, theirs: Any, x_s: Any, inflation: Any) -> tuple[Array, Array]:
        kernel: Any = posterior.kernel(step, x_t, ours)
        if x_s is None:
            wide = kernel if inflation is None else kernel.scale_covariance(inflation)
            x_s = jax.lax.stop_gradient(wide.sample(key))
        return log_ratio(kernel, prior.kernel(step, x_t, theirs), x_s), x_s

    return jax.vmap(one)(keys, x_t, ours, theirs, x_s, walk.inflation)


@jax.custom_vjp
def path_log_ratio(params: Any, walk: Walk) -> tuple[Array, Array]:
    """Where paths end, (n, *shape), and their sums of log K_phi / K, (n,), of which the weights have a gradient."""
    return _forward(params, walk)[:2]


def _forward(params: Any, walk: Walk) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """Also, if the gradient is of some steps only, the states at both their ends, (k, n, *shape)."""
    count = len(jax.tree.leaves(walk.steps)[0])
    kept = None
    slots = jnp.zeros(count, int)
    if walk.chosen is not None:
        k = len(walk.chosen)
        slots = jnp.full(count, k).at[walk.chosen].set(jnp.arange(k))  # the last slot is for all others
        empty = jnp.zeros((k + 1, *walk.start.shape), walk.start.dtype)
        kept = empty, empty

    # Not the loop of `rnejax.smc`: what the second pass carries, a gradient, is no particle, and both must agree.
    def body(carry: Any, this: Any) -> tuple[Any, None]:
        x, total, kept = carry
        index, slot, step = this
        ratios, ends = _step(params, walk, index, step, x)
        if kept is not None:
            kept = jax.tree.map(lambda kept, end: kept.at[slot].set(end), kept, ends)
        return (ends[0] if walk.towards_noise else ends[1], total.add(ratios), kept), None

    zeros = jnp.zeros(len(walk.start), jnp.result_type(float))
    (x, total, kept), _ = jax.lax.scan(
        body, (walk.start, CompensatedSum.of(zeros), kept), (jnp.arange(count), slots, walk.steps)
    )
    return x, total.value, kept


def _save(params: Any, walk: Walk) -> tuple[tuple[Array, Array], Any]:
    x, total, kept = _forward(params, walk)
    return (x, total), (params, walk, kept)


def _backward(saved: Any, cotangents: tuple[Any, Array]) -> tuple[Any, None]:
    params, walk, kept = saved
    weights = cotangents[1]
    count = len(jax.tree.leaves(walk.steps)[0])
    zeros = jax.tree.map(jnp.zeros_like, params)

    def add(gradient: Any, change: Any) -> Any:
        return jax.tree.map(jnp.add, gradient, change)

    if kept is None:

        def again(carry: Any, this: Any) -> tuple[Any, None]:
            x, gradient = carry
            index, step = this
            _, pull, ends = jax.vjp(lambda params: _step(params, walk, index, step, x), params, has_aux=True)
            return (ends[0] if walk.towards_noise else ends[1], add(gradient, pull(weights)[0])), None

        (_, gradient), _ = jax.lax.scan(again, (walk.start, zeros), (jnp.arange(count), walk.steps))
        return gradient, None

    k = len(walk.chosen)

    def at_chosen(gradient: Any, this: Any) -> tuple[Any, None]:
        index, step, x_t, x_s = this
        key_model, key_move = jax.random.split(jax.random.fold_in(walk.key, index))
        keys = jax.random.split(key_move, len(x_t))
        _, pull = jax.vjp(lambda params: _ratios(params, walk, key_model, keys, step, x_t, x_s)[0], params)
        return add(gradient, pull(weights * (count / k))[0]), None

    steps = jax.tree.map(lambda leaf: leaf[walk.chosen], walk.steps)
    gradient, _ = jax.lax.scan(at_chosen, zeros, (walk.chosen, steps, kept[0][:-1], kept[1][:-1]))
    return gradient, None


path_log_ratio.defvjp(_save, _backward)
