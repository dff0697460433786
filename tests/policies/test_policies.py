"""Logged data, Q-functions and diffusion policies, on problems with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax import policies
from rnejax.policies.environments import make_environments
from rnejax.policies.transitions import from_episodes
from rnejax.training import Examples, FineTuned, fit, make_optimizer, trajectory_balance_loss

RANDOM = np.random.default_rng(0)


def some(n=600):
    """One state, in fact: rewards are -(a - 0.3)^2, and half of the steps are the last."""
    actions = RANDOM.uniform(-1, 1, (n, 1))
    observations = RANDOM.normal(size=(n, 2)) * [1.0, 10.0] + [0.0, 5.0]
    rewards = -((actions[:, 0] - 0.3) ** 2)
    return policies.Transitions(observations, actions, rewards, observations, np.ones(n, bool))


def test_transitions_are_stored_and_checked(tmp_path):
    data = some(20)
    policies.save_transitions(tmp_path / "deep" / "data.npz", data)
    again = policies.load_transitions(tmp_path / "deep" / "data.npz")
    for one, other in zip(again, data, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"scripts/make_control_data\.py"):
        policies.load_transitions(tmp_path / "nothing.npz")
    np.savez(tmp_path / "part.npz", observations=data.observations)
    with pytest.raises(ValueError, match="holds no actions, rewards"):
        policies.load_transitions(tmp_path / "part.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        policies.load_transitions(tmp_path / "text.npz")
    for change, words in (
        ({"actions": data.actions[:3]}, "must agree on their number"),
        ({"rewards": np.full(20, np.nan)}, "rewards must be finite, and 20"),
        ({"observations": data.observations[:, 0]}, r"must have shapes \(n, size\)"),
    ):
        with pytest.raises(ValueError, match=words):
            policies.save_transitions(tmp_path / "bad.npz", data._replace(**change))


def test_episodes_become_transitions():
    """As Minari has them: one more observation than actions; an end is a termination, not where time was up."""

    class Episode:
        def __init__(self, length, ended):
            self.observations = np.arange(length + 1.0)[:, None]
            self.actions = np.zeros((length, 2))
            self.rewards = np.arange(length)
            self.terminations = np.array([False] * (length - 1) + [ended])

    data = from_episodes([Episode(3, True), Episode(2, False)])
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 3, 1, 2])
    assert data.terminals.tolist() == [False, False, True, False, False]
    with pytest.raises(ValueError, match="no episode"):
        from_episodes([])


def test_a_q_function_of_single_steps_is_the_reward():
    """Where every step is the last, Q = r, and V the expectile of r over actions."""
    data = some(2000)
    q = policies.fit_q_function(
        jax.random.key(0), data, num_steps=1500, hidden=32, learning_rate=3e-3, expectile=0.8, averaging=0.05
    )
    actions = jnp.linspace(-0.9, 0.9, 7)[:, None]
    seen = jnp.broadcast_to(jnp.asarray([0.0, 5.0]), (7, 2))
    np.testing.assert_allclose(jax.vmap(q)(seen, actions), -((actions[:, 0] - 0.3) ** 2), atol=0.08)
    # The expectile e: 0.8 E(r - e)+ = 0.2 E(e - r)+.
    rewards = np.asarray(data.rewards)
    candidates = np.linspace(rewards.min(), 0, 2000)
    excess = [0.8 * np.maximum(rewards - e, 0).mean() - 0.2 * np.maximum(e - rewards, 0).mean() for e in candidates]
    expectile = candidates[np.argmin(np.abs(excess))]
    assert float(q.value(jnp.asarray([0.0, 5.0]))) == pytest.approx(expectile, abs=0.08)


def test_actions_that_were_never_seen_count_as_the_nearest_that_were():
    data = some(200)
    q = policies.fit_q_function(jax.random.key(0), data, num_steps=20, hidden=8)
    seen, low, high = jnp.zeros(2), data.actions.min(), data.actions.max()
    assert q(seen, jnp.asarray([9.0])) == q(seen, jnp.asarray([high], jnp.float32))
    assert q(seen, jnp.asarray([-9.0])) == q(seen, jnp.asarray([low], jnp.float32))
    assert q(seen, jnp.asarray([low / 2], jnp.float32)) != q(seen, jnp.asarray([low], jnp.float32))


def test_of_two_q_networks_the_smaller_counts():
    """What one of them alone has learned to like is no reason to do it."""
    function = policies.fit_q_function(jax.random.key(0), some(100), num_steps=3, batch_size=8, hidden=8)
    seen, done = some(50).observations, some(50).actions
    both = np.asarray(jax.vmap(function.both)(seen, done))
    assert np.abs(both[:, 0] - both[:, 1]).min() > 0
    found = jax.vmap(function)(seen, done)
    np.testing.assert_allclose(found, float(function.unit) * both.min(axis=1), rtol=1e-5)
    advantages = jax.vmap(function.advantage)(seen, done)
    np.testing.assert_allclose(advantages, found - jax.vmap(function.value)(seen), rtol=1e-4, atol=1e-5)


def test_a_q_function_looks_ahead():
    """Two states in turn, rewards 1 and 0, no end: Q(first) = 1 / (1 - g^2), Q(second) = g / (1 - g^2)."""
    n, discount = 1000, 0.8
    state = np.arange(n) % 2
    one_hot = np.eye(2)[state]
    data = policies.Transitions(one_hot, np.zeros((n, 1)), 1.0 - state, np.eye(2)[1 - state], np.zeros(n, bool))
    q = policies.fit_q_function(
        jax.random.key(0), data, num_steps=3000, hidden=16, learning_rate=3e-3, discount=discount, averaging=0.05
    )
    first, second = (float(q(jnp.asarray(each, jnp.float32), jnp.zeros(1))) for each in np.eye(2))
    assert first == pytest.approx(1 / (1 - discount**2), rel=0.03)
    assert second == pytest.approx(discount / (1 - discount**2), rel=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"discount": 1.0}, "discount must be between 0 and 1"),
        ({"expectile": 0.0}, "expectile must be between 0 and 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
    ],
)
def test_what_is_no_q_learning_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        policies.fit_q_function(jax.random.key(0), some(20), **options)


def test_a_policy_is_cloned_and_tuned_towards_what_is_rewarded():
    """Actions are normal around the first observation; tilted by exp(2 a) they move by twice their variance."""
    n = 4000
    observations = RANDOM.normal(size=(n, 1)) * 3 + 1
    actions = 0.5 * observations + 0.4 * RANDOM.normal(size=(n, 1))
    data = policies.Transitions(observations, actions, np.zeros(n), observations, np.zeros(n, bool))
    process = rj.processes.Cosine(t_max=1.0)
    times = rj.time_grid(process, 12)
    model = policies.policy_model(jax.random.key(0), process, data, hidden=32, depth=2)
    model = policies.clone(jax.random.key(1), model, data, num_steps=1500, learning_rate=3e-3).with_covariance(
        "diagonal"
    )
    seen = jnp.asarray([[-2.0], [4.0]])

    def means(model):
        policy = policies.act(model, times)
        x = policy(jax.random.key(2), np.repeat(np.asarray(seen), 500, axis=0))
        return x.reshape(2, 500).mean(axis=1), x.reshape(2, 500).std(axis=1)

    cloned, spread = means(model)
    np.testing.assert_allclose(cloned, [-1.0, 2.0], atol=0.15)
    np.testing.assert_allclose(spread, 0.4, atol=0.1)

    def log_reward(action, observation):
        return 2.0 * action[0]

    loss = trajectory_balance_loss(
        model, model, times, log_reward, normalizer="batch", paths_per_condition=8, bound=5.0
    )
    tuned = fit(
        jax.random.key(3),
        loss,
        FineTuned(model.params, jnp.zeros(())),
        Examples(jnp.asarray(data.actions), jnp.asarray(data.observations), jnp.asarray(data.observations)),
        make_optimizer(1e-3, num_steps=300, warmup_steps=10),
        num_steps=300,
        batch_size=128,
        steps_per_call=20,
        report_every=100,
        save_every=100,
        ema_decay=0.95,
    ).average
    moved, _ = means(model.with_params(tuned.weights))
    # By 2 * 0.16; errors of the clone, of the tuning, and of 500 draws each.
    np.testing.assert_allclose(moved - cloned, 0.32, atol=0.12)


class TestEnvironments:
    gymnasium = pytest.importorskip("gymnasium")

    def test_returns_are_those_of_whole_episodes(self):
        """Pendulum: 200 steps each, rewards between -16.3 and 0; a policy that does nothing, by hand."""
        found = policies.evaluate("Pendulum-v1", lambda key, seen: np.zeros((len(seen), 1)), num_episodes=3, seed=4)
        for i in range(3):
            environment = self.gymnasium.make("Pendulum-v1")
            environment.reset(seed=4 + i)
            total = sum(environment.step(np.zeros(1, np.float32))[1] for _ in range(200))
            assert found[i] == pytest.approx(total, rel=1e-5)

    def test_an_episode_that_ends_early_earns_nothing_more(self):
        """A hopper that falls: its return is that of its first episode, whatever comes after."""
        pytest.importorskip("mujoco")
        fall = lambda key, seen: np.ones((len(seen), 3))  # noqa: E731
        found = policies.evaluate("Hopper-v5", fall, num_episodes=2, seed=1)
        environment = self.gymnasium.make("Hopper-v5")
        environment.reset(seed=1)
        total, ended, steps = 0.0, False, 0
        while not ended:
            _, reward, ended, _, _ = environment.step(np.ones(3, np.float32))
            total, steps = total + reward, steps + 1
        assert steps < 500
        assert found[0] == pytest.approx(total, rel=1e-4)

    def countdown(self):
        """Names of an environment that ends after 2 or 3 steps, by its seed, and of one that is out of time after 2."""
        gymnasium = self.gymnasium

        class Countdown(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,))
            action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                if seed is not None:
                    self.length = 2 + seed % 2
                self.left = self.length
                return np.full(1, self.left, np.float32), {}

            def step(self, action):
                self.left -= 1
                return np.full(1, self.left, np.float32), 1.0, self.left == 0, False, {}

        for name, limit in {"Countdown-v0": 10, "ShortCountdown-v0": 2}.items():
            if name not in gymnasium.registry:
                gymnasium.register(name, entry_point=Countdown, max_episode_steps=limit)
        return "Countdown-v0", "ShortCountdown-v0"

    def test_what_is_earned_after_an_end_does_not_count(self):
        """Environments that have ended begin again while others go on."""
        idle = lambda key, seen: np.zeros((len(seen), 1))  # noqa: E731
        name, short = self.countdown()
        np.testing.assert_array_equal(policies.evaluate(name, idle, num_episodes=4, seed=0), [2, 3, 2, 3])
        np.testing.assert_array_equal(policies.evaluate(short, idle, num_episodes=4, seed=0), [2, 2, 2, 2])

    def test_an_episode_that_is_out_of_time_has_not_ended(self):
        """Its last state is worth something; what is seen next is not the next episode's beginning."""
        idle = lambda key, seen: np.zeros((len(seen), 1))  # noqa: E731
        _, short = self.countdown()
        data = policies.collect(short, idle, num_steps=8, num_envs=2, seed=0)
        np.testing.assert_array_equal(data.observations[:, 0], [2, 3, 1, 2, 2, 3, 1, 2])
        np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 0, 1, 1, 2, 0, 1])
        np.testing.assert_array_equal(data.terminals, [False, False, True, False] * 2)

    def test_what_is_collected_ends_where_episodes_do(self):
        pytest.importorskip("mujoco")
        data = policies.collect("Hopper-v5", lambda key, seen: np.ones((len(seen), 3)), num_steps=400, num_envs=2)
        assert data.terminals.sum() >= 2
        # Within an episode the next observation is the one that follows; after an end it is not.
        following = data.observations[2:]
        same = np.isclose(following, data.next_observations[:-2], atol=1e-5).all(axis=1)
        np.testing.assert_array_equal(same, ~data.terminals[:-2])

    def test_policies_and_environments_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="environment 'Nowhere-v0'"):
            make_environments("Nowhere-v0", 1)
        with pytest.raises(ValueError, match="must have vectors as observations and actions"):
            make_environments("CartPole-v1", 1)
        with pytest.raises(ValueError, match=r"must return actions of shape \(2, 1\)"):
            policies.evaluate("Pendulum-v1", lambda key, seen: np.zeros(3), num_episodes=2)
        with pytest.raises(ValueError, match="actions that are not finite"):
            policies.evaluate("Pendulum-v1", lambda key, seen: np.full((len(seen), 1), np.nan), num_episodes=2)

    def test_the_best_of_several_is_done(self):
        process = rj.processes.Cosine(t_max=1.0)
        model = policies.policy_model(jax.random.key(0), process, some(50), hidden=8, depth=1)
        times = rj.time_grid(process, 3)
        with pytest.raises(ValueError, match="give a score"):
            policies.act(model, times, num_candidates=4)
        best = policies.act(model, times, num_candidates=16, score=lambda s, a: -jnp.abs(a[0] - s[0]))
        seen = np.array([[0.2, 0.0], [-0.3, 0.0]], np.float32)
        assert np.abs(best(jax.random.key(0), seen)[:, 0] - seen[:, 0]).max() < 0.35
