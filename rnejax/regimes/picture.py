"""Pictures of commitment: how often clones end alike, over the time at which they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plot import INK, MUTED, _clean, _colours, _figure
from .cloning import Cloning
from .theory import same_class_probability

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cloning_curves(
    panels: Mapping[str, Mapping[str, Cloning]],
    theory: Mapping[str, Mapping[str, tuple[Any, Any]]] | None = None,
    *,
    level: float | None = float(same_class_probability(1.0)),
    marks: Mapping[str, Mapping[str, float]] | None = None,
    log_time: bool = True,
    xlabel: str = "time of cloning t",
    ylabel: str = "clones that end alike",
    title: str = "",
) -> Figure:
    """One panel for each experiment, with points and intervals of every process over lines of theory.

    Args:
      panels: results of `cloning_probability` by process, by panel.
      theory: times and probabilities for the lines, by the same names.
      level: where a dashed line is drawn; default: that of speciation, s_t = 1. None for none.
      marks: times that are marked by name, by panel; those that are no number are left out.
      log_time: whether the axis of times is logarithmic.
    """
    figure = _figure(3.1 * len(panels) + 1.6, 3.2)
    axes = list(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)))
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    for ax, (panel, groups) in zip(axes, panels.items(), strict=True):
        if level is not None:
            ax.axhline(level, color=MUTED, linewidth=0.8, linestyle="--")
        for name, found in groups.items():
            bars = np.maximum(np.stack([found.probability - found.lower, found.upper - found.probability]), 0)
            ax.errorbar(
                found.time, found.probability, bars, color=colours[name], marker="o", markersize=3.5, linestyle="none",
                capsize=2, linewidth=1.0, label=name,
            )  # fmt: skip
            if theory is not None and name in theory.get(panel, {}):
                times, values = theory[panel][name]
                ax.plot(times, values, color=colours[name], linewidth=1.2)
        known = {name: time for name, time in (marks or {}).get(panel, {}).items() if np.isfinite(time)}
        for i, (name, time) in enumerate(sorted(known.items(), key=lambda mark: mark[1])):
            ax.axvline(time, color=MUTED, linewidth=0.8, linestyle=":")
            side = "right" if i % 2 == 0 else "left"  # neighbours do not write over each other
            ax.text(time, 0.02, f" {name} ", transform=ax.get_xaxis_transform(), ha=side, fontsize=8, color=INK)
        ax.set(xlabel=xlabel, xscale="log" if log_time else "linear")
        ax.set_title(panel, fontsize=9, color=INK)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    return _clean(figure)
