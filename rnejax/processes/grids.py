"""Time grids: increasing, from t_min to t_max, in float64 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks import check_count, check_number, is_traced
from .process import Process, check_process


def time_grid(
    process: Process,
    num_steps: int,
    kind: str | None = None,
    *,
    t_min: float | None = None,
    t_max: float | None = None,
    rho: float = 7.0,
) -> np.ndarray:
    r"""An increasing grid of ``num_steps + 1`` times.

    - ``uniform``: uniform in t.
    - ``quadratic``: uniform in sqrt(t): short steps near the data.
    - ``edm``: uniform in (sigma / alpha)^(1 / rho), with rho = 7 as in Karras et al. 2022, eq. 5.
    - ``log_snr``: uniform in log(alpha^2 / sigma^2).
    - ``log_time``: of linear SDEs, uniform in log(t).
    - ``survival``: of tokens, uniform in their survival alpha.
    - ``geometric``: of tokens, uniform in log(1 - alpha).

    One token per step is the grid of a process of its own, `rnejax.processes.AnyOrder`.

    Args:
      process: whose time range is spanned.
      num_steps: the number of transitions, at least 1.
      kind: one of the above; default: the process's own.
      t_min, t_max: another range; default: the process's.
      rho: the exponent of ``edm``.

    Raises:
      ValueError: for an unknown kind, a number of steps that is not an integer of at least 1, a range that is not
        inside the process's, or more steps than a process that knows certain times only (a table of betas) has.
    """
    check_process(process)
    kind = process.default_grid if kind is None else kind
    if kind not in process.grids:
        raise ValueError(
            f"unknown grid {kind!r} for {type(process).__name__}; choose one of {', '.join(process.grids)}"
            f"{process.grid_hints.get(kind, '')}"
        )
    num_steps = check_count("num_steps", num_steps)
    rho = check_number("rho", rho, positive=True)
    low = process.t_min if t_min is None else check_number("t_min", t_min)
    high = process.t_max if t_max is None else check_number("t_max", t_max)
    validate_times(process, [low, high])  # before roots and logarithms of them
    ends = process.coordinate(kind, np.asarray([low, high]), rho)
    wanted = np.linspace(ends[0], ends[1], num_steps + 1)
    times = wanted if kind == "uniform" else _invert(process, kind, rho, wanted, low, high)
    times[0], times[-1] = low, high
    return validate_times(process, process.snap(times))


def validate_times(process: Process, times: Any) -> np.ndarray:
    """The times as float64 on the host.

    Raises:
      ValueError: unless they are a finite, strictly increasing vector of two or more times in the process's domain.
    """
    if is_traced(times):
        raise ValueError(
            "times must be known when the program is traced, because every coefficient is computed from them on the "
            "host in float64: make the grid outside jax.jit and let the compiled function close over it"
        )
    try:
        times = np.asarray(times, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"times must be a vector of numbers, got {times!r}; see rnejax.time_grid") from None
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times must be a vector of two or more times, got shape {times.shape}; see rnejax.time_grid")
    if not np.isfinite(times).all():
        raise ValueError(f"times must be finite; entry {int(np.flatnonzero(~np.isfinite(times))[0])} is not")
    bad = np.flatnonzero(np.diff(times) <= 0)
    if bad.size:
        k = int(bad[0])
        hint = "; they run from data to noise: reverse them" if (np.diff(times) < 0).all() else ""
        raise ValueError(
            f"times must increase strictly, but times[{k}] = {times[k]:.6g} >= times[{k + 1}] = "
            f"{times[k + 1]:.6g}{hint}"
        )
    low, high = process.domain
    if times[0] < low or times[-1] > high:
        raise ValueError(
            f"times must lie in [{low:g}, {high:g}], the domain of {type(process).__name__}, "
            f"got [{times[0]:.6g}, {times[-1]:.6g}]"
        )
    return times


def _invert(
    process: Process, kind: str, rho: float, wanted: np.ndarray, low: float, high: float, iterations: int = 200
) -> np.ndarray:
    """Bisection for the times at which the coordinate of a grid, which increases with time, has the values wanted.

    In the logarithm of time where that exists: times span many orders of magnitude.
    """
    middle_of = (lambda a, b: np.sqrt(a * b)) if low > 0 else (lambda a, b: 0.5 * (a + b))
    lower, upper = np.full_like(wanted, low), np.full_like(wanted, high)
    for _ in range(iterations):
        middle = middle_of(lower, upper)
        below = process.coordinate(kind, middle, rho) < wanted
        lower, upper = np.where(below, middle, lower), np.where(below, upper, middle)
    return middle_of(lower, upper)


def check_signal(process: Any, times: np.ndarray, prediction: str) -> None:
    """Raises ValueError for a grid that starts where nothing of x_0 is left, with a prediction that needs some."""
    if float(process.alpha(times[-1])) == 0 and prediction in process.need_signal:
        others = [name for name in process.predictions if name not in process.need_signal]
        raise ValueError(
            f"at t = {times[-1]:g} {type(process).__name__} has alpha = 0, where a {prediction} says nothing about "
            f"x_0: end the grid earlier (for example at 0.999) or predict {' or '.join(others)}"
        )
