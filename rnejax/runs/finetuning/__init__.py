"""What `rnejax finetune` tunes: 25 modes of which nine stay, a model that is there, or the middle of sentences."""

from __future__ import annotations

from ...config import FinetuneRun, Infilling, Modes
from .infilling import build_infilling
from .modes import build_modes
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
    return build_pretrained(config, config.problem)
