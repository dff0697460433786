"""Looking at states: what models and rewards say of them, the only place of ``steer`` where either is called.

The gradient of a reward is that with respect to the state or, of tokens, with respect to rows of token probabilities:
a first-order expansion of what a change of each token would do to the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..covariance import Evaluation
from ..kernels import Array, log_product
from ..model import DiffusionModel
from ..smc.weights import log_mean_exp
from .rewards import Reward

Evaluations = tuple[Evaluation, ...]


class Seen(NamedTuple):
    """What is known of a batch of states.

    Attributes:
      evaluations: of every model.
      rewards: (n, j).
      exact_gradient: gradient of that part of the tilt whose scheme is exact, (n, *relaxed shape).
      gradient: of the rest.
    """

    evaluations: Evaluations
    rewards: Array
    exact_gradient: Array
    gradient: Array


def look_at_numbers(
    key: Array, model: DiffusionModel, rewards: tuple[Reward, ...], evaluate: Callable[[Array], Evaluations], x: Array,
    step: Any,
) -> Seen:  # fmt: skip
    """Of states that are numbers. Rewards at x0 are differentiated through the network."""
    through_network = any(reward.gradient and reward.at == "x0" for reward in rewards)
    known = None if through_network else evaluate(x)

    def value(reward: Reward, x: Array, evaluations: Evaluations) -> Array:
        return _reward_of_numbers(model, reward, x, evaluations, step, step.level)

    def tilts(x: Array) -> tuple[tuple[Array, Array], tuple[Evaluations, dict[int, Array]]]:
        """The exact tilt and the other one, of the rewards that have gradients; all else on the side."""
        evaluations = evaluate(x) if known is None else known
        values = {i: value(r, x, evaluations) for i, r in enumerate(rewards) if r.gradient}
        zero = jnp.zeros(len(x), x.dtype)
        parts = {True: zero, False: zero}
        for i, found in values.items():
            parts[rewards[i].exact] += step.strengths_s[i] * found
        return (parts[True], parts[False]), (evaluations, values)

    if any(reward.gradient for reward in rewards):
        _, pullback, (evaluations, values) = jax.vjp(tilts, x, has_aux=True)
        zero, one = jnp.zeros(len(x), x.dtype), jnp.ones(len(x), x.dtype)
        project = jax.vmap(model.process.subspace.project)
        exact_gradient = project(pullback((one, zero))[0])
        gradient = project(pullback((zero, one))[0])
    else:
        evaluations, values = evaluate(x) if known is None else known, {}
        exact_gradient = gradient = jnp.zeros_like(x)
    for i, reward in enumerate(rewards):
        if not reward.gradient:
            values[i] = value(reward, x, evaluations)
    return Seen(evaluations, _in_order(values, len(x), x.dtype), exact_gradient, gradient)


def look_at_tokens(
    key: Array, model: DiffusionModel, rewards: tuple[Reward, ...], evaluate: Callable[[Array], Evaluations], x: Array,
    step: Any,
) -> Seen:  # fmt: skip
    """Of states that are tokens.

    A reward with a gradient is given rows of probabilities, (length, vocab_size): of the clean tokens as the models
    predict them for ``at="x0"``, of the tokens that are there for ``at="x"`` (MASK: zeros). With g its gradient and m
    the rows, a change of position i to token k changes it by g_ik - sum_j m_ij g_ij to first order; a reward may know
    better (its method ``changes``). That, times the strength at the end of the step to come, is what the proposal is
    given.
    """
    evaluations = evaluate(x)
    size = model.process.vocab_size  # type: ignore[attr-defined]
    present = jax.nn.one_hot(x, size, dtype=jnp.result_type(float))
    rows = {"x": present, "x0": present}
    if any(reward.at == "x0" for reward in rewards):
        predicted = predicted_rows(step.level, x, evaluations, step.exponents_s)
        rows["x0"] = jnp.where(step.is_last, present, predicted)
    values, slopes = {}, {True: jnp.zeros_like(present), False: jnp.zeros_like(present)}
    for i, reward in enumerate(rewards):
        if not reward.gradient:
            values[i] = reward_of_tokens(jax.random.fold_in(key, i), reward, x, rows["x0"])
            continue
        values[i], change = reward.values_and_changes(rows[reward.at])
        slopes[reward.exact] += step.strengths_ahead[i] * change
    return Seen(evaluations, _in_order(values, len(x), present.dtype), slopes[True], slopes[False])


def reward_values(
    key: Array,
    model: DiffusionModel,
    rewards: tuple[Reward, ...],
    evaluations: Evaluations,
    x: Array,
    step: Any,
    level: Any,
) -> Array:
    """Rewards of a batch of states that the models have not seen, from what they said of others: (n, j)."""
    discrete = model.process.is_discrete
    rows = None
    if discrete:
        present = jax.nn.one_hot(x, model.process.vocab_size, dtype=jnp.result_type(float))  # type: ignore[attr-defined]
        rows = jnp.where(step.is_last, present, predicted_rows(level, x, evaluations, step.exponents_s))
    values = {}
    for i, reward in enumerate(rewards):
        if rows is None:
            values[i] = _reward_of_numbers(model, reward, x, evaluations, step, level)
        elif reward.gradient:
            values[i] = reward.values(rows if reward.at == "x0" else present)
        else:
            values[i] = reward_of_tokens(jax.random.fold_in(key, i), reward, x, rows)
    return _in_order(values, len(x), jnp.result_type(float) if discrete else x.dtype)


def _reward_of_numbers(
    model: DiffusionModel, reward: Reward, x: Array, evaluations: Evaluations, step: Any, level: Any
) -> Array:
    if reward.at == "x0":
        weights = step.exponents_s / jnp.sum(step.exponents_s)
        excess = sum(w * evaluation.excess for w, evaluation in zip(weights, evaluations, strict=True))
        # The target is tilted by the reward of the state itself.
        x = jnp.where(step.is_last, x, jax.vmap(level.clean_state)(x, excess))
    return reward.values(jax.vmap(model.transform.to_data)(x))


def predicted_rows(level: Any, x: Array, evaluations: Evaluations, exponents: Array) -> Array:
    """Probabilities of the clean tokens, (n, length, V): of all models together, as their target mixes them."""
    weights = exponents / jnp.sum(exponents)
    mixed = log_product(weights, jnp.stack([evaluation.excess for evaluation in evaluations]))
    possible = jnp.any(mixed > -jnp.inf, axis=-1, keepdims=True)
    mixed = jax.nn.log_softmax(jnp.where(possible, mixed, 0.0), axis=-1) + jnp.log(float(mixed.shape[-1]))
    return level.denoised(x, mixed)


def reward_of_tokens(key: Array, reward: Reward, x: Array, rows: Array) -> Array:
    """Of a batch of token states: of themselves, or of completions drawn from the rows, log-mean-exp over these."""
    if reward.at == "x":
        return reward.values(x)
    drawn = jax.random.categorical(key, jnp.log(rows), axis=-1, shape=(reward.draws, *x.shape)).astype(x.dtype)
    values = reward.values(drawn.reshape(-1, *x.shape[1:])).reshape(reward.draws, len(x))
    return log_mean_exp(values, axis=0)


def _in_order(values: dict[int, Array], n: int, dtype: Any) -> Array:
    if not values:
        return jnp.zeros((n, 0), dtype)
    return jnp.stack([values[i] for i in range(len(values))], axis=1)
