"""rnejax sample: draw from a model."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

import rnejax as rj

from .. import plot
from ..config import SampleRun
from .build import check_classes, load_model, make_times, with_condition
from .folder import Output, require_pictures, summary
from .tokens import fill_in, kind_of, show


def run(config: SampleRun, output: Output) -> None:
    """Samples, their log-densities, a sheet of them if they are pictures."""
    model, blanks = load_model(config), None
    if config.template is not None:
        model, blanks = fill_in(model, config.template, config.grid.kind == "one_token")
    times = make_times(config.grid, model.process, blanks)
    conditions = config.condition if isinstance(config.condition, list) else [config.condition]
    check_classes(config.model, *conditions)
    models = [with_condition(model, condition) for condition in conditions]
    require_pictures()
    folder = output.open()

    # Conditions take turns, so that any leading part of the samples is balanced.
    n = config.num_samples
    floating = np.float64 if config.device.float64 else np.float32
    x = np.zeros((n, *model.shape), np.int32 if model.process.is_discrete else floating)
    log_density = np.zeros(n, floating)
    with folder.timed():
        for i, each in enumerate(models[:n]):
            key = jax.random.fold_in(jax.random.key(config.seed), i)
            samples: Any = rj.sample(key, each, times, num_samples=len(x[i :: len(models)]))
            x[i :: len(models)], log_density[i :: len(models)] = samples.x, samples.log_density
    folder.arrays("samples.npz", x=x, log_density=log_density)
    folder.record(
        num_samples=n,
        network_evaluations=n * (len(times) - 1),
        log_density_nats=summary(log_density),
        t_min=float(times[0]),
    )
    columns = max(1, min(16, 2 * math.isqrt(n)))
    if model.process.is_discrete:
        title = ", ".join(condition for condition in conditions if isinstance(condition, str))
        show(folder, kind_of(config.model), "samples", x, columns, title)
    elif plot.is_image(model.shape):
        folder.picture("samples.png", plot.sample_sheet(x[:256], columns=columns))
    name = "log-density of samples, along the path (nats)"
    folder.picture("log_density.png", plot.log_density_histogram({"generated": log_density}, unit=name))
