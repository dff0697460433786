r"""The Feynman-Kac problem of a target: what a particle is, how it moves, how it is weighed.

The log-weight of a step from t to s < t (mathematics.md, section 4), with reference ref_t and bar_t = sum_i beta_{i,t}:

    log w = sum_i [ beta_{i,t} e_i + (beta_{i,s} - beta_{i,t}) E_i(x_s) ]
            + (bar_t - 1) [ log ref_s(x_s) - log ref_t(x_t) ] + (bar_s - bar_t) log ref_s(x_s)
            + log(K_ref / A)(x_s) + log(B / F)(x_t) + tilt_s(x_s) - tilt_t(x_t)

where e_i is the excess increment of model i (``increments.py``; log(K_i / K_ref)(x_s) for the exact-kernel form) and
E_i = log p_{i,s}(x_s) - log ref_s(x_s) is what the particle has accumulated of it; E_i is needed for exponents that
vary in time, and comes out as the density of each particle under each model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..covariance import Evaluation
from ..density import prior_excess
from ..increments import ESTIMATORS, get_estimator, transitions
from ..kernels import Array, Gaussian, Kernel, log_ratio
from ..model import DiffusionModel
from ..processes import GaussianTransition, NoiseLevel
from ..processes.gaussian import reference
from ..smc.weights import CompensatedSum
from .proposals import Local, Proposal, transport_effects
from .rewards import Reward


class Particle(NamedTuple):
    """A state and everything that is known about it: gathered whole when particles are resampled."""

    x: Array
    evaluations: tuple[Evaluation, ...]
    rewards: Array  # (j,)
    exact_gradient: Array
    gradient: Array
    log_reference: Array
    excess_log_densities: CompensatedSum  # (m,)


class ControlStep(NamedTuple):
    """One iteration: move from t to s, then look at the state at s. The first only looks, at t_max."""

    transition: GaussianTransition
    level: NoiseLevel  # where the state is looked at
    exponents_s: Array
    exponents_t: Array
    strengths_s: Array
    strengths_t: Array
    is_first: Array
    is_last: Array
    evaluate: Array


def control_steps(
    process: Any, times: np.ndarray, exponents: np.ndarray, strengths: np.ndarray, evaluate_last: bool
) -> ControlStep:
    """The n + 1 iterations of a grid with n steps, in order of execution."""
    n = len(times) - 1
    steps = transitions(process, times)
    at_s = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf]), steps)  # the first iteration moves nothing
    levels = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), process.level(times))

    def by_step(increasing: np.ndarray) -> tuple[Array, Array]:
        values = jnp.asarray(increasing[::-1], jnp.result_type(float))
        return values, jnp.concatenate([values[:1], values[:-1]])

    exponents_s, exponents_t = by_step(exponents)
    strengths_s, strengths_t = by_step(strengths)
    index = np.arange(n + 1)
    return ControlStep(
        transition=at_s,
        level=levels,
        exponents_s=exponents_s,
        exponents_t=exponents_t,
        strengths_s=strengths_s,
        strengths_t=strengths_t,
        is_first=jnp.asarray(index == 0),
        is_last=jnp.asarray(index == n),
        evaluate=jnp.asarray((index < n) | evaluate_last),
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["models", "rewards", "initial", "top", "exponents", "proposal"],
    meta_fields=["generated", "effects"],
)
@dataclass(frozen=True)
class Steer:
    """Move by A, weigh by the target over the proposal.

    ``generated``: the target is the law that the one model *generates*, tilted by rewards of the exact scheme or by
    none. Its weights are ratios to the model's own kernels, which are what generates, whatever these approximate;
    targets made of the models' marginals need their log-densities, for which Euler-Maruyama kernels have forms of their
    own. ``effects``: keep what a `Transport` would do to every weight, for `tune_proposal`.
    """

    models: tuple[DiffusionModel, ...]
    rewards: tuple[Reward, ...]
    initial: Gaussian
    top: NoiseLevel
    exponents: Array  # at t_max
    proposal: Proposal
    generated: bool = False
    effects: bool = False

    def init(self, key: Array, num_particles: int) -> tuple[Particle, Array]:
        x = jax.vmap(self.initial.sample)(jax.random.split(key, num_particles))

        def start(x: Array) -> tuple[Array, Array, Array]:
            ref = reference(self.top, x.shape, self.models[0].process.subspace)
            excess = jnp.stack([prior_excess(model.prior_at(self.top), model, self.top, x) for model in self.models])
            log_reference = ref.log_prob(x)
            log_weight = (
                jnp.sum(self.exponents * excess) + jnp.sum(self.exponents) * log_reference - self.initial.log_prob(x)
            )
            return log_reference, excess, log_weight

        log_reference, excess, log_weights = jax.vmap(start)(x)
        nothing = jnp.zeros_like(x)
        particles = Particle(
            x=x,
            evaluations=self._no_evaluations(x),
            rewards=jnp.zeros((num_particles, len(self.rewards)), x.dtype),
            exact_gradient=nothing,
            gradient=nothing,
            log_reference=log_reference,
            excess_log_densities=CompensatedSum.of(excess),
        )
        return particles, log_weights

    def step(self, key: Array, particles: Particle, step: ControlStep) -> tuple[Particle, Array, dict[str, Array]]:
        key_move, key_look = jax.random.split(key)
        keys = jax.random.split(key_move, len(particles.x))
        proposals = jax.vmap(partial(self._proposal_kernel, step))(particles)
        x = jax.lax.cond(
            step.is_first, lambda: particles.x, lambda: jax.vmap(lambda key, law: law.sample(key))(keys, proposals)
        )
        evaluations, rewards, exact_gradient, gradient = self.look(key_look, x, step)
        log_reference = jax.vmap(lambda x: reference(step.level, x.shape, self.models[0].process.subspace).log_prob(x))(
            x
        )
        arrived = Particle(
            x, evaluations, rewards, exact_gradient, gradient, log_reference, particles.excess_log_densities
        )
        increments, excess_increments = jax.vmap(partial(self._weigh, step))(particles, arrived, proposals)
        tilts = jax.vmap(lambda particle: self._local(particle, step.exponents_s, step.strengths_s).tilt)(arrived)
        increments = jnp.where(step.is_first, tilts, increments)
        increments = increments + jnp.where(step.is_last, self._change_of_volume(x, step), 0.0)
        excess_increments = jnp.where(step.is_first, 0.0, excess_increments)
        arrived = arrived._replace(excess_log_densities=particles.excess_log_densities.add(excess_increments))
        finite = [jnp.all(jnp.isfinite(evaluation.excess)) for evaluation in evaluations]
        gradients_finite = jnp.all(jnp.isfinite(exact_gradient)) & jnp.all(jnp.isfinite(gradient))
        aux = {
            "network_finite": jnp.stack(finite),
            "reward_nan": jnp.any(jnp.isnan(rewards)),
            "reward_forbids_some": jnp.any(rewards == -jnp.inf, axis=0),
            "reward_forbids_all": jnp.all(jnp.any(rewards == -jnp.inf, axis=1)),
            "gradients_finite": gradients_finite,
        }
        if self.effects:
            aux["effects"] = jax.vmap(partial(self._effects, step))(particles)
        return arrived, increments, aux

    def position(self, particles: Particle) -> Array:
        return jax.vmap(self.models[0].transform.to_data)(particles.x)

    def _change_of_volume(self, x: Array, step: ControlStep) -> Array:
        """prod_i p_i^beta_i, per volume, in the user's coordinates y over that in the network's: |dy/dx|^(1 - bar)."""
        model = self.models[0]
        log_det = jax.vmap(lambda x: model.transform.log_det(x, model.process.subspace))(x)
        return (1 - jnp.sum(step.exponents_s)) * log_det

    # -- looking at states: the only place where networks and rewards are called ---------------------------------------

    def look(self, key: Array, x: Array, step: ControlStep) -> tuple[tuple[Evaluation, ...], Array, Array, Array]:
        """Evaluations, rewards, and gradients of the exact and of the other tilt, of a batch of states."""
        return jax.lax.cond(
            step.evaluate,
            lambda: self._look(lambda x: self._evaluate(key, x, step.level), x, step),
            lambda: self._look(self._no_evaluations, x, step),
        )

    def _evaluate(self, key: Array, x: Array, level: NoiseLevel) -> tuple[Evaluation, ...]:
        # Several models may decompose matrices, and so does their proposal: one by one, and after the move.
        known = x if len(self.models) > 1 else None
        evaluations = []
        for k, model in zip(jax.random.split(key, len(self.models)), self.models, strict=True):
            evaluations.append(model.evaluate(k, x, level, after=known))
            known = evaluations[-1].spread
        return tuple(evaluations)

    def _no_evaluations(self, x: Array) -> tuple[Evaluation, ...]:
        """Placeholders of the right structure, for states that nobody looks at."""
        shapes = jax.eval_shape(lambda x: self._evaluate(jax.random.key(0), x, self.top), x)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def _look(self, evaluate: Any, x: Array, step: ControlStep) -> tuple[tuple[Evaluation, ...], Array, Array, Array]:
        through_network = any(reward.gradient and reward.at == "x0" for reward in self.rewards)
        known = None if through_network else evaluate(x)

        def tilts(x: Array) -> tuple[tuple[Array, Array], tuple[tuple[Evaluation, ...], dict[int, Array]]]:
            """The exact tilt and the other one, of the rewards that have gradients; all else on the side."""
            evaluations = evaluate(x) if known is None else known
            values = {i: self._reward(r, x, evaluations, step) for i, r in enumerate(self.rewards) if r.gradient}
            zero = jnp.zeros(len(x), x.dtype)
            parts = {True: zero, False: zero}
            for i, value in values.items():
                parts[self.rewards[i].exact] += step.strengths_s[i] * value
            return (parts[True], parts[False]), (evaluations, values)

        with_gradient = [reward for reward in self.rewards if reward.gradient]
        if with_gradient:
            _, pullback, (evaluations, values) = jax.vjp(tilts, x, has_aux=True)
            zero, one = jnp.zeros(len(x), x.dtype), jnp.ones(len(x), x.dtype)
            project = jax.vmap(self.models[0].process.subspace.project)
            exact_gradient = project(pullback((one, zero))[0])
            gradient = project(pullback((zero, one))[0])
        else:
            evaluations, values = evaluate(x) if known is None else known, {}
            exact_gradient = gradient = jnp.zeros_like(x)
        for i, reward in enumerate(self.rewards):
            if not reward.gradient:
                values[i] = self._reward(reward, x, evaluations, step)
        ordered = [values[i] for i in range(len(self.rewards))]
        rewards = jnp.stack(ordered, axis=1) if ordered else jnp.zeros((len(x), 0), x.dtype)
        return evaluations, rewards, exact_gradient, gradient

    def _reward(self, reward: Reward, x: Array, evaluations: tuple[Evaluation, ...], step: ControlStep) -> Array:
        if reward.at == "x0":
            weights = step.exponents_s / jnp.sum(step.exponents_s)
            excess = sum(w * evaluation.excess for w, evaluation in zip(weights, evaluations, strict=True))
            # The target is tilted by the reward of the state itself.
            x = jnp.where(step.is_last, x, step.level.denoised(x, excess))
        return reward.values(jax.vmap(self.models[0].transform.to_data)(x))

    # -- one particle -------------------------------------------------------------------------------------------------

    def _local(self, particle: Particle, exponents: Array, strengths: Array) -> Local:
        return Local(
            x=particle.x,
            evaluations=particle.evaluations,
            exponents=exponents,
            rewards=particle.rewards,
            strengths=strengths,
            exact_gradient=particle.exact_gradient,
            gradient=particle.gradient,
        )

    def _kernels(self, step: ControlStep, particle: Particle) -> tuple[Gaussian, ...]:
        pairs = zip(self.models, particle.evaluations, strict=True)
        return tuple(model.kernel(step.transition, particle.x, evaluation) for model, evaluation in pairs)

    def _proposal_kernel(self, step: ControlStep, particle: Particle) -> Kernel:
        at_t = self._local(particle, step.exponents_t, step.strengths_t)
        return self.proposal.reverse(step.transition, at_t, self._bar(step), self._kernels(step, particle))

    def _effects(self, step: ControlStep, left: Particle) -> Array:
        at_t = self._local(left, step.exponents_t, step.strengths_t)
        return transport_effects(step.transition, at_t, self._bar(step))

    @staticmethod
    def _bar(step: ControlStep) -> Array:
        """The sum of exponents that A and B agree on: both ends count alike."""
        return 0.5 * (jnp.sum(step.exponents_s) + jnp.sum(step.exponents_t))

    def _weigh(self, step: ControlStep, left: Particle, arrived: Particle, proposal: Kernel) -> tuple[Array, Array]:
        """Log-weight of the step, and the increments of every model's log-density relative to the reference."""
        transition, x_t, x_s = step.transition, left.x, arrived.x
        at_t = self._local(left, step.exponents_t, step.strengths_t)
        at_s = self._local(arrived, step.exponents_s, step.strengths_s)

        def increments(estimator: str | None) -> Array:
            pairs = zip(self.models, left.evaluations, strict=True)
            return jnp.stack(
                [ESTIMATORS[get_estimator(estimator, model)](model, transition, x_s, x_t, e) for model, e in pairs]
            )

        excess_increments = increments(None)
        if hasattr(self.proposal, "log_increment"):
            return self.proposal.log_increment(transition, at_t, at_s), excess_increments
        bar_s, bar_t = jnp.sum(step.exponents_s), jnp.sum(step.exponents_t)
        change = step.exponents_s - step.exponents_t
        excess = left.excess_log_densities.value + excess_increments
        weighed = increments("exact") if self.generated else excess_increments
        models = jnp.sum(step.exponents_t * weighed + jnp.where(change == 0, 0.0, change * excess))
        references = (bar_t - 1) * (arrived.log_reference - left.log_reference) + (
            bar_s - bar_t
        ) * arrived.log_reference
        moves = log_ratio(transition.reference_reverse(x_t), proposal, x_s) + log_ratio(
            self.proposal.forward(transition, at_s, self._bar(step)), transition.forward(x_s), x_t
        )
        # A reward of -inf at t has left the particle without weight, and nothing later gives it any.
        tilt = jnp.where(at_t.tilt == -jnp.inf, -jnp.inf, at_s.tilt - at_t.tilt)
        return models + references + moves + tilt, excess_increments


def initial_law(models: tuple[DiffusionModel, ...], top: NoiseLevel, exponents: np.ndarray) -> Gaussian:
    """pi_init proportional to prod_i prior_i^{beta_i}; where priors are not all isotropic or diagonal Gaussians, the
    reference's power, which the initial weights then correct.

    Raises:
      ValueError: where the product has no positive precision.
    """
    priors = [model.prior_at(top) for model in models]
    if len(priors) == 1 and isinstance(priors[0], Gaussian) and exponents[0] > 0:
        return priors[0].scale_covariance(jnp.asarray(1 / exponents[0], jnp.result_type(float)))
    if not all(isinstance(prior, Gaussian) and prior.basis is None for prior in priors):
        shape, subspace = models[0].shape, models[0].process.subspace
        priors = [reference(top, shape, subspace)] * len(models)
    precisions = [1 / (prior.variance * (1 + jnp.asarray(prior.excess))) for prior in priors]
    betas = jnp.asarray(exponents, jnp.result_type(float))
    precision = sum(beta * p for beta, p in zip(betas, precisions, strict=True))
    if not isinstance(precision, jax.core.Tracer) and not bool(jnp.all(precision > 0)):
        raise ValueError(
            f"the product of priors^exponents has no positive precision at t_max: exponents {np.asarray(exponents)} "
            f"give {float(jnp.min(precision)):.3g}; their weighted sum must be positive"
        )
    mean = sum(beta * p * prior.mean for beta, p, prior in zip(betas, precisions, priors, strict=True)) / precision
    zeros = jnp.zeros_like(mean)
    one = jnp.ones((), mean.dtype)
    if jnp.ndim(precision) == 0:
        return Gaussian(zeros, mean, 1 / precision, subspace=priors[0].subspace)
    return Gaussian(zeros, mean, one, 1 / precision - 1, subspace=priors[0].subspace)
