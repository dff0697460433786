"""A model as the proposal of another's target: one that has been tuned towards it, say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..kernels import Kernel
from ..model import DiffusionModel
from ..processes import Process
from .proposals import Local


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Follow:
    """A is the reverse kernel of a model that is no part of the target, B the noising kernel.

    Weights are the target's over this model's, so that whatever it was tuned to (`rnejax.training`), what it has not
    learned is corrected. ``steer(..., proposal=model)`` means this. It costs an evaluation of this model per particle
    and step, beside those of the target's.

    A tuned model moves towards what the reward wants long before the reward of a denoised state says so. On the way,
    weights compare the prior's law with its own, and who resamples by them undoes what it has learned. Count the reward
    fully from the start and resample at the end, where both agree:

        target = rj.tilt(prior, reward, schedule=lambda t: 1.0)
        rj.steer(key, target, times, proposal=tuned, window=(times[0], times[len(times) // 5]))

    Attributes:
      model: of the target's process and shape.
    """

    model: DiffusionModel

    follows_noising = True

    @property
    def is_discrete(self) -> bool:
        return self.model.process.is_discrete

    def needs_auxiliary(self, total_exponents: np.ndarray) -> bool:
        return False

    def reverse(self, transition: Any, at_t: Local, exponent: Any, kernels: tuple[Any, ...]) -> Kernel:
        kernel: Kernel = kernels[-1]  # those of the target come first
        return kernel

    def forward(self, transition: Any, at_s: Local, exponent: Any) -> Kernel:
        kernel: Kernel = transition.forward(at_s.x)
        return kernel

    @classmethod
    def of(cls, proposal: Any) -> Follow | None:
        """The proposal that follows a model, itself or what draws candidates; None where none is followed."""
        if isinstance(proposal, cls):
            return proposal
        drawn = getattr(proposal, "proposal", None)
        return drawn if isinstance(drawn, cls) else None

    def check(self, process: Process, shape: tuple[int, ...]) -> None:
        """Raises ValueError for the model of another process or shape than the target's."""
        if self.model.process != process or self.model.shape != shape:
            raise ValueError(
                f"the proposal is a model of {self.model.process} with shape {self.model.shape}, the target's is of "
                f"{process} with {shape}: only a model of the same process and shape can propose"
            )
