"""What is tuned: a prior, a reward, and all that is known of the posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from ...config import FinetuneRun
from ...persistence import stored_network, training_data_of
from ..folder import RunFolder


@dataclass
class Problem:
    """A prior, a reward, and the model that is to become the posterior.

    Attributes:
      config: what all of it comes from.
      prior: the model as it was.
      posterior: the model that is tuned, with its weights to begin with.
      log_reward: of one example, in nats; and of its condition where there are conditions.
      times: of the paths.
      log_normalizer: log Z, where it is known.
    """

    config: FinetuneRun
    prior: rj.DiffusionModel
    posterior: rj.DiffusionModel
    log_reward: Callable[..., Any]
    times: np.ndarray
    log_normalizer: float | None = None

    num_classes = 0  # conditions that are numbers below this one, each with a log Z of its own
    prior_takes_condition = False
    brings_data = False  # whether `data` has some
    above: float | None = None  # up to this time the posterior is the prior

    def conditions(self, count: int) -> Any:
        """One for each of so many paths to learn from, in turn; None where there are none."""
        return None

    def test_conditions(self, count: int) -> Any:
        """One for each of so many samples that are looked at."""
        return self.conditions(count)

    def steered_conditions(self) -> list[Any]:
        """Those for which the tuned model proposes to `rnejax.steer`."""
        return [jnp.int32(label) for label in range(self.num_classes)] or [None]

    def data(self, key: Any) -> Any:
        """Examples that noised paths begin with, with their conditions; None where they are to come from a buffer."""
        return None

    def exact(self, key: Any, count: int) -> Any:
        """Draws from the posterior itself; None where there are none."""
        return None

    def target(self, condition: Any = None) -> Any:
        """What `rnejax.steer` is given: the posterior as a target, at its full strength all the way.

        A tuned model knows where its paths go: what is left to weigh shows at the end, where the reward of the denoised
        state is that of the sample.
        """
        reward = self.log_reward if condition is None else jax.tree_util.Partial(under, self.log_reward, condition)
        prior = self.prior.with_condition(condition) if self.prior_takes_condition else self.prior
        return rj.tilt(prior, reward, gradient=False, schedule=full_strength)

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        """Numbers of samples, weighted or not."""
        return {}

    def outcomes(self, model: rj.DiffusionModel) -> dict[str, Any]:
        """What comes of the tuned model where it is used."""
        return {}

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        """Pictures of samples, and of what the weights of steered ones have made of them."""

    def save(self, folder: RunFolder, weights: Any) -> None:
        """The tuned model as a file, where it has a form in one."""


def full_strength(t: float) -> float:
    return 1.0


def under(function: Callable[[Any, Any], Any], condition: Any, x: Any) -> Any:
    return function(x, condition)


def save_tuned(folder: RunFolder, config: FinetuneRun, name: str, model: rj.DiffusionModel, **arguments: Any) -> None:
    """``model.safetensors``: other weights of the stored model ``name``, for the same data, of the same network but for
    ``arguments``.
    """
    network = stored_network(name)
    rj.save_model(
        folder.path / "model.safetensors",
        model,
        network=None if network is None else (network[0], network[1] | arguments),
        metadata={
            "seed": config.seed,
            "settings": {"data": training_data_of(name)},
            "finetuning": config.model_dump(mode="json"),
        },
    )
    folder.add("model.safetensors")
