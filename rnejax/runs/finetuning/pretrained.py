"""A stored model under a reward; where the reward is that of each class, the condition is the class."""

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

from ... import plot
from ...config import ClassReward, ConfigError, EachClassReward, FinetuneRun, Pretrained
from ...persistence import stored_network
from ..build import (
    build_reward,
    check_classes,
    check_reward,
    load_classifier,
    load_named,
    load_points,
    make_times,
    with_condition,
)
from ..folder import RunFolder
from ..tokens import diversity_of_tokens, kind_of, show
from .problem import Problem, save_tuned


@dataclass
class PretrainedProblem(Problem):
    """A stored model and a reward; where the reward is that of each class, the condition is the class."""

    judge: Any = None
    labels: Any = None
    classifier: Any = None  # log-probabilities of all conditions
    groups: Any = ()  # the classes of every condition
    merge: Callable[[Any], Any] | None = None
    points: Any = None
    prior_samples: int = 0
    above: float | None = None

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.groups)

    @property
    def brings_data(self) -> bool:  # type: ignore[override]
        return self.points is not None or self.prior_samples > 0

    def conditions(self, count: int) -> Any:
        return None if self.classifier is None else jnp.arange(count, dtype=jnp.int32) % self.num_classes

    def data(self, key: Any) -> Any:
        from ...training import Examples

        if not self.brings_data:
            return None
        key_classes, key_samples = jax.random.split(key)
        points = [] if self.points is None else [self.points]
        if self.prior_samples:
            points.append(self.own_samples(key_samples))
        x = jnp.concatenate(points)
        if self.classifier is None:
            return Examples(x)
        # Every image twice. With a class by the reward's own probabilities: of these pairs x is the prior's data, and y
        # given x the reward's. And with any class: paths that are to become less likely, without which whatever makes
        # data more likely than the prior does, of all classes alike, lowers the loss.
        said = jax.lax.map(self.classifier, x, batch_size=64)
        key_right, key_any = jax.random.split(key_classes)
        right = jax.random.categorical(key_right, said)
        anything = jax.random.randint(key_any, right.shape, 0, self.num_classes)
        both = jnp.concatenate([right, anything]).astype(jnp.int32)
        return Examples(jnp.concatenate([x, x]), both)

    def own_samples(self, key: Any) -> Any:
        """Of the prior."""
        size = min(self.prior_samples, self.config.chunk_size)
        some = jax.jit(lambda key: rj.sample(key, self.prior, self.times, size, progress=False).x)
        keys = jax.random.split(key, -(-self.prior_samples // size))
        return jnp.concatenate([some(each) for each in keys])[: self.prior_samples]

    def describe(self, x: np.ndarray, log_weights: np.ndarray | None, condition: Any) -> dict[str, Any]:
        weights = np.ones(len(x)) if log_weights is None else np.exp(log_weights - log_weights.max())
        shares = weights / weights.sum()
        if self.prior.process.is_discrete:
            return {"diversity": diversity_of_tokens(x, shares)}
        from ..steer import diversity

        found: dict[str, Any] = {"diversity": diversity(x, shares)}
        if self.judge is not None:
            seen = np.asarray(jax.lax.map(self.judge, jnp.asarray(x), batch_size=64)).argmax(-1)
            if condition is None:
                wanted = np.isin(seen, self.labels)
            else:
                wanted = np.array([each in self.groups[i] for each, i in zip(seen, condition, strict=True)])
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
        gate = {} if self.above is None else {"classes_above": self.above}
        save_tuned(folder, self.config, settings.model, self.prior.with_params(self.merge(weights)), **gate)


def build_pretrained(config: FinetuneRun, settings: Pretrained) -> PretrainedProblem:
    """A stored model whose weights are tuned, or low-rank changes of them."""
    from ...networks import adapted
    from ...training import Guidance, Guided, low_rank_model, partial_model

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
    groups: tuple[tuple[int, ...], ...] = ()
    if each:
        if prior.process.is_discrete or prior.condition is None or np.shape(prior.condition) != ():
            raise ConfigError(
                f"problem.reward.kind = each_class is for models whose condition is a class; {settings.model} is none"
            )
        groups = tuple(tuple(group) for group in reward.groups or [[label] for label in range(10)])
        members = np.array([np.isin(np.arange(10), group) for group in groups])
        classifier = jax.tree_util.Partial(_of_groups, load_classifier(reward.classifier), jnp.asarray(members))
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
    if settings.above is not None:
        if not each:
            raise ConfigError("problem.above is of classes: it goes with problem.reward.kind = each_class")
        if settings.parts != ["class_embedding"]:
            raise ConfigError(
                "problem.above is for problem.parts = [class_embedding]: other weights count at all times"
            )
        if config.reward_gradient is not False:
            raise ConfigError("problem.above needs reward_gradient = false: a reward's gradient counts at all times")
        tuned = with_classes_above(tuned, settings, times)
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
            if settings.above is not None:
                merge = lambda weights: tuned.params | with_the_same_no_class(weights, tuned.params)  # noqa: E731
                base = base._replace(fn=WithTheSameNoClass(base.fn, tuned.params))
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
        groups=groups,
        merge=merge,
        points=points,
        prior_samples=settings.prior_samples or 0,
        above=settings.above,
    )


def with_classes_above(model: rj.DiffusionModel, settings: Pretrained, times: np.ndarray) -> rj.DiffusionModel:
    """The same weights in the same network, in which classes count at larger times only."""
    from flax import nnx

    from ...networks import build, functional

    name, arguments = stored_network(settings.model) or ("", {})
    try:
        module = nnx.eval_shape(lambda: build(name, jax.random.key(0), **arguments | {"classes_above": settings.above}))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"problem.above: the network of {settings.model} cannot do that") from error
    assert settings.above is not None
    if not settings.above < times[-1]:
        raise ConfigError(f"problem.above = {settings.above} must be below the grid's last time, {times[-1]:g}")
    apply, _ = functional(module)
    return model._replace(fn=apply.as_prediction())


def with_the_same_no_class(weights: Any, params: Any) -> Any:
    """The vectors of classes, and of "no class" the old one: it is the prior's, where classes do not count."""
    tuned, old = (each["class_embedding"]["embedding"] for each in (weights, params))
    return {"class_embedding": {"embedding": jnp.concatenate([tuned[:-1], old[-1:]])}}


@jax.tree_util.register_static
class WithTheSameNoClass:
    """A network's function of its vectors of classes."""

    def __init__(self, fn: Callable[..., Any], params: Any):
        self.fn, self.params = fn, params

    def __call__(self, weights: Any, x: Any, t: Any, condition: Any) -> Any:
        return self.fn(with_the_same_no_class(weights, self.params), x, t, condition)


def forget_classes(params: Any) -> Any:
    """Weights of a network that begins by knowing no class: every row of its embedding is that of "no class".

    Raises:
      ConfigError: for a network without an embedding of classes.
    """
    if "class_embedding" not in params:
        raise ConfigError("problem.reward.kind = each_class needs a network with an embedding of classes")
    rows = params["class_embedding"]["embedding"]
    return params | {"class_embedding": {"embedding": jnp.broadcast_to(rows[-1], rows.shape)}}


def _of_groups(log_probabilities: Callable[[Any], Any], members: Any, x: Any) -> Any:
    """That x is of any class of a group, of every group."""
    return jax.nn.logsumexp(jnp.where(members, log_probabilities(x), -jnp.inf), axis=-1)


def _of_class(log_probabilities: Callable[[Any], Any], strength: Any, x: Any, label: Any) -> Any:
    return strength * log_probabilities(x)[label]


def _scaled(function: Callable[[Any], Any], strength: Any, x: Any) -> Any:
    return strength * function(x)
