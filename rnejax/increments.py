r"""RNE increments: the one place that knows how a step changes a log-density.

For the true time reversal, p_s(x_s) F(x_t | x_s) = p_t(x_t) K(x_s | x_t) for every pair of states, hence

    l(x_s, x_t) := log p_s(x_s) - log p_t(x_t) = log K(x_s | x_t) - log F(x_t | x_s).              (RNE)

The same holds exactly for the analytic reference, so with the exact forward kernel

    l = log ref_s(x_s) - log ref_t(x_t) + log K(x_s | x_t) - log K_ref(x_s | x_t).                 (RNE-ref)

Both kernels of the last two terms point the same way and differ little; that difference, the *excess increment*, is
what is computed and summed here. The reference's own log-density telescopes, so it is evaluated at the ends only.

Sources: He et al. 2025 (RNE, arXiv 2506.05668); mathematics.md, section 3; for ``ito`` Karczewski et al. 2025 and
Skreta et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .covariance import Evaluation
from .kernels import Array, Kernel, event_sum, log_ratio
from .model import DiffusionModel
from .processes import GaussianTransition, Process, Transition
from .processes.gaussian_steps import drift_and_diffusion
from .processes.grids import validate_times

Increment = Callable[..., Array]


def exact(
    model: DiffusionModel,
    transition: Transition,
    x_s: Array,
    x_t: Array,
    evaluation: Evaluation,
    kernel: Kernel | None = None,
    coordinates: Array | None = None,
) -> Array:
    """log K(x_s | x_t) - log K_ref(x_s | x_t), with the exact kernel of the reference and the model's own kernel.

    Who has made K already, passes it on: a dense covariance takes an eigendecomposition, and XLA may wait for ever for
    two large batches of them in one program; and with it what is known of an x_s that was drawn from it (`draw`).

    Of tokens that are revealed one by one or in crowds: the sum of log(V mu_k) over the tokens revealed.
    """
    kernel = model.kernel(transition, x_t, evaluation) if kernel is None else kernel
    return log_ratio(kernel, transition.reference_reverse(x_t), x_s, coordinates)


def euler_reference(
    model: DiffusionModel, transition: GaussianTransition, x_s: Array, x_t: Array, evaluation: Evaluation
) -> Array:
    """The paper's form with reference: both reverse kernels Euler-Maruyama, so that the noising kernels cancel.

    The reference's score is evaluated at (x_t, t), like the model's: at x_s it would raise the variance.
    """
    kernel = transition.euler_reverse(x_t, evaluation.excess)
    return kernel.log_ratio(transition.euler_reverse(x_t, jnp.zeros_like(x_t)), x_s)


def euler_plain(
    model: DiffusionModel, transition: GaussianTransition, x_s: Array, x_t: Array, evaluation: Evaluation
) -> Array:
    """The paper's form without reference: log K - log F, both Euler-Maruyama."""
    reverse = transition.euler_reverse(x_t, evaluation.excess).log_prob(x_s)
    return (
        reverse
        - transition.euler_forward(x_s).log_prob(x_t)
        - reference_difference(model.process, transition, x_s, x_t)
    )


def ito(model: DiffusionModel, transition: GaussianTransition, x_s: Array, x_t: Array, evaluation: Evaluation) -> Array:
    """The Ito density estimator: l = score . (x_s - x_t) + h (d f + f score . x_t - g^2 |score|^2 / 2), all at t."""
    linear, diffusion = drift_and_diffusion(transition.t)
    score = transition.t.score(x_t, evaluation.excess)
    dimension = transition.subspace.dimension(x_t.shape)
    rate = dimension * linear + linear * event_sum(score * x_t) - 0.5 * diffusion * event_sum(score**2)
    increment = event_sum(score * (x_s - x_t)) + transition.duration * rate
    return increment - reference_difference(model.process, transition, x_s, x_t)


ESTIMATORS: dict[str, Increment] = {"exact": exact, "reference": euler_reference, "plain": euler_plain, "ito": ito}


def get_estimator(name: str | None, model: DiffusionModel) -> str:
    """The estimator's name; by default ``reference`` for Euler-Maruyama kernels, else ``exact``.

    Raises:
      ValueError: for an unknown name, or a form that belongs to Euler-Maruyama kernels with another covariance.
    """
    if name is None:
        return "reference" if model.covariance.euler else "exact"
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; choose one of {', '.join(ESTIMATORS)}")
    if name != "exact" and not model.covariance.euler:
        raise ValueError(
            f"estimator {name!r} is made of Euler-Maruyama kernels, but the model's covariance is "
            f"{type(model.covariance).__name__.lower()!r}; use model.with_covariance('euler') or estimator='exact'"
        )
    return name


def reference_difference(process: Process, transition: Transition, x_s: Array, x_t: Array) -> Array:
    """log ref_s(x_s) - log ref_t(x_t)."""
    at_s, at_t = process.reference_at(transition.s, x_s.shape), process.reference_at(transition.t, x_t.shape)
    return at_s.log_prob(x_s) - at_t.log_prob(x_t)


def increment(
    model: DiffusionModel,
    x_s: Array,
    x_t: Array,
    s: Any,
    t: Any,
    estimator: str | None = None,
    key: Array | None = None,
) -> Array:
    """l(x_s, x_t) = log p_s(x_s) - log p_t(x_t) in nats, for one pair of states in the network's coordinates.

    ``key`` is used by a random covariance only.

    Raises:
      ValueError: for states of another shape than the model's, or known times that are not s < t.
    """
    model.check_state("x_s", x_s)
    model.check_state("x_t", x_t)
    transition = model.process.transition(s, t)
    evaluation = model._evaluate_one(x_t, transition.t, key)
    excess = ESTIMATORS[get_estimator(estimator, model)](model, transition, x_s, x_t, evaluation)
    return reference_difference(model.process, transition, x_s, x_t) + excess


def transitions(process: Process, times: Any, towards_noise: bool = False) -> Any:
    """All steps of a grid, stacked in order of execution: from noise to data, or from data ``towards_noise``."""
    times = validate_times(process, times)
    return process.steps(times[:-1], times[1:], backwards=not towards_noise)
