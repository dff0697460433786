"""The memory of a gradient through paths of many steps: walked twice, of some steps, and kept (the direct gradient).

    python scripts/benchmark_path_memory.py [--batch 16] [--steps 50 200 1000]

The shipped model of digits (712,967 weights, 28 x 28 pixels), its posterior a network of the same kind: the gradient of
the squared residual of relative trajectory balance over ``batch`` generated paths. Bytes are those that XLA sets aside
for temporary arrays of the compiled gradient, on top of weights and their gradient; nothing is run without
``--seconds``. Writes docs/tables/path_memory.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rnejax as rj
from rnejax.training.paths import make_walk, path_log_ratio, walk_once

WAYS = {"walked twice": None, "walked twice, 8 steps drawn": 8, "kept (direct)": "direct"}


def measure(model: rj.DiffusionModel, steps: int, batch: int, way: Any, seconds: bool) -> dict[str, Any]:
    times = rj.time_grid(model.process, steps)
    count = way if isinstance(way, int) else None
    walk = make_walk(jax.random.key(0), model, model, times, batch, None, 1.0, count)

    def loss(params: Any) -> Any:
        ratio = walk_once(params, walk)[1] if way == "direct" else path_log_ratio(params, walk)[1]
        return jnp.sum(ratio**2)

    compiled = jax.jit(jax.grad(loss)).lower(model.params).compile()
    found: dict[str, Any] = {"bytes": compiled.memory_analysis().temp_size_in_bytes}
    if seconds:
        started = time.perf_counter()
        jax.block_until_ready(compiled(model.params))
        found["seconds"] = time.perf_counter() - started
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--seconds", action="store_true", help="run each of them once, too")
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    arguments = parser.parse_args()
    model = rj.load_model(arguments.model)
    report: dict[str, Any] = {"model": arguments.model, "batch": arguments.batch, "ways": {}}
    lines = [
        f"{arguments.batch} paths of the shipped model of digits; megabytes of temporary arrays.",
        "",
        "| steps | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for steps in arguments.steps:
        cells = []
        for name, way in WAYS.items():
            found = measure(model, steps, arguments.batch, way, arguments.seconds)
            report["ways"].setdefault(name, {})[str(steps)] = found
            cells.append(f"{found['bytes'] / 1e6:.0f}" + (f" ({found['seconds']:.0f} s)" if "seconds" in found else ""))
            print(steps, name, cells[-1], flush=True)
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "path_memory.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "path_memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
