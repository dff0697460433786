"""rnejax density: log-densities of given points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import DensityRun
from .build import check_classes, load_model, load_points, make_times, with_condition
from .folder import Output, require_pictures, summary


def run(config: DensityRun, output: Output) -> None:
    """Log-densities with standard errors; in bits per dimension where the points are dequantised pixels."""
    model = with_condition(load_model(config), config.condition)
    check_classes(config.model, config.condition)
    times = make_times(config.grid, model.process)
    key_data, key_paths, key_flow = jax.random.split(jax.random.key(config.seed), 3)
    points, dequantisation = load_points(key_data, config.data, config.num_points, model)
    require_pictures()
    folder = output.open()

    with folder.timed():
        result = rj.log_density(key_paths, model, points, times, num_paths=config.num_paths)
    arrays = {"x": points, "log_density": result.log_density, "standard_error": result.standard_error}
    folder.arrays("samples.npz", **arrays)
    folder.record(
        num_points=len(points),
        num_paths=config.num_paths,
        network_evaluations=len(points) * config.num_paths * (len(times) - 1),
        log_density_nats=summary(result.log_density),
        standard_error_of_one_point_nats=np.mean(result.standard_error),
        dequantisation=dequantisation,
        t_min=float(times[0]),
    )
    values = {"RNE": np.asarray(result.log_density)}
    if config.probability_flow:
        with folder.timed("seconds_probability_flow"):
            flow = rj.probability_flow_log_density(
                key_flow,
                model,
                points,
                times,
                divergence="hutchinson" if config.num_probes else "exact",
                num_probes=max(1, config.num_probes),
                rtol=config.tolerance,
                atol=config.tolerance,
            )
        values["probability flow"] = np.asarray(flow.log_density)
        folder.arrays("samples.npz", **arrays, log_density_probability_flow=flow.log_density)
        folder.record(
            log_density_probability_flow_nats=summary(flow.log_density),
            network_evaluations_probability_flow=len(points) * int(flow.num_evaluations),
        )

    unit = "log-density (nats)"
    if model.process.is_discrete:
        unit = "bits per token"
        values = {name: -value / (model.shape[0] * np.log(2)) for name, value in values.items()}
        folder.record(bits_per_token={name.replace(" ", "_"): summary(value) for name, value in values.items()})
    if dequantisation is not None:
        from ..systems.digits import bits_per_dimension

        unit = "bits per dimension"
        values = {name: np.asarray(bits_per_dimension(jnp.asarray(value))) for name, value in values.items()}
        bits = {name.replace(" ", "_"): summary(value) for name, value in values.items()}
        folder.record(bits_per_dimension=bits)
    folder.picture("log_density.png", plot.log_density_histogram(values, unit=unit))
