"""A cloned policy towards what a Q-function takes for good: offline reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from ... import plot
from ...config import ConfigError, FinetuneRun, Policy
from ...policies import QFunction, Transitions, act, evaluate, from_minari, load_q_function, load_transitions
from ..build import load_named, make_times
from ..folder import RunFolder
from .problem import Problem, save_tuned

NUM_STEERED = 16  # observations for which the tuned model proposes
TEST_SHARE = 0.1  # of the observations, which are looked at and not learned from
NUM_CANDIDATES = 8  # of the cloned policy, of which the Q-function takes the best: what needs no tuning
MINARI = "minari:"
MAKER = "scripts/make_control_data.py and scripts/train_policies.py make data, cloned policies and Q-functions"


@partial(jax.tree_util.register_dataclass, data_fields=["function", "temperature"], meta_fields=[])
@dataclass(frozen=True)
class Worth:
    """The reward (action, observation) -> (Q(observation, action) - V(observation)) / temperature.

    A factor of r that depends on the observation alone changes Z, and no posterior; without V numbers would be large.
    """

    function: QFunction
    temperature: Any

    def __call__(self, action: Any, observation: Any) -> Any:
        return self.function.advantage(observation, action) / self.temperature


@dataclass
class PolicyProblem(Problem):
    """Actions; the condition is the observation, for prior and posterior alike."""

    settings: Policy | None = None
    learned_from: Transitions | None = None
    observations: Any = None  # to look at

    prior_takes_condition = True
    brings_data = True

    def conditions(self, count: int) -> Any:
        assert self.learned_from is not None
        return jnp.asarray(self.learned_from.observations[np.arange(count) % len(self.learned_from.rewards)])

    def test_conditions(self, count: int) -> Any:
        return jnp.asarray(self.observations[np.arange(count) % len(self.observations)])

    def steered_conditions(self) -> list[Any]:
        return list(self.test_conditions(NUM_STEERED))

    def data(self, key: Any) -> Any:
        """What was done."""
        from ...training import Examples

        assert self.learned_from is not None
        observations = jnp.asarray(self.learned_from.observations)
        return Examples(jnp.asarray(self.learned_from.actions), observations, observations)

    def outcomes(self, model: rj.DiffusionModel) -> dict[str, Any]:
        """What policies earn in the environment, in the sum of rewards of an episode, from the same starts."""
        settings = self.settings
        assert settings is not None
        if settings.environment is None:
            return {}
        q = self.log_reward.function  # type: ignore[attr-defined]
        candidates = {"num_candidates": NUM_CANDIDATES, "score": q}
        earned = {
            name: evaluate(settings.environment, policy, num_episodes=settings.num_episodes, seed=self.config.seed)
            for name, policy in {
                "cloned": act(self.prior, self.times),
                f"best of {NUM_CANDIDATES}, cloned": act(self.prior, self.times, **candidates),
                "tuned": act(model, self.times),
            }.items()
        }
        return {"returns": {name: list(map(float, each)) for name, each in earned.items()}}

    def draw(self, folder: RunFolder, x: np.ndarray, condition: Any, corrected: np.ndarray | None) -> None:
        """How much better than V what both policies do is, says Q."""
        some = slice(0, 2000)
        seen = np.asarray(condition)[some]
        cloned = act(self.prior, self.times)(jax.random.key(self.config.seed), seen)
        function = self.log_reward.function  # type: ignore[attr-defined]

        def advantages(actions: np.ndarray) -> np.ndarray:
            return np.asarray(jax.vmap(function.advantage)(jnp.asarray(seen), jnp.asarray(actions)))

        groups = {"cloned": advantages(cloned), "tuned": advantages(x[some])}
        folder.picture("advantages.png", plot.histograms(groups, xlabel="Q(s, a) - V(s), in units of reward"))

    def save(self, folder: RunFolder, weights: Any) -> None:
        assert self.settings is not None
        if self.config.reward_gradient is False:  # a Q-function has no form in a file
            save_tuned(folder, self.config, self.settings.model, self.prior.with_params(weights))


def build_policy(config: FinetuneRun, settings: Policy) -> PolicyProblem:
    """A cloned policy, a Q-function, and the observations of the data."""
    from ...training import Guidance, Guided

    try:
        model = load_named(settings.model)
    except ConfigError as error:
        raise ConfigError(f"problem.{error}; {MAKER}") from error
    try:
        function = load_q_function(settings.q_function)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"problem.q_function = {settings.q_function} cannot be loaded: {error}; {MAKER}") from error
    name = settings.data
    try:
        data = from_minari(name.removeprefix(MINARI)) if name.startswith(MINARI) else load_transitions(name)
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise ConfigError(f"problem.data = {name} cannot be loaded: {error}") from error
    check_policy(settings, model, function, data)
    prior = model if config.covariance is None else model.with_covariance(config.covariance)
    rows = np.random.default_rng(config.seed).permutation(len(data.rewards))
    split = max(1, round(TEST_SHARE * len(rows)))
    test, learned_from = rows[:split], Transitions(*[array[rows[split:]] for array in data])
    log_reward = Worth(function, settings.temperature)
    posterior = prior
    if config.reward_gradient is not False:
        guided = Guided(prior, log_reward=log_reward, trust=config.trust)
        posterior = guided.model(Guidance(prior.params, jnp.ones(())), condition=prior.condition)
    return PolicyProblem(
        config,
        prior,
        posterior,
        log_reward,
        make_times(config.grid, prior.process),
        settings=settings,
        learned_from=learned_from,
        observations=data.observations[test],
    )


def check_policy(settings: Policy, model: rj.DiffusionModel, function: QFunction, data: Transitions) -> None:
    """Raises ConfigError for a model, a Q-function, data and an environment that do not belong together."""
    seen, done = data.observations.shape[1], data.actions.shape[1]
    if model.params is None or np.shape(model.condition) != (seen,) or model.shape != (done,):
        raise ConfigError(
            f"problem.model = {settings.model} must be a policy of {done} numbers for observations of {seen}, as in "
            f"problem.data: its shape is {model.shape}, its condition's {np.shape(model.condition)}"
        )
    try:
        jax.eval_shape(lambda s, a: function(s, a), jnp.zeros(seen), jnp.zeros(done))
    except TypeError as error:
        raise ConfigError(
            f"problem.q_function = {settings.q_function} is not one of observations of {seen} numbers and actions of "
            f"{done}, as in problem.data"
        ) from error
    if settings.environment is not None:
        from ...policies.environments import make_environments

        try:
            environments = make_environments(settings.environment, 1)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"problem.environment: {error}") from error
        sizes = environments.single_observation_space.shape, environments.single_action_space.shape
        environments.close()
        if sizes != ((seen,), (done,)):
            raise ConfigError(
                f"problem.environment = {settings.environment} has observations and actions of shapes {sizes}, and "
                f"problem.data of {((seen,), (done,))}"
            )
