"""When a diffusion decides, and when it memorises: speciation, collapse and cloning, in theory and by experiment."""

from .cloning import Cloning, cloning_probability, commitment_times, pooled
from .empirical import empirical_model, nearest_point
from .picture import cloning_curves
from .skew import optimal_skew, random_skew, rotation_skew
from .theory import NoTransitionError, class_separation, collapse_time, same_class_probability, speciation_time

__all__ = [
    "Cloning",
    "NoTransitionError",
    "class_separation",
    "cloning_curves",
    "cloning_probability",
    "collapse_time",
    "commitment_times",
    "empirical_model",
    "nearest_point",
    "optimal_skew",
    "pooled",
    "random_skew",
    "rotation_skew",
    "same_class_probability",
    "speciation_time",
]
