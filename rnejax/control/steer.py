"""steer(): sequential Monte Carlo along a path of targets, with exact weights (the formula is in ``problem.py``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_number, is_traced
from ..density import check_times, to_user_log_density, warn_of_signal
from ..kernels import Array
from ..model import DiffusionModel
from ..processes import GaussianProcess, Level, LinearProcess, Process
from ..processes.gaussian import require_scalar
from ..processes.gaussian_steps import drift_and_diffusion
from ..smc import Resampling, diagnose, run
from ..smc.faults import raise_on_fault
from ..smc.weights import relative_error_of_mean
from .following import Follow
from .problem import Particle, Steer, initial_law
from .proposals import Drift, FeynmanKac, Proposal, get_proposal
from .renoising import times_to_go_up_to
from .steps import ControlStep, control_steps
from .targets import Target, as_target
from .token_proposals import get_token_proposal


class Steered(NamedTuple):
    """Weighted particles. With ``num_groups`` every field has a leading axis of independent groups.

    Attributes:
      particles: (num_particles, *shape), in the user's coordinates.
      log_weights: (num_particles,), with a mean weight of 1; exp(log_normalizer + log_weights) are the unnormalised
        weights.
      log_normalizer: estimate of log Z, in nats; exp of it is unbiased. What Z is: see `steer`.
      log_densities: log-density of each particle under each model along its own path: (num_particles, num_models).
      info: per step, in order of execution (t_max to t_min): ``time`` arrived at, ``ess`` after weighing, ``resampled``
        (whether the step began by resampling), ``num_resamplings`` (a final one included),
        ``log_normalizer_increments``, ``unique_ancestors``, what was ``saved``, and ``eve``, the initial ancestor of
        every particle; ``kernel_ratios``, whether weights are ratios of kernels: all but those of ``feynman_kac`` are.
      standard_error: of the log of the groups' mean normalising constant; NaN without groups, where one number has no
        spread.
    """

    particles: Array
    log_weights: Array
    log_normalizer: Array
    log_densities: Array
    info: SteerInfo
    standard_error: Array


class SteerInfo(NamedTuple):
    time: Array
    ess: Array
    resampled: Array
    num_resamplings: Array
    log_normalizer_increments: Array
    unique_ancestors: Array
    eve: Array
    kernel_ratios: np.ndarray
    fault: Any
    saved: dict[str, Any]


def steer(
    key: Array,
    target: Target | DiffusionModel,
    times: Any,
    num_particles: int = 1024,
    ess_threshold: float = 0.5,
    proposal: str | tuple[float, float] | Proposal | DiffusionModel | None = None,
    num_groups: int | None = None,
    *,
    renoise: Any = None,
    scheme: str = "systematic",
    every: int | None = None,
    window: tuple[float, float] | None = None,
    partial_fraction: float | None = None,
    final_resampling: bool = False,
    save: Iterable[str] = (),
    progress: bool | None = None,
    check: bool = True,
    warn: bool = True,
) -> Steered:
    """Sample a target with weighted, resampled particles.

    Args:
      key: a typed key.
      target: from `temper`, `product`, `guide`, `tilt`, or a model.
      times: increasing times; particles run from the last to the first.
      num_particles: per group.
      ess_threshold: resample at the start of a step where the effective sample size is below this fraction of the
        particles; 0 never, above 1 always.
      proposal: of numbers ``symmetric`` (the default), ``feynman_kac``, a pair (c_a, c_b), or an object; see
        `rnejax.control.proposals`. Of tokens ``locally_optimal`` (the default), ``base``, or an object; see
        `rnejax.control.token_proposals`. A model, of the target's process and shape, proposes by its reverse kernels:
        one that was fine-tuned for the target (`rnejax.control.Follow`). Rewards then need no gradients.
      num_groups: independent runs at once, whose spread is the standard error.
      renoise: how far a step goes up again by the auxiliary kernel once it is down: a function of the time t it has
        come to that returns a time t+ >= t (t for none), or `rnejax.control.Remask`. The next step starts there,
        so that what was decided can be decided anew, at no further evaluation; weights count the way up as well. For
        constant exponents and proposals whose auxiliary kernel does not look at the models, (1.0, 0.0) for numbers.
      scheme: ``multinomial``, ``stratified``, ``systematic`` or ``residual``.
      every: resample every so many steps instead of by effective sample size.
      window: resample only in steps that begin at a time inside [low, high].
      partial_fraction: let only the particles of the most extreme weights take part.
      final_resampling: resample at the end, so that particles come out equally weighted.
      save: of ``ancestors``, ``log_weights``, ``log_increments``, ``particles``: what to keep of every step.
      progress: a bar; by default on a terminal only.
      check: raise on NaN or infinite weights (outside jit); ``info.fault`` tells inside.
      warn: warn in plain words where the result should not be trusted (outside jit).

    ``log_normalizer`` estimates, in nats with respect to Lebesgue measure in the user's coordinates (counting measure
    of tokens, where they are sums): for temper, product and guide log of the integral of prod_i p_{i,t_min}^{beta_i};
    for tilt(exact=True) log E[e^r] under the law that the model *generates* on this grid; for both together log of the
    integral of p^beta e^r.

    Costs one network evaluation per model, particle and step, and one more at the end where the auxiliary kernel
    looks at the last state (exponents that do not sum to 1). Gradients of rewards at x0 cost a backward pass each.

    Raises:
      ValueError: for unsuitable times, exponents whose sum is not positive, unknown names, a proposal that has no right
        weights for the target.
      RewardError: where a host reward raised, or returned something that is not one number per example.
      SMCError: for weights that are NaN, +inf, or all zero, naming the step, the time, and whether the network or the
        reward was at fault.
    """
    target = as_target(target)
    problem, steps, times = prepare(key, target, times, proposal, warn, renoise)
    result = run(
        key,
        problem,
        steps,
        num_particles=num_particles,
        num_groups=num_groups,
        resampling=Resampling(
            scheme=scheme,
            ess_threshold=ess_threshold,
            every=every,
            window=steps_in_window(window, times),
            partial=partial_fraction,
            final=final_resampling,
        ),
        save=save,
        progress=progress,
        check=False,
    )
    steered = summarise(result, problem, target.process.level(times[0]), times[::-1])
    if not is_traced(steered):
        raise_failures(steered, result, problem, times, num_particles, check)
        if warn:
            messages = diagnose(steered) + warn_of_constraints(result.info.aux, target.strengths_at(times))
            messages = messages + warn_of_impossible(target.process, steered)
            for message in messages + warn_of_euler(problem.proposal, target.process, times):
                warnings.warn(message, SteeringWarning, stacklevel=2)
    return steered


def prepare(
    key: Array, target: Target, times: Any, proposal: Any, warn: bool = True, renoise: Any = None
) -> tuple[Steer, ControlStep, np.ndarray]:
    """The problem that `smc.run <rnejax.smc.run>` solves, its steps, and the times checked.

    Raises:
      ValueError: as `steer`.
    """
    process = target.process
    for model in target.models:
        times = check_times(model, times)
        if warn:
            warn_of_signal(model, times)
    chosen = choose_proposal(process, proposal)
    tops = times_to_go_up_to(renoise, process, times)
    exponents, strengths = target.exponents_at(tops), target.strengths_at(tops)
    check_exponents(exponents, times)
    check_proposal(target, chosen, exponents)
    rewards = tuple(reward.without_schedule() for reward in target.rewards)
    models = target.models
    follow = Follow.of(chosen)
    if follow is not None:
        follow.check(process, models[0].shape)
        # Evaluated with the target's models, of which it is none: its exponent is 0.
        models = (*models, follow.model)
        exponents = np.pad(exponents, ((0, 0), (0, 1)))
        rewards = tuple(replace(reward, gradient=False) for reward in rewards)
    if not is_traced(key, target):
        rewards = tuple(reward.guarded() for reward in rewards)
    top = process.level(times[-1])
    problem = Steer(
        models=models,
        rewards=rewards,
        initial=initial_law(target.models, top, exponents[-1, : len(target.models)]),
        top=top,
        exponents=jnp.asarray(exponents[-1], jnp.result_type(float)),
        proposal=chosen,
        generated=target.is_generated_law,
        renoises=bool((tops > times).any()),
    )
    evaluate_last = chosen.needs_auxiliary(exponents.sum(axis=1))
    looks = evaluate_last or hasattr(chosen, "log_increment")
    looks |= not process.is_discrete and any(reward.gradient and not reward.exact for reward in rewards)
    if problem.renoises and (looks or np.ptp(exponents, axis=0).any()):
        raise ValueError(
            "renoise needs exponents that are constant and an auxiliary kernel that does not look at what models and "
            "rewards say of a state: proposal=(1.0, 0.0) for numbers, and no gradients of rewards that are not exact"
        )
    if getattr(chosen, "num_candidates", 1) > 1 and looks:
        raise ValueError(
            "candidates are chosen before models and rewards have looked at them, and so must not have an auxiliary "
            "kernel that looks: take (1.0, 0.0) for numbers, and no gradients of rewards that are not exact"
        )
    check_last_time(process, times, evaluate_last)
    looks_ahead = hasattr(chosen, "lookahead")
    return problem, control_steps(process, times, tops, exponents, strengths, evaluate_last, looks_ahead), times


def raise_failures(
    steered: Steered, result: Any, problem: Steer, times: np.ndarray, num_particles: int, check: bool = True
) -> None:
    """Raises RewardError where a host reward failed and, with ``check``, SMCError for weights that are no numbers."""
    if any(reward.host for reward in problem.rewards):
        jax.block_until_ready(result)  # the last callback has returned
        for reward in problem.rewards:
            reward.raise_failure()
    if check:
        raise_on_fault(
            steered,
            num_particles=num_particles,
            num_steps=len(times) - 1,
            describe=_describe(result.info.aux, times[::-1], problem.process.failure),
        )


class SteeringWarning(UserWarning):
    """A result that should not be trusted, and why."""


def summarise(result: Any, problem: Steer, bottom: Level, times: np.ndarray) -> Steered:
    """The run in the user's coordinates and without its first iteration, which moves nothing."""
    model = problem.models[0]
    count = len(problem.models) - (Follow.of(problem.proposal) is not None)
    state: Particle = result.state
    x = state.x.reshape(-1, *model.shape)
    excesses = state.excess_log_densities.value.reshape(len(x), -1)[:, :count]
    log_densities = jax.vmap(
        lambda x, excesses: jax.vmap(lambda excess: to_user_log_density(model, bottom, x, excess))(excesses)
    )(x, excesses)
    info = result.info
    by_step = {name: getattr(info, name)[..., 1:] for name in ("ess", "resampled", "unique_ancestors")}
    increments = info.log_normalizer_increments
    axis = result.log_normalizer.ndim
    # Iteration 0 only looks at the states at t_max: what is wrong there is wrong before the first step.
    fault = info.fault._replace(step=jnp.maximum(info.fault.step - 1, -1))
    return Steered(
        particles=result.particles,
        log_weights=result.log_weights,
        log_normalizer=result.log_normalizer,
        log_densities=log_densities.reshape(*result.log_weights.shape, count),
        info=SteerInfo(
            time=jnp.asarray(times[1:], increments.dtype),
            num_resamplings=info.num_resamplings,
            log_normalizer_increments=increments[..., 1:],
            eve=info.eve,
            kernel_ratios=np.full(result.log_normalizer.shape, not isinstance(problem.proposal, FeynmanKac)),
            fault=fault,
            saved=jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 1, None, axis=axis), info.saved),
            **by_step,
        ),
        standard_error=relative_error_of_mean(jnp.atleast_1d(result.log_normalizer)),
    )


def warn_of_constraints(aux: dict[str, Array], strengths: np.ndarray) -> list[str]:
    """What to say of rewards that forbade states on the way."""
    forbidden = np.asarray(aux["reward_forbids_some"])[:-1]  # of every iteration but the one that arrives at t_min
    active = (strengths[::-1][:-1] != 0) & forbidden
    if not active.any():
        return []
    return [
        "a reward was -inf for some states before t_min: no path that was forbidden on its way can end where it is "
        "allowed, so that the result is biased unless it never would; give the reward a schedule that is zero "
        "before t_min, or a finite penalty on the way"
    ]


def warn_of_impossible(process: Process, steered: Steered) -> list[str]:
    """What to say of particles of tokens that came to be where the target has no probability."""
    lost = int(jnp.sum(steered.log_weights == -jnp.inf)) if process.is_discrete else 0
    if not lost or lost > 0.5 * steered.log_weights.size:  # of more than half of them, diagnose says so
        return []
    return [
        f"{lost} of {steered.log_weights.size} particles are where a model or a reward has no probability (log-weight "
        "-inf): they count for nothing; models that exclude each other's sequences, or a reward of -inf, do that"
    ]


def warn_of_euler(proposal: Proposal, process: Any, times: np.ndarray) -> list[str]:
    """What to say of Feynman-Kac correctors whose Euler-Maruyama steps are too long: |f| h > 1."""
    if not isinstance(proposal, FeynmanKac):
        return []
    levels = process.level(jnp.asarray(times[1:]))
    change = np.abs(np.asarray(drift_and_diffusion(levels)[0])) * np.diff(times)
    if change.max() <= 1:
        return []
    worst = int(change.argmax())
    return [
        f"the Euler-Maruyama step of feynman_kac from t = {times[1:][worst]:.6g} multiplies a state by "
        f"{1 + change[worst]:.3g}, and its weight says nothing of that: take shorter steps there, such as those of "
        "time_grid(process, num_steps, 'log_snr', t_max=...) that ends where the drift is still small"
    ]


def steps_in_window(window: tuple[float, float] | None, times: np.ndarray) -> tuple[int, int]:
    """The iterations that begin at a time inside the window; never the first, which moves nothing.

    Raises:
      ValueError: for a window that no step begins in.
    """
    if window is None:
        return 1, len(times)
    try:
        low, high = window
    except (TypeError, ValueError):
        raise ValueError(f"window must be a pair of times (low, high), got {window!r}") from None
    low, high = check_number("window[0]", low), check_number("window[1]", high)
    if low > high:
        raise ValueError(f"window must be (low, high) with low <= high, got ({low:g}, {high:g})")
    begins = times[::-1][:-1]  # iteration k = 1, ..., n begins at begins[k - 1]
    inside = np.flatnonzero((begins >= low) & (begins <= high))
    if inside.size == 0:
        raise ValueError(
            f"no step begins at a time in the window [{low:g}, {high:g}]; times span [{times[0]:g}, {times[-1]:g}]"
        )
    return int(inside[0]) + 1, int(inside[-1]) + 2


def _describe(aux: dict[str, Array], times: np.ndarray, failure: str) -> Any:
    """Words for a faulty step: its time, and who returned what is not a number."""
    network_finite, reward_nan, reward_forbids_all, gradients_finite = (
        np.asarray(aux[name]) for name in ("network_finite", "reward_nan", "reward_forbids_all", "gradients_finite")
    )

    def describe(step: int) -> str:
        step += 1  # the first iteration looks at t_max, before the first step
        where = f"t = {times[step]:.6g}"
        spoilt = "a reward's gradient was NaN or infinite (gradient=False does without)"
        if step > 0 and not gradients_finite[step - 1]:  # what moved the particles; all else follows from it
            return f"{where}: in the step before {spoilt}"
        culprits = [f"model {i} returned {failure}" for i in np.flatnonzero(~network_finite[step])]
        if reward_nan[step]:
            culprits.append("a reward returned NaN")
        elif reward_forbids_all[step]:
            culprits.append("a reward is -inf for every particle")
        elif not gradients_finite[step] and not culprits:
            culprits.append(spoilt)
        return ": ".join([where, " and ".join(culprits)]) if culprits else where

    return describe


def check_proposal(target: Target, proposal: Proposal, exponents: np.ndarray) -> None:
    """Raises ValueError where a proposal cannot do what the target asks for."""
    target.check_exactness()
    transport = getattr(proposal, "transport", None)
    if transport is not None and transport.coefficients.shape != (len(transport.log_snr), len(target.models) + 1):
        raise ValueError(
            f"the proposal's transport has coefficients of shape {transport.coefficients.shape} for "
            f"{len(transport.log_snr)} times, which makes {transport.coefficients.shape[-1] - 1} models, but the "
            f"target has {len(target.models)}: a proposal is tuned for one target"
        )
    if any(reward.exact for reward in target.rewards) and not follows_noising(proposal):
        raise ValueError(
            f"tilt(exact=True) needs the noising kernel as its auxiliary kernel, which {proposal} does not use: take "
            f"proposal='symmetric' or (c_a, 0), or tilt(..., exact=False). If forward() of your own proposal is the "
            f"noising kernel for one model with exponent 1, say so by an attribute follows_noising = True"
        )
    if any(reward.exact for reward in target.rewards) and any(
        reward.gradient and not reward.exact for reward in target.rewards
    ):
        raise ValueError(
            "the gradient of a tilt(exact=False) shifts the auxiliary kernel, and a tilt(exact=True) beside it is no "
            "longer exact: make all rewards of one scheme, or give that one gradient=False"
        )
    if isinstance(proposal, FeynmanKac) and any(not reward.gradient or reward.at != "x" for reward in target.rewards):
        raise ValueError(
            "feynman_kac weighs rewards by their gradient at the noisy state, and has no weights for rewards without "
            "one (host=True, gradient=False) or at='x0'; use proposal='symmetric'"
        )
    if isinstance(proposal, FeynmanKac) and np.ptp(exponents, axis=0).any():
        raise ValueError("feynman_kac has no weights for exponents that change over time; use proposal='symmetric'")


def choose_proposal(process: Process, proposal: Any) -> Proposal:
    """The proposal for a process: its default, one by name, or the object itself.

    Raises:
      ValueError: for an unknown name, something that is no proposal, or one for states of another kind.
    """
    proposal = process.default_proposal if proposal is None else proposal
    if isinstance(proposal, DiffusionModel):
        proposal = Follow(proposal)
    chosen = get_token_proposal(proposal) if process.is_discrete else get_proposal(proposal)
    if getattr(chosen, "is_discrete", process.is_discrete) != process.is_discrete:
        raise ValueError(f"{chosen} is no proposal for states of {type(process).__name__}")
    if isinstance(process, LinearProcess):
        if isinstance(chosen, FeynmanKac):
            require_scalar(process, "the proposal 'feynman_kac'")
        if isinstance(chosen, Drift) and not chosen.matched:
            require_scalar(process, "a proposal with matched=False")
    return chosen


def follows_noising(proposal: Proposal) -> bool:
    """Whether B is the noising kernel, as the proposal says itself."""
    return bool(getattr(proposal, "follows_noising", False))


def check_last_time(process: Process, times: np.ndarray, evaluate_last: bool) -> None:
    """Raises ValueError where the models are asked for the score of states that carry no noise."""
    if evaluate_last and isinstance(process, GaussianProcess) and not float(process.sigma(times[0])) > 0:
        raise ValueError(
            f"the auxiliary kernel of this target and proposal follows the score at the last state, but at t = "
            f"{times[0]:g} sigma = 0 and there is none: start the times later, or take proposal=(1.0, 0.0)"
        )


def check_exponents(exponents: np.ndarray, times: np.ndarray) -> None:
    """Raises ValueError where the exponents' sum is not positive: no such target is integrable, no proposal exists."""
    totals = exponents.sum(axis=1)
    if not (totals > 0).all():
        k = int(np.flatnonzero(~(totals > 0))[0])
        raise ValueError(
            f"exponents must have a positive sum at all times, got {exponents[k]} (sum {totals[k]:g}) "
            f"at t = {times[k]:g}"
        )
