"""Inference-time control: targets, rewards, proposals, and steer()."""

from .following import Follow
from .observations import PredictionError, observe, prediction_error
from .proposals import Drift, FeynmanKac, Local, Proposal, Transport
from .renoising import Remask
from .rewards import Reward, RewardError
from .reweight import reweight
from .steer import Steered, SteerInfo, SteeringWarning, steer
from .targets import Target, guide, product, temper, tilt
from .token_proposals import Base, Candidates, TokenProposal
from .tuning import Tuned, tune_proposal

__all__ = [
    "Base",
    "Candidates",
    "Drift",
    "FeynmanKac",
    "Follow",
    "Local",
    "PredictionError",
    "Proposal",
    "Remask",
    "Reward",
    "RewardError",
    "SteerInfo",
    "Steered",
    "SteeringWarning",
    "Target",
    "TokenProposal",
    "Transport",
    "Tuned",
    "guide",
    "observe",
    "prediction_error",
    "product",
    "reweight",
    "steer",
    "temper",
    "tilt",
    "tune_proposal",
]
