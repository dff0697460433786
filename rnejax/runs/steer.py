"""rnejax steer: sample a target that is not the model's own law, and show how well that went."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ClassReward, ConfigError, Product, PromptReward, SteerRun, Tilt
from ..control.rewards import HostGuard
from ..control.steer import choose_proposal, warn_of_euler
from ..infilling import common_template
from .build import (
    build_reward,
    build_target,
    check_classes,
    check_rewards,
    load_classifier,
    load_model,
    make_times,
)
from .comparison import Comparison
from .folder import Output, RunFolder, require_pictures
from .tokens import diversity_of_tokens, fill_in, judge_of_prompt, judge_of_sentences, kind_of, show

Judge = Callable[[np.ndarray, np.ndarray], dict[str, Any]]
"""judge(x, shares) -> what the metrics say of samples with these weights."""


def run(config: SteerRun, output: Output) -> None:
    """Weighted particles, log Z, diagnostics; beside them, if asked for, the same proposal without any weights."""
    model, blanks = load_model(config), None
    if config.template is not None:
        model, blanks = fill_in(model, config.template, config.grid.kind == "one_token")
    times = make_times(config.grid, model.process, blanks)
    check_classes(config.model, *conditions(config.target))
    check_rewards(tilted(config.target), model)
    target = build_target(model, config.target)
    try:
        common_template(target.models)
    except ValueError as error:
        raise ConfigError(
            "template: it is given to model, and target.models has others; leave one of them out"
        ) from error
    check_pilots(config, target)
    check_moves(config, model.process)
    kind = kind_of(config.model)
    judge = find_judge(config, model, kind)
    comparison = None if config.molecule is None else Comparison(config.molecule, model, config.model, config.target)
    require_pictures()
    folder = output.open()
    key, key_uncorrected, key_sheet, key_pilots = jax.random.split(jax.random.key(config.seed), 4)
    proposal: Any = config.proposal
    if config.pilot_particles is not None:
        proposal = tune(key_pilots, folder, config, config.pilot_particles, target, times)
    if config.candidates > 1:
        proposal = rj.control.Candidates(config.candidates, choose_proposal(model.process, proposal))
    settings: dict[str, Any] = {
        "renoise": rj.control.Remask(config.remask) if config.remask else None,
        "num_particles": config.num_particles,
        "num_groups": config.num_groups,
        "proposal": proposal,
        "warn": False,  # said below, on the terminal and in metrics.json
    }

    with folder.timed():
        result = rj.steer(key, target, times, ess_threshold=config.ess_threshold, save=("ancestors",), **settings)
    x, log_weights = pool(result, model.shape)
    info = {name: getattr(result.info, name) for name in ("time", "ess", "resampled", "unique_ancestors")}
    arrays = {"x": result.particles, "log_weights": result.log_weights, "log_normalizer": result.log_normalizer, **info}
    folder.arrays("samples.npz", **arrays, ancestors=result.info.saved["ancestors"])
    record_weights(folder, config, target, result, times)
    record_quality(folder, config, judge, x, log_weights, "")
    draw_weights(folder, config, result)
    if comparison is not None:
        comparison.record(folder, target, result)
    equal = np.asarray(rj.resample(key_sheet, result)).reshape(x.shape)
    if model.process.is_discrete:
        show(folder, kind, "samples", spread(equal, 128))
    elif plot.is_image(model.shape):
        folder.picture("samples.png", plot.sample_sheet(spread(equal, 128)))
        folder.picture("particles.png", draw_heaviest(x, log_weights))

    if config.compare_uncorrected:
        with folder.timed("seconds_uncorrected"):
            plain = rj.steer(key_uncorrected, target, times, ess_threshold=0.0, **settings)
        x_plain, _ = pool(plain, model.shape)
        folder.arrays("uncorrected.npz", x=plain.particles)
        record_quality(folder, config, judge, x_plain, np.zeros(len(x_plain)), "_uncorrected")
        if comparison is not None:
            comparison.record_uncorrected(folder, x_plain)
        if model.process.is_discrete:
            show(folder, kind, "uncorrected", spread(x_plain, 128))
        elif plot.is_image(model.shape):
            sheets = {"uncorrected": spread(x_plain, 64), "corrected": spread(equal, 64)}
            folder.picture("comparison.png", plot.compare_sheets(sheets))


def check_moves(config: SteerRun, process: Any) -> None:
    """Raises ConfigError for a way to move that the model's states do not have."""
    try:
        choose_proposal(process, config.proposal)
    except ValueError as error:
        raise ConfigError(f"proposal: {error}") from error
    if config.remask and not isinstance(process, rj.processes.Masked):
        raise ConfigError(f"remask = {config.remask} is for masked tokens, lost independently; these are of {process}")


def check_pilots(config: SteerRun, target: Any) -> None:
    """Raises ConfigError for pilots of what cannot be tuned."""
    if config.pilot_particles is None:
        return
    if config.proposal == "feynman_kac":
        raise ConfigError("pilot_particles tunes symmetric and [c_a, c_b], and proposal is feynman_kac: set it to null")
    if any(reward.exact for reward in target.rewards):
        raise ConfigError(
            "pilot_particles moves the auxiliary kernel, which target.exact = true does not allow: set it to null, or "
            "target.exact to false"
        )


def tune(key: jax.Array, folder: RunFolder, config: SteerRun, num_particles: int, target: Any, times: Any) -> Any:
    """The proposal that the pilots found, with what they measured."""
    with folder.timed("seconds_pilots"):
        tuned = rj.tune_proposal(
            key,
            target,
            times,
            num_particles,
            proposal="symmetric" if config.proposal is None else config.proposal,
            ess_threshold=config.ess_threshold,
        )
    folder.record(pilot_variances_nats2=tuned.variances.tolist())
    return tuned.proposal


def conditions(target: Any) -> list[int | str | None]:
    """All classes that a target names."""
    if isinstance(target, Tilt):
        return conditions(target.base)
    return list(target.conditions) if isinstance(target, Product) else [target.condition]


# ------------------------------------------------------------------------------------------------------------- numbers


def pool(result: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All particles (n, *shape) and their log-weights (n,), which are comparable across independent groups."""
    log_weights = np.asarray(result.log_weights, np.float64) + np.asarray(result.log_normalizer, np.float64)[..., None]
    return np.asarray(result.particles).reshape(-1, *shape), log_weights.ravel()


def record_weights(folder: RunFolder, config: SteerRun, target: Any, result: Any, times: Any) -> None:
    """log Z, effective sample sizes, resamplings, survivors, and what speaks against the result."""
    estimate, standard_error = rj.smc.log_normalizer_with_error(result)
    ess, resampled, survivors = (
        np.asarray(getattr(result.info, name)).reshape(config.num_groups or 1, -1)
        for name in ("ess", "resampled", "unique_ancestors")
    )
    warnings = rj.smc.diagnose(result) + warn_of_euler(
        choose_proposal(target.process, config.proposal), target.process, times
    )
    for message in warnings:
        print(f"warning: {message}", file=sys.stderr)
    folder.record(
        log_normalizer_nats=estimate,
        log_normalizer_standard_error_nats=standard_error,
        effective_sample_size_final=ess[:, -1],
        effective_sample_size_smallest=ess.min(axis=1),
        resamplings=resampled.sum(axis=1),
        unique_ancestors=survivors[:, -1],
        effective_ancestors=np.atleast_1d(rj.smc.effective_ancestors(result.info.eve, result.log_weights)),
        models=1 if isinstance(target, rj.DiffusionModel) else len(target.models),
        t_min=float(result.info.time.ravel()[-1]),
        warnings=warnings,
    )


def record_quality(
    folder: RunFolder, config: SteerRun, judge: Judge | None, x: np.ndarray, log_weights: np.ndarray, suffix: str
) -> None:
    """What the samples are worth, by weight: diversity, rewards, and the classes that the judge sees."""
    shares = np.exp(log_weights - log_weights.max())
    shares /= shares.sum()
    discrete = np.issubdtype(x.dtype, np.integer)
    metrics: dict[str, Any] = {"diversity": diversity_of_tokens(x, shares) if discrete else diversity(x, shares)}
    for reward in tilts(config.target):
        function, host = build_reward(reward)
        if host:
            guard = HostGuard(function)
            values = guard(x)
            guard.raise_failure()
        else:
            values = np.asarray(jax.lax.map(function, x, batch_size=64))
        # A particle without weight may have a reward of -inf, which the mean must not see as 0 * inf.
        metrics[f"reward_{reward.kind}"] = float(shares[shares > 0] @ values[shares > 0])
    if judge is not None:
        metrics |= judge(x, shares)
    folder.record(**{name + suffix: value for name, value in metrics.items()})


def find_judge(config: SteerRun, model: Any, kind: str | None) -> Judge | None:
    """Whoever judges this kind of samples.

    Raises:
      ConfigError: for a judge of something else, or one that does not know what to look for.
    """
    if config.judge is None:
        if config.judge_label is not None:
            raise ConfigError(f"judge_label = {config.judge_label}, but judge is null: there is nobody to see it")
        return None
    if not model.process.is_discrete:
        return partial(judged_classes, load_classifier(config.judge), judged_label(config))
    if kind == "digit_tokens":
        prompt = config.judge_prompt or wanted_prompt(config.target)
        if prompt is None:
            raise ConfigError("judge needs a prompt to judge by: set judge_prompt")
        return judge_of_prompt(config.judge, prompt)
    if kind == "text":
        return judge_of_sentences(config.judge)
    raise ConfigError(f"judge = {config.judge}: whether {config.model} makes pictures or sentences is not known")


def judged_classes(classifier: Any, label: Any, x: np.ndarray, shares: np.ndarray) -> dict[str, Any]:
    """The classes that a classifier of images sees, by weight; ``label`` is the class wanted, or several."""
    seen = np.asarray(jax.lax.map(classifier, x, batch_size=64)).argmax(-1)
    classes = np.bincount(seen, weights=shares, minlength=10)
    if label is None:
        return {"judged_classes": classes}
    return {"judged_classes": classes, "judged_as_wanted": classes[np.unique(label)].sum()}


def wanted_prompt(target: Any) -> str | None:
    """The prompt that a target asks for, in its reward or else in its condition."""
    if isinstance(target, Tilt):
        return target.reward.prompt if isinstance(target.reward, PromptReward) else wanted_prompt(target.base)
    condition = None if isinstance(target, Product) else target.condition
    return condition if isinstance(condition, str) else None


def diversity(x: np.ndarray, shares: np.ndarray) -> float:
    """Root mean squared distance, per dimension, of two draws by weight: sqrt(2 sum_i w_i |x_i - mean|^2 / d).

    Copies of one particle add nothing to it.
    """
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    return float(np.sqrt(2 * shares @ np.mean((flat - shares @ flat) ** 2, axis=1)))


def tilted(target: Any) -> list[Tilt]:
    """The tilts of a target, outermost first."""
    return [target, *tilted(target.base)] if isinstance(target, Tilt) else []


def tilts(target: Any) -> list[Any]:
    """The rewards of a target, outermost first."""
    return [each.reward for each in tilted(target)]


def judged_label(config: SteerRun) -> int | list[int] | None:
    """The class that the target asks for, or several of which any will do, if it asks for one."""
    if config.judge_label is not None:
        return config.judge_label
    target: Any = config.target
    while isinstance(target, Tilt):
        if isinstance(target.reward, ClassReward):
            return target.reward.label
        target = target.base
    condition = None if isinstance(target, Product) else target.condition
    return condition if isinstance(condition, int) else None


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_weights(folder: RunFolder, config: SteerRun, result: Any) -> None:
    """Traces over time, final weights, and the genealogy of the first group."""
    folder.picture(
        "traces.png",
        plot.traces(result.info, num_particles=config.num_particles, ess_threshold=config.ess_threshold),
    )
    folder.picture("weights.png", plot.weights(result.log_weights))
    ancestors, time = np.asarray(result.info.saved["ancestors"]), np.asarray(result.info.time)
    if config.num_groups is not None:
        ancestors, time = ancestors[0], time.reshape(-1, ancestors.shape[1])[0]
    folder.picture("genealogy.png", plot.genealogy(ancestors, time))


def draw_heaviest(x: np.ndarray, log_weights: np.ndarray, count: int = 64) -> Any:
    """The particles of largest weight, each with its share."""
    shares = np.exp(log_weights - log_weights.max())
    order = np.argsort(-shares, kind="stable")[:count]
    captions = [f"{share:.2g} %" for share in 100 * shares[order] / shares.sum()]
    return plot.sample_sheet(x[order], captions, title="particles, and their share of the weight")


def spread(x: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of them, evenly spaced: particles lie beside their copies."""
    return x[np.unique(np.linspace(0, len(x) - 1, min(count, len(x))).astype(int))]
