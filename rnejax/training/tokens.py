r"""Training and judging a model of tokens: bounds on -log p, in nats per sequence.

The bound of a grid t_0 < ... < t_n is that of Sohl-Dickstein et al. 2015,

    -log p(x_0) <= sum_k E KL( q(x_{k-1} | x_k, x_0) || K(x_{k-1} | x_k) ) + KL( q(x_n | x_0) || ref_n ),

and of continuous time its limit (Campbell et al. 2022; Shi et al. 2024; Sahoo et al. 2024; Lou et al. 2024):

    Masked    E over t of  -alpha' / (1 - alpha)  sum over masked i of -log mu_{i, x_0i}(x_t),
    Uniform   E over t of  -alpha' / (alpha V)    sum over i and j != x_ti of  s_j (log s_j - log s^_j) + s^_j - s_j,

with s_j = q_t(j | x_0) / q_t(x_t | x_0) at a position and s^_j = sum_k mu_k q_t(j | k) / q_t(x_t | k) (score entropy),
or, of networks that predict a concrete score, s^_j = exp of what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count
from ..model import DiffusionModel
from ..processes import AnyOrder, Masked, TokenProcess, Uniform
from ..processes.grids import check_signal, validate_times
from ..processes.tokens import time_of_survival
from .times import low_discrepancy_uniforms

Predict = Callable[..., jax.Array]
Say = Callable[[jax.Array, Any], jax.Array]


def token_bound_loss(
    key: jax.Array,
    process: TokenProcess,
    predict: Predict,
    x0: jax.Array,
    condition: Any = None,
    *,
    prediction: str = "logits",
    times: Any = None,
    antithetic: bool = False,
    batched: bool = False,
) -> jax.Array:
    """An unbiased estimate of the variational bound of each example, in nats per sequence; not averaged over examples.

    One noised state per example, at times that cover the range evenly over the batch. Of masked tokens and in
    continuous time their *number* m is what covers 1, ..., length evenly, and the loss is (length / m) times the cross
    entropy over the masked ones: the time given m is a beta variable whose weight has been integrated out, for with
    times drawn evenly the weight -alpha' / (1 - alpha) is unbounded and the variance infinite.

    Args:
        key: a typed key.
        process: of tokens.
        predict: predict(x, t) or predict(x, t, condition), on one example, or with `batched` on a batch.
        x0: clean sequences, integers (n, length).
        condition: a pytree with leading axis n, or None.
        prediction: what `predict` returns, ``logits`` or ``concrete_score``.
        times: None for continuous time, or an increasing grid for the bound of that grid.
        antithetic: noise every example twice, with m and length + 1 - m complementary masks (masked tokens in
            continuous time only), and average: twice the network evaluations.
        batched: whether `predict` takes a batch.

    Returns:
        losses, shape (n,).

    Raises:
        ValueError: for sequences that are none of the process's (outside compiled code also for tokens that are none,
            or MASK), an unknown `prediction`, times at which a concrete score says nothing, `antithetic` with anything
            else, or an output of the wrong shape.
    """
    if prediction not in process.predictions:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, process.predictions))}: got {prediction!r}")
    x0 = process.check_tokens("x0", x0)
    if times is not None:
        check_signal(process, validate_times(process, times), prediction)
    # The score entropy asks for scores: those of a network are taken as they are, whether or not a law has them.
    takes_scores = prediction == "concrete_score" and times is None and isinstance(process, Uniform)

    def say(x: jax.Array, levels: Any) -> jax.Array:
        arguments = (x, levels.t) + (() if condition is None else (condition,))
        output = predict(*arguments) if batched else jax.vmap(predict)(*arguments)
        expected = (len(x0), process.length, process.vocab_size)
        if output.shape != expected:
            raise ValueError(
                f"the network must return one number for each of the {process.vocab_size} tokens at each of the "
                f"{process.length} positions (MASK is none of them): expected shape {expected}, got {output.shape}"
            )
        if takes_scores:
            return output
        return jax.vmap(lambda level, output, x: level.excess(output[None], x[None], prediction)[0])(levels, output, x)

    return _bound(key, process, say, x0, times, antithetic, takes_scores)


def token_loss(
    process: TokenProcess,
    apply: Callable[..., jax.Array],
    prepare: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    *,
    prediction: str = "logits",
    times: Any = None,
    antithetic: bool = False,
    dropout: bool = False,
) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """loss(key, params, batch) -> bounds of the examples in nats per token, for `fit`.

    Args:
        process: of tokens.
        apply: apply(params, x, t) or apply(params, x, t, condition), on a batch; with `dropout`, apply(..., key=key).
        prepare: prepare(key, batch) -> (x0, condition).
        prediction, times, antithetic: as in `token_bound_loss`.
        dropout: whether `apply` takes a key for dropout.
    """

    def loss(key: jax.Array, params: Any, batch: Any) -> jax.Array:
        prepare_key, dropout_key, loss_key = jax.random.split(key, 3)
        x0, condition = prepare(prepare_key, batch)
        options = {"key": dropout_key} if dropout else {}

        def predict(x: jax.Array, t: jax.Array, *condition: Any) -> jax.Array:
            return apply(params, x, t, *condition, **options)

        bounds = token_bound_loss(
            loss_key,
            process,
            predict,
            x0,
            condition,
            prediction=prediction,
            times=times,
            antithetic=antithetic,
            batched=True,
        )
        return bounds / process.length

    return loss


class LikelihoodBound(NamedTuple):
    """An upper bound on -log p of each example, in nats per sequence: `bound` (n,), and its `standard_error` (n,).

    The error is as if the samples of an example were independent. They share out the times, which makes the mean more
    even than that: on average the error is too large rather than too small.
    """

    bound: jax.Array
    standard_error: jax.Array


def likelihood_bound(
    key: jax.Array,
    model: DiffusionModel,
    x: Any,
    *,
    times: Any = None,
    num_samples: int = 16,
    conditions: Any = None,
    batch_size: int = 256,
) -> LikelihoodBound:
    """The variational bound on -log p of given sequences, for evaluation.

    Args:
        key: a typed key.
        model: of masked tokens, or of any tokens with a grid.
        x: clean sequences, integers (n, length).
        times: None for continuous time, or a grid.
        num_samples: noised states per sequence; they share out the times evenly.
        conditions: one per sequence, with leading axis n, in place of the model's own.
        batch_size: sequences per call of the network.

    Raises:
        ValueError: for no sequences or samples, sequences that are none of the process's, uniform tokens without a
            grid, or a model that returns NaN or a row without a finite logit.
    """
    process = model.process
    if not isinstance(process, TokenProcess):
        raise ValueError(f"a bound for tokens needs a process of tokens, got {type(process).__name__}")
    if times is None and isinstance(process, Uniform):
        raise ValueError("the bound of uniform tokens is that of a grid, which says where it ends: give times")
    check_count("num_samples", num_samples)
    x = process.check_tokens("x", x)
    if not len(x):
        raise ValueError("x has no sequences")

    @jax.jit
    def bounds(key: jax.Array, model: DiffusionModel, x: jax.Array, conditions: Any) -> jax.Array:
        # One sequence after another, again and again: then the times of each cover the range evenly.
        repeated, conditions = jax.tree.map(
            lambda leaf: jnp.tile(leaf, (num_samples, *[1] * (leaf.ndim - 1))), (x, conditions)
        )

        def say(states: jax.Array, levels: Any) -> jax.Array:
            def one(state: jax.Array, level: Any, condition: Any) -> jax.Array:
                own = model if condition is None else model.with_condition(condition)
                return own._excess(state[None], level)[0]

            return jax.vmap(one)(states, levels, conditions)

        return _bound(key, process, say, repeated, times).reshape(num_samples, len(x)).T

    found = []
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        chosen = jax.tree.map(lambda leaf, part=part: leaf[part], conditions)
        found.append(bounds(jax.random.fold_in(key, first), model, x[part], chosen))
    values = jnp.concatenate(found)
    if bool(jnp.isnan(values).any()):
        row = int(jnp.argmax(jnp.isnan(values).any(axis=1)))
        raise ValueError(f"the bound of x[{row}] is NaN: the model returned {process.failure} on what it was noised to")
    if times is not None:
        values = values + _ends(process, validate_times(process, times))
    error = jnp.std(values, axis=1, ddof=1) / np.sqrt(num_samples) if num_samples > 1 else jnp.full(len(x), jnp.nan)
    return LikelihoodBound(jnp.mean(values, axis=1), error)


# ------------------------------------------------------------------------------------------------------- the estimates


def _bound(
    key: jax.Array,
    process: Any,
    say: Say,
    x0: jax.Array,
    times: Any = None,
    antithetic: bool = False,
    says_scores: bool = False,
) -> jax.Array:
    """One noised state per example; say(x, levels) is what the network says of a batch, as log(V mu), or log s^."""
    time_key, noise_key = jax.random.split(key)
    uniforms = low_discrepancy_uniforms(time_key, len(x0))
    if times is None and isinstance(process, (Masked, AnyOrder)):
        return _masked_by_number(process, say, x0, uniforms, noise_key, antithetic)
    if antithetic:
        raise ValueError("antithetic noise is for masked tokens in continuous time: take times=None, or leave it out")
    if times is None:
        return _score_entropy(process, say, x0, uniforms, noise_key, says_scores)
    return _of_a_step(process, say, x0, uniforms, noise_key, validate_times(process, times))


def _masked_by_number(
    process: Any, say: Say, x0: jax.Array, uniforms: jax.Array, key: jax.Array, antithetic: bool
) -> jax.Array:
    length = x0.shape[1]
    key_positions, key_times = jax.random.split(key)
    number = 1 + jnp.floor(uniforms * length).astype(jnp.int32)
    # The rank of each position in a random order; masked are those that come first, or, antithetically, last.
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key_positions, x0.shape), axis=1), axis=1)

    def of(number: jax.Array, rank: jax.Array, key: jax.Array) -> jax.Array:
        masked = rank < number[:, None]
        if isinstance(process, AnyOrder):
            t = number.astype(jnp.result_type(float))
        else:
            lost = jax.random.beta(key, number.astype(float), length + 1.0 - number)
            t = time_at_loss(process, lost)
        said = say(jnp.where(masked, process.mask_token, x0), process.level(t))
        log_mu = _at(said, x0) - np.log(process.vocab_size)
        return -length / number * jnp.sum(jnp.where(masked, log_mu, 0.0), axis=1)

    keys = jax.random.split(key_times)
    if not antithetic:
        return of(number, rank, keys[0])
    return 0.5 * (of(number, rank, keys[0]) + of(length + 1 - number, length - 1 - rank, keys[1]))


def _score_entropy(
    process: Any, say: Say, x0: jax.Array, uniforms: jax.Array, key: jax.Array, says_scores: bool
) -> jax.Array:
    size = process.vocab_size
    t = process.t_min + (process.t_max - process.t_min) * uniforms
    alpha, slope = jax.jvp(process.alpha, (t,), (jnp.ones_like(t),))
    keys = jax.random.split(key, len(x0))
    x_t = jax.vmap(lambda key, x, t: process.marginal(x, t).sample(key))(keys, x0, t)
    said = say(x_t, process.level(t))
    rest = ((1 - alpha) / size)[:, None, None]
    own = jax.nn.one_hot(x_t, size)
    law = alpha[:, None, None] * own + rest  # q_t(x_t | k), of k

    def scores(mu: jax.Array) -> jax.Array:
        over = mu / law
        return alpha[:, None, None] * over + rest * jnp.sum(over, axis=-1, keepdims=True)

    true = scores(jax.nn.one_hot(x0, size))
    # What a network says of the token that is there means nothing, and is not asked.
    log_model = jnp.where(own > 0, 0.0, said) if says_scores else jnp.log(scores(jnp.exp(said) / size))
    terms = true * (jnp.log(true) - log_model) + jnp.exp(log_model) - true
    rate = (process.t_max - process.t_min) * -slope / (alpha * size)
    return rate * jnp.sum(jnp.where(own > 0, 0.0, terms), axis=(1, 2))


def _of_a_step(
    process: Any, say: Say, x0: jax.Array, uniforms: jax.Array, key: jax.Array, times: np.ndarray
) -> jax.Array:
    """The number of steps times the KL divergence of one of them."""
    num_steps = len(times) - 1
    index = jnp.minimum((uniforms * num_steps).astype(jnp.int32), num_steps - 1)
    keys = jax.random.split(key, len(x0))
    grid = jnp.asarray(times, jnp.result_type(float))
    steps = jax.tree.map(lambda leaf: leaf[index], process.transition(times[:-1], times[1:]))
    x_t = jax.vmap(lambda key, x, t: process.marginal(x, t).sample(key))(keys, x0, grid[index + 1])
    said = say(x_t, process.level(grid[index + 1]))
    true = jnp.where(jax.nn.one_hot(x0, process.vocab_size) > 0, np.log(process.vocab_size), -jnp.inf)
    if process.has_mask:
        true = jnp.where((x_t == process.mask_token)[..., None], true, 0.0)

    def divergence(step: Any, x_t: jax.Array, true: jax.Array, said: jax.Array) -> jax.Array:
        posterior, model = step.reverse(x_t, true), step.reverse(x_t, said)
        probabilities = jnp.exp(posterior.anchor + posterior.shift)
        difference = jnp.where(probabilities > 0, posterior.shift - model.shift, 0.0)
        return jnp.sum(jnp.where(probabilities > 0, probabilities * difference, 0.0))

    return num_steps * jax.vmap(divergence)(steps, x_t, true, said)


def _ends(process: Any, times: np.ndarray) -> float:
    """KL(q(x_n | x_0) || ref_n) + the entropy of q(x_{t_0} | x_0), in nats: what a grid leaves at its ends."""
    if isinstance(process, AnyOrder):
        return 0.0
    size, first, last = process.vocab_size, float(process.alpha(times[0])), float(process.alpha(times[-1]))

    def law(alpha: float, uniform: bool) -> np.ndarray:
        tokens = np.full(size, alpha / size) if uniform else alpha * np.eye(size)[0]
        return np.append(tokens, 1 - alpha) if process.has_mask else tokens + (1 - alpha) / size

    def expected_log(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.sum(p[p > 0] * np.log(q[p > 0])))

    start, end, reference = law(first, False), law(last, False), law(last, True)
    if not process.has_mask:
        reference = np.full(size, 1 / size)
    divergence = expected_log(end, end) - expected_log(end, reference)
    return process.length * (divergence - expected_log(start, start))


def time_at_loss(process: Masked, lost: jax.Array, num_nodes: int = 2049) -> jax.Array:
    """The times at which the probability of being lost, 1 - alpha, has these values."""
    if process.schedule == "linear":
        return jnp.minimum(lost, process.t_max)
    nodes = np.linspace(0.0, 1.0, num_nodes)
    times = np.asarray([time_of_survival(process.alpha, 1 - u, process.t_max) for u in nodes])
    return jnp.interp(lost, jnp.asarray(nodes), jnp.asarray(times))


def _at(table: jax.Array, x: jax.Array) -> jax.Array:
    """table[n, i, x_ni]."""
    return jnp.take_along_axis(table, x[..., None], axis=-1)[..., 0]
