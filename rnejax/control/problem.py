r"""The Feynman-Kac problem of a target: what a particle is, how it moves, how it is weighed.

The log-weight of a step from t to s < t (mathematics.md, section 4), with reference ref_t and bar_t = sum_i beta_{i,t}:

    log w = sum_i [ beta_{i,t} e_i + (beta_{i,s} - beta_{i,t}) E_i(x_s) ]
            + (bar_t - 1) [ log ref_s(x_s) - log ref_t(x_t) ] + (bar_s - bar_t) log ref_s(x_s)
            + log(K_ref / A)(x_s) + log(B / F)(x_t) + tilt_s(x_s) - tilt_t(x_t)

where e_i is the excess increment of model i (``increments.py``; log(K_i / K_ref)(x_s) for the exact-kernel form) and
E_i = log p_{i,s}(x_s) - log ref_s(x_s) is what the particle has accumulated of it; E_i is needed for exponents that
vary in time, and comes out as the density of each particle under each model. Where the path of targets keeps the
reference, as that of tokens does, q_t ~ ref_t^{1 - bar_t} prod_i p_{i,t}^{beta_{i,t}}, the second line is that of the
last step only, and there (bar_s - 1) log ref_s(x_s).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..density import prior_excess
from ..increments import ESTIMATORS, get_estimator
from ..infilling import Template, common_template
from ..kernels import Array, Gaussian, Kernel, log_product, log_ratio
from ..model import DiffusionModel
from ..processes import Level, Process
from ..smc.weights import CompensatedSum, log_mean_exp
from .looking import Evaluations, Seen, look_at_numbers, look_at_tokens, reward_values
from .proposals import Local, Proposal, transport_effects
from .rewards import Reward
from .steps import ControlStep


class Particle(NamedTuple):
    """A state and everything that is known about it: gathered whole when particles are resampled."""

    x: Array
    seen: Seen
    log_reference: Array  # of the part of the path of targets that is a power of the reference
    excess_log_densities: CompensatedSum  # (m,)
    lookahead: Array  # what the weight already holds of the next step's


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["models", "rewards", "initial", "top", "exponents", "proposal"],
    meta_fields=["generated", "effects", "renoises"],
)
@dataclass(frozen=True)
class Steer:
    """Move by A, weigh by the target over the proposal.

    ``generated``: the target is the law that the one model *generates*, tilted by rewards of the exact scheme or by
    none. Its weights are ratios to the model's own kernels, which are what generates, whatever these approximate;
    targets made of the models' marginals need their log-densities, for which Euler-Maruyama kernels have forms of their
    own. ``effects``: keep what a `Transport` would do to every weight, for `tune_proposal`. ``renoises``: some steps
    go up again.
    """

    models: tuple[DiffusionModel, ...]
    rewards: tuple[Reward, ...]
    initial: Any
    top: Level
    exponents: Array  # at t_max
    proposal: Proposal
    generated: bool = False
    effects: bool = False
    renoises: bool = False

    def init(self, key: Array, num_particles: int) -> tuple[Particle, Array]:
        x = jax.vmap(self.initial.sample)(jax.random.split(key, num_particles))

        def start(x: Array) -> tuple[Array, Array, Array]:
            excess = jnp.stack([prior_excess(model.prior_at(self.top), model, self.top, x) for model in self.models])
            reference = self.process.reference_at(self.top, x.shape)
            tempered = log_product(self.exponents, excess)
            if self.process.keeps_reference:
                return jnp.zeros(()), excess, tempered + log_ratio(reference, self.initial, x)
            log_reference = reference.log_prob(x)
            log_weight = tempered + jnp.sum(self.exponents) * log_reference - self.initial.log_prob(x)
            return log_reference, excess, log_weight

        log_reference, excess, log_weights = jax.vmap(start)(x)
        relaxed = jnp.zeros((num_particles, *self.process.relaxed_shape(x.shape[1:])), log_weights.dtype)
        seen = Seen(
            evaluations=self._no_evaluations(x),
            rewards=jnp.zeros((num_particles, len(self.rewards)), log_weights.dtype),
            exact_gradient=relaxed,
            gradient=relaxed,
        )
        particles = Particle(x, seen, log_reference, CompensatedSum.of(excess), jnp.zeros_like(log_weights))
        return particles, log_weights

    @property
    def process(self) -> Process:
        return self.models[0].process

    @property
    def _noises_as_the_process_does(self) -> bool:
        """B is F, and B / F is 1 also where both are zero: of a template no token is ever lost, whatever F says."""
        return self.process.is_discrete and bool(getattr(self.proposal, "follows_noising", False))

    def step(self, key: Array, particles: Particle, step: ControlStep) -> tuple[Particle, Array, dict[str, Array]]:
        key_move, key_look = jax.random.split(key)
        stay = particles.x, jnp.zeros_like(particles.lookahead), jnp.zeros_like(particles.excess_log_densities.value)
        x_s, ratios, excess_increments = jax.lax.cond(
            step.is_first, lambda: stay, lambda: self._move(key_move, step, particles)
        )
        x = self._renoise(jax.random.fold_in(key_move, 1), step, x_s, particles) if self.renoises else x_s
        seen = self.look(key_look, x, step)
        arrived = particles._replace(x=x, seen=seen, log_reference=jax.vmap(partial(self._log_reference, step))(x))
        arrived = arrived._replace(lookahead=jax.vmap(partial(self._lookahead, step))(arrived))
        increments, excess_increments = jax.vmap(partial(self._weigh, step))(
            particles, x_s, arrived, ratios, excess_increments
        )
        tilts = jax.vmap(lambda particle: self._arrived(step, particle).tilt)(arrived)
        increments = jnp.where(step.is_first, tilts, increments)
        # A particle that nothing could follow has no weight any more.
        lost = particles.lookahead == -jnp.inf
        gained = arrived.lookahead - jnp.where(lost, 0.0, particles.lookahead)
        increments = jnp.where(lost, -jnp.inf, increments + gained)
        increments = increments + jnp.where(step.is_last, self._change_of_volume(x, step), 0.0)
        excess_increments = jnp.where(step.is_first, 0.0, excess_increments)
        # What a model has said to be impossible weighs nothing, whatever is said of it from now on.
        impossible = (particles.excess_log_densities.value == -jnp.inf) | (excess_increments == -jnp.inf)
        excess_increments = jnp.where(impossible, -jnp.inf, excess_increments)
        lost = jnp.any(impossible & (step.exponents_s > 0), axis=1)
        increments = jnp.where(lost, -jnp.inf, increments)
        arrived = arrived._replace(excess_log_densities=particles.excess_log_densities.add(excess_increments))
        valid = [lost | step.level.is_valid(evaluation.excess) for evaluation in seen.evaluations]
        failed = ~jnp.all(jnp.stack(valid), axis=0)
        increments = jnp.where(failed, jnp.nan, increments)
        gradients_finite = jnp.all(jnp.isfinite(seen.exact_gradient)) & jnp.all(jnp.isfinite(seen.gradient))
        aux = {
            "network_finite": jnp.stack([jnp.all(each) for each in valid]),
            "reward_nan": jnp.any(jnp.isnan(seen.rewards)),
            "reward_forbids_some": jnp.any(seen.rewards == -jnp.inf, axis=0),
            "reward_forbids_all": jnp.all(jnp.any(seen.rewards == -jnp.inf, axis=1)),
            "gradients_finite": gradients_finite,
        }
        if self.effects:
            aux["effects"] = jax.vmap(partial(self._effects, step))(particles)
        return arrived, increments, aux

    def position(self, particles: Particle) -> Array:
        return jax.vmap(self.models[0].transform.to_data)(particles.x)

    def _move(self, key: Array, step: ControlStep, particles: Particle) -> tuple[Array, Array, Array]:
        """Where the particles go, what the models say of it over A (`_ratio`), and the increments of every model.

        A kernel is made, drawn from and asked in one place: what kernels of a step share, they share by identity.

        Of candidates x_1, ..., x_m from A with weights u_j, one that is drawn in proportion to them, weighed by their
        mean, has what one alone has on average: the weight u_j of the one that was drawn is taken off here and counts
        elsewhere.
        """
        n, count = len(particles.x), getattr(self.proposal, "num_candidates", 1)

        def go(key: Array, left: Particle) -> tuple[Array, Array, Array]:
            kernels = self._kernels(step.transition, left)
            proposal = self._proposal_kernel(step, left, kernels)
            x_s = proposal.sample(key)
            return x_s, *self._ratio(step, left, x_s, proposal, kernels)

        if count == 1:
            return jax.vmap(go)(jax.random.split(key, n), particles)
        key_draw, key_reward, key_choose = jax.random.split(key, 3)

        def candidates(keys: Array, left: Particle) -> tuple[Array, Array, Array, Array]:
            kernels = self._kernels(step.transition, left)
            proposal = self._proposal_kernel(step, left, kernels)
            x = jax.vmap(proposal.sample)(keys)
            found, excess_increments = jax.vmap(lambda x_s: self._ratio(step, left, x_s, proposal, kernels))(x)
            others = jax.vmap(
                lambda x_s: (
                    self._reference_change(step, left, self._log_reference(step, x_s))
                    + self._auxiliary_ratio(step, step.transition, x_s, left)
                )
            )(x)
            return x, found, excess_increments, found + others

        x, found, excess_increments, log_ratios = jax.vmap(candidates)(
            jax.random.split(key_draw, (n, count)), particles
        )

        # What a reward says of a candidate has to do without the networks: they have seen where it comes from.
        flat = x.reshape(-1, *x.shape[2:])
        seen = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), particles.seen)
        values = reward_values(
            key_reward, self.models[0], self.rewards, seen.evaluations, flat, step, step.transition.s
        )
        tilts = jnp.where(step.strengths_s == 0, 0.0, step.strengths_s * values)
        log_u = log_ratios + jnp.sum(tilts, axis=1).reshape(n, count)
        chosen = jax.random.categorical(key_choose, log_u, axis=1)
        own = jnp.take_along_axis(log_u, chosen[:, None], axis=1)[:, 0]
        correction = jnp.where(own == -jnp.inf, -jnp.inf, log_mean_exp(log_u) - jnp.where(own == -jnp.inf, 0.0, own))
        pick = jax.vmap(lambda each, j: each[j])
        return pick(x, chosen), pick(found, chosen) + correction, pick(excess_increments, chosen)

    def _renoise(self, key: Array, step: ControlStep, x_s: Array, particles: Particle) -> Array:
        """Up again by the auxiliary kernel, where the step does that."""

        def up(key: Array, x_s: Array, left: Particle) -> Array:
            x = self._auxiliary(step, step.up, x_s, left).sample(key).astype(x_s.dtype)
            return self.initial.restored(x) if isinstance(self.initial, Template) else x

        keys = jax.random.split(key, len(x_s))
        return jax.lax.cond(step.is_renoised, lambda: jax.vmap(up)(keys, x_s, particles), lambda: x_s)

    def _change_of_volume(self, x: Array, step: ControlStep) -> Array:
        """prod_i p_i^beta_i, per volume, in the user's coordinates y over that in the network's: |dy/dx|^(1 - bar)."""
        model = self.models[0]
        log_det = jax.vmap(lambda x: model.transform.log_det(x, self.process.subspace))(x)
        return (1 - jnp.sum(step.exponents_s)) * log_det

    # -- looking at states --------------------------------------------------------------------------------------------

    def look(self, key: Array, x: Array, step: ControlStep) -> Seen:
        """Evaluations, rewards, and gradients of the exact and of the other tilt, of a batch of states."""
        key_models, key_rewards = jax.random.split(key)
        look_at = look_at_tokens if self.process.is_discrete else look_at_numbers

        def with_evaluations(evaluate: Any) -> Seen:
            return look_at(key_rewards, self.models[0], self.rewards, evaluate, x, step)

        return jax.lax.cond(
            step.evaluate,
            lambda: with_evaluations(lambda x: self._evaluate(key_models, x, step.level)),
            lambda: with_evaluations(self._no_evaluations),
        )

    def _evaluate(self, key: Array, x: Array, level: Level) -> Evaluations:
        # Several models may decompose matrices, and so does their proposal: one by one, and after the move.
        known = x if len(self.models) > 1 else None
        evaluations = []
        for k, model in zip(jax.random.split(key, len(self.models)), self.models, strict=True):
            evaluations.append(model.evaluate(k, x, level, after=known))
            known = evaluations[-1].excess if evaluations[-1].spread is None else evaluations[-1].spread
        return tuple(evaluations)

    def _no_evaluations(self, x: Array) -> Evaluations:
        """Placeholders of the right structure, for states that nobody looks at."""
        shapes = jax.eval_shape(lambda x: self._evaluate(jax.random.key(0), x, self.top), x)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # -- one particle -------------------------------------------------------------------------------------------------

    def _left(self, step: ControlStep, particle: Particle) -> Local:
        """The particle where a step starts."""
        return self._local(particle, step.exponents_t, step.strengths_t, step.exponents_s)

    def _arrived(self, step: ControlStep, particle: Particle) -> Local:
        """The particle where a step has ended."""
        return self._local(particle, step.exponents_s, step.strengths_s, step.exponents_ahead)

    @staticmethod
    def _local(particle: Particle, exponents: Array, strengths: Array, exponents_ahead: Array) -> Local:
        return Local(
            x=particle.x,
            evaluations=particle.seen.evaluations,
            exponents=exponents,
            rewards=particle.seen.rewards,
            strengths=strengths,
            exact_gradient=particle.seen.exact_gradient,
            gradient=particle.seen.gradient,
            exponents_ahead=exponents_ahead,
        )

    def _kernels(self, transition: Any, particle: Particle) -> tuple[Any, ...]:
        pairs = zip(self.models, particle.seen.evaluations, strict=True)
        return tuple(model.kernel(transition, particle.x, evaluation) for model, evaluation in pairs)

    def _proposal_kernel(self, step: ControlStep, particle: Particle, kernels: tuple[Any, ...]) -> Kernel:
        return self.proposal.reverse(step.transition, self._left(step, particle), self._bar(step), kernels)

    def _lookahead(self, step: ControlStep, particle: Particle) -> Array:
        """What is known of the weight of the next step: counted now, and not again then."""
        if not hasattr(self.proposal, "lookahead"):
            return jnp.zeros_like(particle.lookahead)
        known = self.proposal.lookahead(step.next, self._arrived(step, particle), self._kernels(step.next, particle))
        return jnp.where(step.is_last, 0.0, known).astype(particle.lookahead.dtype)

    def _log_reference(self, step: ControlStep, x: Array) -> Array:
        """log ref_s(x), as far as the path of targets tempers the reference at s."""
        log_reference = self.process.reference_at(step.level, x.shape).log_prob(x)
        if not self.process.keeps_reference:
            return log_reference
        return jnp.where(step.is_last, log_reference, 0.0)

    def _effects(self, step: ControlStep, left: Particle) -> Array:
        return transport_effects(step.transition, self._left(step, left), self._bar(step))

    @staticmethod
    def _bar(step: ControlStep) -> Array:
        """The sum of exponents that A and B agree on: both ends count alike."""
        return 0.5 * (jnp.sum(step.exponents_s) + jnp.sum(step.exponents_t))

    def _weigh(
        self, step: ControlStep, left: Particle, x_s: Array, arrived: Particle, ratio: Array, excess_increments: Array
    ) -> tuple[Array, Array]:
        """Log-weight of the step, and the increments of every model's log-density relative to the reference."""
        transition = step.transition
        x_s = x_s if self.renoises else arrived.x  # one object, so that kernels that start from it know that they do
        at_t, at_s = self._left(step, left), self._arrived(step, arrived)
        ratio = ratio + self._reference_change(step, left, arrived.log_reference)
        if hasattr(self.proposal, "log_increment"):
            return self.proposal.log_increment(transition, at_t, at_s), excess_increments
        if self.renoises:
            ratio = ratio + self._auxiliary_ratio(step, transition, x_s, left)
            back, excess_back = self._ratio_back(step, x_s, arrived)
            ratio = ratio - jnp.where(step.is_renoised, back, 0.0)
            # Where a model does not go back at all, it stays impossible.
            gone = jnp.where(excess_back == -jnp.inf, -jnp.inf, excess_increments - excess_back)
            excess_increments = jnp.where(step.is_renoised, gone, excess_increments)
        elif not self._noises_as_the_process_does:
            auxiliary = self.proposal.forward(transition, at_s, self._bar(step))
            ratio = ratio + log_ratio(auxiliary, transition.forward(x_s), left.x)
        # A reward of -inf at t has left the particle without weight, and nothing later gives it any.
        tilt = jnp.where(at_t.tilt == -jnp.inf, -jnp.inf, at_s.tilt - at_t.tilt)
        return ratio + tilt, excess_increments

    def _increments(
        self, transition: Any, seen: Seen, x_s: Array, x_t: Array, estimator: str | None, kernels: tuple[Any, ...]
    ) -> Array:
        """e_i of every model, (m,); ``kernels`` are theirs."""
        found = []
        for model, evaluation, kernel in zip(self.models, seen.evaluations, kernels, strict=True):
            name = get_estimator(estimator, model)
            made = {"kernel": kernel} if name == "exact" else {}
            found.append(ESTIMATORS[name](model, transition, x_s, x_t, evaluation, **made))
        return jnp.stack(found)

    def _auxiliary(self, step: ControlStep, transition: Any, x_s: Array, known: Particle) -> Any:
        """B(. | x_s) of a state that nobody has looked at, which is for kernels that do not look either."""
        seen = known.seen._replace(
            exact_gradient=jnp.zeros_like(known.seen.exact_gradient), gradient=jnp.zeros_like(known.seen.gradient)
        )
        local = self._arrived(step, known._replace(x=x_s, seen=seen))
        return self.proposal.forward(transition, local, self._bar(step))

    def _auxiliary_ratio(self, step: ControlStep, transition: Any, x_s: Array, above: Particle) -> Array:
        """log(B / F)(x_t | x_s), x_t being where the particle ``above`` is."""
        if self._noises_as_the_process_does:
            return jnp.zeros(())
        return log_ratio(self._auxiliary(step, transition, x_s, above), transition.forward(x_s), above.x)

    def _ratio_back(self, step: ControlStep, x_s: Array, arrived: Particle) -> tuple[Array, Array]:
        """What the way back from where a particle was renoised to would weigh; it came there by B."""
        kernels = self._kernels(step.up, arrived)
        exponents = step.exponents_s
        proposal = self.proposal.reverse(step.up, self._arrived(step, arrived), jnp.sum(exponents), kernels)
        excess = self._increments(step.up, arrived.seen, x_s, arrived.x, None, kernels)
        weighed = (
            self._increments(step.up, arrived.seen, x_s, arrived.x, "exact", kernels) if self.generated else excess
        )
        moves = log_ratio(proposal, step.up.reference_reverse(arrived.x), x_s)
        models = log_product(exponents, weighed)
        # A would not go there, so that its reversal does not come from there; or the models do not, which A does only
        # where they leave it nothing else: from there nothing goes on.
        impossible = (moves == -jnp.inf) | (models == -jnp.inf)
        ratio = models - jnp.where(impossible, 0.0, moves)
        ratio = ratio + self._auxiliary_ratio(step, step.up, x_s, arrived)
        return jnp.where(impossible, jnp.inf, ratio), excess

    @staticmethod
    def _reference_change(step: ControlStep, left: Particle, log_reference_s: Array) -> Array:
        """What the reference's part of the path of targets adds to the weight of a step."""
        bar_s, bar_t = jnp.sum(step.exponents_s), jnp.sum(step.exponents_t)
        return (bar_t - 1) * (log_reference_s - left.log_reference) + (bar_s - bar_t) * log_reference_s

    def _ratio(
        self, step: ControlStep, left: Particle, x_s: Array, proposal: Kernel, kernels: tuple[Any, ...]
    ) -> tuple[Array, Array]:
        """What the models say of a step, over A as if B were F; and their increments."""
        transition, x_t = step.transition, left.x
        excess_increments = self._increments(transition, left.seen, x_s, x_t, None, kernels)
        change = step.exponents_s - step.exponents_t
        excess = left.excess_log_densities.value + excess_increments
        weighed = excess_increments
        if self.generated:
            weighed = self._increments(transition, left.seen, x_s, x_t, "exact", kernels)
        # What was impossible already has no weight to be given back.
        excess = jnp.where((change < 0) & (excess == -jnp.inf), 0.0, excess)
        models = log_product(step.exponents_t, weighed) + log_product(change, excess)
        return models + log_ratio(transition.reference_reverse(x_t), proposal, x_s), excess_increments


def initial_law(models: tuple[DiffusionModel, ...], top: Level, exponents: np.ndarray) -> Any:
    """pi_init proportional to prod_i prior_i^{beta_i}; where priors are not all isotropic or diagonal Gaussians, the
    reference's power, which the initial weights then correct; of tokens, the reference itself.

    Raises:
      ValueError: where the product has no positive precision.
    """
    process, shape = models[0].process, models[0].shape
    if process.keeps_reference:
        template = common_template(models)
        return process.reference_at(top, shape) if template is None else template
    priors = [model.prior_at(top) for model in models]
    if len(priors) == 1 and isinstance(priors[0], Gaussian) and exponents[0] > 0:
        return priors[0].scale_covariance(jnp.asarray(1 / exponents[0], jnp.result_type(float)))
    if not all(isinstance(prior, Gaussian) and prior.basis is None for prior in priors):
        priors = [process.reference_at(top, shape)] * len(models)
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
