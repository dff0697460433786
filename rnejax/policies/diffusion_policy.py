"""Diffusion policies: a diffusion model of actions, whose condition is what is observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from ..kernels import Array
from ..networks import build, functional
from ..training import fit, make_optimizer, score_matching_loss
from ..transforms import Affine
from .transitions import Transitions, check_transitions


def policy_model(
    key: Array, process: Any, data: Transitions, *, hidden: int = 128, depth: int = 3
) -> rj.DiffusionModel:
    """A model p(a | s) with fresh weights, for the scales of the data: its samples are actions in their own units, and
    its condition is an observation as it is.

    Args:
      key: a typed key.
      process: of numbers that diffuse, for data of unit variance.
      data: logged transitions.
      hidden, depth: of the network, an `rnejax.networks.MLP`.

    Raises:
      ValueError: for data that are none.
    """
    data = check_transitions(data)
    apply, params = functional(build("mlp", key, **network_arguments(data, hidden, depth)))
    # One number for all directions of the action: the reference is isotropic.
    centre, spread = data.actions.mean(axis=0), float(data.actions.std(axis=0).mean() + 1e-3)
    return rj.DiffusionModel(
        process,
        apply.as_prediction(),
        "v",
        shape=data.actions.shape[1:],
        params=params,
        condition=jnp.zeros(data.observations.shape[1]),
        transform=Affine(spread, centre),
        batched=True,
    )


def network_arguments(data: Transitions, hidden: int, depth: int) -> dict[str, Any]:
    """Of `rnejax.networks.MLP`: actions, given observations that it standardises itself."""
    return {
        "shape": data.actions.shape[1:],
        "hidden": hidden,
        "depth": depth,
        "condition_size": data.observations.shape[1],
        "condition_shift": [round(float(each), 6) for each in data.observations.mean(axis=0)],
        "condition_scale": [round(float(each), 6) for each in data.observations.std(axis=0) + 1e-3],
    }


def clone(
    key: Array,
    model: rj.DiffusionModel,
    data: Transitions,
    *,
    num_steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    **options: Any,
) -> rj.DiffusionModel:
    """Behaviour cloning by denoising score matching: p(a | s) of the data.

    Args:
      key: a typed key.
      model: of `policy_model`.
      data: logged transitions.
      num_steps, batch_size, learning_rate, options: of `rnejax.training.fit`.

    Raises:
      ValueError, FloatingPointError: as `rnejax.training.fit`.
    """
    data = check_transitions(data)
    actions = np.asarray(jax.vmap(model.transform.to_model)(jnp.asarray(data.actions)))

    def loss(key: Array, params: Any, batch: Any) -> Array:
        x0, observations = batch
        return score_matching_loss(
            key, model.process, lambda x, t, c: model.fn(params, x, t, c), x0, observations,
            prediction=model.prediction, batched=True,
        )  # fmt: skip

    result = fit(
        key,
        loss,
        model.params,
        (actions, data.observations),
        make_optimizer(learning_rate, num_steps=num_steps, warmup_steps=min(100, num_steps // 10)),
        num_steps=num_steps,
        batch_size=batch_size,
        **{"steps_per_call": 100, "report_every": 1000, "save_every": 1000, "ema_decay": 0.999, **options},
    )
    return model.with_params(result.average)


def act(
    model: rj.DiffusionModel,
    times: Any,
    *,
    num_candidates: int = 1,
    score: Callable[[Any, Any], Any] | None = None,
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """The model as a policy of `rnejax.policies.evaluate`: one sample for every observation, or the best of several.

    Args:
      model: of actions, whose condition is an observation.
      times: of sampling.
      num_candidates: samples for every observation, of which the one of the largest ``score(observation, action)`` is
        done.
      score: such as a Q-function.

    Raises:
      ValueError: for several candidates and no score.
    """
    if num_candidates > 1 and score is None:
        raise ValueError(f"of {num_candidates} candidates one must be chosen: give a score, such as a Q-function")

    @jax.jit
    def policy(key: Any, model: rj.DiffusionModel, observations: Any) -> Any:
        def one(key: Any, observation: Any) -> Any:
            x = rj.sample(key, model.with_condition(observation), times, num_candidates, progress=False).x
            if score is None:
                return x[0]
            return x[jnp.argmax(jax.vmap(lambda action: score(observation, action))(x))]

        return jax.vmap(one)(jax.random.split(key, len(observations)), observations)

    return lambda key, observations: np.asarray(policy(key, model, jnp.asarray(observations, jnp.float32)))
