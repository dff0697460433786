"""The curves of the documentation, drawn from the tables that the benchmark scripts wrote (docs/tables/*.json).

    python scripts/figures.py

Writes docs/pictures/density_steps.png, control_steps.png, molecules_*_particles.png, molecules_*_steps.png
and free_energy_*.png; nothing is measured here.
"""

from __future__ import annotations

import itertools
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
    scaling(json.loads((DOCS / "tables" / "molecules.json").read_text())["rows"])
    free_energy(json.loads((DOCS / "tables" / "free_energy.json").read_text())["rows"])


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


def scaling(rows: list[dict[str, Any]]) -> None:
    """Energy W1 of the coldest row against particles (200 steps) and against steps (2,000 particles), with floors."""
    names = {
        "symmetric": "symmetric",
        "symmetric, true energy": "symmetric, reweighted",
        "tuned": "tuned on pilots",
        "(1, 0)": "(1, 0)",
        "floor": "floor",
    }
    axes = {"particles": ("steps", 200), "steps": ("particles", 2000)}
    for system, (axis, (other, fixed)) in itertools.product(dict.fromkeys(row["system"] for row in rows), axes.items()):
        own = [row for row in rows if row["system"] == system]
        temperatures = [row["temperature"] for row in own]
        rows_here = [row for row in own if row["temperature"] == min(temperatures) and row[other] == fixed]
        sizes = sorted({row[axis] for row in rows_here if row["row"] in names and row["row"] != "floor"})
        lines, bars = {}, {}
        for name, label in names.items():
            values = [[r["energy_w1"] for r in rows_here if r["row"] == name and r[axis] == size] for size in sizes]
            if sum(len(each) > 1 for each in values) < 2:
                continue
            lines[label] = [np.mean(each) if each else np.nan for each in values]
            bars[label] = [np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan for each in values]
        if not lines:  # measured at one size only
            continue
        figure = plot.curves(
            sizes, lines, errors=bars, xlabel=axis, ylabel="energy W1", log=True, log_x=True,
            title=f"{system} from T = {max(temperatures):g} to {min(temperatures):g}, {fixed:,} {other}",
        )  # fmt: skip
        plot.save(figure, DOCS / "pictures" / f"molecules_{system}_{axis}.png")


def free_energy(rows: list[dict[str, Any]]) -> None:
    """What steering says of log Z minus what MBAR says, over temperature, with error bars."""
    for system in dict.fromkeys(row["system"] for row in rows):
        here = [row for row in rows if row["system"] == system and "estimate" in row]
        temperatures = sorted({row["temperature"] for row in here})
        lines, bars = {"MBAR": [0.0] * len(temperatures)}, {}
        bars["MBAR"] = [find(here, temperature=t, value="mbar_error") for t in temperatures]
        for name in dict.fromkeys(row["estimate"] for row in here):
            lines[name] = [
                find(here, temperature=t, estimate=name, value=lambda row: row["difference"] - row["mbar"])
                for t in temperatures
            ]
            bars[name] = [find(here, temperature=t, estimate=name, value="error") for t in temperatures]
        figure = plot.curves(
            temperatures, lines, errors=bars, xlabel="T", ylabel="log Z(T) - log Z(T0), difference to MBAR",
            title=f"{system}: free energies of the cooled model, in kT, with standard errors",
        )  # fmt: skip
        plot.save(figure, DOCS / "pictures" / f"free_energy_{system}.png")


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
