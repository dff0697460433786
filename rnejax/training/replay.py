"""A replay buffer of clean data that comes to follow the posterior: Metropolis-Hastings with the tuned model's samples.

Off-policy paths (``noised``, ``back_and_forth``) need data where the reward is. Each row of the buffer is a Markov
chain of its own: from time to time the model as it is proposes another path's end x', which replaces x with probability

    min(1, w' / w),    w = r(x) K(path) / K_phi(path),

so that each row has the law p r / Z in the end, whatever the model that proposes, and under the condition of its own
where there are conditions. A row that is worth more than what the model makes is kept until the model has learned it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..checks import check_count, check_key
from ..kernels import Array
from ..model import DiffusionModel
from .fine_tuning import Examples, FineTuned
from .trajectory_balance import Trajectories, trajectory_balance_residual


class ReplayBuffer:
    """Data for `trajectory_balance_loss` that `rnejax.training.fit` renews.

        buffer = ReplayBuffer(posterior, prior, times, log_reward)
        fit(key, loss, tuned, buffer.start(key, 1024), ..., renew=buffer.renew, renew_every=100)

    Args:
      posterior, prior, times, log_reward: as for `trajectory_balance_residual`.

    Weights of rows are those under the model that proposed them, which has changed since: the chain is exact for a
    model that no longer changes, and all that training needs is that paths may be any.
    """

    def __init__(self, posterior: DiffusionModel, prior: DiffusionModel, times: Any, log_reward: Callable[..., Array]):
        self.posterior = posterior

        def propose(key: Array, weights: Any, condition: Any, prior_condition: Any, size: int) -> Trajectories:
            model = posterior.with_params(weights)
            options = {"condition": condition, "prior_condition": prior_condition, "num_paths": size}
            return trajectory_balance_residual(key, model, prior, times, log_reward, **options)

        self._propose = jax.jit(propose, static_argnames="size")

    def start(self, key: Array, size: int, *, condition: Any = None, prior_condition: Any = None) -> Examples:
        """Rows that the model makes as it is, under conditions (size, ...) where there are any.

        Costs an evaluation of both models per row and step, as every renewal does.

        Raises:
          ValueError: for a size below 1, conditions of another number, or what the residual refuses.
          FloatingPointError: where a reward is NaN or +inf.
        """
        check_key(key)
        check_count("size", size)
        made = self._propose(key, self.posterior.params, condition, prior_condition, size)
        return Examples(made.x, condition, prior_condition, _log_weights(made))  # of which none is NaN or +inf

    def renew(self, key: Array, tuned: FineTuned, examples: Examples) -> Examples:
        """Every row proposed to once; rows of zero weight (a reward of zero) take what comes.

        Raises:
          ValueError: for examples that this buffer has not started.
          FloatingPointError: where a reward is NaN or +inf.
        """
        if examples.log_weights is None:
            raise ValueError("examples have no log_weights: begin with those of ReplayBuffer.start")
        key_paths, key_accept = jax.random.split(key)
        made = self._propose(key_paths, tuned.weights, examples.condition, examples.prior_condition, len(examples.x))
        log_weights = _log_weights(made)
        log_uniforms = jnp.log(jax.random.uniform(key_accept, log_weights.shape, minval=1e-30))
        old = examples.log_weights
        accept = (old == -jnp.inf) | (log_uniforms < log_weights - jnp.where(old == -jnp.inf, 0.0, old))
        rows = accept.reshape(-1, *[1] * (made.x.ndim - 1))
        return examples._replace(x=jnp.where(rows, made.x, examples.x), log_weights=jnp.where(accept, log_weights, old))


def _log_weights(paths: Trajectories) -> Array:
    log_weights = paths.log_reward - paths.log_ratio
    # A row of such a weight would stay for ever.
    if not bool(jnp.all(jnp.isfinite(log_weights) | (log_weights == -jnp.inf))):
        raise FloatingPointError("a reward of the replay buffer's new paths is NaN or +inf: look at log_reward")
    return log_weights
