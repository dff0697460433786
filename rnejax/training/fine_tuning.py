r"""The loss of relative trajectory balance for `rnejax.training.fit`: what paths it has, what it learns of log Z.

For the residual itself see `rnejax.training.trajectory_balance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..checks import check_count, check_number
from ..density import check_times, sample
from ..kernels import Array
from ..model import DiffusionModel
from .paths import first_step
from .trajectory_balance import (
    Trajectories,
    back_and_forth_residual,
    batch_log_normalizer,
    trajectory_balance_residual,
)


class FineTuned(NamedTuple):
    """What fine-tuning learns: the weights of the posterior, and log Z, or the weights of what says it.

    A learned log Z is what residuals are measured from; until the posterior is reached it is too low, by about the gap
    of the lower bound, and `assess` has the estimate to quote.

    log Z wants a larger learning rate than weights do:

        optimizer = optax.partition(
            {"weights": make_optimizer(1e-3, num_steps=n), "log_normalizer": optax.adam(0.05)},
            FineTuned("weights", "log_normalizer"),
        )
    """

    weights: Any
    log_normalizer: Any


class Examples(NamedTuple):
    """What a batch of `trajectory_balance_loss` has where it is more than an array of clean data.

    Attributes:
      x: clean data, (n, *shape); of sources that need none, anything with as many rows.
      condition: of the posterior and of the reward, a pytree (n, ...).
      prior_condition: of the prior, (n, ...); None for its own.
      log_weights: (n,), of a `ReplayBuffer`, which no loss looks at.
    """

    x: Array
    condition: Any = None
    prior_condition: Any = None
    log_weights: Any = None


SOURCES = ("generated", "inflated", "noised", "back_and_forth", "renoised")


def trajectory_balance_loss(
    posterior: DiffusionModel,
    prior: DiffusionModel,
    times: Any,
    log_reward: Callable[..., Array],
    *,
    sources: Mapping[str, float] = MappingProxyType({"generated": 1.0}),
    normalizer: str | Callable[[Any, Any], Array] = "learned",
    paths_per_condition: int = 1,
    inflation: float = 2.0,
    turn: float = 0.5,
    bound: float = math.inf,
    least_log_reward: float = -100.0,
    num_steps: int | None = None,
    averaged: bool = False,
    above: float | None = None,
) -> Callable[[Array, FineTuned, Any], tuple[Array, dict[str, Array]]]:
    r"""loss(key, FineTuned, batch) -> (residual^2 / 2 of as many paths as the batch has, what to report), for `fit`.

    A batch is an array of clean data x, of which only their number counts if no source looks at them, or `Examples`
    with a condition for each of them.

    Which paths a batch of n has is a mixture of

        generated       by the posterior's own kernels, as it is (on-policy)
        inflated        by these kernels with ``inflation`` times the variance
        noised          what noise makes of the batch's x: data, or a replay buffer (off-policy)
        back_and_forth  the batch's x, noised a part of the way and denoised: the difference of both residuals
        renoised        what noise makes of the posterior's own samples: on-policy near the data, and with ``averaged``
                        without the noise of its own draws, in which what a path says is lost in many dimensions

    Args:
      posterior: the model to be tuned; its weights are replaced by those of `FineTuned`.
      prior, times, log_reward, num_steps, averaged, above: as for `trajectory_balance_residual`.
      sources: shares of the batch, by name; they are made to sum to one.
      normalizer: "learned", log Z as a weight of its own; a function (weights, condition) -> log Z of one condition,
        such as ``lambda table, label: table[label]``; or "batch", VarGrad: what the batch's paths of the same
        condition say, all but ``back_and_forth``, which know nothing of it (`batch_log_normalizer`).
      paths_per_condition: take so many paths of each of the first examples of a batch, for "batch" where conditions
        would otherwise not come twice; a divisor of the batch's size.
      inflation: of the variance.
      turn: share of the steps after which ``back_and_forth`` turns round.
      bound: of a residual, in nats, beyond which the loss grows linearly (Huber 1964). Reported is the share there.
      least_log_reward: what log r counts as where it is less: a reward of zero teaches avoidance, and no infinity.

    The report has ``log_reward`` and ``residual`` (means), ``squared_residual``, ``beyond_bound``, and
    ``log_normalizer`` (the batch's estimate, over paths generated without inflation if there are any), and
    ``least_reward``, the share of paths whose log r counts as ``least_log_reward``.

    Raises:
      ValueError: for unknown or no sources, a negative share, an unknown normalizer, a bound or an inflation that is
        not positive, a turn outside (0, 1], or what `trajectory_balance_residual` refuses.
    """
    shares = _check_sources(sources)
    if normalizer not in ("learned", "batch") and not callable(normalizer):
        raise ValueError(f"normalizer must be 'learned', 'batch' or a function, got {normalizer!r}")
    check_count("paths_per_condition", paths_per_condition)
    if not (isinstance(bound, (int, float)) and bound > 0):
        raise ValueError(f"bound must be positive, math.inf for none: got {bound!r}")
    if not 0 < check_number("turn", turn) <= 1:
        raise ValueError(f"turn must be a share of the steps, above 0 and at most 1: got {turn}")
    check_number("inflation", inflation, positive=True)
    times = check_times(posterior, times)
    first_step(times, above)
    if num_steps is not None:
        check_count("num_steps", num_steps)
    part = times[: max(2, round(turn * (len(times) - 1)) + 1)]

    def reward(*arguments: Any) -> Array:
        return jnp.maximum(log_reward(*arguments), least_log_reward)

    def log_normalizer_of(tuned: FineTuned, paths: Trajectories, condition: Any) -> Array:
        if normalizer == "batch":
            return batch_log_normalizer(paths, condition, bound=bound)
        if callable(normalizer):
            said: Array = jax.vmap(normalizer, (None, 0))(tuned.log_normalizer, condition)
            return said
        return jnp.asarray(tuned.log_normalizer)

    def loss(key: Array, tuned: FineTuned, batch: Any) -> tuple[Array, dict[str, Array]]:
        if not isinstance(tuned, FineTuned):
            raise TypeError(f"fit learns FineTuned(weights, log_normalizer) here, not {type(tuned).__name__}")
        model = posterior.with_params(tuned.weights)
        examples = batch if isinstance(batch, Examples) else Examples(batch)
        if callable(normalizer) and examples.condition is None:
            raise ValueError("normalizer is a function of conditions: give fit Examples(x, condition) as its data")
        examples = _repeat(examples, paths_per_condition)
        counts = _split_batch(shares, len(examples.x))
        found: list[tuple[Trajectories, Any]] = []
        differences = None
        first = 0
        for name, key_source in zip(SOURCES, jax.random.split(key, len(SOURCES)), strict=True):
            count = counts.get(name, 0)
            rows = slice(first, first + count)
            some = jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples)
            first += count
            if count == 0:
                continue
            options: dict[str, Any] = {
                "condition": some.condition,
                "prior_condition": some.prior_condition,
                "num_steps": num_steps,
            }
            if name == "back_and_forth":
                differences, _ = back_and_forth_residual(key_source, model, prior, part, reward, some.x, **options)
                continue
            if name in ("noised", "renoised"):
                x = some.x
                if name == "renoised":
                    key_source, key_own = jax.random.split(key_source)
                    x = _own_samples(key_own, model, times, count, some.condition)
                options |= {"x": x, "averaged": averaged}
            else:
                options |= {"num_paths": count, "inflation": inflation if name == "inflated" else 1.0}
            options["above"] = above
            made = trajectory_balance_residual(key_source, model, prior, times, reward, **options)
            found.append((made, some.condition))
        if found:
            paths, condition = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
            residual = log_normalizer_of(tuned, paths, condition) + paths.residual
            estimate = batch_log_normalizer(found[0][0], bound=bound)
            rewards = paths.log_reward
        else:
            assert differences is not None
            residual, estimate, rewards = differences[:0], jnp.full((), jnp.nan), jnp.full(1, jnp.nan)
        if differences is not None:
            residual = jnp.concatenate([residual, differences])
        report = {
            "log_reward": jnp.mean(rewards),
            "log_normalizer": estimate,
            "residual": jnp.mean(residual),
            "squared_residual": jnp.mean(residual**2),
            "beyond_bound": jnp.mean(jnp.abs(residual) > bound),
            "least_reward": jnp.mean(rewards <= least_log_reward),
        }
        values = optax.huber_loss(residual, delta=bound) if math.isfinite(bound) else 0.5 * residual**2
        return values, {name: jnp.broadcast_to(value, values.shape) for name, value in report.items()}

    return loss


def _own_samples(key: Array, model: DiffusionModel, times: Any, count: int, condition: Any) -> Array:
    """Of the model as it is, under a condition for each where there are any."""
    if condition is None:
        return jax.lax.stop_gradient(sample(key, model, times, count, progress=False).x)

    def one(key: Array, condition: Any) -> Array:
        return sample(key, model.with_condition(condition), times, progress=False).x[0]

    return jax.lax.stop_gradient(jax.vmap(one)(jax.random.split(key, count), condition))


def _repeat(examples: Examples, times: int) -> Examples:
    """The first of them, so many times in turn: every part of a batch then has all of them."""
    if times == 1:
        return examples
    count = len(examples.x)
    if count % times:
        raise ValueError(f"paths_per_condition must divide the batch's size, {count}: got {times}")
    repeated: Examples = jax.tree.map(lambda leaf: jnp.concatenate([leaf[: count // times]] * times), examples)
    return repeated


def _check_sources(sources: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(sources, Mapping):
        raise ValueError(f"sources must be names with their shares, such as {{'generated': 1.0}}: got {sources!r}")
    unknown = [name for name in sources if name not in SOURCES]
    if unknown:
        raise ValueError(f"sources must be among {', '.join(SOURCES)}: got {', '.join(map(str, unknown))}")
    wrong = [f"{name}: {share}" for name, share in sources.items() if not 0 <= share < math.inf]
    total = sum(sources.values())
    if wrong or not total > 0:
        raise ValueError(f"shares of sources must not be negative, and one must be positive: got {dict(sources)}")
    return {name: share / total for name, share in sources.items() if share > 0}


def _split_batch(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers of paths, as near to the shares as their order allows; their sum is the batch."""
    ends = np.round(np.cumsum([shares.get(name, 0.0) for name in SOURCES]) * count).astype(int)
    return dict(zip(SOURCES, np.diff(ends, prepend=0).tolist(), strict=True))
