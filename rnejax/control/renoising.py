"""Going up again: a step down, then by the auxiliary kernel to a noisier time, from where the next step starts.

Of tokens this is remasking (Wang et al. 2025, ReMDM): what was revealed can be masked and decided anew. Of numbers it
is the restart of Xu et al. 2023. A step up from x_s to x_t by the auxiliary kernel B (for tokens the noising kernel),
whose way back is the proposal A(x_s | x_t), weighs the path of targets q by

    q_t(x_t) A(x_s | x_t) / [q_s(x_s) B(x_t | x_s)],

one over what the step down weighs: the target is the same as without it, and no network is called more often, for
nobody looks at x_s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_number
from ..processes import Masked, Process
from ..processes.tokens import time_of_survival


@dataclass(frozen=True)
class Remask:
    """Masks every token that is there once more with a probability, after each step down.

    A step then reveals at least that share of the tokens at once, however many steps there are, and kernels of several
    tokens are an approximation: the error of log Z falls like one over the number of steps n if the probability does,
    too (``scripts/benchmark_tokens.py remasking``).

    Attributes:
      probability: between 0 and 1; smaller where that would lead above t_max, which is as far as it goes.
      window: times (low, high) between which it is done; default: all. Late steps repair most, for early ones have
        little that could be wrong.

    Raises:
      ValueError: for a probability that is none, or a window that is no interval.
    """

    probability: float
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= check_number("probability", self.probability) < 1:
            raise ValueError(f"probability must be at least 0 and less than 1, got {self.probability}")
        if self.window is not None:
            try:
                low, high = map(float, self.window)
            except (TypeError, ValueError):
                low, high = 1.0, 0.0
            if not low <= high:
                raise ValueError(f"window must be two times (low, high) with low <= high, got {self.window!r}")

    def tops(self, process: Process, times: np.ndarray) -> np.ndarray:
        """Where a step that has come down to each of the times goes up to."""
        if not isinstance(process, Masked):
            raise ValueError(f"Remask is for masked tokens, lost independently; the process is {process}")
        low, high = (times[0], times[-1]) if self.window is None else self.window
        chosen = (times >= low) & (times <= high)
        wanted = np.asarray(process.alpha(times)) * (1 - self.probability)
        tops = [time_of_survival(process.alpha, float(alpha), float(times[-1])) for alpha in wanted]
        return np.where(chosen, np.maximum(tops, times), times)


def times_to_go_up_to(renoise: Any, process: Process, times: np.ndarray) -> np.ndarray:
    """The time from which the step after each of the times starts; of the first and the last, that time itself.

    Raises:
      ValueError: for times that are no times, or lie below where they start from or above t_max.
    """
    if renoise is None:
        return times
    if hasattr(renoise, "tops"):
        tops = np.asarray(renoise.tops(process, times), np.float64)
    elif callable(renoise):
        tops = np.asarray([float(renoise(float(t))) for t in times])
    else:
        raise ValueError(f"renoise must be a function of time, or Remask(probability), got {renoise!r}")
    tops = np.concatenate([times[:1], tops[1:-1], times[-1:]])
    bad = ~((tops >= times) & (tops <= times[-1]))
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"renoise must lead from t = {times[k]:.6g} to a time between that and the last, {times[-1]:.6g}; got "
            f"{tops[k]:.6g}"
        )
    return tops
