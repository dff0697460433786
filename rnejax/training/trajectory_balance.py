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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..checks import check_count, check_key
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
      residual: log Z + log_ratio - log_reward, (n,); +inf where the reward is zero, and no loss then has a gradient:
        `trajectory_balance_loss` counts such a reward as a very small one.
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
    log_reward: Callable[..., Array],
    log_normalizer: Any = 0.0,
    *,
    num_paths: int = 1,
    x: Any = None,
    condition: Any = None,
    prior_condition: Any = None,
    inflation: Any = 1.0,
    num_steps: int | None = None,
    averaged: bool = False,
    above: float | None = None,
) -> Trajectories:
    """Residuals of relative trajectory balance, differentiable in the weights of ``posterior`` and in log Z.

    Args:
      key: a typed key.
      posterior: the model that is tuned; gradients are those of its ``params``, through the means of its kernels (or
        their probabilities). Covariances that a network has (`diagonal`, `full`) count with what they are.
      prior: the model that it started from, of the same process, shape and transform. With another covariance than the
        posterior's, two models of the same denoiser are not the same, and the residual says so.
      times: increasing times; paths have their steps.
      log_reward: log r of one example in the user's coordinates, in nats; -inf where r is zero. With ``condition``,
        log_reward(x, condition).
      log_normalizer: the estimate of log Z, a number or (n,).
      num_paths: n, where paths are generated: by the kernels of ``posterior`` from noise.
      x: clean data, (n, *shape) in the user's coordinates: paths are those that noise makes of them instead.
      condition: of ``posterior``, one for every path: a pytree of arrays (n, ...), as its network takes them. What is
        learned then is the posterior p(x) r(x, y) / Z(y) for every condition y at once.
      prior_condition: likewise of ``prior``; its own by default.
      inflation: generated paths draw from kernels of so many times the variance, a number or (n,): more is explored,
        and what is evaluated are the kernels as they are. Numbers that diffuse only.
      num_steps: of the gradient: so many steps, drawn at random and counted for all. Unbiased and cheaper; it needs
        the memory of so many steps at once, whatever their number on the path.
      averaged: the gradient of each step's log-ratio is its average over where the step ends, given where it begins
        and x; the residual that it is multiplied by stays that of the path. It has much less noise, and leaves out what
        residual and gradient owe to the same draw: it is zero on average at the posterior and the loss's own gradient
        at the prior, where residuals know nothing of the noise, and no gradient of the loss in between. A posterior
        that cannot be reached is approached in another sense. Of noised paths; of scalar Gaussian noise, and of tokens
        one by one (`AnyOrder`), over which of them is the next. (Of generated paths the model is no exact reversal of
        the noise, and a mean of the residuals that is not zero would teach it to be one.)
      above: for a posterior that is the prior at times up to this one, such as a network whose classes count above it
        only: there all ratios are 1, noised paths leap over these steps, and ``num_steps`` chooses among the others. It
        is not checked.

    Costs an evaluation of both models per path and step, and of the gradient's pass another one and its derivative.

    Raises:
      ValueError: for models of different processes or shapes, times or points that do not suit, a posterior without
        weights, an inflation that is not positive or of tokens, counts that are not integers of at least 1, or a reward
        that is not one number.

    Warns:
      SignalAtEndWarning: where a good part of the data is left at the largest time, so that the law that paths start
        from has a tilt of its own. A prior with a law of its own there is no way out of that.
    """
    _check_models(key, posterior, prior)
    times = check_times(posterior, times)
    warn_of_signal(prior, times, own_prior_helps=False)
    num_paths = check_count("num_paths", num_paths)
    conditions = _check_conditions(posterior, prior, condition, prior_condition, num_paths if x is None else len(x))
    walk = make_walk(
        key, posterior, prior, times, num_paths, x, inflation, num_steps, None, *conditions, averaged, above
    )
    end, ratio = path_log_ratio(posterior.params, walk)
    state = end if walk.origin is None else walk.origin
    return _weighed(prior, state, ratio, log_reward, log_normalizer, condition)


def back_and_forth_residual(
    key: Array,
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: Any,
    log_reward: Callable[..., Array],
    x: Any,
    *,
    condition: Any = None,
    prior_condition: Any = None,
    num_steps: int | None = None,
) -> tuple[Array, Trajectories]:
    """The difference of two residuals that share the upper part of their path, and with it log Z: down less up.

    Clean data are noised along ``times``, which may end anywhere, and what they have become is denoised again.

    Args:
      key, posterior, prior, log_reward, condition, prior_condition, num_steps: as for `trajectory_balance_residual`.
      times: increasing; the last is where paths turn round.
      x: clean data, (n, *shape) in the user's coordinates.

    Returns:
      the differences, (n,), and the paths down, with log Z = 0.
    """
    key_up, key_down = jax.random.split(key)
    _check_models(key, posterior, prior)
    times = check_times(posterior, times)
    conditions = _check_conditions(posterior, prior, condition, prior_condition, len(x))
    up = make_walk(key_up, posterior, prior, times, 1, x, 1.0, num_steps, None, *conditions)
    top, ratio_up = path_log_ratio(posterior.params, up)
    start = jax.lax.stop_gradient(top)
    down = make_walk(key_down, posterior, prior, times, len(start), None, 1.0, num_steps, start, *conditions)
    end, ratio_down = path_log_ratio(posterior.params, down)
    there = _weighed(prior, up.start, ratio_up, log_reward, 0.0, condition)
    back = _weighed(prior, end, ratio_down, log_reward, 0.0, condition)
    return back.residual - there.residual, back


def _weighed(
    prior: DiffusionModel,
    state: Array,
    ratio: Array,
    log_reward: Callable[..., Array],
    log_normalizer: Any,
    condition: Any = None,
) -> Trajectories:
    x = jax.vmap(prior.transform.to_data)(jax.lax.stop_gradient(state))
    arguments = (x,) if condition is None else (x, condition)
    rewards = jax.lax.stop_gradient(jax.vmap(log_reward)(*arguments))
    if jnp.shape(rewards) != (len(x),):
        raise ValueError(f"log_reward of one example must return one number, got shape {jnp.shape(rewards)[1:]}")
    return Trajectories(x, ratio, rewards, log_normalizer + ratio - rewards)


def _check_models(key: Array, posterior: DiffusionModel, prior: DiffusionModel) -> None:
    check_key(key)
    if posterior.process != prior.process or posterior.shape != prior.shape:
        raise ValueError(
            f"posterior and prior must be models of one process and shape: {posterior.process} with {posterior.shape}, "
            f"{prior.process} with {prior.shape}"
        )
    if type(posterior.transform) is not type(prior.transform):
        raise ValueError(
            f"posterior and prior must have one transform, in whose coordinates rewards are: got {posterior.transform} "
            f"and {prior.transform}"
        )
    if posterior.params is None:
        raise ValueError("posterior has no weights to tune: DiffusionModel(process, fn, ..., params=weights)")


def _check_conditions(
    posterior: DiffusionModel, prior: DiffusionModel, condition: Any, prior_condition: Any, count: int
) -> tuple[Any, Any]:
    found = []
    for name, model, given in (("condition", posterior, condition), ("prior_condition", prior, prior_condition)):
        given = jax.tree.map(jnp.asarray, given)
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(given)}
        if given is not None and sizes != {count}:
            raise ValueError(f"{name} must have one for each of {count} paths, got leading sizes {sorted(sizes)}")
        if given is not None:
            model.with_condition(jax.tree.map(lambda leaf: leaf[0], given))  # which says what is wrong with it
        found.append(given)
    return found[0], found[1]


def batch_log_normalizer(paths: Trajectories, condition: Any = None, *, bound: float = math.inf) -> Array:
    """VarGrad's estimate of log Z: the mean of log r - log_ratio over the paths of a batch, which the loss holds fixed.

    residual^2 / 2 with it is half the variance of the residuals, whose gradient does not depend on log Z: it is the
    number that minimises the batch's loss. For a loss that grows linearly beyond a ``bound`` this is not the mean but
    Huber's estimate of location, for which a few paths of hardly any reward are a few and no more; found by bisection
    to the precision of the values.

    With a condition for every path, (n,): the estimates for paths of equal conditions. A path that is alone with its
    condition has a residual of zero, and teaches nothing. Without a bound, a reward of zero (-inf) makes the estimate
    of its condition -inf.
    """
    values = jax.lax.stop_gradient(paths.log_reward - paths.log_ratio)
    equal = jnp.ones((1, len(values)), values.dtype) if condition is None else equal_conditions(condition)

    def mean(each: Array) -> Array:
        return jnp.sum(jnp.where(equal > 0, each, 0.0), axis=1) / jnp.sum(equal, axis=1)

    found = mean(values[None])
    if math.isfinite(bound):
        possible = (equal > 0) & jnp.isfinite(values)
        low = jnp.min(jnp.where(possible, values, jnp.inf), axis=1) - bound
        high = jnp.max(jnp.where(possible, values, -jnp.inf), axis=1)

        def slope(estimate: Array) -> Array:
            """Of the loss, less than zero below its minimum."""
            return -mean(jnp.clip(values[None] - estimate[:, None], -bound, bound))

        def halve(ends: tuple[Array, Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array, Array], None]:
            # Where the loss is flat, between values that are far apart, both ends of its minimum, low and high.
            a, b, c, d = ends
            first, last = 0.5 * (a + b), 0.5 * (c + d)
            is_below, is_not_above = slope(first) < 0, slope(last) <= 0
            a, b = jnp.where(is_below, first, a), jnp.where(is_below, b, first)
            c, d = jnp.where(is_not_above, last, c), jnp.where(is_not_above, d, last)
            return (a, b, c, d), None

        bits = 2 + jnp.finfo(values.dtype).nmant
        (a, _, _, d), _ = jax.lax.scan(halve, (low, high, low, high), None, length=bits)
        # Where nothing is beyond the bound, the mean, to its own precision.
        beyond = ~jnp.all((equal == 0) | (jnp.abs(values[None] - found[:, None]) <= bound), axis=1)
        known = jnp.any(possible, axis=1) & ~jnp.isnan(found)  # what is no number must be seen
        found = jnp.where(beyond & known, 0.5 * (a + d), found)
    return found[0] if condition is None else found


def equal_conditions(condition: Any) -> Array:
    """1 where two of n conditions are the same, else 0: (n, n)."""
    equal = jnp.asarray(True)
    for leaf in jax.tree.leaves(condition):
        flat = leaf.reshape(len(leaf), -1)
        equal = equal & jnp.all(flat[:, None] == flat[None], axis=-1)
    return equal.astype(jnp.result_type(float))
