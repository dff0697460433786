"""The four losses that energies are trained with, and what the scripts that compare them share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

# The paper's residual has noise of its own at its fixed step, and wants a smaller weight: of 0.2, 0.02 and 0.002, 0.02
# was best on the plane (standard deviation of log p at t = 0.02: 0.53, 0.16, 0.25; one seed of the last two).
LOSSES: dict[str, dict[str, float]] = {
    "score matching": {"score": 1.0},
    "RNE, Euler-Maruyama (the paper's)": {"score": 1.0, "rne_euler": 0.02, "prior": 0.2},
    "RNE, covariance-corrected": {"score": 1.0, "rne": 0.2, "prior": 0.2},
    "Fokker-Planck": {"score": 1.0, "fokker_planck": 0.2, "prior": 0.2},
}

Row = dict[str, Any]


def collect(
    path: Path,
    settings: dict[str, Any],
    problems: Iterable[str],
    losses: Iterable[str],
    seeds: Iterable[int],
    measure: Callable[[str, str, int], Row],
    table: Callable[[list[Row]], str],
) -> None:
    """Measure every problem, seed and loss; each row is kept in ``path`` (JSON) and its table (.md) as it comes."""
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    for problem in problems:
        for seed in seeds:
            for loss in losses:
                key = {"problem": problem, "loss": loss, "seed": seed}
                row = key | {"weights": LOSSES[loss]} | measure(problem, loss, seed)
                rows = [each for each in rows if any(each[name] != key[name] for name in key)] + [row]
                print(json.dumps(row), flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
                path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def markdown(
    rows: list[Row], columns: dict[str, str], free: Callable[[str, str], bool] = lambda loss, name: False
) -> str:
    """Means and standard errors over seeds; of the milliseconds the median.

    ``columns`` are heads by name; where ``free(loss, name)``, the number means nothing.
    """
    lines = ["| problem | loss | seeds | " + " | ".join(columns.values()) + " | ms per step |"]
    lines.append("|" + "---|" * (4 + len(columns)))
    for problem, loss in dict.fromkeys((row["problem"], row["loss"]) for row in rows):
        chosen = [row for row in rows if (row["problem"], row["loss"]) == (problem, loss)]
        cells = []
        for name in columns:
            values = np.asarray([row[name] for row in chosen])
            error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}" if len(values) > 1 else ""
            cells.append("free" if free(loss, name) else f"{values.mean():.4f}{error}")
        speed = np.median([row["ms_per_step"] for row in chosen])  # a machine that did other things too is slower once
        lines.append(f"| {problem} | {loss} | {len(chosen)} | " + " | ".join(cells) + f" | {speed:.1f} |")
    return "\n".join(lines) + "\n"
