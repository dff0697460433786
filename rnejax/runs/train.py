"""rnejax train: a diffusion model by denoising score matching, or of an energy, with a calibrated covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import rnejax as rj

from .. import plot
from ..config import ConfigError, TrainRun
from .build import build_process, make_times
from .folder import Output, RunFolder, require_pictures
from .training_data import TrainingData, load


def run(config: TrainRun, output: Output) -> None:
    """A model in one file, the state to go on from, losses, and samples.

    The same command in the same folder goes on from where it was stopped.
    """
    from ..networks import build, functional, num_weights
    from ..training import check_state, fit, make_optimizer

    settings = config.training
    key = jax.random.key(config.seed)
    key_init, key_fit = jax.random.split(key)
    key_evaluate, key_calibrate, key_sample = jax.random.split(jax.random.fold_in(key, 1), 3)
    data = load(config.data, key_evaluate, settings.label_dropout)
    process = build_process(config.process, data)
    check_prediction(config, process)
    times = make_times(config.grid, process)  # of the samples at the end
    try:
        network = build(config.network.name, key_init, **config.network.arguments)
        optimizer = make_optimizer(
            settings.learning_rate,
            num_steps=settings.num_steps,
            warmup_steps=settings.warmup_steps,
            decay_steps=settings.decay_steps,
            clip_norm=settings.clip_norm,
            weight_decay=settings.weight_decay,
            method=settings.optimizer,
        )
        apply, params = functional(network)
        loss = make_loss(config, process, apply, data)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error)) from error
    evaluate = make_evaluator(config, process, apply, data, key_evaluate)
    try:
        jax.eval_shape(loss, key_fit, params, jax.tree.map(lambda leaf: leaf[:1], data.train))
    except Exception as error:  # whatever a network may raise that is none of such data
        pictures = {"digits": ("digits", "unet can"), "digit_tokens": ("tokens of digits", "token_unet can")}
        molecules = (f"configurations of shape {data.shape}", "egnn can, with its shape in network.arguments")
        text = (f"sequences of {data.shape[0]} tokens", "token_transformer can, with vocab_size and length of the data")
        what, remedy = pictures.get(str(config.data), text if process.is_discrete else molecules)
        raise ConfigError(
            f"network.name = {config.network.name} cannot be trained on {what} with prediction = {config.prediction} "
            f"and training.dropout = {settings.dropout} ({type(error).__name__}: {error}); "
            f"{remedy}"
        ) from error
    if config.calibration == "elastic_network" and len(data.shape) != 2:
        raise ConfigError(f"calibration = elastic_network is for particles, not for states of shape {data.shape}")
    try:
        check_state(output.path, fingerprint(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require_pictures()
    folder = output.open()
    folder.record(num_weights=num_weights(params), num_examples=len(jax.tree.leaves(data.train)[0]))
    with folder.timed():
        try:
            fitted = fit(
                key_fit,
                loss,
                params,
                data.train,
                optimizer,
                num_steps=settings.num_steps,
                batch_size=settings.batch_size,
                microbatch_size=settings.microbatch_size,
                ema_decay=settings.ema_decay,
                steps_per_call=settings.steps_per_call,
                evaluate=evaluate,
                report_every=settings.report_every,
                save_every=settings.save_every,
                folder=folder.path,
                fingerprint=fingerprint(config),
                on_report=lambda report: folder.record(**{k: v for k, v in report.items() if k != "seconds"}),
            )
        except ValueError as error:  # sizes that do not fit, or a state of other settings in the folder
            raise ConfigError(str(error)) from error
    draw_losses(folder, fitted.metrics)

    model = rj.DiffusionModel(
        process,
        apply.as_prediction(),
        config.prediction,
        shape=data.shape,
        params=fitted.average,
        condition=data.condition,
        transform=data.transform,
        batched=True,
    )
    held_out = jax.vmap(data.transform.to_data)(data.held_out[0])
    if process.is_discrete:
        pass  # the probabilities of tokens are all that there is to know
    elif config.calibration == "elastic_network":
        table = rj.time_grid(process, config.calibration_steps)
        kinds = config.network.arguments.get("kinds")
        model = rj.calibrate_elastic_network(
            key_calibrate, model, table, held_out, kinds=kinds, num_knots=config.calibration_knots
        )
    else:
        model = rj.calibrate(key_calibrate, model, rj.time_grid(process, config.calibration_steps), data=held_out)
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
    data.draw(folder, model, times, config.num_samples, key_sample)


def make_loss(config: TrainRun, process: Any, apply: Any, data: TrainingData) -> Callable[..., Any]:
    """loss(key, params, batch) -> losses of the examples.

    Raises:
      ConfigError: for settings that belong to another kind of prediction.
    """
    from ..training import denoising_loss, energy_loss, time_law, token_loss

    settings = config.training
    if process.is_discrete:
        times = None if settings.discrete_steps is None else rj.time_grid(process, settings.discrete_steps)
        return token_loss(
            process,
            apply,
            data.prepare,
            prediction=config.prediction,
            times=times,
            antithetic=settings.antithetic,
            dropout=settings.dropout,
        )
    law: Any = time_law(process, log_snr_share=settings.log_snr_share, log_snr_range=settings.log_snr_range)
    if config.prediction == "energy":
        if settings.antithetic or settings.weighting is not None or data.null_label is not None:
            raise ConfigError(
                "prediction = energy is for molecules, and training.antithetic and training.weighting are for the "
                "other predictions: leave them out"
            )
        weights: Any = {"score": 1.0} if settings.terms is None else settings.terms
        return energy_loss(
            process, apply, data.prepare, weights=weights, covariance=settings.residual_covariance, times=law
        )
    if settings.terms is not None:
        raise ConfigError(f"training.terms are those of an energy: prediction = {config.prediction} has none")
    return denoising_loss(
        process,
        apply,
        data.prepare,
        prediction=config.prediction,
        weighting=settings.weighting,
        times=law,
        label_dropout=settings.label_dropout if data.null_label is not None else 0.0,
        null_label=data.null_label,
        dropout=settings.dropout,
        antithetic=settings.antithetic,
    )


def make_evaluator(config: TrainRun, process: Any, apply: Any, data: TrainingData, key: Any) -> Callable[..., Any]:
    """evaluate(params) -> the likelihood bound of validation examples."""
    from ..training import denoising_evaluator, score_of_energy

    if process.is_discrete:
        return token_evaluator(config, process, apply, data, key)
    energy = config.prediction == "energy"
    errors = denoising_evaluator(
        process,
        score_of_energy(apply) if energy else apply,
        prediction="score" if energy else config.prediction,
    )
    x0, condition = data.held_out

    def evaluate(params: Any) -> dict[str, float]:
        per_dimension = errors(key, params, *([x0] if condition is None else [x0, condition])).bound
        return data.bound(per_dimension * process.subspace.dimension(data.shape))

    return evaluate


def token_evaluator(config: TrainRun, process: Any, apply: Any, data: TrainingData, key: Any) -> Callable[..., Any]:
    """evaluate(params) -> the likelihood bound of validation sequences, each noised to four numbers of masks."""
    from ..training import token_bound_loss

    x0, conditions = data.held_out
    grid = None if process.has_mask else rj.time_grid(process, 128)

    @jax.jit
    def bounds(key: Any, params: Any, x0: Any, conditions: Any) -> Any:
        def predict(*arguments: Any) -> Any:
            return apply(params, *arguments)

        return token_bound_loss(
            key, process, predict, x0, conditions, prediction=config.prediction, times=grid, batched=True
        )

    def evaluate(params: Any, repeats: int = 4) -> dict[str, float]:
        found = [bounds(jax.random.fold_in(key, repeat), params, x0, conditions) for repeat in range(repeats)]
        return data.bound(float(jnp.mean(jnp.stack(found))))

    return evaluate


def check_prediction(config: TrainRun, process: Any) -> None:
    """Raises ConfigError where such a process has no such prediction."""
    if config.prediction not in process.predictions:
        raise ConfigError(
            f"prediction = {config.prediction}, but a network under process.kind = {config.process.kind} predicts one "
            f"of {', '.join(process.predictions)}"
        )


def fingerprint(config: TrainRun) -> dict[str, Any]:
    """What must agree for a run to go on from a stored state: all but how long, how often it reports, and where."""
    settings = config.model_dump(mode="json", include={"seed", "data", "process", "prediction", "network", "training"})
    for name in ("num_steps", "report_every", "save_every", "steps_per_call"):
        del settings["training"][name]
    return settings


def draw_losses(folder: RunFolder, metrics: list[dict[str, float]]) -> None:
    """The loss, and the bound on -log p of validation examples, over the steps."""
    labels = {
        "loss": "training loss",
        "validation_bits_per_dimension_bound": "validation, bits per dimension (bound)",
        "validation_bits_per_token_bound": "validation, bits per token (bound)",
        "validation_nats_bound": "validation, -log p in nats (bound)",
    }
    if not metrics:
        return
    steps = [report["step"] for report in metrics]
    for number, (name, label) in enumerate(each for each in labels.items() if each[0] in metrics[0]):
        # A bound in nats may be negative: no logarithm of it, and no axis to share with a loss.
        lines = {label: [report[name] for report in metrics]}
        figure = plot.curves(steps, lines, xlabel="step", ylabel="", log=name != "validation_nats_bound")
        folder.picture("losses.png" if number == 0 else "validation.png", figure)
