"""25 modes in the plane, of which nine stay: a posterior of which everything is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from ... import plot
from ...config import ConfigError, FinetuneRun, Modes
from ...systems.modes import ModeSelection, mode_selection
from ..build import make_times
from ..folder import RunFolder
from .problem import Problem

NUM_CALIBRATION = 5000  # draws from the mixture, whose law is no matter of chance


@dataclass
class ModesProblem(Problem):
    """A problem of which everything is known."""

    modes: ModeSelection | None = None

    def exact(self, key: Any, count: int) -> Any:
        assert self.modes is not None
        return jax.vmap(self.modes.posterior.sample)(jax.random.split(key, count))

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        from ...training import mode_coverage

        assert self.modes is not None
        found = mode_coverage(self.modes.modes(x), self.modes.shares, log_weights)
        return {
            "total_variation": found.total_variation,
            "total_variation_floor": found.floor,
            "kl_divergence": found.kl_divergence,
            "modes_found": found.num_found,
            "modes_expected": found.num_expected,
            "shares": found.shares,
        }

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        assert self.modes is not None
        count = 2000
        keys = jax.random.split(jax.random.key(0), count)
        panels = {
            "prior": jax.vmap(self.modes.prior.sample)(keys),
            "posterior": jax.vmap(self.modes.posterior.sample)(keys),
            "tuned": x[:count],
        }
        folder.picture(
            "samples.png", plot.scatters(panels if corrected is None else panels | {"corrected": corrected[:count]})
        )


def build_modes(config: FinetuneRun, settings: Modes) -> ModesProblem:
    """The exact model of 25 modes, and a network on top of it."""
    from ...networks import build, functional
    from ...training import Guidance, Guided

    modes = mode_selection()
    try:
        process = rj.processes.Cosine(t_max=settings.t_max, data_std=modes.prior.std)
    except ValueError as error:
        raise ConfigError(f"problem: {error}") from error
    times = make_times(config.grid, process)
    prior = modes.prior.model(process, "x0")
    if config.covariance is None:
        data = jax.vmap(modes.prior.sample)(jax.random.split(jax.random.key(0), NUM_CALIBRATION))
        prior = rj.calibrate(jax.random.key(1), prior, times, data=data)
    else:
        prior = prior.with_covariance(config.covariance)
    network = build("mlp", jax.random.key(config.seed), shape=(2,), hidden=settings.hidden, depth=settings.depth)
    apply, params = functional(network)
    guided = Guided(prior, apply, None if config.reward_gradient is False else modes.log_reward, trust=config.trust)
    posterior = guided.model(Guidance(params, jnp.ones(())))
    return ModesProblem(config, prior, posterior, modes.log_reward, times, 0.0, modes=modes)
