"""The optimiser that `fit` uses unless it is given another."""

import optax


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
) -> optax.GradientTransformation:
    """Adam (with decoupled weight decay if asked for) behind a global clip, on `learning_rate_schedule`."""
    schedule = learning_rate_schedule(learning_rate, num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    adam = optax.adamw(schedule, weight_decay=weight_decay) if weight_decay else optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam)
