"""From the models' target to a law whose density is known, at the last step: importance sampling of whole paths."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import is_traced
from ..kernels import Array
from ..model import DiffusionModel
from ..smc.weights import relative_error_of_mean
from .steer import Steered
from .targets import Target, as_target


def reweight(result: Steered, target: Target | DiffusionModel, log_density: Callable[[Array], Array]) -> Steered:
    r"""The same particles, weighted for another law, such as exp(-U / kT) of a molecule whose energy is known.

    A steered path has the weight of prod_i p_i^{beta_i}(x) prod B(x_t | x_s), with p_i(x) the density that it has
    accumulated along itself, ``result.log_densities``. The auxiliary kernels B integrate to 1, so with

        log w' = log w + log_density(x) - sum_i beta_i log p_i(x)

    the paths' ends have exactly the law wanted, however wrong the models are; exp(log_normalizer) becomes an unbiased
    estimate of the integral of exp(log_density). How well that works is a question of the new weights: look at
    `rnejax.smc.effective_sample_size` and `rnejax.smc.pareto_k`.

    Args:
      result: of `rnejax.steer`, with or without groups; not of ``proposal="feynman_kac"``, whose weights are
        no ratios of kernels.
      target: what was steered to; without rewards.
      log_density: of one state in the user's coordinates, in nats, up to a constant; -inf where there is none (clashing
        atoms: such particles get no weight).

    Raises:
      ValueError: for a result of ``feynman_kac``, a target with rewards, another number of models than the result has,
        or a log-density that is NaN or +inf.
    """
    target = as_target(target)
    if target.rewards:
        raise ValueError("reweight takes the place of a tilt: give it the target without rewards")
    if len(target.models) != result.log_densities.shape[-1]:
        raise ValueError(
            f"the result has densities of {result.log_densities.shape[-1]} models, the target has {len(target.models)}"
        )
    if not np.all(result.info.kernel_ratios):
        raise ValueError(
            "the result is of proposal='feynman_kac', whose weights are no ratios of kernels: there is no weight that "
            "leads from them to another law; steer with 'symmetric' or (c_a, c_b)"
        )
    exponents = target.exponents_at(np.ravel(np.asarray(result.info.time))[-1:])[0]
    shape = target.models[0].shape
    x = result.particles.reshape(-1, *shape)
    wanted = jax.lax.map(log_density, x, batch_size=1024).reshape(result.log_weights.shape)
    if not is_traced(wanted):
        bad = int(jnp.sum(jnp.isnan(wanted) | (wanted == jnp.inf)))
        if bad:
            raise ValueError(f"log_density is NaN or +inf for {bad} of {wanted.size} particles; it may be -inf")
        if not bool(jnp.all(jnp.any(wanted > -jnp.inf, axis=-1))):
            raise ValueError("log_density is -inf for every particle (of a group): nothing is left to weigh")
    old = jnp.sum(jnp.asarray(exponents, wanted.dtype) * result.log_densities, axis=-1)
    log_weights = jnp.where(result.log_weights == -jnp.inf, -jnp.inf, result.log_weights + wanted - old)
    change = jax.nn.logsumexp(log_weights, axis=-1) - np.log(log_weights.shape[-1])
    log_normalizer = result.log_normalizer + change
    return result._replace(
        log_weights=log_weights - change[..., None],
        log_normalizer=log_normalizer,
        standard_error=relative_error_of_mean(jnp.atleast_1d(log_normalizer)),
    )
