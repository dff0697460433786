"""When a diffusion decides, and when it memorises: speciation, collapse and cloning, in theory and by experiment."""

from .skew import optimal_skew, random_skew, rotation_skew
from .theory import class_separation, collapse_time, same_class_probability, speciation_time

__all__ = [
    "class_separation",
    "collapse_time",
    "optimal_skew",
    "random_skew",
    "rotation_skew",
    "same_class_probability",
    "speciation_time",
]
