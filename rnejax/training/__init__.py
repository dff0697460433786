"""Losses, the training loop and what judges its result. Nothing here is imported by `import rnejax`."""

from .adapting import low_rank_model, partial_model
from .assessment import Assessment, ModeCoverage, assess, mode_coverage
from .denoising import DenoisingErrors, denoising_evaluator, denoising_loss
from .ema import ema_decay, ema_update
from .energy import energy_loss, fokker_planck_residual, noising_pair, rne_residual, score_of_energy
from .fine_tuning import Examples, FineTuned, trajectory_balance_loss
from .fit import FitResult, FitState, check_state, fit
from .guided import Guidance, Guided
from .losses import drop_labels, score_matching_loss
from .optimizer import learning_rate_schedule, make_optimizer
from .preconditioning import Preconditioned
from .replay import ReplayBuffer
from .times import TimeLaw, low_discrepancy_uniforms, time_law
from .tokens import LikelihoodBound, likelihood_bound, token_bound_loss, token_loss
from .trajectory_balance import (
    Trajectories,
    back_and_forth_residual,
    batch_log_normalizer,
    trajectory_balance_residual,
)

__all__ = [
    "Assessment",
    "DenoisingErrors",
    "Examples",
    "FineTuned",
    "FitResult",
    "FitState",
    "Guidance",
    "Guided",
    "LikelihoodBound",
    "ModeCoverage",
    "Preconditioned",
    "ReplayBuffer",
    "TimeLaw",
    "Trajectories",
    "assess",
    "back_and_forth_residual",
    "batch_log_normalizer",
    "check_state",
    "denoising_evaluator",
    "denoising_loss",
    "drop_labels",
    "ema_decay",
    "ema_update",
    "energy_loss",
    "fit",
    "fokker_planck_residual",
    "learning_rate_schedule",
    "likelihood_bound",
    "low_discrepancy_uniforms",
    "low_rank_model",
    "make_optimizer",
    "mode_coverage",
    "noising_pair",
    "partial_model",
    "rne_residual",
    "score_matching_loss",
    "score_of_energy",
    "time_law",
    "token_bound_loss",
    "token_loss",
    "trajectory_balance_loss",
    "trajectory_balance_residual",
]
