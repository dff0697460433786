"""Free energies of cooled models against MBAR over the ladder of the reference samples.

A model of temperature T0, steered to T = T0 / beta, gives log of the integral of p^beta = log Z_T - beta log Z_T0. The
one number that a density does not know is log Z_T0, measured by reweighting the model's own samples to the true energy:

    model alone      log Z_T - log Z_T0 = log_normalizer + (beta - 1) log Z_T0
    true energy      the same particles, reweighted to exp(-U / kT) at the last step: log Z_T itself, unbiased

in nats (kT), with standard errors over independent groups of particles. MBAR's is the mean of both stored sets. The
proposal is the symmetric one, tuned for every temperature on two pilot runs of half a group's particles.

    python scripts/benchmark_free_energy.py [--systems dw4 lj13] [--groups 8] [--particles 1000] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark_molecules import SYSTEMS, load

import rnejax as rj
from rnejax.systems.references import load_reference

ESTIMATES = ("model alone", "true energy")


def reference(name: str, start: float) -> dict[float, tuple[float, float]]:
    """log Z_T - log Z_T0 and its error, by MBAR, of every temperature of the ladder."""
    found = load_reference(name, start).metadata["free_energy"]
    values = np.asarray([each["log_normalizer"] for each in found])
    errors = np.asarray([each["standard_error"] for each in found])
    temperatures = found[0]["temperatures"]
    zero = values[:, temperatures.index(start)][:, None]
    mean, error = (values - zero).mean(axis=0), np.sqrt((errors**2).sum(axis=0)) / len(errors)
    return {t: (float(m), float(e)) for t, m, e in zip(temperatures, mean, error, strict=True)}


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per temperature and estimate."""
    start = SYSTEMS[name]["start"]
    model, system, truth = load(name), load_reference(name, start).system, reference(name, start)
    times = rj.time_grid(model.process, options.steps)

    def steered(key: Any, temperature: float) -> tuple[tuple[float, float], tuple[float, float], dict[str, float]]:
        """log of the integral of p^beta, and log Z of the temperature, with errors."""
        target = rj.temper(model, start / temperature)
        proposal: Any = "symmetric"
        if temperature != start:  # the model's own law has constant weights
            pilots = jax.random.fold_in(key, 1)
            proposal = rj.tune_proposal(pilots, target, times, options.particles // 2).proposal
        groups = {"num_particles": options.particles, "num_groups": options.groups}
        result = rj.steer(key, target, times, proposal=proposal, warn=False, progress=False, **groups)
        kT = system.thermal_energy(temperature)
        again = rj.reweight(result, target, lambda x: -system.energy(x) / kT)
        quality = {
            "ess": float(np.mean(jax.vmap(rj.smc.effective_sample_size)(again.log_weights))),
            "pareto_k": float(np.max(jax.vmap(rj.smc.pareto_k)(again.log_weights))),
        }
        both = [tuple(float(v) for v in rj.smc.log_normalizer_with_error(each)) for each in (result, again)]
        return both[0], both[1], quality

    key = jax.random.key(40)
    _, at_start, quality = steered(key, start)
    yield {"system": name, "temperature": start, "log_normalizer": at_start[0], "error": at_start[1], **quality}
    for number, temperature in enumerate(each for each in sorted(truth, reverse=True) if each < start):
        if options.temperatures and temperature not in options.temperatures:
            continue
        ours, known, quality = steered(jax.random.fold_in(key, number), temperature)
        more = start / temperature - 1
        found = {
            "model alone": (ours[0] + more * at_start[0], float(np.hypot(ours[1], more * at_start[1]))),
            "true energy": (known[0] - at_start[0], float(np.hypot(known[1], at_start[1]))),
        }
        for estimate in ESTIMATES:
            value, error = found[estimate]
            yield {
                "system": name, "temperature": temperature, "estimate": estimate, "difference": value, "error": error,
                "mbar": truth[temperature][0], "mbar_error": truth[temperature][1],
                "z": (value - truth[temperature][0]) / np.hypot(error, truth[temperature][1]), **quality,
            }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| system | T | estimate | log Z - log Z(T0), nats | MBAR | z | ESS | k-hat |", "|" + "---|" * 8]
    for row in rows:
        if "estimate" in row:
            quality = f"{row['ess']:.0f} | {row['pareto_k']:.2f}" if row["estimate"] == "true energy" else "- | -"
            lines.append(
                f"| {row['system']} | {row['temperature']:g} | {row['estimate']} | {row['difference']:.3f} ± "
                f"{row['error']:.3f} | {row['mbar']:.3f} ± {row['mbar_error']:.3f} | {row['z']:.1f} | {quality} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--temperatures", nargs="+", type=float, help="of the ladder; by default all")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    path = options.output / "free_energy.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["system"] not in options.systems]
    settings = {name: getattr(options, name) for name in ("groups", "particles", "steps")}
    for name in options.systems:
        for row in measure(name, options):
            print(json.dumps(row), flush=True)
            rows.append(row)
            path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
