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


class TrainedStudy(Section):
    """Networks that are trained on two of the digits of scikit-learn (8 x 8 pixels), under several noises."""

    kind: Literal["small_digits"]
    digits: tuple[Annotated[Integer, Field(ge=0, le=9)], Annotated[Integer, Field(ge=0, le=9)]] = (0, 1)
    """the two classes"""
    num_train: Annotated[Integer, Field(ge=4)] = 240
    """images that networks see; the others judge"""
    shrinkage: Annotated[Real, Field(gt=0, le=1)] = 0.2
    """of the covariance within classes that noise and reference know, towards a multiple of the identity"""
    skews: Annotated[tuple[Circulation, ...], Field(min_length=1)] = ("none", "optimal")
    """circulations of the noise whose stationary law has the covariance of the data"""
    isotropic: bool = True
    """whether to compare them with noise that is alike in all directions"""
    strength: Positive = 5.0
    """spectral norm of the random and the rotating circulation"""
    num_seeds: PositiveInt = 3
    """networks for each noise"""
    hidden: PositiveInt = 256
    """width of the networks"""
    depth: PositiveInt = 2
    """their residual blocks"""
    num_steps: Annotated[Integer, Field(ge=10)] = 2000
    """of training"""
    batch_size: PositiveInt = 128
    """images in each"""
    learning_rate: Positive = 1e-3
    """of Adam, at its largest"""
    few_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (4, 8, 16, 32, 64)
    """numbers of steps at which samples are judged"""
    many_steps: PositiveInt = 256
    """at which a model's samples are taken for all that it knows"""
    num_samples: Annotated[Integer, Field(ge=8)] = 1000
    """that are judged, of every network"""


class RegimesRun(Run):
    """rnejax regimes: when samples commit to a class, and when to a training point; by theory and by cloning."""

    data: Annotated[MixtureStudy | ModelStudy | TrainedStudy, Field(discriminator="kind")]
    """what is studied: a mixture or networks under several noises, or a model as it is"""
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
