"""Offline reinforcement learning with diffusion policies: logged data, a Q-function learned from them, environments.

A policy is a diffusion model of actions whose condition is what is observed. Cloned from the data it is a prior, and
exp(Q / temperature) a reward: relative trajectory balance (`rnejax.training`) makes it its own posterior.
"""

from .diffusion_policy import act, clone, policy_model
from .environments import collect, evaluate
from .q_learning import QFunction, fit_q_function, load_q_function, save_q_function
from .transitions import Transitions, from_minari, load_transitions, save_transitions

__all__ = [
    "QFunction",
    "Transitions",
    "act",
    "clone",
    "collect",
    "evaluate",
    "fit_q_function",
    "from_minari",
    "load_q_function",
    "load_transitions",
    "policy_model",
    "save_q_function",
    "save_transitions",
]
