"""rnejax finetune: a model into its own posterior, what has become of it, and what weights correct."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnejax as rj

from .. import plot
from ..config import ConfigError, FinetuneRun
from .finetuning import Problem, build_problem
from .folder import Output, RunFolder, require_pictures


def run(config: FinetuneRun, output: Output) -> None:
    """The tuned model's samples, bounds on log Z, and the same target with the tuned model as the proposal.

    The same command in the same folder goes on from where it was stopped.
    """
    from ..training import check_state

    problem = build_problem(config)
    check_sizes(config, problem)
    try:
        check_state(output.path, fingerprint(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require_pictures()
    folder = output.open()
    with folder.timed():
        fitted = tune(config, problem, folder)
    draw_progress(folder, fitted.metrics, problem.log_normalizer)
    if fitted.interrupted:
        done = fitted.metrics[-1]["step"] if fitted.metrics else 0
        raise KeyboardInterrupt(f"interrupted after {done} of {config.training.num_steps} steps")
    if config.normalizer == "learned":
        folder.record(log_normalizer_learned=fitted.average.log_normalizer)
    folder.record(evaluations=evaluations(config, problem))
    problem.save(folder, fitted.average.weights)

    model = problem.posterior.with_params(fitted.average.weights)
    key_paths, key_noise, key_steer = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 3)
    with folder.timed("seconds_sampling"):
        condition = problem.test_conditions(config.num_samples)
        paths = sample_paths(key_paths, config, problem, model)
        noised = sample_paths(key_noise, config, problem, model, exact=True)
    arrays = {"x": paths.x, "log_ratio": paths.log_ratio, "log_reward": paths.log_reward}
    folder.arrays("samples.npz", **arrays | ({} if condition is None else {"condition": condition}))
    folder.record(tuned=describe(problem, paths, noised, condition))
    with folder.timed("seconds_outcomes"):
        folder.record(**problem.outcomes(model))
    corrected = None
    if config.num_particles is not None:
        with folder.timed("seconds_steering"):
            found, corrected = steer(key_steer, config, problem, model)
        folder.record(corrected=found)
    problem.draw(folder, paths.x, condition, corrected)


def check_sizes(config: FinetuneRun, problem: Problem) -> None:
    """Raises ConfigError for what `tune` would refuse after the folder has been opened."""
    settings = config.training
    if needs_clean_data(config) and not problem.brings_data and config.buffer.size < settings.batch_size:
        raise ConfigError(
            f"buffer.size = {config.buffer.size} must not be below training.batch_size = {settings.batch_size}"
        )
    if config.normalizer == "learned" and config.normalizer_paths < problem.num_classes:
        raise ConfigError(
            f"normalizer_paths = {config.normalizer_paths}: at least one is needed for each of {problem.num_classes} "
            "classes"
        )
    if config.normalizer == "learned" and problem.conditions(1) is not None and not problem.num_classes:
        raise ConfigError("normalizer = learned is for one log Z, or one for each class: take batch")
    if (
        config.normalizer == "batch"
        and config.paths_per_condition == 1
        and problem.conditions(1) is not None
        and not problem.num_classes
        and set(config.sources) != {"back_and_forth"}
    ):
        raise ConfigError(
            "paths_per_condition must be at least 2 for normalizer = batch: a path that is alone with its condition "
            "teaches nothing"
        )
    if settings.batch_size % config.paths_per_condition:
        raise ConfigError(
            f"paths_per_condition = {config.paths_per_condition} must divide training.batch_size = "
            f"{settings.batch_size}"
        )
    if settings.save_every % settings.report_every:
        raise ConfigError(
            f"training.save_every = {settings.save_every} must be a multiple of training.report_every = "
            f"{settings.report_every}"
        )
    try:
        make_loss(config, problem)
        make_optimizer(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def tune(config: FinetuneRun, problem: Problem, folder: RunFolder | None = None, loss: Any = None) -> Any:
    """`rnejax.training.fit` as configured; ``loss`` is another than that of trajectory balance."""
    from ..training import Examples, FineTuned, ReplayBuffer, fit

    settings = config.training
    key_fit, key_data, key_normalizer = jax.random.split(jax.random.key(config.seed), 3)
    renewing: dict[str, Any] = {}
    examples = problem.data(key_data) if needs_clean_data(config) else None
    if examples is None and needs_clean_data(config):
        buffer = ReplayBuffer(problem.posterior, problem.prior, problem.times, problem.log_reward)
        size = config.buffer.size
        condition = problem.conditions(size)
        both = {"condition": condition, "prior_condition": condition if problem.prior_takes_condition else None}
        examples = buffer.start(key_data, size, **both)
        renewing = {"renew": buffer.renew, "renew_every": config.buffer.renew_every}
    if examples is None:  # nothing looks at clean data: their number and their conditions are all that counts
        examples = problem.data(key_data) if problem.prior_takes_condition else None
    if examples is None:
        size = settings.batch_size * max(1, problem.num_classes)
        examples = Examples(jnp.zeros((size, 1)), problem.conditions(size))
    return fit(
        key_fit,
        make_loss(config, problem) if loss is None else loss,
        FineTuned(problem.posterior.params, start_of_log_normalizer(key_normalizer, config, problem)),
        examples,
        make_optimizer(config),
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        ema_decay=settings.ema_decay,
        steps_per_call=settings.steps_per_call,
        report_every=settings.report_every,
        save_every=settings.save_every,
        folder=None if folder is None else folder.path,
        fingerprint=fingerprint(config),
        on_report=None if folder is None else lambda report: folder.record(**numbers(report)),
        **renewing,
    )


def start_of_log_normalizer(key: Any, config: FinetuneRun, problem: Problem) -> Any:
    """log Z to begin with: a number, or one for each condition, by importance sampling.

    A guess that is off by a nat is a residual of a nat on every path, which teaches the model to avoid all of them
    until log Z has been learned.
    """
    shape = (problem.num_classes,) if problem.num_classes else ()
    if config.normalizer == "batch":
        return jnp.zeros(shape)
    paths = sample_paths(key, config, problem, problem.posterior, count=config.normalizer_paths)
    log_weights = np.maximum(paths.log_reward, config.least_log_reward) - paths.log_ratio
    condition = problem.conditions(len(log_weights))
    rows = [np.asarray(condition) == i for i in range(shape[0])] if shape else [np.ones(len(log_weights), bool)]
    means = [jax.nn.logsumexp(jnp.asarray(log_weights[row])) - np.log(row.sum()) for row in rows]
    return jnp.stack(means).reshape(shape)


def make_loss(config: FinetuneRun, problem: Problem) -> Any:
    """The loss of trajectory balance as configured."""
    from ..training import trajectory_balance_loss

    normalizer: Any = config.normalizer
    if normalizer == "learned" and problem.num_classes:
        normalizer = _of_condition
    return trajectory_balance_loss(
        problem.posterior,
        problem.prior,
        problem.times,
        problem.log_reward,
        sources={str(name): share for name, share in config.sources.items()},
        normalizer=normalizer,
        paths_per_condition=config.paths_per_condition,
        inflation=config.inflation,
        turn=config.turn,
        bound=np.inf if config.bound is None else config.bound,
        least_log_reward=config.least_log_reward,
        num_steps=config.gradient_steps,
        averaged=config.averaged,
        above=problem.above,
    )


def _of_condition(table: Any, condition: Any) -> Any:
    return table[condition]


def make_optimizer(config: FinetuneRun) -> Any:
    """Adam for the weights and, at another rate, for log Z."""
    from ..training import FineTuned
    from ..training import make_optimizer as make

    settings = config.training
    schedule: dict[str, Any] = {
        "num_steps": settings.num_steps,
        "warmup_steps": settings.warmup_steps,
        "decay_steps": settings.decay_steps,
    }
    rules = {
        "weights": make(settings.learning_rate, clip_norm=settings.clip_norm, **schedule),
        "log_normalizer": make(settings.normalizer_learning_rate, clip_norm=np.inf, **schedule),
    }
    return optax.partition(rules, FineTuned("weights", "log_normalizer"))


def needs_clean_data(config: FinetuneRun) -> bool:
    """Whether a source of paths begins with clean data."""
    return bool({"noised", "back_and_forth"} & set(config.sources))


def evaluations(config: FinetuneRun, problem: Problem) -> dict[str, int]:
    """Pairs of network evaluations, the prior's and the posterior's, of one state."""
    steps, settings = len(problem.times) - 1, config.training
    shares = np.array(list(config.sources.values())) / sum(config.sources.values())
    turn = max(1, round(config.turn * steps))
    # Noised paths leap over times at which there is nothing to ask. Own samples that are noised again ask the posterior
    # alone on their way down: half a pair.
    noised = steps if problem.above is None else int(np.sum(np.asarray(problem.times)[1:] > problem.above))
    known = {"back_and_forth": 2 * turn, "noised": noised, "renoised": noised + 0.5 * steps}
    lengths = [known.get(name, steps) for name in config.sources]
    found = {"training": round(settings.num_steps * settings.batch_size * float(shares @ lengths))}
    if needs_clean_data(config) and not problem.brings_data:
        renewals = 1 + -(-settings.num_steps // config.buffer.renew_every)
        found["buffer"] = renewals * config.buffer.size * steps
    return found


def sample_paths(
    key: Any,
    config: FinetuneRun,
    problem: Problem,
    model: rj.DiffusionModel,
    *,
    exact: bool = False,
    count: int | None = None,
) -> Any:
    """Paths of a model or of what noise makes of draws from the posterior itself, None where there are none."""
    from ..training import trajectory_balance_residual

    count = config.num_samples if count is None else count
    size = min(count, config.chunk_size)

    @jax.jit
    def some(key: Any, model: rj.DiffusionModel, condition: Any, x: Any) -> Any:
        given: dict[str, Any] = {"num_paths": size} if x is None else {"x": x}
        if problem.prior_takes_condition:
            given["prior_condition"] = condition
        return trajectory_balance_residual(
            key, model, problem.prior, problem.times, problem.log_reward, condition=condition, **given
        )

    parts = []
    for i in range(-(-count // size)):
        key_data, key_paths = jax.random.split(jax.random.fold_in(key, i))
        x = problem.exact(key_data, size) if exact else None
        if exact and x is None:
            return None
        rows = np.arange(i * size, (i + 1) * size)
        condition = problem.test_conditions(rows[-1] + 1)
        parts.append(jax.device_get(some(key_paths, model, None if condition is None else condition[rows], x)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def describe(problem: Problem, paths: Any, noised: Any, condition: Any) -> dict[str, Any]:
    """Numbers of the tuned model: as it is, and as importance samples where there is one target for all."""
    from ..training import assess

    metrics: dict[str, Any] = {"log_reward": float(np.mean(paths.log_reward))}
    metrics |= problem.describe(paths.x, None, None if condition is None else np.asarray(condition))
    if condition is not None and not problem.num_classes:
        # Every condition has a log Z of its own, and these are bounds on their mean.
        log_weights = np.asarray(paths.log_reward - paths.log_ratio, np.float64)
        error = float(log_weights.std(ddof=1) / np.sqrt(len(log_weights)))
        return metrics | {"log_normalizer_lower_bound": with_error((float(log_weights.mean()), error))}
    if condition is not None:
        rows = [np.asarray(condition) == each for each in range(problem.num_classes)]
        found = [_assessed(assess(jax.tree.map(lambda leaf, row=row: leaf[row], paths)), row.sum()) for row in rows]
        return metrics | {name: [each[name] for each in found] for name in found[0]}
    metrics |= _assessed(assess(paths, noised), len(paths.x))
    weighted = problem.describe(paths.x, np.asarray(paths.log_reward - paths.log_ratio, np.float64), None)
    return metrics | {"weighted": weighted}


def _assessed(found: Any, count: int) -> dict[str, Any]:
    return {
        "log_normalizer_lower_bound": with_error(found.lower_bound),
        "log_normalizer_importance": with_error((found.log_normalizer, found.standard_error)),
        "log_normalizer_upper_bound": None if found.upper_bound is None else with_error(found.upper_bound),
        "effective_sample_share": found.effective_sample_size / count,
        "residual_variance": found.residual_variance,
    }


def steer(key: Any, config: FinetuneRun, problem: Problem, model: rj.DiffusionModel) -> tuple[Any, np.ndarray]:
    """The posterior by particles that the tuned model proposes, one condition after another: numbers, and samples."""
    found, samples = [], []
    # Weights before are those of the prior's law at t over the tuned model's, and resampling by them would undo it.
    first = max(1, round(config.resampling_share * (len(problem.times) - 1)))
    window = (float(problem.times[0]), float(problem.times[first]))
    conditions = problem.steered_conditions()
    for i, condition in enumerate(conditions):
        each = model if condition is None else model.with_condition(condition)
        result = rj.steer(
            jax.random.fold_in(key, i),
            problem.target(condition),
            problem.times,
            config.num_particles or 1,
            proposal=each,
            num_groups=config.num_groups,
            window=window,
            warn=False,
            progress=False,
        )
        x = np.asarray(result.particles).reshape(-1, *problem.prior.shape)
        # Groups count by their normalising constants.
        log_weights = np.asarray(result.log_weights + result.log_normalizer[:, None], np.float64).ravel()
        values = np.asarray(result.log_normalizer, np.float64)
        log_normalizer = float(values.max() + np.log(np.mean(np.exp(values - values.max()))))
        found.append(
            {
                "log_normalizer": with_error((log_normalizer, float(result.standard_error))),
                "smallest_effective_sample_share": float(np.min(result.info.ess) / result.log_weights.shape[-1]),
                "resamplings": float(np.mean(result.info.num_resamplings)),
            }
            | problem.describe(x, log_weights, None if condition is None else np.stack([condition] * len(x)))
        )
        shares = np.exp(log_weights - log_weights.max())
        draws = np.random.default_rng(0).choice(len(x), 2000 if condition is None else 20, p=shares / shares.sum())
        samples.append(x[draws])
    # Conditions in turn, as they are in what the tuned model makes.
    pool = np.stack(samples, axis=1).reshape(-1, *problem.prior.shape)
    return (found[0] if conditions[0] is None else found), pool


def with_error(pair: tuple[float, float]) -> dict[str, float]:
    return {"value": pair[0], "standard_error": pair[1]}


def numbers(report: dict[str, float]) -> dict[str, float]:
    """A report without what is not the same in every run."""
    return {name: value for name, value in report.items() if not name.startswith("seconds")}


def fingerprint(config: FinetuneRun) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was stopped."""
    everything = config.model_dump(mode="json")
    for name in ("output", "num_samples", "num_particles", "num_groups", "chunk_size", "resampling_share"):
        everything.pop(name)
    return everything


def draw_progress(folder: RunFolder, metrics: list[dict[str, float]], log_normalizer: float | None) -> None:
    """Estimates of log Z and the residual's square over the steps."""
    steps = [report["step"] for report in metrics]
    groups = {"log Z, of a batch": [report["log_normalizer"] for report in metrics]}
    if log_normalizer is not None:
        groups["log Z"] = [log_normalizer] * len(steps)
    groups["mean log r"] = [report["log_reward"] for report in metrics]
    folder.picture("progress.png", plot.curves(steps, groups, xlabel="optimiser step", ylabel="nats"))
    squared = {"squared residual": [report["squared_residual"] for report in metrics]}
    folder.picture(
        "residuals.png", plot.curves(steps, squared, xlabel="optimiser step", ylabel="nats squared", log=True)
    )
