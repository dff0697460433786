"""What a step of each loss costs, as a ratio to one of score matching, measured side by side.

The times in the table of benchmark_energy_training.py are of runs that took their turns over days; a machine that does
other work too changes by a factor of two between them. Here all losses train for a few steps in turn, several times
over; ratios are taken within a turn, and their median and range over turns are what is told.

    python scripts/benchmark_step_time.py [--problems plane high] [--turns 5] [--steps 500]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_energy_training import PROBLEMS, train
from energy_losses import LOSSES


def table(rows: list[dict[str, Any]]) -> str:
    """By problem and loss, in Markdown."""
    lines = ["| problem | loss | turns | ms per step | times score matching | least | most |", "|" + "---|" * 7]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        for loss in LOSSES:
            here = [row for row in rows if row["problem"] == problem]
            chosen = [row for row in here if row["loss"] == loss]
            base = {row["turn"]: row["ms"] for row in here if row["loss"] == "score matching"}
            ratios = [row["ms"] / base[row["turn"]] for row in chosen]
            milliseconds = np.median([row["ms"] for row in chosen])
            cells = [f"{milliseconds:.1f}", *(f"{f(ratios):.2f}" for f in (np.median, min, max))]
            lines.append(f"| {problem} | {loss} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of a turn; a tenth of them is a report")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for problem in options.problems:
        for turn in range(options.turns):
            for loss, weights in LOSSES.items():
                ms = train(PROBLEMS[problem], weights, 0, options.steps)["ms_per_step"]
                rows.append({"problem": problem, "loss": loss, "turn": turn, "ms": ms})
                print(json.dumps(rows[-1]), flush=True)
    settings = {"turns": options.turns, "steps": options.steps}
    path = options.output / "step_time.json"
    path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
