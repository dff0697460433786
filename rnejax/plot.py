"""Pictures of what a run made. matplotlib is imported when the first one is drawn, and needs no display.

Every function returns a new ``matplotlib.figure.Figure`` and draws nothing else: save it with `save`, or show it
in a notebook by naming it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, ACCENT = "#1f2430", "#9aa0ac", "#c2410c"


def sample_sheet(
    images: Any,
    labels: Sequence[str] | None = None,
    *,
    columns: int = 16,
    value_range: tuple[float, float] = (-1.0, 1.0),
    title: str = "",
) -> Figure:
    """Images side by side, in rows.

    Args:
      images: (n, height, width) or (n, height, width, channels) with 1 or 3 channels.
      labels: a caption under each image.
      columns: images per row.
      value_range: the values shown as black and white; what lies outside is shown as these.
      title: of the sheet.

    Raises:
      ValueError: for arrays of another rank, no images, or labels that do not match them.
    """
    images = _images(images, value_range)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must match images: got {len(labels)} labels for {len(images)} images")
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    caption = 0.28 * height if labels is not None else 0.0
    # One picture for all: a subplot for each of some hundred images would take a minute to lay out.
    pitch = height + round(caption)
    inches = 0.6 * columns + 0.1
    lines = textwrap.wrap(title, max(10, int(12 * inches)))  # some twelve letters to the inch
    figure = _figure(inches, 0.6 * rows * pitch / width + 0.1 + (0.15 + 0.15 * len(lines) if lines else 0))
    ax = figure.subplots()
    _show(ax, _mosaic(images, rows, columns, gap=round(caption)))
    for i, label in enumerate(labels if labels is not None else ()):
        x, y = (i % columns + 0.5) * width, (i // columns) * pitch + height + 0.5 * caption
        ax.text(x, y, label, ha="center", va="center", fontsize=6.5, color=INK)
    if title:
        figure.suptitle("\n".join(lines), fontsize=10, color=INK)
    return figure


def compare_sheets(
    groups: Mapping[str, Any],
    *,
    columns: int = 8,
    rows: int = 8,
    value_range: tuple[float, float] = (-1.0, 1.0),
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Several sheets beside each other, each under its name: what changes from one way of sampling to another.

    Args:
      groups: images by name, as for `sample_sheet`; the first ``rows * columns`` of each are shown.
      columns: images per row of each sheet.
      rows: the most rows of a sheet.
      value_range: the values shown as black and white.
      row_labels: what stands to the left of each row, where rows mean the same in all groups.

    Raises:
      ValueError: for no groups, images as in `sample_sheet`, or labels for more or fewer rows than there are.
    """
    if not groups:
        raise ValueError("groups must hold at least one set of images")
    shown = {name: _images(images, value_range)[: rows * columns] for name, images in groups.items()}
    rows = max(-(-len(images) // columns) for images in shown.values())
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"row_labels must match rows: got {len(row_labels)} labels for {rows} rows")
    margin = 0.07 * max(map(len, row_labels), default=0) if row_labels is not None else 0.0
    figure = _figure((0.42 * columns + 0.3) * len(shown) + margin, 0.42 * rows + 0.5)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, (name, images) in zip(axes, shown.items(), strict=True):
        _show(ax, _mosaic(images, rows, columns))
        ax.set_title(name, fontsize=10, color=INK)
    if row_labels is not None:
        height = next(iter(shown.values())).shape[1]
        for i, label in enumerate(row_labels):
            axes[0].text(-0.3 * height, (i + 0.5) * height, label, ha="right", va="center", fontsize=9, color=INK)
    return figure


def traces(info: Any, *, num_particles: int, ess_threshold: float | None = None, title: str = "") -> Figure:
    """Effective sample size, log normalising constant and surviving ancestors over time, noise on the left.

    Args:
      info: of a result of `rnejax.steer`; with groups, one thin line each.
      num_particles: per group.
      ess_threshold: the fraction below which particles are resampled, drawn as a line.
    """
    time = np.asarray(info.time, np.float64)
    ess, resampled = _by_group(info.ess), _by_group(info.resampled)
    log_normalizer = np.cumsum(_by_group(info.log_normalizer_increments).astype(np.float64), axis=1)
    survivors = _by_group(info.unique_ancestors)
    figure = _figure(6.4, 6.0)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for group in range(len(ess)):
        style = {"color": INK, "linewidth": 1.2 if len(ess) == 1 else 0.6, "alpha": 1.0 if len(ess) == 1 else 0.6}
        top.plot(time, ess[group], **style)
        when = resampled[group].astype(bool)
        top.plot(time[when], np.full(when.sum(), 0.02 * num_particles), "|", color=ACCENT, markersize=7)
        middle.plot(time, log_normalizer[group], **style)
        bottom.plot(time, survivors[group], drawstyle="steps-post", **style)
    if ess_threshold is not None and 0 < ess_threshold <= 1:
        top.axhline(ess_threshold * num_particles, color=MUTED, linewidth=0.8, linestyle="--")
    top.set(ylabel="effective sample size", ylim=(0, 1.04 * num_particles))
    middle.set(ylabel="log normalising\nconstant (nats)")
    bottom.set(
        ylabel="initial particles with\ndescendants", ylim=(0, 1.04 * num_particles), xlabel="time (noise to data)"
    )
    bottom.invert_xaxis()
    top.set_title(title or "marks: resampling; dashed: its threshold", fontsize=9, color=INK)
    return _clean(figure)


def weights(log_weights: Any, *, title: str = "") -> Figure:
    """The normalised weights of the final particles, from the largest, against equal ones.

    Args:
      log_weights: (num_particles,), or (num_groups, num_particles): one line per group.
    """
    figure = _figure(5.2, 3.2)
    ax = figure.subplots()
    for row in _by_group(log_weights).astype(np.float64):
        shares = np.exp(row - np.max(row))
        shares = np.sort(shares / shares.sum())[::-1]
        ax.step(np.arange(1, len(row) + 1), shares, where="mid", color=INK, linewidth=1.0)
        ax.axhline(1 / len(row), color=MUTED, linewidth=0.8, linestyle="--")
    ax.set(xlabel="particle, by weight", ylabel="share of the weight", ylim=(0, None))
    ax.set_title(title or "dashed: equal weights", fontsize=9, color=INK)
    return _clean(figure)


def genealogy(ancestors: Any, times: Any | None = None, *, max_lines: int = 256, title: str = "") -> Figure:
    """Who descends from whom: one line per particle and step, drawn from noise (left) to data (right).

    Lineages that reach the end are dark, the others light; many particles at the end with one common line are copies
    that have not moved apart for long.

    Args:
      ancestors: (num_steps, num_particles), for each step the index of the particle that each one came from, in order
        of execution: ``result.info.saved["ancestors"]`` of one group.
      times: (num_steps,) the times the steps arrive at.
      max_lines: of more particles, that many evenly spaced ones are followed back from the end.

    Raises:
      ValueError: if ancestors are not a matrix of valid indices.
    """
    ancestors = np.asarray(ancestors)
    if ancestors.ndim != 2 or not np.issubdtype(ancestors.dtype, np.integer):
        raise ValueError(f"ancestors must be integers of shape (num_steps, num_particles), got {ancestors.shape}")
    num_steps, num_particles = ancestors.shape
    if ancestors.min() < 0 or ancestors.max() >= num_particles:
        raise ValueError(
            f"ancestors must be between 0 and {num_particles - 1}, got {ancestors.min()} to {ancestors.max()}"
        )
    # A particle is placed beside its siblings, every generation in the order of its parents: lines do not cross.
    places = [np.arange(num_particles, dtype=np.float64)]
    for parents in ancestors:
        order = np.lexsort((np.arange(num_particles), places[-1][parents]))
        place = np.empty(num_particles)
        place[order] = np.arange(num_particles)
        places.append(place)
    alive = np.unique(np.linspace(0, num_particles - 1, min(max_lines, num_particles)).astype(int))
    surviving: list[np.ndarray] = []
    extinct: list[np.ndarray] = []
    for k in range(num_steps - 1, -1, -1):
        ends = np.stack(
            [np.full((num_particles, 2), (k, k + 1)), np.stack([places[k][ancestors[k]], places[k + 1]], 1)], 2
        )
        surviving.extend(ends[alive])
        if num_particles <= max_lines:
            extinct.extend(np.delete(ends, alive, axis=0))
        alive = np.unique(ancestors[k][alive])
    from matplotlib.collections import LineCollection

    figure = _figure(7.2, 4.2)
    ax = figure.subplots()
    ax.add_collection(LineCollection(extinct, colors=MUTED, linewidths=0.35, alpha=0.5))
    ax.add_collection(LineCollection(surviving, colors=INK, linewidths=0.7))
    ax.set(xlim=(0, num_steps), ylim=(-1, num_particles), ylabel="particles", xlabel="step (noise to data)", yticks=[])
    if times is not None:
        ticks = np.unique(np.linspace(1, num_steps, 6).astype(int))
        ax.set_xticks(ticks, [f"{float(np.asarray(times)[k - 1]):.3g}" for k in ticks])
        ax.set_xlabel("time (noise to data)")
    eves = f"{len(np.unique(alive))} of {num_particles} initial particles have descendants at the end"
    ax.set_title(title or eves, fontsize=9, color=INK)
    return _clean(figure)


def log_density_histogram(groups: Mapping[str, Any], *, bins: int = 40, unit: str = "nats", title: str = "") -> Figure:
    """Histograms of log-densities (or bits per dimension), one per named set of points.

    Values that are not finite belong to no bin; how many there are is written beside the name.

    Args:
      groups: values by name.
    """
    finite = {name: np.asarray(values, np.float64).ravel() for name, values in groups.items()}
    counts = {name: int((~np.isfinite(values)).sum()) for name, values in finite.items()}
    finite = {name: values[np.isfinite(values)] for name, values in finite.items()}
    together = np.concatenate(list(finite.values()))
    if together.size == 0:
        raise ValueError("there is no finite value to show")
    edges = np.histogram_bin_edges(together, bins=bins).tolist()
    figure = _figure(5.6, 3.4)
    ax = figure.subplots()
    for (name, values), colour in zip(finite.items(), _colours(len(finite)), strict=True):
        label = name + (f" ({counts[name]} not finite)" if counts[name] else "")
        ax.hist(values, bins=edges, histtype="stepfilled", alpha=0.25, color=colour)
        ax.hist(values, bins=edges, histtype="step", linewidth=1.2, color=colour, label=label)
    ax.set(xlabel=unit, ylabel="points")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(title, fontsize=9, color=INK)
    return _clean(figure)


def histograms(
    groups: Mapping[str, Any],
    *,
    xlabel: str,
    dashed: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    over: str | None = None,
    bins: int = 80,
    title: str = "",
) -> Figure:
    """Densities of numbers, one line per named set, over the range of all of them.

    Args:
      groups: numbers by name; what lies outside the range that is drawn, or is infinite, is counted in the legend.
      dashed: more sets under the same names, drawn as dashed lines of the same colour: what the first are compared to.
      weights: of some of the groups, by name.
      over: the group over whose range to draw, and a tenth more on either side, if it is there: a few samples far off
        would make it a line.
    """
    values = {name: np.asarray(group, np.float64).ravel() for name, group in groups.items()}
    others = {name: np.asarray(group, np.float64).ravel() for name, group in (dashed or {}).items()}
    every = values[over] if over in values else np.concatenate([*values.values(), *others.values()])
    low, high = np.quantile(every[np.isfinite(every)], [0.0005, 0.9995])
    if over in values:
        low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    edges = np.linspace(float(low), float(high), bins + 1)
    many = len(values) > 4
    figure = _figure(6.6 if many else 5.2, 3.4)
    ax = figure.subplots()
    for (name, each), colour in zip(values.items(), _colours(len(values)), strict=True):
        share = (weights or {}).get(name)
        share = np.full(each.size, 1 / each.size) if share is None else np.asarray(share, np.float64).ravel()
        heights = np.histogram(each, edges, weights=share)[0] / np.diff(edges)
        outside = 1 - np.sum(heights * np.diff(edges)) / share.sum()
        label = name if outside < 5e-3 else f"{name} ({100 * outside:.2g} % outside)"
        ax.stairs(heights, edges, color=colour, label=label, linewidth=1.2)
        if name in others:
            heights = np.histogram(others[name], edges)[0] / (others[name].size * np.diff(edges))
            ax.stairs(heights, edges, color=colour, linewidth=1.0, linestyle="--")
    ax.set(xlabel=xlabel, ylabel="density")
    ax.set_title(title, fontsize=9, color=INK)
    if many:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        ax.legend(frameon=False, fontsize=8)
    return _clean(figure)


def ramachandran(
    groups: Mapping[str, Any], *, over: str | None = None, kT: float = 1.0, unit: str = "kT", title: str = ""
) -> Figure:
    """Free energies -kT log P over the torsions phi and psi, side by side on one scale; white where no sample is.

    Args:
      groups: shares of a histogram by name, (bins, bins), phi along the first axis (``systems.metrics``).
      over: the group whose range the colours span (particles of hardly any weight would stretch them), if it is there;
        by default that of all of them.
    """
    levels = {}
    for name, shares in groups.items():
        with np.errstate(divide="ignore"):
            level = -kT * np.log(np.asarray(shares, np.float64))
        levels[name] = np.where(np.isfinite(level), level - level.min(), np.nan)
    all_highest = max(float(np.nanmax(level)) for level in levels.values())
    highest = float(np.nanmax(levels[over])) if over in levels else all_highest
    figure = _figure(2.9 * len(levels) + 0.8, 3.1)
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    for ax, (name, level) in zip(axes, levels.items(), strict=True):
        drawn = ax.imshow(
            level.T, origin="lower", extent=(-180, 180, -180, 180), vmin=0, vmax=highest, cmap="viridis", aspect="equal"
        )
        ax.set(xlabel="phi (degrees)", title=name, xticks=[-180, -90, 0, 90, 180], yticks=[-180, -90, 0, 90, 180])
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("psi (degrees)")
    beyond = "max" if all_highest > highest else "neither"
    figure.colorbar(drawn, ax=list(axes), label=f"free energy ({unit})", shrink=0.85, extend=beyond)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def curves(
    x: Any,
    groups: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    log_x: bool = False,
    errors: Mapping[str, Any] | None = None,
    title: str = "",
) -> Figure:
    """Lines over a common axis, such as losses over training steps.

    Args:
      groups: values by name, NaN where there is none: lines join those that are there.
      log, log_x: scales of the vertical and of the horizontal axis.
      errors: half-lengths of the error bars of some of the groups, by name.
    """
    from matplotlib.ticker import LogFormatter, NullLocator

    class Plain(LogFormatter):
        """0.3 and 2 instead of 3e-01 and 2 x 10^0."""

        def __call__(self, value: float, position: Any = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    figure = _figure(6.8, 3.4)
    ax = figure.subplots()
    colours = _colours(len(groups))
    for i, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=True)):
        again = colour in colours[:i]  # colours are few: the second line of a colour is dashed
        style: dict[str, Any] = {"color": colour, "linewidth": 1.2, "label": name, "linestyle": "--" if again else "-"}
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        if errors is not None and name in errors:
            bars = np.asarray(errors[name], np.float64)[known]
            ax.errorbar(np.asarray(x)[known], values[known], bars, marker="o", markersize=3, capsize=2, **style)
        else:
            ax.plot(np.asarray(x)[known], values[known], **style)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear", xscale="log" if log_x else "linear")
    if log_x:
        ax.set_xticks(np.asarray(x), [f"{value:g}" for value in np.asarray(x)], minor=False)
        ax.xaxis.set_minor_locator(NullLocator())
    if log:  # within one decade the minor ticks are all there is
        ax.yaxis.set_major_formatter(Plain())
        ax.yaxis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.2, 0.4)))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set_title(title, fontsize=9, color=INK)
    return _clean(figure)


def scatters(panels: Mapping[str, Any], *, title: str = "") -> Figure:
    """Points in the plane, (n, 2), side by side on common axes."""
    figure = _figure(2.3 * len(panels), 2.6)
    axes = list(np.atleast_1d(figure.subplots(1, len(panels), sharex=True, sharey=True)))
    for ax, (name, points) in zip(axes, panels.items(), strict=True):
        points = np.asarray(points)
        ax.plot(points[:, 0], points[:, 1], ".", markersize=1.5, alpha=0.5, color=_colours(1)[0], rasterized=True)
        ax.set_title(name, fontsize=9, color=INK)
        ax.set_aspect("equal")
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return _clean(figure)


def is_image(shape: Sequence[int]) -> bool:
    """Whether states of this shape can be shown on a sheet: (height, width, 1 or 3)."""
    return len(shape) == 3 and shape[-1] in (1, 3)


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure; the ending says the format. Returns the path."""
    path = Path(path)
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path


# ------------------------------------------------------------------------------------------------------------- helpers


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib (rnejax's extra 'plot')") from error
    # Not by pyplot: no global list of figures to fill up, and no display that would be needed.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))


def _clean(figure: Figure) -> Figure:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=8, colors=INK)
        ax.xaxis.label.set(fontsize=9, color=INK)
        ax.yaxis.label.set(fontsize=9, color=INK)
    return figure


def _images(images: Any, value_range: tuple[float, float]) -> np.ndarray:
    """Values in [0, 1], (n, height, width) or (n, height, width, 3)."""
    images = np.asarray(images, np.float64)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)) or len(images) == 0:
        raise ValueError(f"images must have shape (n, height, width) or (n, height, width, 1 or 3), got {images.shape}")
    low, high = value_range
    return np.clip((images - low) / (high - low), 0.0, 1.0)


def _mosaic(images: np.ndarray, rows: int, columns: int, gap: int = 0) -> np.ndarray:
    """Images in rows, with ``gap`` white pixels below each; white where there is none."""
    height, width = images.shape[1:3]
    cells = np.ones((rows * columns, height + gap, width, *images.shape[3:]))
    cells[: len(images), :height] = images
    grid = np.moveaxis(cells.reshape(rows, columns, *cells.shape[1:]), 2, 1)
    return grid.reshape(rows * (height + gap), columns * width, *images.shape[3:])


def _show(ax: Any, picture: np.ndarray) -> None:
    ax.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_axis_off()


def _by_group(values: Any) -> np.ndarray:
    """(groups, n), one group where there is no group axis."""
    values = np.asarray(values)
    return values[None] if values.ndim == 1 else values


def _colours(count: int) -> list[Any]:
    first = [INK, ACCENT, "#2563eb", "#15803d", "#7c3aed", "#b45309"]
    return [first[i % len(first)] for i in range(count)]
