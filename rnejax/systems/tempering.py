r"""Reference samples: parallel tempering with Hamiltonian Monte Carlo, many chains at once.

A chain holds one configuration at each temperature of a ladder. A round moves all of them by HMC (blackjax's kernel)
and then offers swaps between neighbours, even and odd pairs in turn: x_i at T_i and x_j at T_j change places with
probability min(1, exp[(1/kT_i - 1/kT_j)(U(x_i) - U(x_j))]). So those of cold, slow temperatures are renewed by those
of hot, fast ones.

Half of the chains start from a quenched configuration, half from runs at the highest temperature: where both halves
agree, no barrier between the two was missed. Step sizes are tuned while burning in, and fixed afterwards.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_count, check_key
from ..kernels import Array, Subspace
from ..smc.progress import piece_length, progress_bar


class System(Protocol):
    """What is sampled: an energy on one configuration, in the system's own units."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def subspace(self) -> Subspace: ...
    def start(self, key: Array) -> Array: ...
    def energy(self, x: Array) -> Array: ...
    def thermal_energy(self, temperature: Any) -> float: ...


class Reference(NamedTuple):
    """Samples at every temperature, and how far they can be trusted.

    Attributes:
      x: (temperatures, chains, samples, *shape), on the system's subspace.
      energy: (temperatures, chains, samples).
      temperatures: in the order given.
      acceptance: of HMC moves after burning in, (temperatures,).
      swap_rate: accepted share of the swaps between neighbours, (temperatures - 1,).
      step_size: of the integrator, (temperatures,).
      effective_sample_size: of the mean energy, over all chains, (temperatures,).
      rhat: potential scale reduction of the energy over chains, (temperatures,); 1 where they agree.
      halves_z: difference of the mean energies of chains started cold and hot, in standard errors, (temperatures,).
    """

    x: Array
    energy: Array
    temperatures: np.ndarray
    acceptance: Array
    swap_rate: Array
    step_size: Array
    effective_sample_size: np.ndarray
    rhat: np.ndarray
    halves_z: np.ndarray


class Replicas(NamedTuple):
    """All chains: configurations (chains, temperatures, *shape), their energies, and the step sizes (temperatures,)."""

    x: Array
    energy: Array
    log_step_size: Array


def parallel_tempering(
    key: Array,
    system: System,
    temperatures: Any,
    start: Any = None,
    *,
    num_chains: int = 16,
    num_samples: int = 500,
    rounds_between: int = 5,
    burn_in: int = 1000,
    integration_steps: int = 10,
    step_size: float = 0.01,
    target_acceptance: float = 0.8,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Reference:
    """Samples of exp(-energy / kT) at every temperature of a ladder.

    Args:
      key: a typed key.
      system: an energy; see `System`.
      temperatures: strictly monotone, in the system's units, so close that neighbours swap (a rate of 0.2 or more).
      start: one configuration of finite energy, of ``system.shape``; by default what ``system.start`` draws.
      num_chains: an even number; half of them start from a quenched ``start``, half from runs at the highest
        temperature.
      num_samples: of each chain at each temperature.
      rounds_between: rounds from one sample to the next.
      burn_in: rounds before the first; step sizes are tuned in all but the last tenth.
      integration_steps: leapfrog steps of one HMC move; the step size varies by 20 % from move to move, so that no
        orbit closes on itself.
      step_size: where tuning starts.
      target_acceptance: where tuning aims.
      batch_size: configurations that move at a time; all by default. On a CPU, where those of a few fit into the cache
        and those of all do not, 16 took two thirds of the time (alanine dipeptide). Numbers change by rounding only.
      progress: a bar; by default on a terminal only.

    Raises:
      ValueError: for temperatures that are not positive or not monotone, an odd number of chains, a start of another
        shape or of infinite energy, counts that are no positive integers.
    """
    check_key(key)
    thermal = check_ladder(system, temperatures)
    num_chains = check_count("num_chains", num_chains)
    if num_chains % 2:
        raise ValueError(f"num_chains must be even, half of them start cold and half hot, got {num_chains}")
    for name, count in [("num_samples", num_samples), ("rounds_between", rounds_between), ("burn_in", burn_in)]:
        check_count(name, count)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    key_start, key_hot, key_burn, key_run = jax.random.split(key, 4)
    start = jnp.asarray(system.start(key_start) if start is None else start, jnp.result_type(float))
    if start.shape != system.shape or not bool(jnp.isfinite(system.energy(start))):
        raise ValueError(f"start must be one configuration of shape {system.shape} and of finite energy")
    beta = jnp.asarray(1 / thermal, start.dtype)
    hmc = _hmc(system, check_count("integration_steps", integration_steps))
    move = partial(_round, system, hmc, batch_size, beta)

    def begin(x: Array) -> Replicas:
        return Replicas(x, jax.vmap(jax.vmap(system.energy))(x), jnp.full(x.shape[1], np.log(step_size), x.dtype))

    def tune(move: Any, replicas: Replicas, step: tuple[Array, Array]) -> tuple[Replicas, None]:
        key, number = step
        replicas, acceptance, _ = move(key, replicas, number)
        # Robbins and Monro; the gain falls as a power between 1/2 and 1, so that it stops where it should.
        gain = jnp.where(number < 0.9 * burn_in, 1.0 / (1.0 + number) ** 0.6, 0.0)
        return replicas._replace(log_step_size=replicas.log_step_size + gain * (acceptance - target_acceptance)), None

    def sample(replicas: Replicas, step: tuple[Array, Array]) -> tuple[Replicas, Any]:
        key, number = step

        def one(replicas: Replicas, inner: tuple[Array, Array]) -> tuple[Replicas, Any]:
            replicas, acceptance, swaps = move(inner[0], replicas, inner[1])
            return replicas, (acceptance, swaps)

        inner = (jax.random.split(key, rounds_between), number * rounds_between + jnp.arange(rounds_between))
        replicas, (acceptance, swaps) = jax.lax.scan(one, replicas, inner)
        return replicas, (replicas.x, replicas.energy, acceptance.mean(axis=0), swaps)

    bar = sys.stderr.isatty() if progress is None else progress
    at_hottest = partial(_round, system, hmc, batch_size, beta[np.argmax(thermal)][None])
    alone = begin(jnp.broadcast_to(start, (num_chains // 2, 1, *start.shape)))
    hot = _in_pieces(partial(tune, at_hottest), alone, key_hot, burn_in, bar)[0].x
    cold = jnp.broadcast_to(quench(system, start), hot.shape)
    replicas = begin(jnp.repeat(jnp.concatenate([cold, hot]), len(thermal), axis=1))
    replicas, _ = _in_pieces(partial(tune, move), replicas, key_burn, burn_in, bar)
    replicas, (x, energy, acceptance, swaps) = _in_pieces(sample, replicas, key_run, num_samples, bar)
    # From (samples, chains, temperatures, ...) to (temperatures, chains, samples, ...).
    x = jnp.swapaxes(x, 0, 2)
    energy = jnp.swapaxes(energy, 0, 2)
    offered = jnp.isfinite(swaps)
    return Reference(
        x,
        energy,
        np.asarray(temperatures, np.float64),
        acceptance.mean(axis=0),
        jnp.sum(jnp.where(offered, swaps, 0.0), axis=(0, 1, 2)) / jnp.maximum(jnp.sum(offered, axis=(0, 1, 2)), 1),
        jnp.exp(replicas.log_step_size),
        *convergence(energy),
    )


def check_ladder(system: System, temperatures: Any) -> np.ndarray:
    """kT of every temperature; ValueError where they are not positive numbers in strict order."""
    ladder = np.atleast_1d(np.asarray(temperatures, np.float64))
    thermal = np.asarray([system.thermal_energy(float(temperature)) for temperature in ladder])
    if ladder.ndim != 1 or not (np.all(np.diff(thermal) > 0) or np.all(np.diff(thermal) < 0)):
        raise ValueError(f"temperatures must be strictly increasing or decreasing, got {ladder}")
    return thermal


def convergence(energy: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effective sample size, R-hat, and z between both halves of the chains, of energies (temperatures, chains, n)."""
    from blackjax.diagnostics import effective_sample_size, potential_scale_reduction

    energies = np.asarray(energy, np.float64)
    sizes, rhats, scores = [], [], []
    half = energies.shape[1] // 2
    for of_chain in energies:
        sizes.append(float(effective_sample_size(of_chain)))
        rhats.append(float(potential_scale_reduction(of_chain)))
        means, variances = [], []
        for chains in (of_chain[:half], of_chain[half:]):
            means.append(chains.mean())
            variances.append(chains.var() / float(effective_sample_size(chains)))
        scores.append((means[0] - means[1]) / np.sqrt(sum(variances)))
    return np.asarray(sizes), np.asarray(rhats), np.asarray(scores)


def quench(system: System, x: Array, num_steps: int = 2000) -> Array:
    """A nearby minimum of the energy, by L-BFGS (optax)."""
    import optax

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(system.energy)

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
        x, state = carry
        value, gradient = value_and_grad(x, state=state)
        updates, state = solver.update(gradient, state, x, value=value, grad=gradient, value_fn=system.energy)
        moved = optax.apply_updates(x, updates)
        better = system.energy(moved) <= value
        return (jnp.where(better, moved, x), state), None

    (x, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, solver.init(x)), None, length=num_steps))(x)
    return system.subspace.project(x)


def _hmc(system: System, integration_steps: int) -> Any:
    """One HMC move of one configuration: (key, x, beta, step size) -> (x, acceptance probability)."""
    import blackjax

    kernel = blackjax.hmc.build_kernel()

    def move(key: Array, x: Array, beta: Array, step_size: Array) -> tuple[Array, Array]:
        def log_density(x: Array) -> Array:
            return -beta * system.energy(x)

        key_jitter, key_move = jax.random.split(key)
        step_size = step_size * jax.random.uniform(key_jitter, (), x.dtype, 0.8, 1.2)
        state = blackjax.hmc.init(x, log_density)
        mass = jnp.ones(x.size, x.dtype)
        state, info = kernel(key_move, state, log_density, step_size, mass, integration_steps)
        # The energy does not change when all of it moves: what has drifted away is brought back.
        return system.subspace.project(state.position), info.acceptance_rate

    return move


def _round(
    system: System, hmc: Any, batch_size: int | None, beta: Array, key: Array, replicas: Replicas, number: Array
) -> tuple[Replicas, Array, Array]:
    """HMC and swaps: the replicas, acceptance (temperatures,), swaps (chains, pairs), NaN where none was offered."""
    num_chains, num_temperatures = replicas.energy.shape
    key_move, key_swap = jax.random.split(key)
    keys = jax.random.split(key_move, num_chains * num_temperatures)
    by_temperature = [jnp.tile(each, num_chains) for each in (beta, jnp.exp(replicas.log_step_size))]
    x, acceptance = jax.lax.map(
        lambda each: hmc(*each),
        (keys, replicas.x.reshape(-1, *system.shape), *by_temperature),
        batch_size=len(keys) if batch_size is None else batch_size,
    )
    x, acceptance = x.reshape(replicas.x.shape), acceptance.reshape(replicas.energy.shape)
    energy = jax.vmap(jax.vmap(system.energy))(x)

    log_ratio = (beta[:-1] - beta[1:]) * (energy[:, :-1] - energy[:, 1:])
    uniform = jax.random.uniform(key_swap, log_ratio.shape, x.dtype)
    offered = jnp.arange(num_temperatures - 1) % 2 == number % 2
    swapped = (jnp.log(uniform) < log_ratio) & offered
    index = jnp.broadcast_to(jnp.arange(num_temperatures), energy.shape)
    up = jnp.pad(swapped, ((0, 0), (0, 1)))  # with the next one
    down = jnp.pad(swapped, ((0, 0), (1, 0)))  # with the one before
    index = index + up.astype(int) - down.astype(int)
    chains = jnp.arange(num_chains)[:, None]
    swaps = jnp.where(offered, swapped.astype(x.dtype), jnp.nan)
    return Replicas(x[chains, index], energy[chains, index], replicas.log_step_size), acceptance.mean(axis=0), swaps


def _in_pieces(step: Any, carry: Any, key: Array, count: int, bar: bool) -> tuple[Any, Any]:
    """A scan of ``count`` steps in compiled pieces, between which a bar moves."""
    keys, numbers = jax.random.split(key, count), jnp.arange(count)
    length = piece_length(count)
    scan = jax.jit(lambda carry, steps: jax.lax.scan(step, carry, steps))
    outs = []
    with progress_bar(count, bar) as advance:
        for first in range(0, count, length):
            piece = slice(first, min(first + length, count))
            carry, out = scan(carry, (keys[piece], numbers[piece]))
            outs.append(jax.device_get(out))
            advance(piece.stop - piece.start)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *outs)
