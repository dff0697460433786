"""The optimiser that `fit` uses unless it is given another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib


def learning_rate_schedule(
    learning_rate: float, num_steps: int, *, warmup_steps: int = 0, decay_steps: int | None = None
) -> optax.Schedule:
    """Linear warm-up, a plateau, and a half cosine down to zero over the last `decay_steps` steps.

    With the default, decay over everything after the warm-up, this is the usual warm-up/cosine schedule. A short decay
    leaves a plateau on which the schedule does not depend on `num_steps`: a run may be lengthened without regret.

    Raises:
        ValueError: if warm-up and decay do not fit into `num_steps`.
    """
    decay_steps = num_steps - warmup_steps if decay_steps is None else decay_steps
    if min(warmup_steps, decay_steps) < 0 or warmup_steps + decay_steps > num_steps:
        raise ValueError(
            f"warmup_steps + decay_steps must not exceed num_steps: got {warmup_steps} + {decay_steps} > {num_steps}"
        )
    pieces = [
        optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1)),
        optax.constant_schedule(learning_rate),
        optax.cosine_decay_schedule(learning_rate, max(decay_steps, 1)),
    ]
    return optax.join_schedules(pieces, [warmup_steps, num_steps - decay_steps])


def make_optimizer(
    learning_rate: float = 1e-3,
    *,
    num_steps: int,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float = 1.0,
    weight_decay: float = 0.0,
    method: str = "adam",
) -> optax.GradientTransformation:
    """Adam or Muon (with decoupled weight decay if asked for) behind a global clip, on `learning_rate_schedule`.

    ``muon`` moves the hidden matrices, which are two-dimensional arrays called "kernel" outside of a layer called
    "head", by the orthogonal factor of their momentum's polar decomposition (Jordan et al. 2024), scaled to the size of
    a step of Adam, 0.2 times the learning rate per entry (Liu et al. 2025), so that learning rates of Adam carry over.
    All else (embeddings, the last layer, convolutions, biases) is Adam's, with Nesterov's momentum. A transformer
    needs fewer steps (the card of the shipped model "verses" has numbers), each dearer by the fifteen matrix products
    of five Newton-Schulz iterations for every kernel.

    Raises:
        ValueError: for another method, or a schedule that does not fit.
    """
    schedule = learning_rate_schedule(learning_rate, num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    if method == "adam":
        rule = optax.adamw(schedule, weight_decay=weight_decay) if weight_decay else optax.adam(schedule)
    elif method == "muon":
        rule = contrib.muon(
            schedule,
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=_hidden_matrices,
            consistent_rms=0.2,
        )
    else:
        raise ValueError(f"method must be 'adam' or 'muon': got {method!r}")
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def _hidden_matrices(params: Any) -> Any:
    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        names = {str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path}
        hidden = jnp.ndim(leaf) == 2 and "kernel" in names and "head" not in names
        return contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1) if hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
