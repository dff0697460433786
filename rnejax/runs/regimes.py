"""rnejax regimes: when samples commit to a class, and when to a training point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import regimes
from ..config import ConfigError, MixtureStudy, ModelStudy, RegimesRun, TrainedStudy
from ..regimes.picture import cloning_curves
from .build import load_classifier, load_named, load_points, make_times
from .folder import Output, require_pictures
from .trained_regimes import make_skew, run_trained, time_of


def run(config: RegimesRun, output: Output) -> None:
    """Speciation and collapse in theory, and phi(t) by cloning."""
    require_pictures()
    if isinstance(config.data, MixtureStudy):
        run_mixture(config, config.data, output)
    elif isinstance(config.data, TrainedStudy):
        run_trained(config, config.data, output)
    else:
        run_model(config, config.data, output)


def run_mixture(config: RegimesRun, study: MixtureStudy, output: Output) -> None:
    """Two Gaussian classes under every circulation."""
    rates = study.ratio ** (np.arange(study.dimension) / (study.dimension - 1))
    rates *= study.dimension / rates.sum()
    processes = {}
    for name in study.skews:
        try:
            skew = make_skew(name, rates, study.strength, config.seed)
            processes[name] = rj.processes.NonReversible(rates, skew, study.variance, t_max=config.grid.t_max)
        except ValueError as error:
            raise ConfigError(f"data.skews: {name}: {error}") from error
    grids = {name: make_times(config.grid, process) for name, process in processes.items()}
    folder = output.open()

    results: dict[str, dict[str, regimes.Cloning]] = {}
    lines: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    arrays: dict[str, Any] = {"precision": rates}
    with folder.timed():
        for name, process in processes.items():
            metrics[name] = describe(process, rates, study, config.num_points)
        for i, direction in enumerate(study.directions):
            mean = class_mean(direction, study.dimension)
            mixture = rj.systems.GaussianMixture([mean, -mean], study.variance**0.5)
            for j, (name, process) in enumerate(processes.items()):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), i), j)
                key_data, key_clones = jax.random.split(key)
                found = regimes.cloning_probability(
                    key_clones,
                    mixture.model(process, "x0", config.covariance or "reference"),
                    grids[name],
                    Side(mean),
                    num_pairs=config.num_pairs,
                    num_times=config.num_times,
                    data=jax.vmap(mixture.sample)(jax.random.split(key_data, config.num_pairs)),
                    confidence=config.confidence,
                    chunk_size=config.chunk_size,
                )
                results.setdefault(direction, {})[name] = found
                times = np.geomspace(found.time[0], found.time[-1], 100)
                phi = regimes.same_class_probability(regimes.class_separation(process, times, mean, study.variance))
                lines.setdefault(direction, {})[name] = times, phi
                metrics[name][direction] = compare(process, found, mean, study.variance)
                for part in ("time", "probability", "lower", "upper"):
                    arrays[f"{direction}_{name}_{part}"] = getattr(found, part)
    folder.record(regimes=metrics, num_pairs=config.num_pairs)
    folder.arrays("samples.npz", **arrays)
    folder.picture("cloning.png", cloning_curves(results, lines))


def run_model(config: RegimesRun, study: ModelStudy, output: Output) -> None:
    """A model as it is, whose classes a classifier tells apart; theory from the covariance of its data."""
    model = load_named(study.model)
    if config.covariance is not None:
        model = model.with_covariance(config.covariance)
    times = make_times(config.grid, model.process)
    label = Classified(load_classifier(study.classifier))
    key_points, key_clones = jax.random.split(jax.random.key(config.seed))
    points, _ = load_points(key_points, study.points, None, model)
    folder = output.open()
    flat = np.asarray(points, np.float64).reshape(len(points), -1)
    covariance = np.cov(flat.T) + 1e-9 * np.eye(flat.shape[1])
    with folder.timed():
        found = regimes.cloning_probability(
            key_clones,
            model,
            times,
            label,
            num_pairs=config.num_pairs,
            num_times=config.num_times,
            data=points if study.start == "points" else None,
            confidence=config.confidence,
            chunk_size=config.chunk_size,
        )
    speciation = time_of(regimes.speciation_time, model.process, data_covariance=covariance)
    collapse = {
        str(n): time_of(regimes.collapse_time, model.process, n, covariance) for n in (len(points), *config.num_points)
    }
    shares = np.bincount(np.asarray(jax.lax.map(label, points, batch_size=500))) / len(points)
    chance = float((shares**2).sum())
    folder.record(
        speciation_time=speciation,
        collapse_time=collapse,
        chance=chance,
        half_way=found.time_at(0.5 * (1 + chance)),
        probability=[{"t": t, "phi": p} for t, p in zip(found.time, found.probability, strict=True)],
        num_pairs=config.num_pairs,
    )
    folder.arrays("samples.npz", **{part: getattr(found, part) for part in ("time", "probability", "lower", "upper")})
    marks = {study.model: {"$t_S$": speciation, "$t_C$": collapse[str(len(points))]}}
    folder.picture(
        "cloning.png", cloning_curves({study.model: {"clones": found}}, level=chance, marks=marks, log_time=False)
    )


class Classified:
    """The class that a classifier finds most probable."""

    def __init__(self, log_probabilities: Any):
        self.log_probabilities = log_probabilities

    def __call__(self, x: Any) -> Any:
        return jnp.argmax(self.log_probabilities(x))


def class_mean(direction: str, dimension: int) -> np.ndarray:
    """m with |m|^2 = d along a direction; rates increase with the index of a coordinate."""
    if direction == "uniform":
        return np.ones(dimension)
    return np.sqrt(dimension) * np.eye(dimension)[0 if direction == "slowest" else -1]


class Side:
    """On which side of the plane between the classes a sample is."""

    def __init__(self, mean: np.ndarray):
        self.mean = jnp.asarray(mean, jnp.result_type(float))

    def __call__(self, x: Any) -> Any:
        return self.mean @ x > 0


def describe(
    process: rj.processes.NonReversible, rates: np.ndarray, study: MixtureStudy, num_points: Sequence[int]
) -> dict[str, Any]:
    """What the circulation is like, and when a training set is memorised."""
    covariances = {"classes": study.variance, "stationary": 1 / rates}
    return {
        "spectral_gap": process.spectral_gap,
        "fastest_rotation": float(np.abs(process.eigenvalues.imag).max()),
        "entropy_production_nats": process.entropy_production,
        "stiffness": process.stiffness,
        "steps_needed": process.steps_needed(),
        "t_max": process.t_max,
        "collapse_time": {
            name: {str(n): time_of(regimes.collapse_time, process, n, covariance) for n in num_points}
            for name, covariance in covariances.items()
        },
    }


def compare(
    process: rj.processes.NonReversible, found: regimes.Cloning, mean: np.ndarray, variance: float
) -> dict[str, Any]:
    """Theory against experiment: speciation times, and how many standard errors phi(t) is off."""
    phi = regimes.same_class_probability(regimes.class_separation(process, found.time, mean, variance))
    errors = np.sqrt(phi * (1 - phi) / found.num_pairs)
    known = errors > 0.5 / found.num_pairs  # elsewhere less than one pair in all is expected on the other side
    return {
        "speciation_time": time_of(regimes.speciation_time, process, mean, variance),
        "speciation_time_by_cloning": found.time_at(float(regimes.same_class_probability(1.0))),
        "largest_z": float(np.abs((found.probability - phi)[known] / errors[known]).max()) if known.any() else 0.0,
    }
