"""What `rnejax finetune` tunes: 25 modes of which nine stay, a stored model, the middle of sentences, or a policy."""

from __future__ import annotations

from ...config import FinetuneRun, Infilling, Modes, Policy
from .infilling import build_infilling
from .modes import build_modes
from .policy import build_policy
from .pretrained import build_pretrained
from .problem import Problem

__all__ = ["Problem", "build_problem"]


def build_problem(config: FinetuneRun) -> Problem:
    """What a configuration asks for.

    Raises:
      ConfigError: for models, rewards or grids that cannot be.
    """
    if isinstance(config.problem, Modes):
        return build_modes(config, config.problem)
    if isinstance(config.problem, Infilling):
        return build_infilling(config, config.problem)
    if isinstance(config.problem, Policy):
        return build_policy(config, config.problem)
    return build_pretrained(config, config.problem)
