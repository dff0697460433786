"""What steering costs beside sampling: wall-clock on the digits model, same particles, same steps, runs in turn.

    python scripts/benchmark_cost.py [--particles 64] [--steps 50] [--repeats 5]

Prints medians and their ratio, and writes docs/tables/cost.json. Compilation is not in the times; it is printed beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rnejax as rj

TABLES = Path(__file__).parent.parent / "docs" / "tables"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=TABLES)
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    times = rj.time_grid(model.process, arguments.steps)
    n = arguments.particles
    key = jax.random.key(0)

    def steer(target: Any) -> Callable[[], Any]:
        return lambda: rj.steer(key, target, times, n, warn=False, progress=False).particles

    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "sample": (lambda: rj.sample(key, model, times, n, progress=False).x, arguments.steps),
        "steer: the model itself": (steer(model), arguments.steps),
        "steer: temper, exponent 2": (steer(rj.temper(model, 2.0)), arguments.steps + 1),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, (call, evaluations) in contenders.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        rows[name] = {
            "evaluations": evaluations,
            "first_call_seconds": round(time.perf_counter() - start, 2),
            "seconds": [],
        }
    for _ in range(arguments.repeats):
        for name, (call, _) in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            rows[name]["seconds"].append(round(time.perf_counter() - start, 3))
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
    for row in rows.values():
        row["over_sample"] = round(row["median_seconds"] / rows["sample"]["median_seconds"], 3)
    print(f"{n} particles, {arguments.steps} steps, {jnp.zeros(()).devices()}")
    print("| | evaluations | median seconds | over sample | first call, with compilation |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['evaluations']} | {row['median_seconds']:.2f} | {row['over_sample']:.3f} "
            f"| {row['first_call_seconds']:.1f} |"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {"particles": n, "steps": arguments.steps, "repeats": arguments.repeats}
    (arguments.output / "cost.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
