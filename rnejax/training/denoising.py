"""Training and judging a denoiser on data: the loss `fit` minimises, and the held-out error by noise level."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..processes.gaussian import require_scalar
from .losses import drop_labels, score_matching_loss
from .times import time_law

Prepare = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
"""prepare(key, batch) -> (x0, condition): what a batch of the stored data becomes, for example by dequantisation."""


def denoising_loss(
    process: Any,
    apply: Callable[..., jax.Array],
    prepare: Prepare,
    *,
    prediction: str,
    weighting: str | None = None,
    times: Callable[[jax.Array], jax.Array] | None = None,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    dropout: bool = False,
    antithetic: bool = False,
) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """loss(key, params, batch) -> denoising losses of the examples, for `fit`.

    Args:
        process: a scalar Gaussian process.
        apply: apply(params, x, t, condition), on a batch; with `dropout`, apply(..., key=key) too.
        prepare: prepare(key, batch) -> (x0, condition).
        prediction, weighting, times, antithetic: as in `score_matching_loss`.
        label_dropout: share of the examples whose condition becomes `null_label`.
        null_label: needed if `label_dropout` > 0.
        dropout: whether `apply` takes a key for dropout.
    """
    if label_dropout > 0 and null_label is None:
        raise ValueError(f"label_dropout = {label_dropout} needs a null_label to replace labels by: got None")

    def loss(key: jax.Array, params: Any, batch: Any) -> jax.Array:
        prepare_key, label_key, dropout_key, loss_key = jax.random.split(key, 4)
        x0, condition = prepare(prepare_key, batch)
        if null_label is not None and label_dropout > 0:
            condition = drop_labels(label_key, condition, label_dropout, null_label)
        options = {"key": dropout_key} if dropout else {}

        def predict(x: jax.Array, t: jax.Array, *condition: Any) -> jax.Array:
            return apply(params, x, t, *condition, **options)

        return score_matching_loss(
            loss_key,
            process,
            predict,
            x0,
            condition,
            prediction=prediction,
            weighting=weighting,
            times=times,
            batched=True,
            antithetic=antithetic,
        )

    return loss


class DenoisingErrors(NamedTuple):
    """Mean squared errors of the noise prediction, per dimension, in bins of log-SNR, and the bound they imply.

    `edges`: (bins + 1,), increasing log-SNR. `epsilon_error`, `standard_error`: (bins,). `bound`: an upper bound on the
    mean of -log p_{t_min}(x_{t_min}), in nats per dimension.
    """

    edges: np.ndarray
    epsilon_error: np.ndarray
    standard_error: np.ndarray
    bound: float


def denoising_evaluator(
    process: Any,
    apply: Callable[..., jax.Array],
    *,
    prediction: str,
    num_bins: int = 8,
    repeats: int = 1,
    batch_size: int = 250,
) -> Callable[..., DenoisingErrors]:
    """evaluate(key, params, x0, condition=None) -> DenoisingErrors: the error by noise level and the bound it implies.

    With lambda = log-SNR (Kingma et al. 2021, equation 17, between t_min and t_max),

        -E log p_{t_min}(x) <= 1/2 int E|eps - eps_hat|^2 d lambda + E KL(q(x_{t_max}|x_0) || N(0, V I))
                               + (d/2) log(2 pi e sigma_{t_min}^2),

    the last term being the entropy of the noise at t_min; V is the reference's variance at t_max. The same key gives
    the same noise levels and the same noise, so that two sets of weights can be compared; the network is compiled once
    for all calls.

    Args:
        process: a scalar Gaussian process.
        apply: apply(params, x, t) or apply(params, x, t, condition), on a batch.
        prediction: what `apply` returns.
        num_bins: bins of equal width in log-SNR.
        repeats: noise levels per example.
        batch_size: examples per network call.
    """
    require_scalar(process, "a bound from denoising errors")
    law = time_law(process, log_snr_share=1.0)

    @jax.jit
    def errors(key: jax.Array, params: Any, x0: jax.Array, condition: Any, t: jax.Array) -> jax.Array:
        def predict(*arguments: Any) -> jax.Array:
            return apply(params, *arguments)

        return score_matching_loss(
            key, process, predict, x0, condition, prediction=prediction, weighting="epsilon", times=t, batched=True
        )

    def evaluate(key: jax.Array, params: Any, x0: jax.Array, condition: Any = None) -> DenoisingErrors:
        count = x0.shape[0]
        found, log_snrs = [], []
        for repeat in range(repeats):
            repeat_key = jax.random.fold_in(key, repeat)
            order = jax.random.permutation(repeat_key, count)
            t = law((jnp.arange(count) + (repeat + 0.5) / repeats) / count)[order]
            for first in range(0, count, batch_size):
                part = slice(first, first + batch_size)
                chosen = jax.tree.map(lambda leaf, part=part: leaf[part], condition)
                part_key = jax.random.fold_in(repeat_key, first)
                found.append(np.asarray(errors(part_key, params, x0[part], chosen, t[part]), np.float64))
                log_snrs.append(np.asarray(process.level(t[part]).log_snr))
        return _summarise(process, x0, np.concatenate(found), np.concatenate(log_snrs), num_bins)

    return evaluate


def _summarise(process: Any, x0: jax.Array, error: np.ndarray, log_snr: np.ndarray, num_bins: int) -> DenoisingErrors:
    end, start = process.level(process.t_max), process.level(process.t_min)
    edges = np.linspace(float(end.log_snr), float(start.log_snr), num_bins + 1)
    bins = np.clip(np.digitize(log_snr, edges) - 1, 0, num_bins - 1)
    members = [error[bins == i] for i in range(num_bins)]

    variance = float(end.reference_variance)
    ratio = float(end.sigma) ** 2 / variance
    dimension = process.subspace.dimension(x0.shape[1:])
    power = float(jnp.sum(jnp.square(x0))) / (len(x0) * dimension) * float(end.alpha) ** 2 / variance
    prior = 0.5 * (power + ratio - 1.0 - math.log(ratio))
    entropy = 0.5 * math.log(2 * math.pi * math.e * float(start.sigma) ** 2)
    return DenoisingErrors(
        edges,
        epsilon_error=np.array([values.mean() for values in members]),
        standard_error=np.array([values.std(ddof=1) / np.sqrt(values.size) for values in members]),
        bound=0.5 * float(edges[-1] - edges[0]) * float(error.mean()) + prior + entropy,
    )
