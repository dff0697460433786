"""Networks on two digits under several noises: when they decide, when they memorise, and what few steps cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

import rnejax as rj

from .. import plot, regimes
from ..config import ConfigError, RegimesRun, TrainedStudy
from ..regimes.picture import cloning_curves
from ..systems import small_digits
from ..systems.metrics import relative_energy_distance
from .build import make_times
from .folder import Output, RunFolder, summary

GRIDS = ("uniform", "quadratic", "log_time")
COLUMNS = 8
"""images of a row of the sheet"""


class TwoClasses(NamedTuple):
    """Images of two digits in the coordinates of the noise, and their moments.

    Centred half-way between the classes, and scaled so that the precision U of the noise has tr U = d.

    Attributes:
      train, test: images (n, d).
      side: of the test images, True for the first digit, (n,).
      centre: in grey levels from 0 to 1, (d,).
      scale: coordinates per grey level.
      mean: m, half the difference of the classes' means, (d,).
      within: the covariance of the training images within their classes, (d, d).
      known: what noise and reference know of it: shrunk towards a multiple of the identity, plus m m^T.
    """

    train: np.ndarray
    test: np.ndarray
    side: np.ndarray
    centre: np.ndarray
    scale: float
    mean: np.ndarray
    within: np.ndarray
    known: np.ndarray

    @property
    def direction(self) -> np.ndarray:
        """Fisher's: the sign of its product with an image tells the classes apart."""
        shrunk = self.known - np.outer(self.mean, self.mean)
        found: np.ndarray = np.linalg.solve(shrunk, self.mean)
        return found

    def pictures(self, x: np.ndarray) -> np.ndarray:
        """Grey levels from 0 to 1, (n, height, width), with a white margin: digits fill their images to the edge."""
        levels = (self.centre + x / self.scale).reshape(-1, *small_digits.IMAGE_SHAPE)
        return np.pad(levels, ((0, 0), (1, 1), (1, 1)))


def run_trained(config: RegimesRun, study: TrainedStudy, output: Output) -> None:
    """Train under every noise, clone, and count steps."""
    data = two_classes(study, config.seed)
    noises = make_noises(config, study, data)
    grids = {name: make_times(config.grid, process) for name, process in noises.items()}
    folder = output.open()
    metrics: dict[str, Any] = {}
    arrays: dict[str, Any] = {"train": data.train, "test": data.test}
    panels, lines, marks = {}, {}, {}
    quality: dict[str, np.ndarray] = {}
    sheets: dict[str, np.ndarray] = {}
    floor = relative_energy_distance(data.train, data.test)
    accuracy = float(((data.test @ data.direction > 0) == data.side).mean())
    folder.record(num_train=len(data.train), num_test=len(data.test), label_accuracy=accuracy, train_to_test=floor)
    with folder.timed():
        for i, (name, process) in enumerate(noises.items()):
            key = jax.random.fold_in(jax.random.key(config.seed), i)
            models, held_out = train(key, process, study, data, folder, name)
            clones = clone(jax.random.fold_in(key, 1), models, grids[name], data, config)
            judged = judge(jax.random.fold_in(key, 2), models, study, data)
            described, line, mark = describe(process, data, clones, config)
            metrics[name] = described | {"held_out_loss": summary(held_out)} | judged.described
            panels[name], lines[name], marks[name] = clones, {"class": line}, mark
            quality[name], sheets[name] = judged.to_itself, data.pictures(judged.shown)
            for label, found in clones.items():
                for part in ("time", "probability", "lower", "upper"):
                    arrays[f"{name}_{label.replace(', ', '_').replace(' ', '_')}_{part}"] = getattr(found, part)
            arrays[f"{name}_to_itself"], arrays[f"{name}_to_test"] = judged.to_itself, judged.to_test
            folder.record(regimes=metrics)
    folder.arrays("samples.npz", **arrays)
    folder.picture("cloning.png", cloning_curves(panels, lines, marks=marks))
    folder.picture("quality.png", draw_quality(study, quality))
    rows = [f"{count} steps" for count in (*study.few_steps, study.many_steps)]
    sheets["images"] = data.pictures(data.test[: COLUMNS * len(rows)])
    folder.picture("samples.png", plot.compare_sheets(sheets, columns=COLUMNS, value_range=(1.0, 0.0), row_labels=rows))


def time_of(criterion: Callable[..., float], *arguments: Any, **options: Any) -> float:
    """A time of transition, NaN where there is none: a study goes on without it."""
    try:
        return criterion(*arguments, **options)
    except regimes.NoTransitionError:
        return math.nan


# ------------------------------------------------------------------------------------------------------------ the data


def two_classes(study: TrainedStudy, seed: int) -> TwoClasses:
    """The images, split at random.

    Raises:
      ConfigError: for equal digits, more training images than there are, or where scikit-learn is missing.
    """
    try:
        images, labels = small_digits.load(study.digits)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"data.digits: {error}") from error
    order = np.random.default_rng(seed).permutation(len(images))
    images, side = images[order], labels[order] == study.digits[0]
    n, d = study.num_train, images.shape[1]
    few = min(side[:n].sum(), (~side[:n]).sum())
    if len(images) - n < 2 or few < 2:
        raise ConfigError(
            f"data.num_train = {n}: of {len(images)} images at least 2 must be left to judge, and at least 2 of either "
            "digit be trained on"
        )
    train, halves = images[:n], [images[:n][side[:n]], images[:n][~side[:n]]]
    centre = 0.5 * (halves[0].mean(0) + halves[1].mean(0))
    mean = 0.5 * (halves[0].mean(0) - halves[1].mean(0))
    residuals = np.concatenate([half - half.mean(0) for half in halves])
    within = residuals.T @ residuals / (n - 2)
    level = np.trace(within) / d
    known = (1 - study.shrinkage) * within + study.shrinkage * level * np.eye(d) + np.outer(mean, mean)
    scale = float(np.sqrt(np.trace(np.linalg.inv(known)) / d))
    # Pixels that are always white have no variance at all; theory asks for some.
    within = within + 1e-6 * level * np.eye(d)
    return TwoClasses(
        train=(train - centre) * scale,
        test=(images[n:] - centre) * scale,
        side=side[n:],
        centre=centre,
        scale=scale,
        mean=mean * scale,
        within=within * scale**2,
        known=known * scale**2,
    )


def make_noises(config: RegimesRun, study: TrainedStudy, data: TwoClasses) -> dict[str, rj.processes.NonReversible]:
    """The processes by name; all have a reference of the data's covariance."""
    precision = np.linalg.inv(data.known)
    precision = 0.5 * (precision + precision.T)
    options: dict[str, Any] = {"t_max": config.grid.t_max}
    if config.grid.t_min is not None:
        options["t_min"] = config.grid.t_min
    noises = {}
    try:
        if study.isotropic:
            isotropic = np.ones(len(precision))
            noises["isotropic"] = rj.processes.NonReversible(isotropic, data_covariance=data.known, **options)
        for name in study.skews:
            skew = make_skew(name, precision, study.strength, config.seed)
            noises["reversible" if name == "none" else name] = rj.processes.NonReversible(precision, skew, **options)
    except ValueError as error:
        raise ConfigError(f"grid: {error}") from error
    return noises


def make_skew(name: str, precision: np.ndarray, strength: float, seed: int) -> np.ndarray | None:
    """A circulation by name."""
    if name == "none":
        return None
    if name == "random":
        return regimes.random_skew(seed, len(precision), strength)
    if name == "rotation":
        return regimes.rotation_skew(precision, strength)
    return regimes.optimal_skew(precision)


# -------------------------------------------------------------------------------------------------------- the networks


def train(
    key: Any, process: Any, study: TrainedStudy, data: TwoClasses, folder: RunFolder, name: str
) -> tuple[list[rj.DiffusionModel], list[float]]:
    """Networks over the reference, one per seed, on times even in log t; and their losses on the other images."""
    from ..networks import build, functional, save_network
    from ..training import Preconditioned, fit, make_optimizer, score_matching_loss

    size = data.train.shape[1]
    arguments = {"shape": (size,), "hidden": study.hidden, "depth": study.depth, "time_scale": "log"}
    low, high = np.log(process.t_min), np.log(process.t_max)
    apply, _ = functional(build("mlp", key, **arguments))
    network = Preconditioned(process, apply)

    def loss(key: Any, params: Any, x0: Any) -> Any:
        return score_matching_loss(
            key,
            process,
            partial(network.at_time, params),
            x0,
            prediction="x0",
            weighting="posterior",
            times=lambda uniforms: jnp.exp(low + (high - low) * uniforms),
        )

    test = jnp.asarray(np.tile(data.test, (50, 1)), jnp.float32)
    judge = jax.jit(lambda params: jnp.mean(loss(jax.random.fold_in(key, 1), params, test)))
    models, held_out = [], []
    for seed in range(study.num_seeds):
        key_init, key_fit = jax.random.split(jax.random.fold_in(key, 2 + seed))
        _, params = functional(build("mlp", key_init, **arguments))
        optimizer = make_optimizer(study.learning_rate, num_steps=study.num_steps)
        fitted = fit(
            key_fit,
            loss,
            params,
            jnp.asarray(data.train, jnp.float32),
            optimizer,
            num_steps=study.num_steps,
            batch_size=min(study.batch_size, len(data.train)),
            steps_per_call=max(each for each in (1, 2, 5, 10) if study.num_steps % each == 0),
            report_every=study.num_steps,
            save_every=study.num_steps,
        )
        held_out.append(float(judge(fitted.average)))
        file = f"network_{name}_{seed}.safetensors"
        save_network(folder.path / file, "mlp", arguments, fitted.average, {"noise": name, "seed": seed})
        folder.add(file)
        models.append(
            rj.DiffusionModel(process, network, "x0", shape=(size,), params=fitted.average, noise_level="level")
        )
    return models, held_out


# ---------------------------------------------------------------------------------------------------------- the clones


def clone(
    key: Any, models: list[rj.DiffusionModel], times: np.ndarray, data: TwoClasses, config: RegimesRun
) -> dict[str, regimes.Cloning]:
    """How often clones of noised training images end in one class, and nearest to one training image.

    Beside the networks, pooled over seeds, the exact model of the training images, which only memorises: what
    has decided on an image has decided on a class.
    """
    direction = jnp.asarray(data.direction, jnp.float32)
    point = regimes.nearest_point(data.train)
    memory = regimes.empirical_model(models[0].process, data.train)

    def side(x: Any) -> Any:
        return direction @ x > 0

    labels = {
        "class": (models, side),
        "image": (models, point),
        "class, exact model": ([memory], side),
        "image, exact model": ([memory], point),
    }
    found = {}
    for i, (name, (of, label)) in enumerate(labels.items()):
        runs = [
            regimes.cloning_probability(
                jax.random.fold_in(jax.random.fold_in(key, i), j),
                model,
                times,
                label,
                num_pairs=config.num_pairs,
                num_times=config.num_times,
                data=data.train,
                confidence=config.confidence,
                chunk_size=config.chunk_size,
            )
            for j, model in enumerate(of)
        ]
        found[name] = regimes.pooled(runs, config.confidence)
    return found


def describe(
    process: Any, data: TwoClasses, clones: dict[str, regimes.Cloning], config: RegimesRun
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray], dict[str, float]]:
    """Numbers, the line of theory for two Gaussian classes, and the times of the two transitions."""
    times = np.geomspace(clones["class"].time[0], clones["class"].time[-1], 200)
    phi = regimes.same_class_probability(regimes.class_separation(process, times, data.mean, data.within))
    covariance = data.within + np.outer(data.mean, data.mean)
    speciation = time_of(regimes.speciation_time, process, data.mean, data.within)
    collapse = time_of(regimes.collapse_time, process, len(data.train), covariance)
    level = float(regimes.same_class_probability(1.0))
    numbers = {
        "t_max": float(process.t_max),
        "spectral_gap": process.spectral_gap,
        "fastest_rotation": float(np.abs(process.eigenvalues.imag).max()),
        "steps_needed": process.steps_needed(),
        "speciation_time": speciation,
        "speciation_time_by_covariance": time_of(regimes.speciation_time, process, data_covariance=covariance),
        "speciation_time_by_cloning": {name: clones[name].time_at(level) for name in ("class", "class, exact model")},
        "collapse_time": collapse,
        "collapse_time_by_cloning": {name: clones[name].time_at(0.5) for name in ("image", "image, exact model")},
    }
    return numbers, (times, phi), {"$t_S$": speciation, "$t_C$": collapse}


# ----------------------------------------------------------------------------------------------------------- few steps


class Judged(NamedTuple):
    """Distances of samples, (seeds, grids, numbers of steps), and what metrics.json says of them.

    ``shown`` are some of the first network's, in rows of as many steps, on the grid that suits it best.
    """

    to_itself: np.ndarray
    to_test: np.ndarray
    shown: np.ndarray
    described: dict[str, Any]


def judge(key: Any, models: list[rj.DiffusionModel], study: TrainedStudy, data: TwoClasses) -> Judged:
    """Samples at few steps against the model's own at many, and against images that no network has seen."""
    process = models[0].process
    shape = len(models), len(GRIDS), len(study.few_steps)
    to_itself, to_test = np.zeros(shape), np.zeros(shape)
    some: dict[tuple[int, int], np.ndarray] = {}
    at_best: dict[str, list[float]] = {"to_test": [], "copies": [], "first_class": [], "floor": []}

    def samples(index: int, model: rj.DiffusionModel, num_steps: int, kind: str) -> np.ndarray:
        times = rj.time_grid(process, num_steps, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rj.processes.CoarseGridWarning)  # coarse grids are what is judged
            found = rj.sample(jax.random.fold_in(key, index), model, times, study.num_samples)
        return np.asarray(found.x, np.float64)

    for i, model in enumerate(models):
        count = len(GRIDS) * len(study.few_steps) + 2
        best, again = (samples(i * count + j, model, study.many_steps, "log_time") for j in (0, 1))
        at_best["to_test"].append(relative_energy_distance(best, data.test))
        at_best["floor"].append(relative_energy_distance(best, again))
        at_best["first_class"].append(float((best @ data.direction > 0).mean()))
        if i == 0:
            many = best[:COLUMNS]
        nearest = np.sort(cdist(best, data.train), axis=1)
        at_best["copies"].append(float((nearest[:, 0] < 0.5 * nearest[:, 1]).mean()))
        for j, kind in enumerate(GRIDS):
            for k, num_steps in enumerate(study.few_steps):
                x = samples(i * count + 2 + j * len(study.few_steps) + k, model, num_steps, kind)
                if i == 0:
                    some[j, k] = x[:COLUMNS]
                to_itself[i, j, k] = relative_energy_distance(x, best)
                to_test[i, j, k] = relative_energy_distance(x, data.test)
    described = {
        "many_steps": {name: summary(values) for name, values in at_best.items()},
        "few_steps": [
            {
                "grid": kind,
                "steps": num_steps,
                "to_itself": summary(to_itself[:, j, k]),
                "to_test": summary(to_test[:, j, k]),
            }
            for j, kind in enumerate(GRIDS)
            for k, num_steps in enumerate(study.few_steps)
        ],
    }
    suits = best_grid(to_itself)
    shown = np.concatenate([*(some[suits, k] for k in range(len(study.few_steps))), many])
    return Judged(to_itself, to_test, shown, described)


def best_grid(to_itself: np.ndarray) -> int:
    """The grid whose samples are nearest to many steps', on the whole."""
    return int(to_itself.mean(axis=(0, 2)).argmin())


def draw_quality(study: TrainedStudy, quality: dict[str, np.ndarray]) -> Any:
    """Every noise on the grid that suits it best on the whole."""
    groups, errors = {}, {}
    for name, values in quality.items():
        best = best_grid(values)
        label = f"{name} ({GRIDS[best].replace('_', ' ')} grid)"
        groups[label] = values[:, best].mean(axis=0)
        if len(values) > 1:
            errors[label] = values[:, best].std(axis=0, ddof=1) / np.sqrt(len(values))
    return plot.curves(
        np.asarray(study.few_steps),
        groups,
        errors=errors,
        log_x=True,
        xlabel="steps",
        ylabel=f"relative energy distance to {study.many_steps} steps",
    )
