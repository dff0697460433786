r"""At which noise, and for which configurations, does a molecular model err? Its denoiser against Monte Carlo's.

Where the energy is known, E[x_0 | x_t] is known too: the mean under exp(-U(x_0) / kT - |x_t - alpha x_0|^2 / (2
sigma^2)), which Hamiltonian Monte Carlo samples from many chains. With the noise eps that made x_t out of x_0, and eps*
and eps_theta as the exact and the learned denoiser see it,

    d log p_theta(x_0) - d log p(x_0) = -1/2 E[|eps - eps_theta|^2 - |eps - eps*|^2] d(log-SNR)    (Kong et al. 2022)

which is what ``rate`` measures, in nats per unit of log-SNR, on reference samples of several temperatures: where the
density of a model of temperature T0 goes wrong for the configurations that annealing will look at. ``error`` is
|eps_theta - eps*|^2, of ``signal`` = |eps*|^2. All is right for noise so small that the chains reach all of the
posterior (sigma / alpha below about 0.5); error bars are over configurations.

    python scripts/denoising_oracle.py lj13 --start 2.0 --temperatures 2.0 1.5 0.8 [--ratios 0.05 0.1 0.2]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

import rnejax as rj
from rnejax.systems.references import load_reference

BURN_IN = 100


def posterior_mean(
    model: rj.DiffusionModel, system: Any, kT: float, level: Any, key: Any, x_t: Any, x_0: Any, chains: int, length: int
) -> tuple[Any, Any]:
    """Means of chains that all begin at x_0, (chains, *shape), in the network's coordinates, and their acceptance."""
    kernel = blackjax.hmc.build_kernel()

    def log_density(x: Any) -> Any:
        bond = jnp.sum((x_t - level.alpha * x) ** 2) / (2 * level.sigma**2)
        return -system.energy(model.transform.to_data(x)) / kT - bond

    def move(carry: tuple[Any, Any], step: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        x, log_step = carry
        key, number = step
        key_move, key_jitter = jax.random.split(key)
        size = jnp.exp(log_step) * jax.random.uniform(key_jitter, (), minval=0.7, maxval=1.3)
        state, info = kernel(key_move, blackjax.hmc.init(x, log_density), log_density, size, jnp.ones(x.size), 12)
        gain = jnp.where(number < BURN_IN, 0.5 / (1 + number) ** 0.6, 0.0)
        x = model.process.subspace.project(state.position)
        return (x, log_step + gain * (info.acceptance_rate - 0.75)), (x, info.acceptance_rate)

    def chain(key: Any) -> tuple[Any, Any]:
        steps = (jax.random.split(key, BURN_IN + length), jnp.arange(BURN_IN + length))
        first = jnp.log(0.25 * jnp.minimum(level.sigma / level.alpha, 0.3))
        _, (xs, accepted) = jax.lax.scan(move, (x_0, first), steps)
        return xs[BURN_IN:].mean(axis=0), accepted[BURN_IN:].mean()

    means, accepted = jax.vmap(chain)(jax.random.split(key, chains))
    return means, accepted.mean()


def measure(
    model: rj.DiffusionModel, stored: Any, kT: float, ratio: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One temperature at one noise level, sigma / alpha = ratio."""
    process = model.process
    t = brentq(lambda t: float(process.sigma(t) / process.alpha(t)) - ratio, process.t_min, process.t_max)
    level = process.level(t)
    x = stored.x[-1]
    chosen = np.random.default_rng(1).choice(len(x), options.points, replace=False)
    x_0 = jax.vmap(model.transform.to_model)(jnp.asarray(x[chosen]))
    key_noise, *keys = jax.random.split(jax.random.key(round(1000 * ratio)), options.points + 1)
    noise = jax.vmap(process.subspace.project)(jax.random.normal(key_noise, x_0.shape))
    x_t = level.alpha * x_0 + level.sigma * noise

    @jax.jit
    @jax.vmap
    def exact(key: Any, x_t: Any, x_0: Any) -> tuple[Any, Any]:
        return posterior_mean(model, stored.system, kT, level, key, x_t, x_0, options.chains, options.length)

    means, accepted = exact(jnp.stack(keys), x_t, x_0)
    gain = float(level.alpha / level.sigma)
    scatter = gain**2 * jnp.sum(means.std(axis=1, ddof=1) ** 2, axis=(1, 2)) / options.chains
    true = x_t / level.sigma - gain * means.mean(axis=1)
    learned = -level.sigma * jax.vmap(lambda x: model.score(x, t))(x_t)
    error = jnp.sum((learned - true) ** 2, axis=(1, 2)) - scatter
    rate = -0.5 * (error + 2 * jnp.sum((noise - true) * (true - learned), axis=(1, 2)))
    return {
        "temperature": stored.temperature,
        "ratio": ratio,
        "t": t,
        "acceptance": float(accepted.mean()),
        "signal": float(jnp.mean(jnp.sum(true**2, axis=(1, 2)))),
        "error": float(error.mean()),
        "error_of_error": float(error.std(ddof=1) / np.sqrt(options.points)),
        "monte_carlo": float(scatter.mean()),
        "rate": float(rate.mean()),
        "error_of_rate": float(rate.std(ddof=1) / np.sqrt(options.points)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the name of a shipped model, or a file")
    parser.add_argument("--reference", help="by default the model's name")
    parser.add_argument("--start", type=float, required=True, help="the model's own temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--chains", type=int, default=24)
    parser.add_argument("--length", type=int, default=250)
    options = parser.parse_args()
    model, name = rj.load_model(options.model), options.reference or options.model
    for temperature in options.temperatures:
        stored = load_reference(name, temperature)
        for ratio in options.ratios:
            row = measure(model, stored, stored.system.thermal_energy(options.start), ratio, options)
            print(json.dumps({name: float(f"{value:.4g}") for name, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
