"""Denoising score matching, in every parameterisation (Vincent 2011; Ho et al. 2020; Salimans & Ho 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..processes.gaussian import require_scalar
from .times import low_discrepancy_uniforms

QUANTITIES = ("x0", "epsilon", "score", "v", "velocity")


def score_matching_loss(
    key: jax.Array,
    process: Any,
    predict: Callable[..., jax.Array],
    x0: jax.Array,
    condition: Any = None,
    *,
    prediction: str,
    weighting: str | None = None,
    times: Callable[[jax.Array], jax.Array] | jax.Array | None = None,
    batched: bool = False,
    antithetic: bool = False,
) -> jax.Array:
    """The squared error of the denoiser at one noise level per example; not averaged over examples.

    x_t = alpha_t x_0 + sigma_t eps with eps ~ N(0, I), and the loss of one example is

        |prediction(x_t, t) - target|^2 / d,

    with d the dimension of the process's subspace, where noise and error are taken (3 (atoms - 1) without a centre of
    mass), measured in the quantity that `weighting` names. All targets are linear in (x_0, eps), and given x_t one
    error says them all: with e = D(x_t, t) - x_0,

        x0: e    epsilon: -(alpha/sigma) e    score: (alpha/sigma^2) e    v: -(alpha^2/sigma + sigma) e
        velocity: (alpha' - sigma' alpha/sigma) e

    so `weighting` is exact for every `prediction` of a scalar process; of a linear SDE, where these factors are
    matrices, it is the prediction itself, or "posterior" for x0. Times of a linear SDE are the nearest of the levels
    that it keeps under jit. "epsilon" with log-SNR-uniform times is the likelihood's own weighting; "v" also weighs the
    noisy end. "posterior" is e in units of the root mean square error that the reference's denoiser makes on its own
    data: every noise level counts alike (Karras et al. 2022, section 5, for a reference that has the data's standard
    deviation).

    Args:
        key: a typed key; gives the times and the noise.
        process: a process of numbers that diffuse.
        predict: the network, predict(x, t) or, if `condition` is given, predict(x, t, condition); on one example, or
            with `batched` on a batch.
        x0: data, shape (n, ...).
        condition: a pytree with leading axis n, or None.
        prediction: what `predict` returns: "x0", "epsilon", "score", "v" = alpha eps - sigma x_0, or "velocity" =
            alpha' x_0 + sigma' eps.
        weighting: the quantity whose squared error is the loss, or "posterior"; default, the one that is predicted.
        times: a map from uniform numbers in [0, 1) to times (`time_law`), or an array of n times; default, uniform on
            [t_min, t_max].
        batched: whether `predict` takes a batch.
        antithetic: take eps and -eps for every example and average both losses. Where there is little noise, most of
            what eps says of a network's gradient is about eps, and it is odd in eps: |f(x + sigma eps) - eps|^2 +
            |f(x - sigma eps) + eps|^2 has a gradient whose noise is smaller by a factor of order sigma. Twice the
            network evaluations per example: halve the batch to compare.

    Returns:
        losses, shape (n,).

    Raises:
        ValueError: unknown quantity, or a prediction whose shape is not that of the data.
    """
    weighting = prediction if weighting is None else weighting
    quantities = [each for each in QUANTITIES if each in process.predictions]
    for name, quantity, known in (
        ("prediction", prediction, quantities),
        ("weighting", weighting, [*quantities, "posterior"]),
    ):
        if quantity not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}: got {quantity!r}")
    if weighting != prediction and (prediction, weighting) != ("x0", "posterior"):
        require_scalar(process, "a loss in another quantity than the one that is predicted")
    count = x0.shape[0]
    time_key, noise_key = jax.random.split(key)
    t = _draw_times(time_key, process, times, count)
    # The barrier keeps XLA from drawing the same noise anew wherever it is used.
    shape = (count, *process.state_shape(x0.shape[1:]))
    noise = jax.lax.optimization_barrier(jax.random.normal(noise_key, shape, x0.dtype))
    project, dimension = jax.vmap(process.subspace.project), process.subspace.dimension(x0.shape[1:])
    noise = project(noise)
    level = process.training_levels(t)
    t = jnp.asarray(level.t, t.dtype)
    per_error: Any = 1.0
    if weighting != prediction:
        if weighting == "posterior":
            per_error = 1 / jax.vmap(lambda level: level.posterior_scale)(level)
        else:
            per_error = _per_denoising_error(level, weighting)
        if prediction != "x0":
            per_error = per_error / _per_denoising_error(level, prediction)
        per_error = jnp.square(per_error)

    def losses(noise: jax.Array) -> jax.Array:
        x = jax.vmap(lambda level, x0, noise: level.noised(x0, noise))(level, x0, noise).astype(x0.dtype)
        arguments = (x, t) + (() if condition is None else (condition,))
        output = predict(*arguments) if batched else jax.vmap(predict)(*arguments)
        if output.shape != x0.shape:
            raise ValueError(f"the network's output must have the shape of the data {x0.shape}: got {output.shape}")
        target = jax.vmap(lambda level, x0, noise: level.target(prediction, x0, noise))(level, x0, noise)
        # What a network says off the subspace is not heard, in a model either.
        return jnp.sum(jnp.square(project(output - target)), axis=tuple(range(1, x0.ndim))) / dimension * per_error

    return 0.5 * (losses(noise) + losses(-noise)) if antithetic else losses(noise)


def _draw_times(key: jax.Array, process: Any, times: Any, count: int) -> jax.Array:
    if times is not None and not callable(times):
        if times.shape != (count,):
            raise ValueError(f"times must hold one time per example, shape ({count},): got {times.shape}")
        return times
    uniforms = low_discrepancy_uniforms(key, count)
    if times is None:
        return process.t_min + (process.t_max - process.t_min) * uniforms
    return times(uniforms)


def _per_denoising_error(level: Any, quantity: str) -> jax.Array:
    """The error in `quantity` that an error of one in x_0 makes, up to its sign."""
    alpha, sigma = level.alpha, level.sigma
    if quantity == "x0":
        return jnp.ones_like(alpha)
    if quantity == "epsilon":
        return alpha / sigma
    if quantity == "score":
        return alpha / sigma**2
    if quantity == "v":
        return alpha**2 / sigma + sigma
    return level.alpha_rate - level.sigma_rate * alpha / sigma


def drop_labels(key: jax.Array, labels: jax.Array, rate: float, null_label: int) -> jax.Array:
    """Replace each label by `null_label` with probability `rate`, for classifier-free guidance (Ho & Salimans 2022)."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be in [0, 1]: got {rate}")
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null_label, labels)
