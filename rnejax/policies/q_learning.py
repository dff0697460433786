"""A Q-function from logged data alone: implicit Q-learning, which asks for no action that is not there.

    V: expectile regression of min(Q_1, Q_2)(s, a),  |tau - 1(u < 0)| u^2 with u = Q - V, Q a moving average
    Q: regression of r + gamma V(s'), or of r where the environment ended

Source: Kostrikov et al. 2021 (arXiv 2110.06169).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..checkpoint import CheckpointError, load_arrays, save_arrays
from ..checks import check_count, check_key, check_number
from ..kernels import Array
from .transitions import Transitions, check_transitions


class QFunction(NamedTuple):
    """Q(s, a): a pytree that is called with one observation and one action.

    Attributes:
      weights: of the two Q networks and of V.
      shift, scale: of observations.
      unit: what a unit of the networks' output is worth, in rewards.
      low, high: of the actions in the data, (a,): others count as the nearest of these, beyond which nothing is known
        and environments clip.
    """

    weights: Any
    shift: Array
    scale: Array
    unit: Array
    low: Array
    high: Array

    def __call__(self, observation: Array, action: Array) -> Array:
        """The smaller of both networks, in units of reward."""
        return self.unit * jnp.min(self.both(observation, action))

    def both(self, observation: Array, action: Array) -> Array:
        """(2,), in the networks' unit."""
        x = jnp.concatenate([self.seen(observation), jnp.clip(action, self.low, self.high)], axis=-1)
        return jnp.stack([_network(self.weights[name], x) for name in ("q1", "q2")])

    def value(self, observation: Array) -> Array:
        """V(s), in units of reward."""
        return self.unit * _network(self.weights["v"], self.seen(observation))

    def advantage(self, observation: Array, action: Array) -> Array:
        """Q(s, a) - V(s), in units of reward."""
        return self(observation, action) - self.value(observation)

    def seen(self, observation: Array) -> Array:
        return (observation - self.shift) / self.scale


def fit_q_function(
    key: Array,
    data: Transitions,
    *,
    discount: float = 0.99,
    expectile: float = 0.7,
    num_steps: int = 20_000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    averaging: float = 0.005,
    hidden: int = 256,
    steps_per_call: int = 500,
) -> QFunction:
    """Implicit Q-learning.

    Args:
      key: a typed key.
      data: logged transitions; actions as they are.
      discount: gamma.
      expectile: tau, between 0.5 (the value of the policy that made the data) and 1 (that of its best actions).
      num_steps, batch_size, learning_rate: of Adam.
      averaging: the share of new weights in the moving average of Q that V is fitted to.
      hidden: width of the networks' two hidden layers.
      steps_per_call: steps in one compiled call.

    Raises:
      ValueError: for data that are none, or numbers out of range.
      FloatingPointError: if a loss is no number in the end.
    """
    check_key(key)
    data = check_transitions(data)
    for name, number in (("discount", discount), ("expectile", expectile)):
        if not 0 < check_number(name, number) < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {number}")
    for name, count in (("num_steps", num_steps), ("batch_size", batch_size), ("steps_per_call", steps_per_call)):
        check_count(name, count)
    key_init, key_train = jax.random.split(key)
    # Rewards of the order of one per horizon, so that the networks' output is of the order of one.
    unit = max(float(np.abs(data.rewards).mean()) / (1 - discount), 1e-6)
    shift, scale = data.observations.mean(axis=0), data.observations.std(axis=0) + 1e-3
    arrays = {
        "s": (data.observations - shift) / scale,
        "a": data.actions,
        "r": data.rewards / unit,
        "next": (data.next_observations - shift) / scale,
        "goes_on": 1.0 - data.terminals.astype(np.float32),
    }
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arrays)
    sizes = data.observations.shape[1], data.actions.shape[1]
    keys = jax.random.split(key_init, 3)
    weights = {
        "q1": _initial(keys[0], sum(sizes), hidden),
        "q2": _initial(keys[1], sum(sizes), hidden),
        "v": _initial(keys[2], sizes[0], hidden),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def loss(weights: Any, average: Any, batch: Any) -> Array:
        pairs = jnp.concatenate([batch["s"], batch["a"]], axis=-1)
        known = jnp.minimum(*[_network(average[name], pairs) for name in ("q1", "q2")])
        advantage = known - _network(weights["v"], batch["s"])
        of_value = jnp.mean(jnp.abs(expectile - (advantage < 0)) * advantage**2)
        following = jax.lax.stop_gradient(_network(weights["v"], batch["next"]))
        target = batch["r"] + discount * batch["goes_on"] * following
        of_q = sum(jnp.mean((_network(weights[name], pairs) - target) ** 2) for name in ("q1", "q2"))
        return of_value + of_q

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        weights, average, memory = carry
        rows = jax.random.randint(jax.random.fold_in(key_train, index), (batch_size,), 0, len(data.rewards))
        batch = jax.tree.map(lambda leaf: leaf[rows], arrays)
        value, gradient = jax.value_and_grad(loss)(weights, average, batch)
        updates, memory = optimizer.update(gradient, memory)
        weights = optax.apply_updates(weights, updates)
        average = jax.tree.map(lambda old, new: (1 - averaging) * old + averaging * new, average, weights)
        return (weights, average, memory), value

    run = jax.jit(lambda carry, first, count: jax.lax.scan(step, carry, first + jnp.arange(count)), static_argnums=2)
    carry, value = (weights, weights, optimizer.init(weights)), jnp.zeros(1)
    for first in range(0, num_steps, steps_per_call):
        carry, value = run(carry, first, min(steps_per_call, num_steps - first))
    if not bool(jnp.isfinite(value[-1])):
        raise FloatingPointError(f"implicit Q-learning ended with a loss of {float(value[-1])}: lower learning_rate")
    return QFunction(
        carry[0],
        shift=jnp.asarray(shift),
        scale=jnp.asarray(scale),
        unit=jnp.asarray(unit, jnp.float32),
        low=jnp.asarray(data.actions.min(axis=0)),
        high=jnp.asarray(data.actions.max(axis=0)),
    )


def save_q_function(
    path: str | os.PathLike[str], function: QFunction, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write one safetensors file, with ``metadata`` in its header.

    Raises:
      OSError: if it cannot be written.
    """
    save_arrays(path, function._asdict(), dict(metadata or {}) | {"kind": _KIND})


def load_q_function(path: str | os.PathLike[str]) -> QFunction:
    """Read what `save_q_function` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      CheckpointError: if it is none of a Q-function, or of another version.
    """
    arrays, header = load_arrays(path)
    if header.get("kind") != _KIND:
        raise CheckpointError(f"{path} holds no Q-function of rnejax.policies")
    if missing := [name for name in QFunction._fields if name not in arrays]:
        raise CheckpointError(f"{path} was written by another version: it holds no {', '.join(missing)}")
    arrays = jax.tree.map(jnp.asarray, arrays)
    weights = {name: [layers[str(i)] for i in range(len(layers))] for name, layers in arrays.pop("weights").items()}
    return QFunction(weights, **arrays)


_KIND = "q_function"


def _initial(key: Array, inputs: int, hidden: int) -> list[dict[str, Array]]:
    sizes = (inputs, hidden, hidden, 1)
    layers = []
    for k, (a, b) in zip(jax.random.split(key, 3), pairwise(sizes), strict=True):
        layers.append({"kernel": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "bias": jnp.zeros(b)})
    layers[-1]["kernel"] = 0.01 * layers[-1]["kernel"]
    return layers


def _network(layers: list[dict[str, Array]], x: Array) -> Array:
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return (x @ layers[-1]["kernel"] + layers[-1]["bias"])[..., 0]
