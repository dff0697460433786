"""REINFORCE with a KL penalty, for the comparisons with trajectory balance. See the scripts that import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnejax.config import FinetuneRun
from rnejax.runs.finetuning import Problem
from rnejax.training import Examples, FineTuned, batch_log_normalizer, trajectory_balance_residual


def reinforce_loss(config: FinetuneRun, problem: Problem) -> Callable[..., Any]:
    """Minus E[log r] - KL(tuned | prior), with the gradient of the score function.

    The baseline is the batch's mean, of all conditions together: a class comes hardly twice in a batch, and Z of all of
    them is about the same.
    """

    def loss(key: Any, tuned: FineTuned, batch: Examples) -> Any:
        def log_reward(*arguments: Any) -> Any:
            return jnp.maximum(problem.log_reward(*arguments), config.least_log_reward)

        model = problem.posterior.with_params(tuned.weights)
        paths = trajectory_balance_residual(
            key,
            model,
            problem.prior,
            problem.times,
            log_reward,
            num_paths=len(batch.x),
            condition=batch.condition,
            num_steps=config.gradient_steps,
            above=problem.above,
        )
        advantage = jax.lax.stop_gradient(paths.log_reward - paths.log_ratio)
        advantage = advantage - batch_log_normalizer(paths)
        named = {
            "log_reward": paths.log_reward,
            "log_normalizer": paths.log_reward - jax.lax.stop_gradient(paths.log_ratio),
            "squared_residual": advantage**2,
        }
        return -advantage * paths.log_ratio, named

    return loss
