r"""How particles move: proposal A(x_s | x_t) and auxiliary forward kernel B(x_t | x_s), both free.

The weight of a step (mathematics.md, section 4) is that of the target over the proposal,

    log w = sum_i beta_i l_i + [tilt_s(x_s) - tilt_t(x_t)] + log B(x_t | x_s) - log A(x_s | x_t),

so any pair is correct and a good one makes it constant. (Rewards of the exact scheme are exact for B = F, the noising
kernel, only.) To leading order, with S = sum_i beta_i score_i, A drifts by c_a v S / a and B by c_b v S, and there is
no noise of order sqrt(step) if and only if c_a + c_b = 1. The symmetric choice c_a = (1 + 1/bar)/2,
c_b = (1 - 1/bar)/2, bar = sum_i beta_i, makes the weights of Gaussian data constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number
from ..covariance import Evaluation
from ..kernels import Array, Gaussian, Kernel, event_sum
from ..linear import apply
from ..processes import GaussianTransition, NoiseLevel
from ..processes.gaussian_steps import drift_and_diffusion


class Local(NamedTuple):
    """What is known at one end of a step, for one particle.

    Attributes:
      x: the state, in the network's coordinates.
      evaluations: what each model said of it.
      exponents: of the models at this time, (m,).
      rewards: values of the rewards, (j,).
      strengths: of the rewards at this time, (j,).
      exact_gradient: gradient of that part of the tilt whose scheme is exact, of the state's shape (zero where
        rewards give none). Of tokens: by how much a change of each position to each token changes it, (length,
        vocab_size), with the strengths at the end of the step that starts here.
      gradient: of the rest.
      exponents_ahead: of the models at the end of the step that starts here, (m,).
    """

    x: Array
    evaluations: tuple[Evaluation, ...]
    exponents: Array
    rewards: Array
    strengths: Array
    exact_gradient: Array
    gradient: Array
    exponents_ahead: Array | None = None

    @property
    def tilt(self) -> Array:
        """sum_j lambda_j r_j; a reward of no strength does not count, not even one of -inf."""
        return jnp.sum(jnp.where(self.strengths == 0, 0.0, self.strengths * self.rewards))


class Transport(NamedTuple):
    r"""A drift that A follows and B goes back, on top of what makes the weights of Gaussian data constant.

    With v the variance of a step's noise, A moves by v f(x_t) more and B by -v f(x_s),

        f(x) = sum_i c_i beta_i [score_i(x) - score_ref(x)] + c_ref bar score_ref(x),

    and the log-weight of a step changes by v (div f + f . S) on average, S the target's score: weights are as exact
    as before, and where the c are right (`rnejax.tune_proposal`), more even.

    Attributes:
      log_snr: increasing, (k,).
      coefficients: of each model and of the reference, (k, m + 1); linear between and constant outside.

    Source: Ren et al. 2025 (DriftLite), who solve for such a drift in continuous time at every step of the run itself.
    """

    log_snr: Array
    coefficients: Array

    def at(self, log_snr: Array) -> Array:
        """(m + 1,)."""
        return jax.vmap(partial(jnp.interp, log_snr, self.log_snr), in_axes=1)(self.coefficients)


class Proposal(Protocol):
    """A pair of kernels, which are pytrees. The proposal itself is a pytree too, or hashable: then it is configuration.

    A reward of the exact scheme (``tilt(..., exact=True)``) needs B to be the noising kernel. A proposal of which that
    is true for one model with exponent 1 says so by an attribute ``follows_noising = True``; without it, ``steer``
    refuses to combine the two.
    """

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        """Whether B looks at what the models say of x_s: this costs one more evaluation at the very end."""
        ...

    def reverse(self, transition: Any, at_t: Local, exponent: Array, kernels: tuple[Any, ...]) -> Kernel:
        """A(x_s | x_t). ``exponent`` is bar, the sum of exponents; ``kernels`` the models' K_i(x_s | x_t)."""
        ...

    def forward(self, transition: Any, at_s: Local, exponent: Array) -> Kernel:
        """B(x_t | x_s); ``transition.forward(at_s.x)`` is always right."""
        ...

    # A method ``lookahead(transition, at_t, kernels)``, where there is one, says what is known of a step's log-weight
    # before the step is made, so that particles may be resampled before they move.


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["transport"],
    meta_fields=["coefficients", "matched", "reward_coefficient", "trust"],
)
@dataclass(frozen=True)
class Drift:
    """A and B drift along the target's score.

    Attributes:
      coefficients: (c_a, c_b), or None for the symmetric choice.
      matched: the reference-matched form, for steps that are not small: weights are exactly constant where the data
        are the reference, whatever the step. Otherwise the leading-order form, A = N(x_t / a + c_a (v / a) S, C) and
        B = N(a x_s + c_b v S, v I).
      reward_coefficient: by how much of C lambda grad r, the shift that tilts the kernel, the gradient of a reward of
        the exact scheme moves A. 1 makes the weights of a single step as even as they can be, and the sum of many steps
        less so than 1/2 does: r(x_t) is not what the path is worth, and who follows it all the way leaves the target's
        path (``scripts/benchmark_control.py``, last section). The low-variance scheme shifts both A and B by half.
      trust: the largest KL divergence, in nats, by which the gradients of rewards may move A (and, in the low-variance
        scheme, B) in one step. Any kernels are right, so this bounds the damage of a gradient that is followed too far
        (few steps, a steep reward, a network that is rough where there is only noise), not the correctness;
        ``math.inf`` is no bound.
      transport: a drift tuned for one target, or None; see `rnejax.tune_proposal`.
    """

    coefficients: tuple[float, float] | None = None
    matched: bool = True
    reward_coefficient: float = 0.5
    trust: float = 1.0
    transport: Transport | None = None

    is_discrete: ClassVar[bool] = False

    @property
    def follows_noising(self) -> bool:
        """Whether B is the noising kernel F for one model with exponent 1, which the exact reward scheme needs."""
        return self.transport is None and (self.coefficients is None or self.coefficients[1] == 0)

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        if self.transport is not None:
            return True
        if self.coefficients is not None:
            return self.coefficients[1] != 0
        return bool(np.any(total_exponents != 1))

    def reverse(
        self, transition: GaussianTransition, at_t: Local, exponent: Array, kernels: tuple[Gaussian, ...]
    ) -> Gaussian:
        c_a, _ = self._coefficients(exponent)
        reference = transition.reference_reverse(at_t.x)
        excess = sum(
            beta * (kernel.shift - reference.shift) for beta, kernel in zip(at_t.exponents, kernels, strict=True)
        )
        if self.matched:
            law = transition.tempered_reverse(at_t.x, exponent)
        else:
            decay, v_t = transition.decay, transition.t.reference_variance
            shift = (-transition.decay_shift - c_a * exponent * transition.variance / v_t) / decay * at_t.x
            law = replace(reference, shift=shift)
        relative, basis = combine_covariances(kernels, at_t.exponents / jnp.sum(at_t.exponents))
        law = replace(law, shift=law.shift + c_a * excess, excess=relative, basis=basis)
        # A reward tilts the kernel: K exp(lambda r) has its mean moved by C lambda grad r.
        if at_t.rewards.size:
            slope_of_tilt = self.reward_coefficient * at_t.exact_gradient + 0.5 * at_t.gradient
            law = replace(law, shift=law.shift + law.pull(slope_of_tilt, self.trust))
        if self.transport is not None:
            field = self._transported(self.transport, transition, transition.t, at_t, exponent)
            law = replace(law, shift=law.shift + transition.forward(at_t.x).pull(field))
        return law

    def forward(self, transition: GaussianTransition, at_s: Local, exponent: Array) -> Gaussian:
        _, c_b = self._coefficients(exponent)
        noising = transition.forward(at_s.x)
        if self.matched:
            law = transition.tempered_forward(at_s.x, exponent)
        else:
            slope = -c_b * exponent * transition.variance / transition.s.reference_variance
            law = replace(noising, shift=noising.shift + slope * at_s.x)
        # At sigma = 0 there is no score, and c_b = 0 (steer refuses all else): any finite number will do.
        level = transition.s._replace(sigma=jnp.where(transition.s.sigma == 0, 1.0, transition.s.sigma))
        scores = [level.excess_score(at_s.x, evaluation.excess) for evaluation in at_s.evaluations]
        drift = c_b * jnp.sum(jnp.stack([beta * score for beta, score in zip(at_s.exponents, scores, strict=True)]), 0)
        if self.transport is not None:
            drift = drift - self._transported(self.transport, transition, level, at_s, exponent)
        law = replace(law, shift=law.shift + noising.pull(drift))
        if at_s.rewards.size:
            law = replace(law, shift=law.shift + noising.pull(0.5 * at_s.gradient, self.trust))
        return law

    @staticmethod
    def _transported(
        transport: Transport, transition: GaussianTransition, level: NoiseLevel, at: Local, exponent: Array
    ) -> Array:
        """f of `Transport`. Both ends of a step take the coefficients of t, so that they cancel between A and B."""
        coefficients = transport.at(transition.t.log_snr).astype(at.x.dtype)
        fields = transport_fields(level, at, exponent)
        return jnp.tensordot(coefficients, jnp.stack(fields), axes=1)

    def _coefficients(self, exponent: Array) -> tuple[Any, Any]:
        if self.coefficients is not None:
            return self.coefficients
        return 0.5 * (1 + 1 / exponent), 0.5 * (1 - 1 / exponent)


@jax.tree_util.register_static
@dataclass(frozen=True)
class FeynmanKac:
    """Feynman-Kac correctors (Skreta et al. 2025), target-score scheme: the continuous-time limit of (1, 0).

    Euler-Maruyama moves with drift -f + g^2 (S + lambda grad r / 2), and instead of a ratio of kernels the weights

        d log w = [ (bar - 1) d f + g^2/2 (|S|^2 - sum_i beta_i |s_i|^2)
                    + grad(lambda r) . (g^2 S / 2 - f x) ] h  +  d(lambda) r.

    Right in the limit of small steps and for constant exponents only, and offered so that it can be compared with.
    """

    follows_noising = False
    is_discrete = False

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        return False

    def reverse(
        self, transition: GaussianTransition, at_t: Local, exponent: Array, kernels: tuple[Gaussian, ...]
    ) -> Gaussian:
        linear, diffusion = drift_and_diffusion(transition.t)
        total, _ = self._scores(transition, at_t)
        drift = diffusion * (total + 0.5 * (at_t.gradient + at_t.exact_gradient)) - linear * at_t.x
        h = transition.duration
        return Gaussian(at_t.x, h * drift, h * diffusion, subspace=transition.subspace)

    def forward(self, transition: GaussianTransition, at_s: Local, exponent: Array) -> Gaussian:
        return transition.forward(at_s.x)

    def log_increment(self, transition: GaussianTransition, at_t: Local, at_s: Local) -> Array:
        """The continuous-time weight, frozen at the beginning of the step."""
        linear, diffusion = drift_and_diffusion(transition.t)
        total, weighted_squares = self._scores(transition, at_t)
        gradient = at_t.gradient + at_t.exact_gradient
        bar = jnp.sum(at_t.exponents)
        dimension = transition.subspace.dimension(at_t.x.shape)
        rate = (bar - 1) * dimension * linear + 0.5 * diffusion * (event_sum(total**2) - weighted_squares)
        rate = rate + event_sum(gradient * (0.5 * diffusion * total - linear * at_t.x))
        change = at_s.strengths - at_t.strengths
        return transition.duration * rate + jnp.sum(jnp.where(change == 0, 0.0, change * at_t.rewards))

    @staticmethod
    def _scores(transition: GaussianTransition, at_t: Local) -> tuple[Array, Array]:
        scores = [transition.t.score(at_t.x, evaluation.excess) for evaluation in at_t.evaluations]
        pairs = list(zip(at_t.exponents, scores, strict=True))
        total = jnp.sum(jnp.stack([beta * score for beta, score in pairs]), axis=0)
        return total, jnp.sum(jnp.stack([beta * event_sum(score**2) for beta, score in pairs]))


def transport_fields(level: NoiseLevel, at: Local, exponent: Array) -> list[Array]:
    """The fields that a `Transport` adds up: each model's, and the reference's."""
    pairs = zip(at.exponents, at.evaluations, strict=True)
    models = [beta * level.excess_score(at.x, evaluation.excess) for beta, evaluation in pairs]
    return [*models, exponent * level.reference_score(at.x)]


def transport_effects(transition: GaussianTransition, at_t: Local, exponent: Array) -> Array:
    """v (div f + f . S) of every field: by how much its coefficient changes the mean log-weight of a step, (m + 1,).

    The divergence of a score is the trace of the model's covariance of x_0, which the evaluation knows; exact to
    leading order for ``full``, and as good as the choice of covariance otherwise.
    """
    level, dimension = transition.t, transition.subspace.dimension(at_t.x.shape)
    fields = transport_fields(level, at_t, exponent)
    target_score = sum(fields[:-1], fields[-1]) + at_t.gradient + at_t.exact_gradient
    # Of the excess score, per covariance of x_0; and that of the reference.
    jacobian = (level.alpha / level.sigma**2) ** 2 * level.reference_posterior_variance
    divergences = [
        beta * jacobian * _trace(evaluation, dimension, at_t.x.size)
        for beta, evaluation in zip(at_t.exponents, at_t.evaluations, strict=True)
    ]
    divergences.append(-exponent * dimension / level.reference_variance)
    along = jnp.stack([event_sum(field * target_score) for field in fields])
    return transition.variance * (jnp.stack(divergences) + along)


def _trace(evaluation: Evaluation, dimension: int, size: int) -> Array:
    """Of the spread: a number, eigenvalues (zero off the subspace) or a diagonal, whose directions it cuts alike."""
    if jnp.ndim(evaluation.spread) == 0:
        return dimension * evaluation.spread
    return jnp.sum(evaluation.spread) * (1.0 if evaluation.basis is not None else dimension / size)


def combine_covariances(kernels: tuple[Gaussian, ...], weights: Array) -> tuple[Array | float, Array | None]:
    """Relative covariance of the proposal: sum_i weights_i C_i, clipped between the smallest and the largest C_i.

    All kernels of a transition share their base variance, so only the relative excesses are combined. Negative weights
    (guidance) could otherwise make the combination indefinite.
    """
    if len(kernels) == 1:
        return kernels[0].excess, kernels[0].basis
    if all(kernel.basis is kernels[0].basis for kernel in kernels):
        excesses = jnp.stack(jnp.broadcast_arrays(*[jnp.asarray(kernel.excess) for kernel in kernels]))
        combined = jnp.tensordot(weights.astype(excesses.dtype), excesses, axes=1)
        return jnp.clip(combined, jnp.min(excesses, axis=0), jnp.max(excesses, axis=0)), kernels[0].basis
    matrices = [_dense(kernel) for kernel in kernels]
    eigenvalues, basis = jnp.linalg.eigh(sum(w * m for w, m in zip(weights, matrices, strict=True)))
    smallest = jnp.min(jnp.stack([jnp.min(kernel.excess) for kernel in kernels]))
    largest = jnp.max(jnp.stack([jnp.max(kernel.excess) for kernel in kernels]))
    return jnp.clip(eigenvalues, smallest, largest), basis


def _dense(kernel: Gaussian) -> Array:
    d = kernel.shift.size
    excess = jnp.broadcast_to(jnp.asarray(kernel.excess).reshape(-1), (d,))
    if kernel.basis is not None:
        basis = kernel.basis
        if basis.ndim == 3:  # in blocks
            units = jnp.eye(d, dtype=kernel.shift.dtype).reshape(d, *jnp.shape(kernel.excess))
            basis = jax.vmap(lambda unit, blocks=basis: apply(blocks, unit).reshape(-1), out_axes=1)(units)
        return (basis * excess) @ basis.T
    # A dense M is zero in the directions that the subspace has not; a number says nothing of them.
    rows = jax.vmap(lambda row: kernel.subspace.project(row.reshape(kernel.shift.shape)).reshape(-1))
    return rows(jnp.diag(excess))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Configuration:
    """A proposal of the user's own that is no pytree: compiled code is made for it."""

    proposal: Any

    def __getattr__(self, name: str) -> Any:
        if name == "proposal":  # not yet set, while it is copied
            raise AttributeError(name)
        return getattr(self.proposal, name)


PROPOSALS: dict[str, Proposal] = {"symmetric": Drift(), "feynman_kac": FeynmanKac()}


def get_proposal(proposal: Any) -> Proposal:
    """A proposal for numbers that diffuse: by name, as a pair (c_a, c_b), or the object itself.

    Raises:
      ValueError: for an unknown name, or something that is none of these.
    """
    if isinstance(proposal, str):
        if proposal in PROPOSALS:
            return PROPOSALS[proposal]
        raise ValueError(
            f"unknown proposal {proposal!r}; use 'symmetric', 'feynman_kac', a pair (c_a, c_b) or an object"
        )
    if isinstance(proposal, (tuple, list)):
        if len(proposal) != 2:
            raise ValueError(f"a pair (c_a, c_b) has two numbers, got {len(proposal)}: {proposal}")
        return Drift((check_number("c_a", proposal[0]), check_number("c_b", proposal[1])))
    return as_proposal(proposal)


def as_proposal(proposal: Any) -> Proposal:
    """A proposal object that compiled code can be given.

    Raises:
      ValueError: for an object without the methods of one.
    """
    missing = [name for name in ("needs_auxiliary", "reverse", "forward") if not hasattr(proposal, name)]
    if missing:
        raise ValueError(
            f"a proposal object needs the methods of rnejax.control.Proposal; {type(proposal).__name__} lacks {missing}"
        )
    is_pytree = not jax.tree_util.all_leaves([proposal])
    return proposal if is_pytree else _Configuration(proposal)
