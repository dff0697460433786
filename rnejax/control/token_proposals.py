r"""How particles of tokens move. The auxiliary kernel B is the noising kernel F; the proposal A is free.

With kernels kept relative to the reference, the weight of a step (mathematics.md, section 5) is

    log w = sum_i beta_i log(K_i / K_ref)(x_s) + log(K_ref / A)(x_s) + [tilt_s(x_s) - tilt_t(x_t)].

It does not depend on which tokens are drawn where A draws them from prod_i (K_i / K_ref)^{beta_i}: *locally optimal*.
Its mean over the positions that change is then known before anything is drawn. ``steer`` weighs the particle with it,
and may resample, before it proposes.

Two things that look better and are not (``scripts/benchmark_tokens.py``). Of masked tokens, to draw from the product
which positions are revealed as well: the weight of each step is then a function of where it starts, but paths of the
target lose their tokens at random times, and a proposal that reveals the certain ones first goes astray. Of uniform
tokens, a B that noises towards the target's tokens, as the symmetric choice does for numbers: what spoils the weights
there is that K / F of two tokens that change in one step is a product of what each would be worth alone, and such a B
makes more of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, check_number
from ..kernels import Array, Kernel, log_product
from .proposals import Local, Proposal, as_proposal


@jax.tree_util.register_static
@dataclass(frozen=True)
class TokenProposal:
    """Tokens from the product of the models' kernels, tilted by what gradients of rewards say of every change.

        A(x_s | x_t) proportional to K_ref(x_s | x_t) exp(sum over tokens that change of
            [ sum_i beta_i log(V mu_{i,k}) + c (dr/dk) ])        (k: what a token becomes; where it changes as in K_ref)

    with dr/dk the first-order change of the tilt at the end of the step.

    Attributes:
      reward_coefficient: c, by how much of their first-order change rewards with gradients tilt A.
      trust: the largest KL divergence, in nats and to second order, by which they may tilt it in one step.

    Raises:
      ValueError: for a coefficient that is no finite number, or a trust that is not positive.
    """

    reward_coefficient: float = 1.0
    trust: float = math.inf

    def __post_init__(self) -> None:
        check_number("reward_coefficient", self.reward_coefficient)
        if self.trust != math.inf:
            check_number("trust", self.trust, positive=True)

    follows_noising: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = True

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        return False

    def reverse(self, transition: Any, at_t: Local, exponent: Array, kernels: tuple[Any, ...]) -> Kernel:
        return self._law(transition, at_t, kernels)[0]

    def forward(self, transition: Any, at_s: Local, exponent: Array) -> Kernel:
        kernel: Kernel = transition.forward(at_s.x)
        return kernel

    def lookahead(self, transition: Any, at_t: Local, kernels: tuple[Any, ...]) -> Array:
        """The log of the mean weight of the step to come, as far as models and gradients tell."""
        return self._law(transition, at_t, kernels)[1]

    def _law(self, transition: Any, at_t: Local, kernels: tuple[Any, ...]) -> tuple[Any, Array]:
        shift = log_product(exponents_of_step(at_t), jnp.stack([kernel.shift for kernel in kernels]))
        if self.reward_coefficient:
            slope = transition.shift(at_t.x, self.reward_coefficient * (at_t.exact_gradient + at_t.gradient))
            shift = shift + self._bounded(transition, at_t.x, shift, slope)
        law: tuple[Any, Array] = transition.tilted(at_t.x, shift)
        return law

    def _bounded(self, transition: Any, x: Array, shift: Array, slope: Array) -> Array:
        """A tilt of the law, made smaller until its KL divergence, half the variance of the tilt, is ``trust``."""
        if not math.isfinite(self.trust):
            return slope
        law, _ = transition.tilted(x, shift)
        probabilities = jnp.exp(law.anchor + law.shift)
        mean = jnp.sum(probabilities * slope, axis=-1, keepdims=True)
        divergence = 0.5 * jnp.sum(probabilities * (slope - mean) ** 2)
        return slope * jnp.minimum(1.0, jnp.sqrt(self.trust / jnp.maximum(divergence, 1e-30)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Base:
    """The models' own kernels, with exponents that sum to 1, as if there were no target; B is the noising kernel.

        A(x_s | x_t) proportional to K_ref(x_s | x_t) prod over tokens that change of prod_i (V mu_{i,k})^{beta_i / bar}

    with bar = sum_i beta_i: for the power of a model, K itself.
    """

    follows_noising: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = True

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        return False

    def reverse(self, transition: Any, at_t: Local, exponent: Array, kernels: tuple[Any, ...]) -> Kernel:
        exponents = exponents_of_step(at_t)
        shift = log_product(exponents / jnp.sum(exponents), jnp.stack([kernel.shift for kernel in kernels]))
        law: Kernel = transition.tilted(at_t.x, shift)[0]
        return law

    def forward(self, transition: Any, at_s: Local, exponent: Array) -> Kernel:
        kernel: Kernel = transition.forward(at_s.x)
        return kernel


@jax.tree_util.register_static
@dataclass(frozen=True)
class Candidates:
    """Several draws from a proposal, of which the particle takes one in proportion to their weights.

    For rewards that have no gradient: each candidate is given its reward, and the particle is weighed by the mean of
    the candidates' weights, so that everything stays as exact as it was. It costs rewards, but no evaluations of the
    network: what the models say is what they said where the step began. So of tokens a reward at ``x0`` knows what the
    candidate has revealed; of numbers, take rewards at ``x``.

    Attributes:
      num_candidates: of every particle, in every step.
      proposal: any whose auxiliary kernel does not look at what the models say; default, the models' own kernels.

    Source: nested sampling of proposals (Naesseth et al. 2015); of rewards in diffusion, Li et al. 2024 (SVDD), who
    take the best and weigh nothing.

    Raises:
      ValueError: for fewer than one candidate, a proposal that is none, or candidates of candidates.
    """

    num_candidates: int = 8
    proposal: Any = Base()

    def __post_init__(self) -> None:
        check_count("num_candidates", self.num_candidates)
        if isinstance(self.proposal, Candidates):
            raise ValueError("candidates of candidates are candidates: give their number once")
        if isinstance(self.proposal, (str, tuple, list)):
            raise ValueError(
                f"candidates need an object to draw them, such as TokenProposal() for tokens or Drift((1.0, 0.0)) for "
                f"numbers: got {self.proposal!r}"
            )
        as_proposal(self.proposal)

    def __getattr__(self, name: str) -> Any:
        if name in ("num_candidates", "proposal"):  # not yet set, while it is copied
            raise AttributeError(name)
        return getattr(self.proposal, name)


TOKEN_PROPOSALS: dict[str, Proposal] = {
    "locally_optimal": TokenProposal(),
    "base": Base(),
}


def exponents_of_step(at_t: Local) -> Array:
    """Of the end of the step: what varies with where it ends is prod_i p_{i,s}^{beta_{i,s}}."""
    return at_t.exponents if at_t.exponents_ahead is None else at_t.exponents_ahead


def get_token_proposal(proposal: Any) -> Proposal:
    """A proposal for tokens, by name or the object itself.

    Raises:
      ValueError: for an unknown name, or something that is neither.
    """
    if isinstance(proposal, (str, tuple, list)):
        if isinstance(proposal, str) and proposal in TOKEN_PROPOSALS:
            return TOKEN_PROPOSALS[proposal]
        raise ValueError(
            f"unknown proposal {proposal!r} for tokens; use "
            f"{', '.join(map(repr, TOKEN_PROPOSALS))} or an object such as Candidates(8)"
        )
    return as_proposal(proposal)
