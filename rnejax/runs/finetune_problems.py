"""What `rnejax finetune` tunes: 25 modes of which nine stay, or a model that is there, under a reward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ClassReward, ConfigError, EachClassReward, FinetuneRun, Modes, Pretrained
from ..persistence import stored_network
from ..systems.modes import ModeSelection, mode_selection
from .build import (
    build_reward,
    check_classes,
    check_reward,
    load_classifier,
    load_named,
    load_points,
    make_times,
    with_condition,
)
from .folder import RunFolder
from .tokens import diversity_of_tokens, kind_of, show

NUM_CALIBRATION = 5000  # draws from the mixture, whose law is no matter of chance


@dataclass
class Problem:
    """A prior, a reward, and the model that is to become the posterior.

    Attributes:
      config: what all of it comes from.
      prior: the model as it was.
      posterior: the model that is tuned, with its weights to begin with.
      log_reward: of one example, in nats; and of its condition where there are conditions.
      times: of the paths.
      log_normalizer: log Z, where it is known.
    """

    config: FinetuneRun
    prior: rj.DiffusionModel
    posterior: rj.DiffusionModel
    log_reward: Callable[..., Any]
    times: np.ndarray
    log_normalizer: float | None = None

    num_conditions = 0

    def conditions(self, count: int) -> Any:
        """One for each of so many paths, in turn; None where there are none."""
        return None

    def data(self, key: Any) -> Any:
        """Examples that noised paths begin with; None where they are to come from a buffer."""
        return None

    def exact(self, key: Any, count: int) -> Any:
        """Draws from the posterior itself; None where there are none."""
        return None

    def target(self, condition: Any = None) -> Any:
        """What `rnejax.steer` is given: the posterior as a target, at its full strength all the way.

        A tuned model knows where its paths go: what is left to weigh shows at the end, where the reward of the denoised
        state is that of the sample.
        """
        reward = self.log_reward if condition is None else jax.tree_util.Partial(_under, self.log_reward, condition)
        return rj.tilt(self.prior, reward, gradient=False, schedule=_full_strength)

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        """Numbers of samples, weighted or not."""
        return {}

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        """Pictures of samples, and of what the weights of steered ones have made of them."""

    def save(self, folder: RunFolder, weights: Any) -> None:
        """The tuned model as a file, where it has a form in one."""


def build_problem(config: FinetuneRun) -> Problem:
    """What a configuration asks for.

    Raises:
      ConfigError: for models, rewards or grids that cannot be.
    """
    return build_modes(config, config.problem) if isinstance(config.problem, Modes) else build_pretrained(config)


# --------------------------------------------------------------------------------------------------- 25 modes, and nine


@dataclass
class ModesProblem(Problem):
    """A problem of which everything is known."""

    modes: ModeSelection | None = None

    def exact(self, key: Any, count: int) -> Any:
        assert self.modes is not None
        return jax.vmap(self.modes.posterior.sample)(jax.random.split(key, count))

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        from ..training import mode_coverage

        assert self.modes is not None
        found = mode_coverage(self.modes.modes(x), self.modes.shares, log_weights)
        return {
            "total_variation": found.total_variation,
            "total_variation_floor": found.floor,
            "kl_divergence": found.kl_divergence,
            "modes_found": found.num_found,
            "modes_expected": found.num_expected,
            "shares": found.shares,
        }

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        assert self.modes is not None
        count = 2000
        keys = jax.random.split(jax.random.key(0), count)
        panels = {
            "prior": jax.vmap(self.modes.prior.sample)(keys),
            "posterior": jax.vmap(self.modes.posterior.sample)(keys),
            "tuned": x[:count],
        }
        folder.picture(
            "samples.png", plot.scatters(panels if corrected is None else panels | {"corrected": corrected[:count]})
        )


def build_modes(config: FinetuneRun, settings: Modes) -> ModesProblem:
    """The exact model of 25 modes, and a network on top of it."""
    from ..networks import build, functional
    from ..training import Guidance, Guided

    modes = mode_selection()
    try:
        process = rj.processes.Cosine(t_max=settings.t_max, data_std=modes.prior.std)
    except ValueError as error:
        raise ConfigError(f"problem: {error}") from error
    times = make_times(config.grid, process)
    prior = modes.prior.model(process, "x0")
    if config.covariance is None:
        data = jax.vmap(modes.prior.sample)(jax.random.split(jax.random.key(0), NUM_CALIBRATION))
        prior = rj.calibrate(jax.random.key(1), prior, times, data=data)
    else:
        prior = prior.with_covariance(config.covariance)
    network = build("mlp", jax.random.key(config.seed), shape=(2,), hidden=settings.hidden, depth=settings.depth)
    apply, params = functional(network)
    guided = Guided(prior, apply, None if config.reward_gradient is False else modes.log_reward, trust=config.trust)
    posterior = guided.model(Guidance(params, jnp.ones(())))
    return ModesProblem(config, prior, posterior, modes.log_reward, times, 0.0, modes=modes)


# ------------------------------------------------------------------------------------------------ a model that is there


@dataclass
class PretrainedProblem(Problem):
    """A stored model and a reward; where the reward is that of each class, the condition is the class."""

    judge: Any = None
    labels: Any = None
    classifier: Any = None
    merge: Callable[[Any], Any] | None = None
    points: Any = None

    @property
    def num_conditions(self) -> int:  # type: ignore[override]
        return 0 if self.classifier is None else 10

    def conditions(self, count: int) -> Any:
        return None if self.classifier is None else jnp.arange(count, dtype=jnp.int32) % self.num_conditions

    def data(self, key: Any) -> Any:
        from ..training import Examples

        if self.points is None:
            return None
        if self.classifier is None:
            return Examples(self.points)
        # A class by the reward's own probabilities: of these pairs x is the prior's data, and y given x the reward's.
        said = jax.lax.map(self.classifier, self.points, batch_size=64)
        return Examples(self.points, jax.random.categorical(key, said).astype(jnp.int32))

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        weights = np.ones(len(x)) if log_weights is None else np.exp(log_weights - log_weights.max())
        shares = weights / weights.sum()
        if self.prior.process.is_discrete:
            return {"diversity": diversity_of_tokens(x, shares)}
        from .steer import diversity

        found: dict[str, Any] = {"diversity": diversity(x, shares)}
        if self.judge is not None:
            seen = np.asarray(jax.lax.map(self.judge, jnp.asarray(x), batch_size=64)).argmax(-1)
            wanted = seen == condition if condition is not None else np.isin(seen, self.labels)
            found |= {
                "judged_as_wanted": float(shares @ wanted),
                "judged_classes": np.bincount(seen, weights=shares, minlength=10),
            }
        return found

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        settings = self.config.problem
        assert isinstance(settings, Pretrained)
        columns = 20 if condition is not None else max(1, min(16, 2 * math.isqrt(len(x))))
        for name, each in {"samples": x, "corrected": corrected}.items():
            if each is None:
                continue
            if self.prior.process.is_discrete:
                show(folder, kind_of(settings.model), name, each, columns)
            elif plot.is_image(self.prior.shape):
                folder.picture(f"{name}.png", plot.sample_sheet(each[:200], columns=columns))

    def save(self, folder: RunFolder, weights: Any) -> None:
        settings = self.config.problem
        assert isinstance(settings, Pretrained)
        if self.merge is None:
            return
        model = self.prior.with_params(self.merge(weights))
        rj.save_model(
            folder.path / "model.safetensors",
            model,
            network=stored_network(settings.model),
            metadata={"seed": self.config.seed, "settings": self.config.model_dump(mode="json")},
        )
        folder.add("model.safetensors")


def build_pretrained(config: FinetuneRun) -> PretrainedProblem:
    """A stored model whose weights are tuned, or low-rank changes of them."""
    from ..networks import adapted
    from ..training import Guidance, Guided, low_rank_model, partial_model

    settings = config.problem
    assert isinstance(settings, Pretrained)
    model = load_named(settings.model)
    check_classes(settings.model, settings.condition)
    prior = with_condition(model, settings.condition)
    prior = prior if config.covariance is None else prior.with_covariance(config.covariance)
    times = make_times(config.grid, prior.process)
    reward: Any = settings.reward
    each = isinstance(reward, EachClassReward)
    if prior.params is None:
        raise ConfigError(f"problem.model = {settings.model} has no weights to tune")
    if config.reward_gradient and prior.process.is_discrete:
        raise ConfigError("reward_gradient is of models of numbers: leave it out for tokens")
    classifier, log_reward = None, None
    if each:
        if prior.process.is_discrete or prior.condition is None or np.shape(prior.condition) != ():
            raise ConfigError(
                f"problem.reward.kind = each_class is for models whose condition is a class; {settings.model} is none"
            )
        classifier = load_classifier(reward.classifier)
        log_reward = jax.tree_util.Partial(_of_class, classifier, reward.strength)
    else:
        function, host = build_reward(reward)
        if host:
            raise ConfigError(
                "problem.reward runs on the host, where a compiled run cannot ask for it: give one in JAX"
            )
        check_reward(reward, prior, None, "problem.reward")
        # Of weights a pytree, which is data to compiled code; of a plain function configuration.
        bind: Any = functools.partial if jax.tree_util.all_leaves([function]) else jax.tree_util.Partial
        log_reward = bind(_scaled, function, reward.strength)
    labels = reward.label if isinstance(reward, ClassReward) else None
    # Judged by whom the reward has not asked.
    judge = None
    if each or labels is not None:
        judge = load_classifier({"reward": "judge", "judge": "reward"}[reward.classifier])

    tuned = prior.with_params(forget_classes(prior.params)) if each else prior
    base = tuned
    merge: Callable[[Any], Any] | None = lambda weights: weights  # noqa: E731
    if settings.rank is not None and settings.parts is not None:
        raise ConfigError("problem.rank and problem.parts: take one of them")
    try:
        if settings.rank is not None:
            base = low_rank_model(jax.random.key(config.seed), tuned, settings.rank)
            merge = lambda weights: adapted(tuned.params, weights)  # noqa: E731
        if settings.parts is not None:
            base = partial_model(tuned, settings.parts)
            merge = lambda weights: tuned.params | weights  # noqa: E731
    except ValueError as error:
        raise ConfigError(f"problem: {error}") from error
    start = base.params
    posterior = base
    if config.reward_gradient is not False and not prior.process.is_discrete:
        guided = Guided(base, log_reward=log_reward, trust=config.trust)
        condition = jnp.zeros((), jnp.int32) if each else None
        posterior = guided.model(Guidance(start, jnp.ones(())), condition=condition)
        merge = None  # a reward has no form in a file
    points = None
    if settings.data is not None:
        points, _ = load_points(jax.random.key(config.seed), settings.data, None, prior)
    return PretrainedProblem(
        config,
        prior,
        posterior,
        log_reward,
        times,
        judge=judge,
        labels=labels,
        classifier=classifier,
        merge=merge,
        points=points,
    )


def forget_classes(params: Any) -> Any:
    """Weights of a network that begins by knowing no class: every row of its embedding is that of "no class".

    Raises:
      ConfigError: for a network without an embedding of classes.
    """
    if "class_embedding" not in params:
        raise ConfigError("problem.reward.kind = each_class needs a network with an embedding of classes")
    rows = params["class_embedding"]["embedding"]
    return params | {"class_embedding": {"embedding": jnp.broadcast_to(rows[-1], rows.shape)}}


def _full_strength(t: float) -> float:
    return 1.0


def _of_class(log_probabilities: Callable[[Any], Any], strength: Any, x: Any, label: Any) -> Any:
    return strength * log_probabilities(x)[label]


def _scaled(function: Callable[[Any], Any], strength: Any, x: Any) -> Any:
    return strength * function(x)


def _under(function: Callable[[Any, Any], Any], condition: Any, x: Any) -> Any:
    return function(x, condition)
