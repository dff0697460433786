"""A posterior's denoiser as what it adds to the prior's: a network or other weights, and a reward's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..checks import check_number
from ..kernels import Array
from ..model import DiffusionModel


class Guidance(NamedTuple):
    """Weights of `Guided`: those of its network, or the prior's own, and the multiple of the reward's gradient."""

    network: Any
    strength: Array


@jax.tree_util.register_static
class Guided:
    r"""D(x, t) = D_prior(x, t) + c_t F(x / r_t, t) + g c_t^2 grad log r(D_prior(x, t)).

    c_t is the root mean square error of the reference's denoiser on its own data, r_t the root mean square of its
    states, as for `Preconditioned`. Tilting N(D, c^2) by r moves its mean by c^2 grad log r, to first order: g = 1 is
    that, for data as the reference's; the network F knows better, and begins, if its last layer does, at zero. The
    gradient is in the network's coordinates, of the reward of `prior.transform`'s; it is not differentiated again, and
    where the reward is zero (log r = -inf) there is none to follow. Another gradient that is no number is not mended:
    the denoised state is NaN, and `rnejax.training.fit` stops.

        guided = Guided(prior, apply, log_reward)
        posterior = guided.model(Guidance(params, jnp.ones(())))

    Without F, the prior's own weights are tuned: D_prior is that of ``prior.with_params(weights.network)``, under the
    posterior's condition where there is one.

        posterior = Guided(prior, log_reward=log_reward).model(Guidance(prior.params, jnp.ones(())))

    Args:
      prior: the model of numbers that is tuned. With F its weights stay as they are.
      apply: F, apply(params, x, t) or, with a condition, apply(params, x, t, condition), of one state; None for none.
      log_reward: log r of one example in the user's coordinates, log_reward(x, condition) where the posterior has a
        condition; None for no gradient.
      trust: the largest KL divergence, c_t^2 |grad log r|^2 / 2 in nats, by which the gradient may move the denoised
        state where g = 1: steeper ones are shortened, for they say nothing of what is far away.

    Raises:
      ValueError: for a model of tokens, or a trust that is not positive.
    """

    def __init__(
        self,
        prior: DiffusionModel,
        apply: Callable[..., Array] | None = None,
        log_reward: Callable[..., Array] | None = None,
        *,
        trust: float = 1.0,
    ):
        if prior.process.is_discrete:
            raise ValueError(f"{type(prior.process).__name__} has tokens: add logits to the prior's instead")
        self.prior = prior
        self.apply = apply
        self.log_reward = log_reward
        self.trust = check_number("trust", trust, positive=True)

    def model(self, weights: Guidance, **options: Any) -> DiffusionModel:
        """The posterior, with the prior's covariance, shape, transform and law at the largest time; see
        `rnejax.DiffusionModel` for options.
        """
        prior = self.prior
        options = {
            "covariance": prior.covariance,
            "shape": prior.shape,
            "transform": prior.transform,
            "prior": prior._own_prior,
            **options,
        }
        return DiffusionModel(prior.process, self, "x0", params=weights, noise_level="level", **options)

    def __call__(self, weights: Guidance, x: Array, level: Any, condition: Any = None) -> Array:
        """E[x_0 | x_t] of the posterior, of one state at a noise level."""
        arguments = () if condition is None else (condition,)
        model = self.prior
        if self.apply is None:
            model = model.with_params(weights.network)
            model = model if condition is None else model.with_condition(condition)
        clean = level.denoised(x, model._excess(x[None], level)[0])
        moved = clean
        if self.apply is not None:
            output = self.apply(weights.network, x / level.state_scale, jnp.asarray(level.t, x.dtype), *arguments)
            moved = clean + level.posterior_scale * output
        if self.log_reward is None:
            return moved
        return moved + weights.strength * self._shift(clean, level.posterior_scale, arguments)

    def _shift(self, clean: Array, scale: Array, condition: tuple[Any, ...]) -> Array:
        """c^2 grad log r of the denoised state, no longer than is trusted."""
        log_reward, to_data = self.log_reward, self.prior.transform.to_data
        assert log_reward is not None
        value, slope = jax.lax.stop_gradient(jax.value_and_grad(lambda x: log_reward(to_data(x), *condition))(clean))
        slope = jnp.where(value == -jnp.inf, 0.0, slope)
        divergence = 0.5 * scale**2 * jnp.sum(slope**2)
        return scale**2 * slope * jnp.sqrt(self.trust / jnp.maximum(divergence, self.trust))
