"""How well springs describe what is known of x_0: the covariance of an elastic network against the denoiser's Jacobian.

At each noise level, on configurations that were not used for the fit: the root mean square, over configurations, of the
Frobenius norm of the error of Cov[x_0 | x_t] in units of sigma^2 / alpha^2, for the best isotropic covariance and for
springs, against that of `covariance="full"`; and the mean variance per dimension of all three in the same units.

    python scripts/benchmark_elastic_network.py [--systems lj13 dw4 alanine_dipeptide]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_molecules import SYSTEMS, load
from scipy.optimize import brentq

import rnejax as rj
from rnejax.systems.references import load_reference

RATIOS = (0.01, 0.03, 0.1, 0.3, 1.0)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per noise level."""
    model = load(options.model or name)
    process, subspace = model.process, model.process.subspace
    stored = load_reference(name, SYSTEMS[name]["start"])
    kinds = getattr(stored.system, "kinds", None)
    wanted = [
        brentq(lambda t, r=r: float(process.sigma(t) / process.alpha(t)) - r, process.t_min, process.t_max)
        for r in RATIOS
    ]
    # The table has the levels in question and those between them, since each fit starts from the one before.
    times = np.unique([*wanted, *rj.time_grid(process, options.times)])
    began = time.perf_counter()
    springs = rj.calibrate_elastic_network(
        jax.random.key(5), model, times, stored.x[0][: options.samples], kinds=kinds,
        num_knots=12 if kinds is None else 1, num_samples=options.samples,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    full = model.with_covariance("full")
    x_0 = jax.vmap(model.transform.to_model)(jnp.asarray(stored.x[1][: options.points]))
    d = int(np.prod(model.shape))
    on = np.asarray(jax.vmap(lambda row: subspace.project(row.reshape(model.shape)).reshape(-1))(jnp.eye(d)))
    dimension = subspace.dimension(model.shape)
    rows = []
    for ratio, t in zip(RATIOS, wanted, strict=True):
        level = process.level(t)
        noise = jax.vmap(subspace.project)(jax.random.normal(jax.random.key(3), x_0.shape))
        x_t = level.alpha * x_0 + level.sigma * noise

        def matrices(model: Any, x_t: Any = x_t, level: Any = level, unit: float = ratio**2) -> np.ndarray:
            found = model.evaluate(jax.random.key(0), x_t, level)
            spread = (found.spread + 1) * level.reference_posterior_variance
            return on @ np.asarray(jnp.einsum("nij,nj,nkj->nik", found.basis, spread, found.basis)) @ on / unit

        truth, fitted = matrices(full), matrices(springs)
        mean = np.einsum("nii->n", truth).mean() / dimension
        rows.append({
            "system": name, "ratio": ratio, "variance": float(mean),
            "variance_springs": float(np.einsum("nii->n", fitted).mean() / dimension),
            "error_isotropic": float(np.sqrt(((truth - mean * on) ** 2).sum((1, 2)).mean())),
            "error_springs": float(np.sqrt(((truth - fitted) ** 2).sum((1, 2)).mean())),
            "seconds_of_fit": round(seconds, 1), "times": len(times),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| system | sigma / alpha | variance | variance, springs | error, isotropic | error, springs |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['system']} | {row['ratio']:g} | {row['variance']:.3f} | {row['variance_springs']:.3f} "
        f"| {row['error_isotropic']:.3f} | {row['error_springs']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["dw4", "lj13", "alanine_dipeptide"], choices=list(SYSTEMS))
    parser.add_argument("--model", help="another model file, of the one system given")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()
    path = options.output / "elastic_network.json"
    for name in options.systems:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if row["system"] != name] + measure(name, options)
        path.write_text(json.dumps({"settings": {"samples": options.samples}, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(rows))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
