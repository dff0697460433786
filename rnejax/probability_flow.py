r"""The probability-flow baseline: log-densities from an ordinary differential equation (needs ``rnejax[flow]``).

A model's probability flow, dx/dt = f x - g^2 score / 2, carries p_t without noise, so that along one of its paths
log p_{t_min}(x) = log p_{t_max}(x_T) + int div dt (Song et al. 2021, section 4.3). It is integrated in coordinates
where nothing is left to do for the reference. With V_t = alpha^2 data_std^2 + sigma^2 the reference's variance,

    y = x / sqrt(V_t),   tan(angle) = sigma_t / (alpha_t data_std),   excess = D(x, t) - D_ref(x, t),

the reference's flow keeps y at rest, its density in y is N(0, I) at every time, and along the model's flow

    dy/d(angle) = - excess / (data_std sin(angle)),
    d/d(angle) [log p_t - log ref_t] = (sqrt(V_t) tr(d excess / dx) - y . excess) / (data_std sin(angle)),

both exact. The angle runs from about sigma / data_std near the data to at most pi / 2 at pure noise, finite for every
process, and no rate of the schedule is left in the equation: one adaptive solver serves them all.

The flow of an imperfect network does not generate what its reverse chain generates. Its density is another number than
that of `rnejax.log_density`, and not wrong for that; where the score is exact they agree.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_count, check_key, check_number
from .density import check_points, check_times, prior_excess, to_user_log_density, warn_of_signal
from .kernels import Array
from .model import DiffusionModel
from .processes import GaussianProcess, NoiseLevel
from .processes.gaussian import require_scalar
from .smc.faults import SMCError

DIVERGENCES = ("exact", "hutchinson")
NO_FAILURE, STEP_VANISHED, STEPS_SPENT = range(3)


class FlowLogDensity(NamedTuple):
    """Log-densities of the probability flow at given points.

    Attributes:
      log_density: in nats, (n,).
      standard_error: of log_density over the probes of ``hutchinson``, (n,): sd / sqrt(num_probes). NaN with one
        probe, for one number has no spread; 0 with the exact divergence. The solver's own error is not in it.
      num_evaluations: network evaluations per point, (); with each come the JVPs of the divergence: one per dimension
        (exact) or per probe (hutchinson).
    """

    log_density: Array
    standard_error: Array
    num_evaluations: Array


def probability_flow_log_density(
    key: Array,
    model: DiffusionModel,
    x: Array,
    times: Any,
    *,
    divergence: str = "exact",
    num_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: Any = None,
    max_steps: int = 4096,
) -> FlowLogDensity:
    """Log-density of given points under the model's probability flow.

    Args:
      key: a typed key; the probes of ``hutchinson`` come from it, ``exact`` draws nothing.
      model: the model; its covariance choice plays no part.
      x: points in the user's coordinates, with a batch axis: (n, *shape).
      times: increasing times, as for `rnejax.log_density`. Only the first, whose density it is, and the last
        matter: the solver chooses its own in between.
      divergence: ``exact``, one JVP per dimension, or ``hutchinson``, an unbiased estimate from Rademacher probes that
        stay the same along the path (Grathwohl et al. 2019).
      num_probes: for ``hutchinson``; they share one path, hence the network evaluations.
      rtol, atol: of one step of the solver, in the coordinates above and in nats. The largest error over the points
        counts, so that a point's accuracy does not depend on its company.
      solver: an explicit Runge-Kutta method of diffrax; default ``Tsit5()``.
      max_steps: of the solver, rejected ones included.

    Raises:
      ImportError: without diffrax.
      TypeError: for a key that is not a single typed one.
      ValueError: for unsuitable points, times, tolerances, an unknown divergence, a solver that is not explicit.
      SMCError: where the network returned NaN or infinity.
      RuntimeError: where the tolerances were not met within ``max_steps``.
    """
    diffrax = _import_diffrax()
    check_key(key)
    process = require_scalar(model.process, "the probability flow")
    times = check_times(model, times)
    warn_of_signal(model, times)
    x = check_points(model, x)
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; choose one of {', '.join(DIVERGENCES)}")
    num_probes, max_steps = check_count("num_probes", num_probes), check_count("max_steps", max_steps)
    rtol, atol = check_number("rtol", rtol, positive=True), check_number("atol", atol, positive=True)
    solver = diffrax.Tsit5() if solver is None else solver
    if not isinstance(solver, diffrax.AbstractERK):
        raise ValueError(f"solver must be an explicit Runge-Kutta method such as diffrax.Tsit5(), got {solver!r}")
    if model.noise_level == "index":
        raise ValueError(
            "the probability flow asks the network at times of its own choice, between the step numbers that "
            "noise_level='index' knows; for a network that interpolates, noise_level=lambda level: level.t - 1"
        )
    if not float(process.sigma(times[0])) > 0:
        raise ValueError(
            f"the probability flow is singular where sigma = 0, at t = {times[0]:g}: start the times later"
        )
    low, high = jnp.asarray(times[0], x.dtype), jnp.asarray(times[-1], x.dtype)
    flowed, reached, state, failure = _flow(
        key,
        model,
        x,
        (low, high),
        (jnp.asarray(rtol, x.dtype), jnp.asarray(atol, x.dtype)),
        num_probes=0 if divergence == "exact" else num_probes,
        solver=solver,
        max_steps=max_steps,
    )
    if not isinstance(failure, jax.core.Tracer) and int(failure) != NO_FAILURE:
        where = f"at t = {float(reached):.6g}, on the way from {times[0]:.6g} to {times[-1]:.6g}"
        if int(failure) == STEP_VANISHED:
            raise SMCError(f"the network returned NaN or infinity {where} (or just beyond)", state)
        raise RuntimeError(
            f"the probability flow used up max_steps = {max_steps} {where}, with rtol = {rtol:g} and atol = {atol:g}: "
            f"loosen them or raise max_steps (in float32 tolerances below 1e-6 ask for less than rounding)"
        )
    return flowed


# ------------------------------------------------------------------------------------------------------- the equation


class FlowState(NamedTuple):
    """Points on their way: y (n, *shape), and log p_t - log ref_t relative to the start, (n, max(num_probes, 1))."""

    y: Array
    excess_log_density: Array


@partial(jax.jit, static_argnames=("num_probes", "solver", "max_steps"))
def _flow(
    key: Array,
    model: DiffusionModel,
    x: Array,
    ends: tuple[Array, Array],
    tolerances: tuple[Array, Array],
    *,
    num_probes: int,
    solver: Any,
    max_steps: int,
) -> tuple[FlowLogDensity, Array, FlowState, Array]:
    """The densities, the time that was reached, the state there, and what went wrong."""
    import diffrax

    process = require_scalar(model.process, "the probability flow")
    (low, high), (rtol, atol) = ends, tolerances
    bottom, top = process.level(low), process.level(high)
    start = jax.vmap(model.transform.to_model)(x)
    probes = None
    if num_probes:
        probes = jax.random.rademacher(key, (num_probes, *x.shape), x.dtype)
        probes = jax.vmap(jax.vmap(process.subspace.project))(probes)

    def rates(angle: Any, state: FlowState, args: Any) -> FlowState:
        level = process.level(time_at_angle(process, angle, low, high))
        scale = jnp.sqrt(level.reference_variance)
        excess, traces = excess_and_traces(model, scale * state.y, level, probes)
        inner_products = jnp.sum((state.y * excess).reshape(len(x), -1), axis=-1)
        slope = process.data_std * jnp.sin(angle)
        return FlowState(-excess / slope, (scale * traces - inner_products[:, None]) / slope)

    first, last = angle_at(process, low), angle_at(process, high)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        solver,
        first,
        last,
        dt0=jnp.minimum(first, last - first),  # the noise's own scale at the start
        y0=FlowState(start / jnp.sqrt(bottom.reference_variance), jnp.zeros((len(x), max(num_probes, 1)), x.dtype)),
        # Where the network is not finite no step is short enough; one that the clock does not resolve ends the search.
        stepsize_controller=diffrax.PIDController(
            rtol=rtol, atol=atol, norm=_largest_over_points, dtmin=jnp.finfo(x.dtype).eps * last, force_dtmin=False
        ),
        max_steps=max_steps,
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    state = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    x_top = state.y * jnp.sqrt(top.reference_variance)
    at_top = jax.vmap(partial(prior_excess, model.prior_at(top), model, top))(x_top)
    excess = at_top[:, None] - state.excess_log_density
    per_probe = jax.vmap(lambda x, row: jax.vmap(partial(to_user_log_density, model, bottom, x))(row))(start, excess)
    if num_probes == 0:
        error = jnp.zeros(len(x), x.dtype)
    elif num_probes == 1:
        error = jnp.full(len(x), jnp.nan, x.dtype)
    else:
        error = jnp.std(per_probe, axis=1, ddof=1) / np.sqrt(num_probes)
    # A method whose last stage is the next step's first (FSAL) evaluates it once, and once at the very start.
    tableau = solver.tableau
    evaluations = int(tableau.fsal) + (tableau.num_stages - int(tableau.fsal)) * solution.stats["num_steps"]
    results = diffrax.RESULTS
    vanished = solution.result == results.dt_min_reached
    failure = jnp.where(
        vanished, STEP_VANISHED, jnp.where(solution.result == results.successful, NO_FAILURE, STEPS_SPENT)
    )
    flowed = FlowLogDensity(jnp.mean(per_probe, axis=1), error, evaluations)
    return flowed, time_at_angle(process, solution.ts[-1], low, high), state, failure


def angle_at(process: GaussianProcess, t: Array) -> Array:
    """arctan(sigma_t / (alpha_t data_std)), between 0 (data) and pi / 2 (noise)."""
    return jnp.arctan2(process.sigma(t), process.data_std * process.alpha(t))


def time_at_angle(process: GaussianProcess, angle: Array, low: Array, high: Array) -> Array:
    """The inverse of `angle_at` on [low, high], by bisection in log t until the working precision is spent."""

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bracket
        middle = jnp.sqrt(lower * upper)
        below = angle_at(process, middle) < angle
        return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

    # The bracket spans a few powers of e in log t: as many halvings as the type has digits, and 8 more, exhaust it.
    lower, upper = jax.lax.fori_loop(0, jnp.finfo(low.dtype).nmant + 8, halve, (low, high))
    return jnp.sqrt(lower * upper)


def excess_and_traces(model: DiffusionModel, x: Array, level: NoiseLevel, probes: Array | None) -> tuple[Array, Array]:
    """Excesses (n, *shape) of a batch and tr(d excess / dx): exact, (n, 1), or by each of the probes, (n, num_probes).

    On a subspace the excess lies in the subspace, so that the trace over it equals the trace over all coordinates.
    """
    excess, jvp = jax.linearize(lambda states: model._excess(states, level), x)

    def quadratic_form(direction: Array) -> Array:
        return jnp.sum((direction * jvp(direction)).reshape(len(x), -1), axis=-1)

    if probes is not None:
        return excess, jax.lax.map(quadratic_form, probes).T
    directions = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, *x.shape[1:])

    def add(total: Array, direction: Array) -> tuple[Array, None]:
        return total + quadratic_form(jnp.broadcast_to(direction, x.shape)), None

    trace, _ = jax.lax.scan(add, jnp.zeros(len(x), x.dtype), directions)
    return excess, trace[:, None]


def _largest_over_points(scaled: FlowState) -> Array:
    """The largest scaled error of any point: root mean square over its coordinates, largest over its log-densities."""
    coordinates = jnp.sqrt(jnp.mean(scaled.y.reshape(len(scaled.y), -1) ** 2, axis=1))
    return jnp.maximum(jnp.max(coordinates), jnp.max(jnp.abs(scaled.excess_log_density)))


def _import_diffrax() -> Any:
    try:
        import diffrax
    except ImportError:
        raise ImportError("the probability flow needs diffrax: pip install diffrax (rnejax's extra 'flow')") from None
    return diffrax
