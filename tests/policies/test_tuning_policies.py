"""rnejax finetune of a policy: what it leaves behind, what it earns, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax import policies
from rnejax.checkpoint import CheckpointError, save_arrays
from rnejax.cli import main
from rnejax.policies.diffusion_policy import network_arguments

pytest.importorskip("gymnasium")

CONFIG = """
problem:
  kind: policy
  model: {folder}/policy.safetensors
  q_function: {folder}/q.safetensors
  data: {folder}/data.npz
  temperature: 2.0
  environment: Pendulum-v1
  num_episodes: 2
reward_gradient: false
covariance: diagonal
grid: {{num_steps: 3}}
sources: {{generated: 0.5, noised: 0.5}}
paths_per_condition: 4
training: {{num_steps: 4, batch_size: 16, report_every: 2, save_every: 2, steps_per_call: 2, warmup_steps: 1}}
num_samples: 30
num_particles: 8
num_groups: 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, a Q-function and data for the pendulum: of its sizes, and of no worth."""
    folder = tmp_path_factory.mktemp("policy")
    random = np.random.default_rng(0)
    seen = random.normal(size=(200, 3))
    data = policies.Transitions(seen, random.uniform(-2, 2, (200, 1)), -(seen[:, 0] ** 2), seen, np.zeros(200, bool))
    policies.save_transitions(folder / "data.npz", data)
    model = policies.policy_model(jax.random.key(0), rj.processes.Cosine(t_max=1.0), data, hidden=8, depth=1)
    rj.save_model(folder / "policy.safetensors", model, network=("mlp", network_arguments(data, 8, 1)))
    q = policies.fit_q_function(jax.random.key(1), data, num_steps=20, hidden=8)
    policies.save_q_function(folder / "q.safetensors", q)
    (folder / "policy.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def finetune(folder, out, *overrides):
    return main(["finetune", str(folder / "policy.yaml"), "--output", str(out), *overrides])


def test_a_q_function_is_the_same_after_it_was_stored(folder, tmp_path):
    data = policies.load_transitions(folder / "data.npz")
    q = policies.fit_q_function(jax.random.key(1), data, num_steps=20, hidden=8)
    again = policies.load_q_function(folder / "q.safetensors")
    s, a = jnp.asarray(data.observations), jnp.asarray(data.actions)
    np.testing.assert_array_equal(jax.vmap(again)(s, a), jax.vmap(q)(s, a))
    np.testing.assert_array_equal(jax.vmap(again.value)(s), jax.vmap(q.value)(s))
    np.testing.assert_allclose(
        jax.vmap(again.advantage)(s, a), jax.vmap(again)(s, a) - jax.vmap(again.value)(s), rtol=1e-5, atol=1e-6
    )
    save_arrays(tmp_path / "other.safetensors", {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="holds no Q-function"):
        policies.load_q_function(tmp_path / "other.safetensors")
    save_arrays(tmp_path / "old.safetensors", {"weights": np.zeros(2), "low": np.zeros(1)}, {"kind": "q_function"})
    with pytest.raises(CheckpointError, match="another version: it holds no shift, scale, unit, high"):
        policies.load_q_function(tmp_path / "old.safetensors")


def test_the_shipped_policy_swings_up():
    """Uniform torques earn -1235, its clone -674, and the controller that made the best of the data -155."""
    model = rj.load_model("pendulum")
    earned = policies.evaluate("Pendulum-v1", policies.act(model, rj.time_grid(model.process, 20)), num_episodes=10)
    assert earned.mean() > -300


def test_a_run_says_what_the_policies_earn(folder, tmp_path):
    out = tmp_path / "out"
    assert finetune(folder, out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    arrays = np.load(out / "samples.npz")
    assert arrays["x"].shape == (30, 1)
    assert arrays["condition"].shape == (30, 3)
    # log r is what the stored Q-function says, less V, in units of the temperature.
    q = policies.load_q_function(folder / "q.safetensors")
    said = jax.vmap(q.advantage)(jnp.asarray(arrays["condition"]), jnp.asarray(arrays["x"])) / 2.0
    np.testing.assert_allclose(arrays["log_reward"], said, rtol=1e-4, atol=1e-5)
    # What is looked at has not been learned from.
    data = policies.load_transitions(folder / "data.npz")
    assert len(np.unique(arrays["condition"], axis=0)) == 20
    assert np.isin(arrays["condition"][:, 0], data.observations[:, 0]).all()
    assert {len(each) for each in metrics["returns"].values()} == {2}
    # The stored model is the policy whose returns are told.
    tuned = rj.load_model(out / "model.safetensors").with_covariance("diagonal")
    times = rj.time_grid(tuned.process, 3)
    earned = policies.evaluate("Pendulum-v1", policies.act(tuned, times), num_episodes=2, seed=0)
    np.testing.assert_allclose(metrics["returns"]["tuned"], earned, rtol=1e-3)
    assert len(metrics["corrected"]) == 16
    assert (out / "advantages.png").stat().st_size > 1000


def test_what_is_looked_at_has_not_been_learned_from(folder):
    from rnejax.config import FinetuneRun, load_config
    from rnejax.runs.finetuning import build_problem

    problem = build_problem(load_config(FinetuneRun, str(folder / "policy.yaml"), []))
    examples = problem.data(jax.random.key(0))
    assert len(examples.x) == 180
    assert not np.isin(np.asarray(problem.test_conditions(20))[:, 0], np.asarray(examples.condition)[:, 0]).any()
    # Actions stay with what had been observed.
    data = policies.load_transitions(folder / "data.npz")
    rows = [np.flatnonzero(data.observations[:, 0] == seen)[0] for seen in np.asarray(examples.condition)[:, 0]]
    np.testing.assert_array_equal(examples.x, data.actions[rows])


def test_prior_and_posterior_are_asked_under_the_same_observation(folder, tmp_path):
    """Before it is tuned the one is the other, whatever is observed: the paths that are looked at have no ratio."""
    from rnejax.config import FinetuneRun, load_config
    from rnejax.runs.finetune import sample_paths
    from rnejax.runs.finetuning import build_problem

    data = policies.load_transitions(folder / "data.npz")
    model = rj.load_model(folder / "policy.safetensors")
    # A fresh network begins at zero, for all observations.
    other = jax.tree.map(lambda w: w + 0.5 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), model.params)
    path = tmp_path / "policy.safetensors"
    rj.save_model(path, model.with_params(other), network=("mlp", network_arguments(data, 8, 1)))
    config = load_config(FinetuneRun, str(folder / "policy.yaml"), ["--problem.model", str(path)])
    problem = build_problem(config)
    paths = sample_paths(jax.random.key(2), config, problem, problem.posterior)
    np.testing.assert_allclose(paths.log_ratio, 0, atol=1e-4)
    seen = problem.test_conditions(2)
    x = jnp.ones(1)
    said = [problem.prior.with_condition(each).denoise(x, 0.5) for each in seen]
    assert abs(said[0] - said[1]) > 1e-2, "what is observed must matter"
    for each, expected in zip(problem.steered_conditions()[:2], said, strict=True):
        (term,) = problem.target(each).models
        np.testing.assert_allclose(term.denoise(x, 0.5), expected, rtol=1e-5)


def test_a_policy_may_follow_the_gradient_of_q(folder, tmp_path):
    out = tmp_path / "out"
    assert finetune(folder, out, "--reward_gradient", "true", "--problem.environment", "null") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert "returns" not in metrics
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--problem.data", "nothing.npz"], "problem.data = nothing.npz cannot be loaded"),
        (["--problem.q_function", "nothing"], "problem.q_function = nothing cannot be loaded"),
        (["--problem.model", "digits"], "problem.model = digits must be a policy of 1 numbers"),
        (["--problem.environment", "Nowhere-v3"], "problem.environment"),
        (["--problem.environment", "MountainCarContinuous-v0"], "observations and actions of shapes"),
        (["--problem.temperature", "0"], "problem.temperature"),
        (["--normalizer", "learned"], "normalizer = learned is for one log Z"),
        (["--paths_per_condition", "1"], "paths_per_condition must be at least 2 for normalizer = batch"),
        (["--problem.model", "nothing"], "scripts/train_policies.py make data, cloned policies"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, tmp_path, capsys, overrides, words):
    assert finetune(folder, tmp_path / "out", *overrides) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_q_function_of_other_sizes_is_refused(folder, tmp_path, capsys):
    random = np.random.default_rng(1)
    seen = random.normal(size=(50, 5))
    data = policies.Transitions(seen, random.normal(size=(50, 2)), seen[:, 0], seen, np.zeros(50, bool))
    policies.save_q_function(tmp_path / "q.safetensors", policies.fit_q_function(jax.random.key(0), data, num_steps=2))
    assert finetune(folder, tmp_path / "out", "--problem.q_function", str(tmp_path / "q.safetensors")) == 2
    assert "is not one of observations of 3 numbers" in capsys.readouterr().err
