"""A network as what it adds to the reference's denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import Array
from ..processes.process import Process, check_process


@jax.tree_util.register_static
class Preconditioned:
    r"""D(x, t) = D_ref(x, t) + c_t F(x / r_t, t): the analytic denoiser of the reference, and a network for the rest.

    c_t is the root mean square error of D_ref on the reference's data, r_t the root mean square of its states, both
    per entry: a network sees and says numbers of order one at every noise level, and starts, if its last layer is zero
    then, from what is right for Gaussian data of the reference's covariance. For the variance-exploding process it is
    c_skip x + c_out F(c_in x) of Karras et al. 2022 (table 1), with sigma_data the reference's; for a linear SDE D_ref
    is a matrix that knows the covariance of the data.

    A function of one state for `rnejax.DiffusionModel`, with the level itself as its noise level; of times in training:

        network = Preconditioned(process, apply)
        score_matching_loss(key, process, partial(network.at_time, params), x0, prediction="x0", weighting="posterior")
        DiffusionModel(process, network, "x0", shape=shape, params=params, noise_level="level")

    Args:
      process: the noising process, of numbers that diffuse.
      apply: F, apply(params, x, t) or, with a condition, apply(params, x, t, condition), of one state; what it returns
        has the shape of the data.

    Raises:
      ValueError: for a process of tokens.
    """

    def __init__(self, process: Process, apply: Callable[..., Array]):
        check_process(process)
        if process.is_discrete:
            raise ValueError(f"{type(process).__name__} is a process of tokens and has no reference denoiser")
        self.process = process
        self.apply = apply

    def __call__(self, params: Any, x: Array, level: Any, condition: Any = None) -> Array:
        """E[x_0 | x_t] at a noise level."""
        t = jnp.asarray(level.t, x.dtype)
        arguments = () if condition is None else (condition,)
        output = self.apply(params, x / level.state_scale, t, *arguments)
        return level.denoised(x, jnp.zeros((), x.dtype)) + level.posterior_scale * output

    def at_time(self, params: Any, x: Array, t: Array, condition: Any = None) -> Array:
        """E[x_0 | x_t] at a time."""
        level = jax.tree.map(lambda leaf: leaf[0], self.process.training_levels(jnp.asarray(t)[None]))
        return self(params, x, level, condition)
