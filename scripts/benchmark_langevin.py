"""Do sampling and simulation agree? Energies trained with four losses, sampled by denoising and simulated at t near 0.

A diffusion model of an energy gives two laws of the data: what its reverse process generates, and exp(-E(x, t)) at the
smallest t, which Langevin dynamics samples (MALA, blackjax; started from data, so that what is measured is where the
energy drives them). Score matching alone leaves the energy at small t free between modes, and the two disagree; the
residuals tie them together. The measure is the Jensen-Shannon divergence (nats; at most 0.693) between histograms of
the plane (Muller-Brown) or of the distances of all pairs (DW-4), against the reference; "floor" is the same between as
many samples of one reference set and all of the other, "floor of samples" between as many of both, which is to be held
against the divergence of what was sampled from what was simulated.

    python scripts/benchmark_langevin.py [--problems muller_brown dw4] [--seeds 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from energy_losses import LOSSES, Row, collect, markdown

import rnejax as rj
from rnejax.networks import build, functional
from rnejax.systems.metrics import jensen_shannon, pair_distances
from rnejax.systems.references import load_reference
from rnejax.training import energy_loss, fit, make_optimizer, time_law

PROBLEMS: dict[str, dict[str, Any]] = {
    "muller_brown": {
        "temperature": 25.0,
        "network": ("mlp", {"shape": (2,), "hidden": 128, "depth": 3}),
        "covariance": "full",
        "steps": 6000,
        "batch": 512,
    },
    "dw4": {
        "temperature": 1.0,
        "network": ("egnn", {"shape": (4, 2), "features": 32, "num_layers": 2, "num_radial": 32, "reach": 5.0}),
        "covariance": "full",
        "steps": 6000,
        "batch": 256,
    },
}


class Bins:
    """A histogram over the range of a reference, what lies outside included."""

    def __init__(self, reference: np.ndarray):
        self.flat = reference.ndim == 2
        values = self.values(reference)
        low, high = values.min(axis=0), values.max(axis=0)
        count = 40 if self.flat else 100
        inside = [np.linspace(a, b, count + 1) for a, b in zip(low, high, strict=True)]
        self.edges = [np.concatenate([[-np.inf], each, [np.inf]]) for each in inside]

    def values(self, x: np.ndarray) -> np.ndarray:
        return x if self.flat else pair_distances(x).reshape(-1, 1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        counts, _ = np.histogramdd(self.values(np.asarray(x, np.float64)), self.edges)
        return counts / counts.sum()


def train(
    problem: dict[str, Any], weights: dict[str, float], seed: int, x: np.ndarray, system: Any
) -> tuple[Any, float]:
    """A model of an energy, and the time of a step in ms."""
    dimension = system.subspace.dimension(system.shape)
    mean = 0.0 if len(system.shape) == 2 else x.mean(axis=0)
    scale = float(np.sqrt(np.sum((x - mean) ** 2, dtype=np.float64) / (len(x) * dimension)))
    transform = rj.transforms.Affine(scale, mean)
    process = rj.processes.VariancePreserving(t_min=1e-3, subspace=system.subspace)
    name, arguments = problem["network"]
    network = build(name, jax.random.key(seed), output="energy", time_scale="log", **arguments)
    apply, params = functional(network)
    data = np.asarray(jax.vmap(transform.to_model)(jnp.asarray(x)))
    loss = energy_loss(
        process, apply, weights=weights, covariance=problem["covariance"], times=time_law(process, log_snr_share=0.5)
    )
    steps = problem["steps"]
    optimizer = make_optimizer(1e-3, num_steps=steps, warmup_steps=min(100, steps // 10), decay_steps=2 * steps // 3)
    fitted = fit(
        jax.random.key(seed + 100), loss, params, data, optimizer,
        num_steps=steps, batch_size=problem["batch"], steps_per_call=50, report_every=steps // 10, save_every=steps,
    )  # fmt: skip
    # The first report's time has the compilation in it.
    took = 1e3 * float(np.median([report["seconds_per_step"] for report in fitted.metrics[1:]]))
    model = rj.DiffusionModel(
        process, apply.as_prediction(), "energy", "reference", system.shape,
        params=fitted.average, transform=transform, batched=True,
    )  # fmt: skip
    return model, took


def simulate(key: Any, model: rj.DiffusionModel, x: np.ndarray, t: float, num_steps: int) -> np.ndarray:
    """MALA at the energy of time t, one chain from each configuration; the step size is tuned in the first fifth."""
    import blackjax

    kernel = blackjax.mala.build_kernel()
    project = model.process.subspace.project

    def log_density(x: Any) -> Any:
        return -model.energy(x, t)

    def step(carry: Any, number: Any) -> tuple[Any, Any]:
        x, log_step = carry
        keys = jax.random.split(jax.random.fold_in(key, number), len(x))

        def move(key: Any, x: Any) -> tuple[Any, Any]:
            state, info = kernel(key, blackjax.mala.init(x, log_density), log_density, jnp.exp(log_step))
            return project(state.position), info.acceptance_rate

        x, acceptance = jax.vmap(move)(keys, x)
        gain = jnp.where(number < 0.2 * num_steps, 1 / (1 + number) ** 0.6, 0.0)
        return (x, log_step + gain * (acceptance.mean() - 0.6)), acceptance.mean()

    start = jax.vmap(model.transform.to_model)(jnp.asarray(x))
    run = jax.jit(lambda x: jax.lax.scan(step, (x, jnp.log(jnp.asarray(1e-3))), jnp.arange(num_steps)))
    (last, _), _ = run(start)
    return np.asarray(jax.vmap(model.transform.to_data)(last))


def measure(name: str, loss: str, seed: int, steps: int | None, particles: int, simulation_steps: int) -> Row:
    """One row."""
    problem = PROBLEMS[name] | ({} if steps is None else {"steps": steps})
    stored = load_reference(name, problem["temperature"])
    system = stored.system
    model, took = train(problem, LOSSES[loss], seed, stored.x[0], system)
    key_sample, key_simulate = jax.random.split(jax.random.key(seed + 1000))
    times = rj.time_grid(model.process, 200)
    sampled = np.asarray(rj.sample(key_sample, model, times, num_samples=particles).x)
    start = stored.x[0][np.random.default_rng(seed).permutation(len(stored.x[0]))[:particles]]
    simulated = simulate(key_simulate, model, start, float(times[0]), simulation_steps)
    bins = Bins(stored.x[1])
    reference = bins(stored.x[1])
    return {
        "floor": jensen_shannon(bins(start), reference),
        "floor_of_samples": floor_of_samples(stored, seed, particles),
        "sampled": jensen_shannon(bins(sampled), reference),
        "simulated": jensen_shannon(bins(simulated), reference),
        "sampled_against_simulated": jensen_shannon(bins(sampled), bins(simulated)),
        "ms_per_step": took,
    }


def floor_of_samples(stored: Any, seed: int, particles: int) -> float:
    """Between as many samples of both reference sets: what two sets of samples of one law show."""
    rng = np.random.default_rng(seed)
    one, two = (each[rng.permutation(len(each))[:particles]] for each in stored.x[:2])
    bins = Bins(stored.x[1])
    return jensen_shannon(bins(one), bins(two))


def table(rows: list[Row]) -> str:
    """By problem and loss, in Markdown."""
    names = ("floor", "sampled", "simulated", "floor_of_samples", "sampled_against_simulated")
    columns = {name: name.replace("_", " ") for name in names}
    return markdown(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="rows of other seeds are kept")
    parser.add_argument("--steps", type=int, help="of training, instead of each problem's own")
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--simulation-steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("docs/tables"))
    options = parser.parse_args()

    def measured(problem: str, loss: str, seed: int) -> Row:
        return measure(problem, loss, seed, options.steps, options.particles, options.simulation_steps)

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    settings = {name: getattr(options, name) for name in ("steps", "particles", "simulation_steps")}
    collect(options.output / "langevin.json", settings, options.problems, options.losses, seeds, measured, table)


if __name__ == "__main__":
    main()
