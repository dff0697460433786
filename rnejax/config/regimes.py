"""What a study of regimes is: the keys of ``rnejax regimes``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .basics import Grid, Integer, Positive, PositiveInt, Real, Run, Section

Direction = Literal["slowest", "uniform", "fastest"]
Circulation = Literal["none", "random", "rotation", "optimal"]


class MixtureStudy(Section):
    """Two Gaussian classes at +-m, with the precision of the noise's stationary law spread geometrically."""

    kind: Literal["mixture"]
    dimension: Annotated[Integer, Field(ge=2)] = 32
    """d, of the data"""
    ratio: Annotated[Real, Field(ge=1, allow_inf_nan=False)] = 25.0
    """the largest over the smallest rate of the reversible process; their mean is 1"""
    directions: Annotated[tuple[Direction, ...], Field(min_length=1)] = (
        "slowest",
        "uniform",
        "fastest",
    )
    """of m: the slowest or the fastest eigendirection, or all of them alike; |m|^2 = d"""
    variance: Positive = 1.0
    """of each class, in every direction"""
    skews: Annotated[tuple[Circulation, ...], Field(min_length=1)] = ("none", "optimal")
    """circulations of the noise"""
    strength: Positive = 5.0
    """spectral norm of the random and the rotating one"""


class ModelStudy(Section):
    """A model of digits as it is, with a classifier's labels."""

    kind: Literal["model"]
    model: str = "digits"
    """the name of a shipped model, or the path of a saved one"""
    classifier: Literal["judge", "reward"] = "judge"
    """the shipped classifier whose classes are the labels"""
    points: str = "digits_train"
    """what the model was trained on: digits_train, digits_validation, digits_test, or an .npz file with an array x"""
    start: Literal["samples", "points"] = "samples"
    """what is cloned on its way: the model's own samples, or the points, noised"""


class RegimesRun(Run):
    """rnejax regimes: when samples commit to a class, and when to a training point; by theory and by cloning."""

    data: Annotated[MixtureStudy | ModelStudy, Field(discriminator="kind")]
    """what is studied: a mixture under several circulations of the noise, or a model"""
    grid: Grid = Grid()
    """the time grid on which clones run"""
    num_pairs: PositiveInt = 1000
    """pairs of clones at each time"""
    num_times: PositiveInt = 12
    """at how many times samples are cloned"""
    confidence: Annotated[Real, Field(gt=0, lt=1)] = 0.95
    """of the intervals"""
    num_points: Annotated[tuple[Annotated[Integer, Field(ge=2)], ...], Field(min_length=1)] = (100, 10000, 100000000)
    """sizes of training sets, for collapse times"""
    covariance: Literal["reference", "hutchinson", "diagonal", "full"] | None = None
    """of the reverse kernels; by default that which was saved with the model, or the reference's"""
    chunk_size: PositiveInt = 1000
    """pairs that run together"""
