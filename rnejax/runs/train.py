"""rnejax train: a diffusion model of images, by denoising score matching, with a calibrated reverse covariance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ConfigError, TrainRun
from .build import build_process, make_times
from .folder import Output, RunFolder, require_pictures, summary


def run(config: TrainRun, output: Output) -> None:
    """A model in one file, the state to go on from, losses, and a sheet of samples.

    The same command in the same folder goes on from where it was stopped.
    """
    from ..networks import build, functional, num_weights
    from ..systems import digits
    from ..training import check_state, denoising_evaluator, denoising_loss, fit, make_optimizer, time_law

    settings = config.training
    key = jax.random.key(config.seed)
    key_init, key_fit = jax.random.split(key)
    key_evaluate, key_calibrate, key_sample = jax.random.split(jax.random.fold_in(key, 1), 3)
    process = build_process(config.process)
    times = make_times(config.grid, process)  # of the samples at the end
    try:
        network = build(config.network.name, key_init, **config.network.arguments)
        law: Any = time_law(process, log_snr_share=settings.log_snr_share, log_snr_range=settings.log_snr_range)
        optimizer = make_optimizer(
            settings.learning_rate,
            num_steps=settings.num_steps,
            warmup_steps=settings.warmup_steps,
            decay_steps=settings.decay_steps,
            clip_norm=settings.clip_norm,
            weight_decay=settings.weight_decay,
        )
        train, validation = digits.load("train"), digits.load("validation")
        apply, params = functional(network)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error)) from error
    null_label = digits.NUM_CLASSES
    loss = denoising_loss(
        process,
        apply,
        digits.training_batch,
        prediction=config.prediction,
        weighting=settings.weighting,
        times=law,
        label_dropout=settings.label_dropout,
        null_label=null_label,
        dropout=settings.dropout,
    )
    held_out = digits.training_batch(key_evaluate, validation)
    errors = denoising_evaluator(process, apply, prediction=config.prediction)

    def evaluate(params: Any) -> dict[str, float]:
        bound = jnp.asarray(errors(key_evaluate, params, *held_out).bound * np.prod(digits.IMAGE_SHAPE))
        return {"validation_bits_per_dimension_bound": float(digits.bits_per_dimension(-bound))}

    try:
        jax.eval_shape(loss, key_fit, params, jax.tree.map(lambda leaf: leaf[:1], train))
    except Exception as error:  # whatever a network may raise that is none of such pictures
        raise ConfigError(
            f"network.name = {config.network.name} cannot be trained on {config.data} with training.dropout = "
            f"{settings.dropout} ({type(error).__name__}: {error}); unet can"
        ) from error
    try:
        check_state(output.path, fingerprint(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require_pictures()
    folder = output.open()
    folder.record(num_weights=num_weights(params), num_images=len(train.labels))
    with folder.timed():
        try:
            fitted = fit(
                key_fit,
                loss,
                params,
                train,
                optimizer,
                num_steps=settings.num_steps,
                batch_size=settings.batch_size,
                ema_decay=settings.ema_decay,
                steps_per_call=settings.steps_per_call,
                evaluate=evaluate,
                report_every=settings.report_every,
                save_every=settings.save_every,
                folder=folder.path,
                fingerprint=fingerprint(config),
                on_report=lambda report: folder.record(step=int(report["step"]), loss=report["loss"]),
            )
        except ValueError as error:  # sizes that do not fit, or a state of other settings in the folder
            raise ConfigError(str(error)) from error
    draw_losses(folder, fitted.metrics)

    model = rj.DiffusionModel(
        process,
        apply,
        config.prediction,
        shape=digits.IMAGE_SHAPE,
        params=fitted.average,
        condition=jnp.int32(null_label),
        batched=True,
    )
    model = rj.calibrate(key_calibrate, model, rj.time_grid(process, config.calibration_steps), data=held_out[0])
    last = fitted.metrics[-1] if fitted.metrics else {}
    rj.save_model(
        folder.path / "model.safetensors",
        model,
        network=(config.network.name, config.network.arguments),
        metadata={"seed": config.seed, "settings": fingerprint(config), "metrics": last},
        dtype=jnp.dtype(config.storage),
    )
    folder.add("model.safetensors")
    folder.record(**{name: value for name, value in last.items() if name != "seconds"})
    if fitted.interrupted:
        raise KeyboardInterrupt(f"interrupted after {last.get('step', 0)} of {settings.num_steps} steps")
    draw_samples(folder, model, times, config.num_samples, key_sample)


def fingerprint(config: TrainRun) -> dict[str, Any]:
    """What must agree for a run to go on from a stored state: all but how long, how often it reports, and where."""
    settings = config.model_dump(mode="json", include={"seed", "data", "process", "prediction", "network", "training"})
    for name in ("num_steps", "report_every", "save_every", "steps_per_call"):
        del settings["training"][name]
    return settings


def draw_losses(folder: RunFolder, metrics: list[dict[str, float]]) -> None:
    """The loss, and the bound on the bits per dimension of validation images, over the steps."""
    if metrics:
        steps = [report["step"] for report in metrics]
        names = {
            "loss": "training loss",
            "validation_bits_per_dimension_bound": "validation, bits per dimension (bound)",
        }
        lines = {label: [report[name] for report in metrics] for name, label in names.items()}
        folder.picture("losses.png", plot.curves(steps, lines, xlabel="step", ylabel="", log=True))


def draw_samples(folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: Any) -> None:
    """``n`` samples of the ten classes in turn, and what their own densities say."""
    from ..systems import digits

    x = np.zeros((n, *digits.IMAGE_SHAPE), np.float32)
    log_density = np.zeros(n, np.float32)
    for label in range(min(n, digits.NUM_CLASSES)):
        chosen = slice(label, None, digits.NUM_CLASSES)
        each = model.with_condition(jnp.int32(label))
        samples = rj.sample(jax.random.fold_in(key, label), each, times, num_samples=len(x[chosen]))
        x[chosen], log_density[chosen] = samples.x, samples.log_density
    folder.arrays("samples.npz", x=x, log_density=log_density)
    folder.record(samples_bits_per_dimension=summary(digits.bits_per_dimension(jnp.asarray(log_density))))
    folder.picture("samples.png", plot.sample_sheet(x, columns=2 * digits.NUM_CLASSES))
