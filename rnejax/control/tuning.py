r"""tune_proposal(): the drift that makes the weights of a target as even as a few fields can, from pilot runs.

A step from t moves particles by the proposal and weighs them. A drift v f(x) that A follows and B goes back
(`rnejax.control.Transport`) changes the log-weight by v (div f + f . S) on average, S the target's score. With
fields f_j (each model's score, and the reference's) that is linear in their coefficients, so those that make

    sum over steps of Var[log-weight of the step],     over particles as they are weighed at its beginning,

smallest are a linear regression of a pilot's increments. Once found they are constants: the weights of any later run
are exact, log Z is unbiased, and the run costs what it cost before (and one evaluation at the end where the untuned
proposal needed none).

Source: Ren et al. 2025 (DriftLite, arXiv 2509.21655), for the fields and the objective; there the coefficients come
from the particles of the run itself, in continuous time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, check_number, is_traced
from ..kernels import Array
from ..model import DiffusionModel
from ..processes.gaussian import require_scalar
from ..smc import Resampling, SMCError, run
from .proposals import Drift, Transport, get_proposal
from .steer import prepare, raise_failures, summarise
from .targets import Target, as_target


class Tuned(NamedTuple):
    """What `tune_proposal` found.

    Attributes:
      proposal: for `rnejax.steer`, of the same target on times as fine.
      variances: sum over steps of the variance of the log-increments, in nats^2, in every pilot: of the proposal given,
        then after every round, infinite (and the last) where weights broke down. Where none is smaller than the first,
        ``proposal`` is the one given.
    """

    proposal: Drift
    variances: np.ndarray


def tune_proposal(
    key: Array,
    target: Target | DiffusionModel,
    times: Any,
    num_particles: int = 500,
    *,
    rounds: int = 1,
    proposal: Any = "symmetric",
    ess_threshold: float = 0.5,
    smoothing: float = 3.0,
    ridge: float = 1e-2,
) -> Tuned:
    """A proposal for one target, tuned on pilot runs: fewer resamplings, more surviving ancestors, weights as exact.

    Worth its cost where the symmetric proposal resamples often: data far from Gaussian that change their shape when
    they are cooled, such as clusters that condense. Each of ``rounds + 1`` pilots costs what `rnejax.steer` of
    as many particles costs; the last one only measures. The target's models should know their covariances: with
    ``analytic`` or ``reference`` the divergence of a score is taken for the same everywhere.

    Args:
      key: a typed key.
      target, times: of the run to come.
      num_particles: of a pilot.
      rounds: of fitting. The fit is linear in what the pilot saw, so one is most of it.
      proposal: what to start from: ``symmetric``, a pair (c_a, c_b), or a `rnejax.control.Drift`.
      ess_threshold: of the pilots' resampling.
      smoothing: neighbouring steps are fitted together, with Gaussian weights of this width in steps.
      ridge: added to the fields' correlations, against fields that are alike (at much noise all scores are).

    Returns:
      The proposal of the smallest variance that was measured, and all variances.

    Raises:
      ValueError: for a proposal that is no drift, a reward of the exact scheme (whose auxiliary kernel may not move),
        arguments that `rnejax.steer` refuses, or a call inside jax.jit.
      RewardError: as `rnejax.steer`.
      SMCError: as `rnejax.steer`, in the first pilot.
    """
    if is_traced(key, target):
        raise ValueError("tune_proposal runs pilots and looks at them: call it outside jax.jit; steer may be inside")
    target = as_target(target)
    require_scalar(target.process, "a drift to be tuned")
    given = get_proposal(proposal)
    if not isinstance(given, Drift):
        raise ValueError(f"tune_proposal tunes a Drift ('symmetric' or a pair (c_a, c_b)), got {proposal!r}")
    if any(reward.exact for reward in target.rewards):
        raise ValueError(
            "tune_proposal moves the auxiliary kernel, and tilt(exact=True) is exact for the noising kernel only; use "
            "tilt(..., exact=False), or do without"
        )
    check_count("num_particles", num_particles)
    check_count("rounds", rounds)
    check_number("smoothing", smoothing, positive=True)
    check_number("ridge", ridge, positive=True)
    num_fields = len(target.models) + 1
    # Zeros from the beginning, so that all pilots are one compiled function.
    start = given.transport or Transport(jnp.asarray([-1.0, 1.0]), jnp.zeros((2, num_fields)))
    prepare(key, target, times, replace(given, transport=start))  # warns and refuses, before anything runs
    current = replace(given, transport=_on_steps(start, target, np.asarray(times)))
    tried, variances = [current], []
    for number, pilot_key in enumerate(jax.random.split(key, rounds + 1)):
        problem, steps, times = prepare(pilot_key, target, times, current, warn=False)
        try:
            result = run(
                pilot_key,
                replace(problem, effects=True),
                steps,
                num_particles=num_particles,
                resampling=Resampling(ess_threshold=ess_threshold),
                save=("log_weights", "log_increments"),
                progress=False,
                check=False,
            )
            steered = summarise(result, problem, target.process.level(times[0]), times[::-1])
            raise_failures(steered, result, problem, times, num_particles)
        except SMCError:
            if number == 0:  # of what was given; a fit that breaks the run is only a bad one
                raise
            variances.append(np.inf)
            break
        increments = np.asarray(result.info.saved["log_increments"], np.float64)[1:]
        weights = weights_before(np.asarray(result.info.saved["log_weights"], np.float64)[1:], increments)
        effects = np.asarray(result.info.aux["effects"], np.float64)[1:]
        gram, slope, variance = normal_equations(weights, increments, effects)
        variances.append(float(variance.sum()))
        if number < rounds:
            change = -fit_coefficients(gram, slope, smoothing, ridge)
            assert current.transport is not None
            # Steps run from the largest time, tables from the smallest log-SNR: the same order.
            before = current.transport.coefficients
            found = before + jnp.asarray(change, before.dtype)
            current = replace(current, transport=current.transport._replace(coefficients=found))
            tried.append(current)
    best = int(np.argmin(variances))
    return Tuned(tried[best] if best > 0 else given, np.asarray(variances))


def _on_steps(transport: Transport, target: Target, times: np.ndarray) -> Transport:
    """The same at the beginning of every step of these times."""
    log_snr = jnp.asarray(target.process.level(times[:0:-1]).log_snr)
    return Transport(log_snr, jax.vmap(transport.at)(log_snr))


def normal_equations(
    weights: np.ndarray, increments: np.ndarray, effects: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the regression of increments on effects, by step: covariances of effects (n, k, k), with increments (n, k),
    and the increments' variance (n,). ``weights`` (n, N) sum to 1 in each step; a particle without any does not count.
    """
    counted = weights > 0
    increments = np.where(counted, increments, 0.0)
    effects = np.where(counted[..., None], effects, 0.0)
    centred = increments - np.sum(weights * increments, axis=1, keepdims=True)
    deviations = effects - np.einsum("tn,tnk->tk", weights, effects)[:, None]
    gram = np.einsum("tn,tnj,tnk->tjk", weights, deviations, deviations)
    return (
        gram,
        np.einsum("tn,tnk,tn->tk", weights, deviations, centred),
        np.einsum("tn,tn->t", weights, centred**2),
    )


def fit_coefficients(gram: np.ndarray, slope: np.ndarray, smoothing: float, ridge: float) -> np.ndarray:
    """Least squares with neighbouring steps pooled and a ridge on the scale of correlations: (n, k).

    A field without any effect gets zero.
    """
    index = np.arange(len(gram))
    kernel = np.exp(-0.5 * ((index[:, None] - index) / smoothing) ** 2)
    gram, slope = np.einsum("ij,jkl->ikl", kernel, gram), kernel @ slope
    scale = np.sqrt(np.einsum("tkk->tk", gram))
    known = scale > 0
    safe = np.where(known, scale, 1.0)
    correlations = gram / safe[:, :, None] / safe[:, None, :] + ridge * np.eye(gram.shape[1])
    return np.linalg.solve(correlations, (slope / safe)[..., None])[..., 0] / safe * known


def weights_before(log_weights: np.ndarray, increments: np.ndarray) -> np.ndarray:
    """Weights (n, N) at the beginning of each step, after resampling, from those at its end; their sum is 1.

    What is -inf at the end and lost its weight in this very step counts as lost before: its increment is no number to
    regress on.
    """
    lost = log_weights == -np.inf
    log_weights = np.where(lost, -np.inf, log_weights - np.where(lost, 0.0, increments))
    weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
