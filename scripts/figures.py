"""The curves of the documentation, drawn from the tables that the benchmark scripts wrote (docs/tables/*.json).

    python scripts/figures.py

Writes docs/pictures/density_steps.png and control_steps.png; nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rnejax import plot

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    (DOCS / "pictures").mkdir(exist_ok=True)
    density(json.loads((DOCS / "tables" / "density.json").read_text())["rows"])
    control(json.loads((DOCS / "tables" / "control.json").read_text())["sections"])


def density(rows: list[dict[str, Any]]) -> None:
    """Error of a sample's log-density against the number of steps, one line per estimator."""
    rows = [row for row in rows if row["process"] == "variance exploding"]
    steps = sorted({row["steps"] for row in rows})
    names = list(dict.fromkeys(row["column"] for row in rows))
    lines = {name: [find(rows, column=name, steps=n, value="mse") for n in steps] for name in names}
    figure = plot.curves(
        steps, lines, xlabel="steps", ylabel="mean squared error of log p, nats²", log=True,
        title="10-D mixture of 40 Gaussians, exact score",
    )  # fmt: skip
    plot.save(figure, DOCS / "pictures" / "density_steps.png")


def control(sections: dict[str, list[dict[str, Any]]]) -> None:
    """|error of log Z| against the number of steps, one line per proposal and covariance."""
    rows = [row for row in next(iter(sections.values())) if row["process"] == "VP" and row["problem"] == "anneal"]
    steps = sorted({row["steps"] for row in rows})
    names = list(dict.fromkeys((row["proposal"], row["covariance"]) for row in rows))
    lines = {}
    for proposal, covariance in names:
        values = [find(rows, proposal=proposal, covariance=covariance, steps=n, value=total_error) for n in steps]
        lines[f"{proposal}, {covariance}"] = values
    figure = plot.curves(
        steps, lines, xlabel="steps", ylabel="root mean squared error of log Z, nats", log=True,
        title="annealing a 10-D mixture of 8 Gaussians to exponent 2, 1,024 particles",
    )  # fmt: skip
    plot.save(figure, DOCS / "pictures" / "control_steps.png")


def total_error(row: dict[str, Any]) -> float:
    """Bias and spread of one run together."""
    return float(np.hypot(row["error"], row["sd"]))


def find(rows: list[dict[str, Any]], value: Any, **wanted: Any) -> float:
    """The value in the row with these entries; NaN, which is not drawn, where it was not measured."""
    for row in rows:
        if all(row[name] == entry for name, entry in wanted.items()):
            return float(value(row)) if callable(value) else float(row[value])
    return float("nan")


if __name__ == "__main__":
    main()
