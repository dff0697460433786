"""Inference-time control: targets, rewards, proposals, and steer()."""

from .observations import observe
from .proposals import Drift, FeynmanKac, Local, Proposal
from .rewards import Reward, RewardError
from .steer import Steered, SteerInfo, SteeringWarning, steer
from .targets import Target, guide, product, temper, tilt

__all__ = [
    "Drift",
    "FeynmanKac",
    "Local",
    "Proposal",
    "Reward",
    "RewardError",
    "SteerInfo",
    "Steered",
    "SteeringWarning",
    "Target",
    "guide",
    "observe",
    "product",
    "steer",
    "temper",
    "tilt",
]
