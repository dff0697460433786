r"""Energy-based training: log p_theta(x, t) = -E_theta(x, t) is a scalar network, and its gradient the score.

Score matching fixes E at every time up to a constant, and only where samples of that time are; it says nothing of how
different noise levels and separate modes compare. A residual couples them. For the true time reversal

    log p_s(x_s) - log p_t(x_t) = l(x_s, x_t) = log K(x_s | x_t) - log F(x_t | x_s)      for every pair (x_s, x_t),

so the difference of two energies has to be the increment l (`rnejax.increments`), which the score at (x_t, t)
gives: no divergence, no time derivative, no gradient of a gradient beyond score matching's own. The Fokker-Planck
residual asks the same of infinitesimal steps.

Sources: He et al. 2025 (RNE, arXiv 2506.05668), with Euler-Maruyama kernels and steps of 1e-4; mathematics.md, section
6, for the residual with the covariance of the reverse kernel and random steps; Plainer et al. 2025 for Fokker-Planck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..checks import check_count
from ..covariance import Covariance
from ..increments import ESTIMATORS, get_estimator, increment, reference_difference
from ..kernels import Array, event_sum
from ..model import DiffusionModel
from ..processes.gaussian import require_scalar
from ..processes.gaussian_steps import drift_and_diffusion
from .denoising import Prepare
from .times import low_discrepancy_uniforms

TERMS = ("score", "rne", "rne_euler", "fokker_planck", "prior")


def rne_residual(
    model: DiffusionModel,
    x_s: Array,
    x_t: Array,
    s: Any,
    t: Any,
    *,
    estimator: str | None = None,
    key: Array | None = None,
) -> Array:
    """log p_theta(x_s, s) - log p_theta(x_t, t) - stop_gradient(l_theta(x_s, x_t)) in nats, for one pair of states.

    The pair has to be a noising transition, x_t ~ F(. | x_s). l and all that it is made of (score, covariance) sit
    inside the stop-gradient. With ``covariance="euler"`` it is the residual of the RNE paper; with the exact kernels
    and one of the other choices, the covariance-corrected one, which stays small for steps that are not.

    Args:
      model: of an energy (``prediction="energy"``).
      x_s, x_t: states in the network's coordinates, s < t.
      estimator: of the increment; by default the exact one, or the paper's with Euler-Maruyama kernels.
      key: used by a random covariance only.

    Raises:
      ValueError: for a model of another prediction, states of another shape, or known times that are not s < t.
    """
    difference = model.energy(x_t, t) - model.energy(x_s, s)
    return difference - jax.lax.stop_gradient(increment(model, x_s, x_t, s, t, estimator, key))


def fokker_planck_residual(
    key: Array, model: DiffusionModel, x: Array, t: Any, *, time_step: float = 1e-3, probe_std: float = 1e-2
) -> Array:
    r"""An estimate of the rate, in nats per unit of t, at which log p_theta violates the Fokker-Planck equation.

    R = d/dt log p + f (d + score . x) - g^2 / 2 (laplacian log p + |score|^2),   dx = f x dt + g dW,

    with a central difference of ``time_step`` in time (one-sided at the ends of the process's range), and the Laplacian
    from one random probe, (score(x + v) - score(x)) . v / std^2 with v of standard deviation ``probe_std`` times
    sigma_t. The probe is independent of everything else, so R of two keys, multiplied, is an unbiased estimate of
    the square.

    Args:
      key: of the probe.
      model: of an energy.
      x: one state, in the network's coordinates.

    Raises:
      ValueError: for a model of another prediction, a state of another shape, or steps that are not positive.

    Source: Plainer et al. 2025.
    """
    if not (time_step > 0 and probe_std > 0):
        raise ValueError(f"time_step and probe_std must be positive, got {time_step} and {probe_std}")
    process, level = model.process, model.process.level(t)
    linear, diffusion = drift_and_diffusion(level)
    dimension = process.subspace.dimension(x.shape)
    later, earlier = jnp.minimum(t + time_step, process.t_max), jnp.maximum(t - time_step, process.t_min)
    rate = (model.energy(x, earlier) - model.energy(x, later)) / (later - earlier)
    score = model.score(x, t)
    std = probe_std * level.sigma
    probe = std * process.subspace.project(jax.random.normal(key, x.shape, x.dtype))
    laplacian = event_sum((model.score(x + probe, t) - score) * probe) / std**2
    drift = linear * (dimension + event_sum(score * x))
    return rate + drift - 0.5 * diffusion * (laplacian + event_sum(score**2))


class Pair(NamedTuple):
    """Noised data at two times, x_t ~ F(. | x_s). All have a batch axis."""

    x_s: Array
    x_t: Array
    s: Array
    t: Array


def noising_pair(key: Array, process: Any, x0: Array, s: Array, t: Array, noise: Array) -> Pair:
    """x_t = alpha_t x_0 + sigma_t eps of this noise, and x_s between x_0 and x_t: a transition, drawn from its end.

    Args:
      key: of what the bridge adds.
      process: a process of numbers that diffuse; of a linear SDE with times that are known.
      x0: clean data, (n, *shape), on the process's subspace.
      s, t: (n,), s < t.
      noise: standard, of the states' shape, on the subspace.
    """
    x_t = jax.vmap(lambda level, x0, noise: level.noised(x0, noise))(process.level(t), x0, noise)
    return Pair(bridge(key, process.transition(s, t), x0, x_t), x_t, s, t)


def bridge(key: Array, steps: Any, x0: Array, x_t: Array) -> Array:
    """x_s between clean data and x_t: the reverse kernel of somebody who knows x_0, with no covariance of it left."""

    def one(key: Array, step: Any, x0: Array, x_t: Array) -> Array:
        excess = step.t.excess(x0[None], x_t[None], "x0")[0]
        x_s: Array = step.reverse(x_t, excess, -jnp.ones((), x_t.dtype)).sample(key)
        return x_s

    return jax.vmap(one)(jax.random.split(key, len(x0)), steps, x0, x_t)


def energy_loss(
    process: Any,
    apply: Callable[..., Array],
    prepare: Prepare = lambda key, batch: (batch, None),
    *,
    weights: Mapping[str, float],
    covariance: str | Covariance = "full",
    step_ratio: tuple[float, float] = (1.0, 1.2),
    euler_step: float = 1e-4,
    time_step: float = 1e-3,
    probe_std: float = 1e-2,
    thinning: Mapping[str, int] = MappingProxyType({"rne": 2, "rne_euler": 2, "fokker_planck": 2, "prior": 8}),
    times: Callable[[Array], Array] | None = None,
    bound: float = 1.0,
) -> Callable[[Array, Any, Any], tuple[Array, dict[str, Array]]]:
    r"""loss(key, params, batch) -> (weighted sums of the terms, the terms), one number each per example, for `fit`.

    All terms look at the same noised data (x_t, t), where the score is computed once. With d the dimension and delta
    = log-SNR(s) - log-SNR(t), they are, for residuals as rates per unit of log-SNR and for each dimension,

        score          |eps - eps_theta|^2 / d, denoising score matching
        rne            (residual / delta)^2 / d, reverse kernel that of ``covariance``, t / s uniform in ``step_ratio``
        rne_euler      (residual / delta)^2 / d with Euler-Maruyama kernels and t - s = ``euler_step``: the RNE paper's
        fokker_planck  (R of one probe) (R of another) / rate^2 / d, rate = |d log-SNR / dt|: R per unit of log-SNR
        prior          (log p_theta - log reference)^2 / d on noised data at t_max: pins the constant, so that p_theta
                       is normalised where a residual carries the pin to smaller times

    A residual is a sum over dimensions, so that the mean of its square grows with d where dimensions err on their own:
    divided by d, a weight that serves in the plane serves in a hundred dimensions.

    The target of ``rne`` is made from the score that is being learned, squared. Where that is far off, the square of
    the residual pulls the energy along with it, past what score matching can hold: in 100 dimensions one seed of three
    ran away after 3,600 steps. So u^2, u = residual / (delta sqrt(d)), is 2 c^2 (sqrt(1 + u^2 / c^2) - 1) here
    (pseudo-Huber): the same where u is small against c = ``bound``, and of a bounded gradient beyond.

    Args:
      process: a process of numbers that diffuse; ``rne_euler`` and ``fokker_planck`` take a scalar one. A linear SDE
        has `num_levels` times, each with one step of its own ratio. Of a phase space it is the whole state's energy.
      apply: apply(params, x, t, condition) -> energies (n,), on a batch.
      prepare: prepare(key, batch) -> (x0, condition).
      weights: of the terms, by name; what is left out is not computed.
      covariance: of the reverse kernel in ``rne``: ``full`` in a few dimensions, ``hutchinson`` or ``diagonal`` beyond.
      step_ratio: lowest and highest t / s.
      thinning: a term is computed on every so many-th example only, and stands for the others: residuals cost more
        than score matching, and vary less. 1 where a term is not named.
      times: a map from uniform numbers to times (`rnejax.training.time_law`); default, uniform in t.
      bound: c of ``rne``, in nats per unit of log-SNR and root of a dimension; ``math.inf`` for squares.

    Raises:
      ValueError: for an unknown term or one that the process has not, a weight that is not positive, none at all, a
        ratio below 1, a thinning that is no positive integer, or a bound that is not positive.
    """
    if process.is_discrete:
        raise ValueError(f"energies are of states that are numbers; {type(process).__name__} is a process of tokens")
    weights = _check_terms(weights)
    for name in {"rne_euler", "fokker_planck"} & weights.keys():
        require_scalar(process, f"the term {name}")
    thin = {name: check_count(f"thinning of {name}", thinning.get(name, 1)) for name in TERMS}
    low, high = step_ratio
    if not 1 <= low <= high or high == 1:
        raise ValueError(f"step_ratio must be (low, high) with 1 <= low <= high and high > 1: got {step_ratio}")

    if not bound > 0:
        raise ValueError(f"bound must be positive, math.inf for none: got {bound}")

    def residual_terms(keys: dict[str, Array], name: str, data: _Noised, evaluation: Any) -> Array:
        """One of the terms that is no score matching, of the examples given."""
        count = len(data.t)
        if name == "rne":
            drawn = jax.random.uniform(keys["ratio"], (count,), data.t.dtype, minval=0.01)
            corrected = data._replace(model=data.model.with_covariance(covariance))
            steps = process.training_steps(data.t, drawn, (low, high))
            return corrected.squared_residuals(keys[name], steps, corrected.evaluate(keys["score"]))
        if name == "rne_euler":
            s = jnp.maximum(data.t - euler_step, 0.5 * process.t_min)
            return data.squared_residuals(keys[name], process.transition(s, data.t), evaluation)
        if name == "fokker_planck":

            def rate(model: DiffusionModel, x: Array, t: Array, key: Array) -> Array:
                return fokker_planck_residual(key, model, x, t, time_step=time_step, probe_std=probe_std)

            probes = [jax.random.split(key, count) for key in jax.random.split(keys[name])]
            level = process.level(data.t)
            per_log_snr = 2 * (level.alpha_rate / level.alpha - level.sigma_rate / level.sigma)
            one, other = (data.each(rate, data.x_t, data.t, probe) for probe in probes)
            return one * other / per_log_snr**2
        end = process.level(process.t_max)
        at_end = process.reference_at(end, data.x_t.shape[1:])
        fresh = jax.vmap(process.subspace.project)(jax.random.normal(keys[name], data.x_t.shape, data.x0.dtype))
        return data.each(
            lambda model, x: (model.energy(x, process.t_max) + at_end.log_prob(x)) ** 2,
            jax.vmap(end.noised)(data.x0, fresh),
        )

    def loss(key: Array, params: Any, batch: Any) -> tuple[Array, dict[str, Array]]:
        keys = dict(zip(("prepare", "times", "noise", "ratio", *TERMS), jax.random.split(key, 9), strict=True))
        x0, condition = prepare(keys["prepare"], batch)
        count = len(x0)
        uniforms = low_discrepancy_uniforms(keys["times"], count)
        t = process.t_min + (process.t_max - process.t_min) * uniforms if times is None else times(uniforms)
        shape = process.state_shape(x0.shape[1:])
        noise = jax.vmap(process.subspace.project)(jax.random.normal(keys["noise"], (count, *shape), x0.dtype))
        noise = jax.lax.optimization_barrier(noise)
        level = process.training_levels(t)
        t = jnp.asarray(level.t, t.dtype)
        x_t = jax.vmap(lambda level, x0, noise: level.noised(x0, noise))(level, x0, noise).astype(x0.dtype)
        model = DiffusionModel(
            process,
            lambda params, x, t, condition: apply(params, x, t, *([] if condition is None else [condition])),
            "energy",
            "euler" if "rne_euler" in weights else "reference",
            shape,
            params=params,
            condition=None if condition is None else jax.tree.map(lambda leaf: leaf[0], condition),
            batched=True,
        )
        data = _Noised(model, condition, x0, x_t, t, level)
        evaluation = data.evaluate(keys["score"])
        terms: dict[str, Array] = {}
        for name in weights:
            if name == "score":
                error = jax.vmap(type(level).denoised)(level, x_t, evaluation.excess) - x0
                error = jax.vmap(type(level).whiten_mean)(level, error)  # as one of the noise
                terms[name] = jnp.sum(error**2, axis=1) / process.subspace.dimension(x0.shape[1:])
                continue
            some = slice(None, None, thin[name])
            chosen, said = jax.tree.map(lambda leaf, some=some: leaf[some], (data._replace(model=None), evaluation))
            found = residual_terms(keys, name, chosen._replace(model=model), said)
            # Each of them stands for those left out, so that the mean over the batch is the term's.
            found = found / process.subspace.dimension(x0.shape[1:])
            if name == "rne" and math.isfinite(bound):
                found = pseudo_huber(found, bound)
            found = found * (count / len(found))
            terms[name] = jnp.zeros(count, x0.dtype).at[some].set(found)
        return sum((weights[name] * terms[name] for name in weights), jnp.zeros(count, x0.dtype)), terms

    return loss


def pseudo_huber(square: Array, bound: float) -> Array:
    """2 c^2 (sqrt(1 + u^2 / c^2) - 1) of u^2, without the cancellation: u^2 for small u, 2 c |u| for large."""
    return 2 * square / (1 + jnp.sqrt(1 + square / bound**2))


class _Noised(NamedTuple):
    """Examples with one noised state each. All but the model have a batch axis."""

    model: Any
    condition: Any
    x0: Array
    x_t: Array
    t: Array
    level: Any

    def each(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model under the example's condition, ...) over the examples."""

        def one(condition: Any, *rest: Any) -> Any:
            return function(self.model if condition is None else self.model.with_condition(condition), *rest)

        return jax.vmap(one)(self.condition, *arguments)

    def evaluate(self, key: Array) -> Any:
        """What the model says at (x_t, t): its score, and what its covariance needs."""

        def one(model: DiffusionModel, x: Array, level: Any, key: Array) -> Any:
            return model._evaluate_one(x, level, key)

        return self.each(one, self.x_t, self.level, jax.random.split(key, len(self.t)))

    def squared_residuals(self, key: Array, steps: Any, evaluation: Any) -> Array:
        """The squares of `rne_residual` per unit of log-SNR, with the model's evaluation at (x_t, t) known."""

        def one(model: DiffusionModel, x_s: Array, x_t: Array, step: Any, said: Any) -> Array:
            change = ESTIMATORS[get_estimator(None, model)](model, step, x_s, x_t, said)
            change = jax.lax.stop_gradient(change + reference_difference(model.process, step, x_s, x_t))
            residual = model.energy_at(x_t, step.t) - model.energy_at(x_s, step.s) - change
            return (residual / (step.s.log_snr - step.t.log_snr)) ** 2

        x_s = bridge(key, steps, self.x0, self.x_t)
        return self.each(one, x_s, self.x_t, steps, jax.lax.stop_gradient(evaluation))


def score_of_energy(apply: Callable[..., Array]) -> Callable[..., Array]:
    """apply(params, x, t, ...) -> scores (n, *shape), of a network of energies (n,)."""

    def score(params: Any, x: Array, *rest: Any) -> Array:
        return -jax.grad(lambda x: jnp.sum(apply(params, x, *rest)))(x)

    return score


def _check_terms(weights: Mapping[str, float]) -> dict[str, float]:
    unknown = [name for name in weights if name not in TERMS]
    if unknown or not weights:
        raise ValueError(f"weights must name terms of the loss, {', '.join(TERMS)}: got {', '.join(unknown) or 'none'}")
    wrong = [f"{name}: {weight}" for name, weight in weights.items() if not weight > 0]
    if wrong:
        raise ValueError(f"a weight must be positive; leave out the terms that are not wanted: got {', '.join(wrong)}")
    return dict(weights)
