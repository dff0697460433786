"""Paths of a prior and a posterior: the sum of their log-kernel ratios, whose gradient has the memory of one step.

A path is a constant, whoever has made it, and each of its steps has a random key of its own: so it can be walked twice.
The first pass adds up log K_phi / K; the second walks the same path again and adds up the gradients of its steps,
weighted by what the first has found. Neither keeps a path. See `rnejax.training.trajectory_balance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, check_number
from ..density import check_points
from ..increments import transitions
from ..kernels import Array, log_ratio
from ..model import DiffusionModel
from ..processes import AnyOrder, GaussianProcess
from ..smc import CompensatedSum


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "key",
        "posterior",
        "prior",
        "steps",
        "start",
        "origin",
        "inflation",
        "chosen",
        "conditions",
        "prior_conditions",
        "bridges",
    ],
    meta_fields=["towards_noise", "num_differing"],
)
@dataclass(frozen=True)
class Walk:
    """All that paths are made of, but for the weights.

    Attributes:
      key: every step has a key of its own, so that a path can be walked again.
      posterior, prior: the models.
      steps: stacked, in order of execution.
      start: states in the network's coordinates, (n, *shape).
      origin: clean data that noise has made ``start`` of, where it has; None where paths are generated.
      inflation: factors on the variance of the kernels that paths are drawn from, (n,), or None.
      chosen: the steps that the gradient is of, (k,), or None for all.
      conditions, prior_conditions: of the two models, with a leading axis of paths; None for their own.
      bridges: of every step from t to s, (c_0, c_t) with E[x_s | x_t, origin] = c_0 origin + c_t x_t under the noise,
        where the gradient is that of x_s there; None for that of x_s where it is. Of tokens that appear one
        by one (): any that is masked may be the next.
      towards_noise: whether paths go up by the noising kernels.
      num_differing: how many steps there are in which posterior and prior may differ; only of these any are chosen.
    """

    key: Array
    posterior: DiffusionModel
    prior: DiffusionModel
    steps: Any
    start: Array
    origin: Array | None
    inflation: Array | None
    chosen: Array | None
    conditions: Any
    prior_conditions: Any
    bridges: tuple[Array, ...] | None
    towards_noise: bool
    num_differing: int


def make_walk(
    key: Array,
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: np.ndarray,
    num_paths: int,
    x: Any,
    inflation: Any,
    num_steps: int | None,
    start: Array | None = None,
    conditions: Any = None,
    prior_conditions: Any = None,
    averaged: bool = False,
    above: float | None = None,
) -> Walk:
    key_start, key_steps, key_chosen = jax.random.split(key, 3)
    first = first_step(times, above)
    differing = len(times) - 1 - first
    origin = None
    if x is not None:
        origin = start = jax.vmap(prior.transform.to_model)(check_points(prior, x, times))
        factors = None
        start = _noised(key_start, prior.process, times[: first + 1], start)
    else:
        if start is None:
            law = prior.prior_at(prior.process.level(times[-1]))
            start = jax.vmap(law.sample)(jax.random.split(key_start, num_paths))
        factors = _inflation(inflation, prior, num_paths)
    bridges = None
    if x is not None:
        bridges = _bridges(prior.process, times, first) if averaged else None
        times = times[first:]
    chosen = None  # of the steps that differ, which are the first of a path that is generated, and all of a noised one
    if num_steps is not None and check_count("num_steps", num_steps) < differing:
        chosen = jax.random.choice(key_chosen, differing, (num_steps,), replace=False)
    return Walk(
        key=key_steps,
        posterior=posterior.with_params(jax.lax.stop_gradient(posterior.params)),
        prior=prior,
        steps=transitions(prior.process, times, towards_noise=x is not None),
        start=jax.lax.stop_gradient(start),
        origin=jax.lax.stop_gradient(origin),
        inflation=factors,
        chosen=chosen,
        conditions=conditions,
        prior_conditions=prior_conditions,
        bridges=bridges,
        towards_noise=x is not None,
        num_differing=differing,
    )


def first_step(times: np.ndarray, above: float | None) -> int:
    """How many steps there are at whose upper end, where models are asked, the time is not above ``above``."""
    if above is None:
        return 0
    first = int(np.sum(times[1:] <= check_number("above", above)))
    if first == len(times) - 1:
        raise ValueError(f"above must be below the largest time, {times[-1]:g}: got {above}")
    return first


def _noised(key: Array, process: Any, times: np.ndarray, x: Array) -> Array:
    """Where noise takes states from the first to the last of some times; no model is asked."""
    if len(times) == 1:
        return x

    def move(x: Array, this: Any) -> tuple[Array, None]:
        key, step = this
        return jax.vmap(lambda key, x: step.forward(x).sample(key))(jax.random.split(key, len(x)), x), None

    keys = jax.random.split(key, len(times) - 1)
    moved, _ = jax.lax.scan(move, x, (keys, transitions(process, times, towards_noise=True)))
    return moved


def _bridges(process: Any, times: np.ndarray, first: int) -> tuple[Array, ...]:
    """What noise makes of the start, on the way back: E[x_s | x_t, x_{t_min}] = c_0 x_{t_min} + c_t x_t of every step.

    With x_s = a x_{t_min} + N(0, v) and x_t = b x_s + N(0, w): c_0 = a w / (w + b^2 v) and c_t = b v / (w + b^2 v).

    Raises:
      ValueError: for a process whose noise is no number, nor masks one token after the other; which needs no numbers.
    """
    if isinstance(process, AnyOrder):
        return ()
    if not isinstance(process, GaussianProcess):
        raise ValueError(
            f"gradients are averaged over draws of scalar Gaussian noise, or over which token is next: not of {process}"
        )
    alpha, sigma = (np.asarray(each(times), np.float64) for each in (process.alpha, process.sigma))
    decay, variance = alpha / alpha[0], np.maximum(sigma**2 - (alpha / alpha[0] * sigma[0]) ** 2, 0.0)
    a, v = decay[:-1], variance[:-1]
    b = alpha[1:] / alpha[:-1]
    w = np.maximum(sigma[1:] ** 2 - (b * sigma[:-1]) ** 2, 0.0)
    total = w + b**2 * v
    return jnp.asarray((a * w / total)[first:], float), jnp.asarray((b * v / total)[first:], float)


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


def _step(
    params: Any, walk: Walk, index: Array, step: Any, x: Array, averaged: bool = False
) -> tuple[Array, tuple[Array, Array]]:
    """log K_phi / K of one step of every path, and both its ends (x_t, x_s); one of them is x.

    ``averaged``: of what x_s is on average, where the walk knows that.
    """
    key_model, key_move = jax.random.split(jax.random.fold_in(walk.key, index))
    keys = jax.random.split(key_move, len(x))
    x = jax.lax.stop_gradient(x)
    if walk.towards_noise:
        x_t, x_s = jax.vmap(lambda key, x: step.forward(x).sample(key))(keys, x), x
    else:
        x_t, x_s = x, None
    asked = _averaged(walk, index, x_t) if averaged else None
    ratios, x_s = _ratios(params, walk, key_model, keys, step, x_t, x_s, asked)
    return ratios, (x_t, x_s)


def _averaged(walk: Walk, index: Array, x_t: Array) -> tuple[Array, Array] | None:
    """States x_s, (m, n, *shape), and their weights, (m, n), with the mean gradient over x_s given x_t and the origin.

    None where the gradient is that of x_s where it is. Of numbers one state is enough: the log-ratio is a quadratic of
    x_s, whose gradient in a kernel's mean is linear in it. Of tokens that appear one by one, each of those that are
    masked may be the next, with the same probability.
    """
    origin = walk.origin
    if walk.bridges is None or origin is None:
        return None
    if walk.prior.process.is_discrete:
        masked = x_t == walk.prior.process.mask_token  # type: ignore[attr-defined]
        weights = masked.T / jnp.sum(masked, axis=1)
        # Instead of a place where nothing is masked, which has no weight, the first that is: a step that there may be.
        places = jnp.where(masked.T, jnp.arange(x_t.shape[1])[:, None], jnp.argmax(masked, axis=1))
        next_one = places[..., None] == jnp.arange(x_t.shape[1])
        return jnp.where(next_one, origin, x_t), weights
    of_start, of_end = (each[index].astype(x_t.dtype) for each in walk.bridges)
    return (of_start * origin + of_end * x_t)[None], jnp.ones((1, len(x_t)))


def _ratios(
    params: Any,
    walk: Walk,
    key_model: Array,
    keys: Array,
    step: Any,
    x_t: Array,
    x_s: Array | None,
    asked: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """log K_phi(x_s | x_t) / K(x_s | x_t) and x_s, which is drawn from K_phi, inflated, where it is not given.

    ``asked``: the ratio is that of these states instead, (m, n, *shape), with their weights, (m, n).
    """
    posterior, prior = walk.posterior.with_params(params), walk.prior
    ours = _evaluate(posterior, walk.conditions, key_model, x_t, step.t)
    # Covariances are taken as they are: eigenvectors have no derivative where eigenvalues are equal.
    ours = jax.lax.stop_gradient(ours)._replace(excess=ours.excess)
    theirs = _evaluate(prior, walk.prior_conditions, key_model, x_t, step.t, jax.lax.stop_gradient(ours.excess))

    if x_s is None:

        def draw(key: Array, x_t: Array, ours: Any, inflation: Any) -> Array:
            kernel: Any = posterior.kernel(step, x_t, ours)
            wide = kernel if inflation is None else kernel.scale_covariance(inflation)
            drawn: Array = wide.sample(key)
            return drawn

        x_s = jax.vmap(draw)(keys, x_t, jax.lax.stop_gradient(ours), walk.inflation)

    def ratio(x_t: Array, ours: Any, theirs: Any, x_s: Array) -> Array:
        return log_ratio(posterior.kernel(step, x_t, ours), prior.kernel(step, x_t, theirs), x_s)

    if asked is None:
        return jax.vmap(ratio)(x_t, ours, theirs, x_s), x_s
    states, weights = asked
    each = jax.vmap(jax.vmap(ratio), (None, None, None, 0))(x_t, ours, theirs, states)
    return jnp.sum(weights * each, axis=0), x_s


def _evaluate(model: DiffusionModel, conditions: Any, key: Array, x: Array, level: Any, after: Any = None) -> Any:
    """What a model says of every path's state, under a condition of its own where there are any."""
    if conditions is None:
        return model.evaluate(key, x, level, after=after)

    def one(condition: Any, key: Array, x: Array, after: Any) -> Any:
        found = model.with_condition(condition).evaluate(key, x[None], level, after=after)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return jax.vmap(one)(conditions, jax.random.split(key, len(x)), x, after)


@jax.custom_vjp
def path_log_ratio(params: Any, walk: Walk) -> tuple[Array, Array]:
    """Where paths end, (n, *shape), and their sums of log K_phi / K, (n,), of which the weights have a gradient."""
    return walk_once(params, walk)[:2]


def walk_once(params: Any, walk: Walk) -> tuple[Array, Array, tuple[Array, Array] | None]:
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
    x, total, kept = walk_once(params, walk)
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
            _, pull, ends = jax.vjp(lambda params: _step(params, walk, index, step, x, True), params, has_aux=True)
            return (ends[0] if walk.towards_noise else ends[1], add(gradient, pull(weights)[0])), None

        (_, gradient), _ = jax.lax.scan(again, (walk.start, zeros), (jnp.arange(count), walk.steps))
        return gradient, None

    k = len(walk.chosen)

    def one(params: Any, index: Array, step: Any, x_t: Array, x_s: Array) -> Array:
        key_model, key_move = jax.random.split(jax.random.fold_in(walk.key, index))
        keys = jax.random.split(key_move, len(x_t))
        return _ratios(params, walk, key_model, keys, step, x_t, x_s, _averaged(walk, index, x_t))[0]

    def at_chosen(params: Any) -> Array:
        # All at once, which is why few are chosen: on CPUs XLA has no fast gradient of a convolution inside a loop.
        steps = jax.tree.map(lambda leaf: leaf[walk.chosen], walk.steps)
        each = jax.vmap(one, (None, 0, 0, 0, 0))
        return jnp.sum(each(params, walk.chosen, steps, kept[0][:-1], kept[1][:-1]), axis=0)

    _, pull = jax.vjp(at_chosen, params)
    return pull(weights * (walk.num_differing / k))[0], None


path_log_ratio.defvjp(_save, _backward)
