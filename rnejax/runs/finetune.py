"""rnejax finetune: a model into its own posterior, what has become of it, and what weights correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnejax as rj

from .. import plot
from ..config import ConfigError, FinetuneRun
from ..systems.modes import ModeSelection, mode_selection
from .build import make_times
from .folder import Output, RunFolder, require_pictures

# Paths that are made at once to be looked at: what bounds memory.
CHUNK = 5000


@dataclass
class Problem:
    """What a configuration asks for.

    Attributes:
      prior: the model as it was.
      posterior: the model that is tuned, with its weights to begin with.
      log_reward: of one example, in nats.
      times: of the paths.
      exact: draws (n, *shape) from the posterior itself; None where there are none.
      log_normalizer: log Z, where it is known.
    """

    prior: rj.DiffusionModel
    posterior: rj.DiffusionModel
    log_reward: Callable[[Any], Any]
    times: np.ndarray
    exact: Callable[[Any, int], Any] | None = None
    log_normalizer: float | None = None
    modes: ModeSelection | None = None


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
    folder.record(log_normalizer_learned=float(fitted.average.log_normalizer), evaluations=evaluations(config, problem))
    model = problem.posterior.with_params(fitted.average.weights)
    key_paths, key_noise, key_steer = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 3)
    paths = sample_paths(key_paths, problem, model, config.num_samples)
    noised = None
    if problem.exact is not None:
        noised = sample_paths(key_noise, problem, model, config.num_samples, problem.exact)
    folder.arrays("samples.npz", x=paths.x, log_ratio=paths.log_ratio, log_reward=paths.log_reward)
    folder.record(tuned=describe(problem, paths, noised))
    steered = None
    if config.num_particles is not None:
        with folder.timed("seconds_steering"):
            target = rj.tilt(problem.prior, problem.log_reward, gradient=False)
            steered = rj.steer(
                key_steer,
                target,
                problem.times,
                config.num_particles,
                proposal=model,
                num_groups=config.num_groups,
                warn=False,
                progress=False,
            )
        folder.record(corrected=describe_steered(problem, steered))
    if problem.modes is not None:
        folder.picture("samples.png", plot_modes(problem, paths.x, steered))


def build_problem(config: FinetuneRun) -> Problem:
    """Prior, posterior and reward.

    Raises:
      ConfigError: for a process or a grid that cannot be.
    """
    from ..networks import build, functional
    from ..training import Guidance, Guided

    key = jax.random.key(config.seed)
    settings = config.problem
    modes = mode_selection()
    try:
        process = rj.processes.Cosine(t_max=settings.t_max, data_std=modes.prior.std)
    except ValueError as error:
        raise ConfigError(f"problem: {error}") from error
    times = make_times(config.grid, process)
    prior = modes.prior.model(process, "x0")
    if config.covariance is None:
        # The prior is no matter of chance: of the same draws for every seed.
        data = jax.vmap(modes.prior.sample)(jax.random.split(jax.random.key(0), CHUNK))
        prior = rj.calibrate(jax.random.key(1), prior, times, data=data)
    else:
        prior = prior.with_covariance(config.covariance)
    apply, params = functional(build("mlp", key, shape=(2,), hidden=settings.hidden, depth=settings.depth))
    log_reward = modes.log_reward if config.reward_gradient else None
    guided = Guided(prior, apply, log_reward, trust=config.trust)
    return Problem(
        prior=prior,
        posterior=guided.model(Guidance(params, jnp.ones(()))),
        log_reward=modes.log_reward,
        times=times,
        exact=lambda key, count: jax.vmap(modes.posterior.sample)(jax.random.split(key, count)),
        log_normalizer=0.0,
        modes=modes,
    )


def check_sizes(config: FinetuneRun, problem: Problem) -> None:
    """Raises ConfigError for what `tune` would refuse after the folder has been opened."""
    settings = config.training
    if needs_buffer(config) and config.buffer.size < settings.batch_size:
        raise ConfigError(
            f"buffer.size = {config.buffer.size} must not be below training.batch_size = {settings.batch_size}"
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
    key_fit, key_buffer = jax.random.split(jax.random.key(config.seed))
    renewing: dict[str, Any] = {}
    if needs_buffer(config):
        buffer = ReplayBuffer(problem.posterior, problem.prior, problem.times, problem.log_reward)
        examples = buffer.start(key_buffer, config.buffer.size)
        renewing = {"renew": buffer.renew, "renew_every": config.buffer.renew_every}
    else:  # whose number is all that counts
        examples = Examples(jnp.zeros((settings.batch_size, *problem.prior.shape), problem.prior.process.dtype))
    return fit(
        key_fit,
        make_loss(config, problem) if loss is None else loss,
        FineTuned(problem.posterior.params, jnp.zeros(())),
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


def make_loss(config: FinetuneRun, problem: Problem) -> Any:
    """The loss of trajectory balance as configured."""
    from ..training import trajectory_balance_loss

    return trajectory_balance_loss(
        problem.posterior,
        problem.prior,
        problem.times,
        problem.log_reward,
        sources={str(name): share for name, share in config.sources.items()},
        normalizer=config.normalizer,
        inflation=config.inflation,
        turn=config.turn,
        bound=np.inf if config.bound is None else config.bound,
        least_log_reward=config.least_log_reward,
        num_steps=config.gradient_steps,
    )


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


def needs_buffer(config: FinetuneRun) -> bool:
    """Whether a source of paths begins with clean data."""
    return bool({"noised", "back_and_forth"} & set(config.sources))


def evaluations(config: FinetuneRun, problem: Problem) -> dict[str, int]:
    """Pairs of network evaluations, the prior's and the posterior's, of one state."""
    steps = len(problem.times) - 1
    settings = config.training
    training = settings.num_steps * settings.batch_size * steps
    found = {"training": training}
    if needs_buffer(config):
        renewals = 1 + -(-settings.num_steps // config.buffer.renew_every)
        found["buffer"] = renewals * config.buffer.size * steps
    return found


def sample_paths(
    key: Any, problem: Problem, model: rj.DiffusionModel, count: int, data: Callable[[Any, int], Any] | None = None
) -> Any:
    """Paths of the tuned model or, with data, of what noise makes of so many draws from them."""
    from ..training import trajectory_balance_residual

    @jax.jit
    def some(key: Any, model: rj.DiffusionModel) -> Any:
        key_data, key_paths = jax.random.split(key)
        size = min(count, CHUNK)
        given: dict[str, Any] = {"num_paths": size} if data is None else {"x": data(key_data, size)}
        return trajectory_balance_residual(key_paths, model, problem.prior, problem.times, problem.log_reward, **given)

    keys = jax.random.split(key, -(-count // CHUNK))
    parts = [some(each, model) for each in keys]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def describe(problem: Problem, paths: Any, noised: Any) -> dict[str, Any]:
    """Numbers of the tuned model: as it is, and as importance samples."""
    from ..training import assess

    found = assess(paths, noised)
    metrics: dict[str, Any] = {
        "log_normalizer_lower_bound": with_error(found.lower_bound),
        "log_normalizer_importance": with_error((found.log_normalizer, found.standard_error)),
        "log_normalizer_upper_bound": None if found.upper_bound is None else with_error(found.upper_bound),
        "effective_sample_share": found.effective_sample_size / len(paths.x),
        "residual_variance": found.residual_variance,
        "log_reward": float(np.mean(paths.log_reward)),
    }
    if problem.modes is not None:
        metrics["modes"] = coverage(problem.modes, paths.x)
        metrics["modes_weighted"] = coverage(problem.modes, paths.x, paths.log_reward - paths.log_ratio)
    return metrics


def describe_steered(problem: Problem, steered: Any) -> dict[str, Any]:
    """Numbers of particles that the tuned model has proposed."""
    log_normalizers = np.asarray(steered.log_normalizer, np.float64)
    largest = log_normalizers.max()
    metrics: dict[str, Any] = {
        "log_normalizer": with_error(
            (float(largest + np.log(np.mean(np.exp(log_normalizers - largest)))), float(steered.standard_error))
        ),
        "smallest_effective_sample_share": float(np.min(steered.info.ess) / steered.log_weights.shape[-1]),
        "resamplings": float(np.mean(steered.info.num_resamplings)),
    }
    if problem.modes is not None:
        x = np.asarray(steered.particles).reshape(-1, 2)
        metrics["modes"] = coverage(problem.modes, x, pooled_log_weights(steered))
    return metrics


def pooled_log_weights(steered: Any) -> np.ndarray:
    """Of all groups together, which count by their normalising constants."""
    return np.asarray(steered.log_weights + steered.log_normalizer[:, None], np.float64).ravel()


def coverage(modes: ModeSelection, x: Any, log_weights: Any = None) -> dict[str, Any]:
    """Shares of the modes in words of metrics.json."""
    from ..training import mode_coverage

    found = mode_coverage(modes.modes(x), modes.shares, log_weights)
    return {
        "total_variation": found.total_variation,
        "floor": found.floor,
        "kl_divergence": found.kl_divergence,
        "found": found.num_found,
        "expected": found.num_expected,
        "shares": found.shares,
    }


def with_error(pair: tuple[float, float]) -> dict[str, float]:
    return {"value": pair[0], "standard_error": pair[1]}


def numbers(report: dict[str, float]) -> dict[str, float]:
    """A report without what is not the same in every run."""
    return {name: value for name, value in report.items() if not name.startswith("seconds")}


def fingerprint(config: FinetuneRun) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was stopped."""
    everything = config.model_dump(mode="json")
    for name in ("output", "num_samples", "num_particles", "num_groups"):
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


def plot_modes(problem: Problem, x: np.ndarray, steered: Any) -> Any:
    """The prior's, the exact posterior's and the tuned model's samples, and what weights make of these."""
    assert problem.modes is not None
    count = 2000
    modes = problem.modes
    key = jax.random.key(0)
    panels = {
        "prior": jax.vmap(modes.prior.sample)(jax.random.split(key, count)),
        "posterior": jax.vmap(modes.posterior.sample)(jax.random.split(key, count)),
        "tuned": x[:count],
    }
    if steered is not None:
        log_weights = pooled_log_weights(steered)
        shares = np.exp(log_weights - log_weights.max())
        pool = np.asarray(steered.particles).reshape(-1, 2)
        chosen = np.random.default_rng(0).choice(len(pool), count, p=shares / shares.sum())
        panels["tuned, corrected"] = pool[chosen]
    return plot.scatters(panels)
