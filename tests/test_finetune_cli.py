"""rnejax finetune: what a run leaves behind, how it goes on, and what it refuses."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.checkpoint import load_metadata
from rnejax.cli import main
from rnejax.networks import build, functional
from rnejax.systems.modes import mode_selection

SMALL = """
problem: {kind: modes, hidden: 8, depth: 1}
grid: {num_steps: 6, kind: uniform}
sources: {generated: 0.5, noised: 0.5}
buffer: {size: 32, renew_every: 4}
training: {num_steps: 8, batch_size: 16, report_every: 4, save_every: 4, steps_per_call: 2, warmup_steps: 2}
num_samples: 300
num_particles: 32
num_groups: 3
"""


def write(folder: Path, text: str = SMALL) -> str:
    path = folder / "tuning.yaml"
    path.write_text(text)
    return str(path)


def finetune(folder: Path, *overrides: str, output: str = "out") -> int:
    return main(["finetune", write(folder), "--output", str(folder / output), *overrides])


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_says_what_the_tuned_model_is_and_what_corrects_it(tmp_path):
    assert finetune(tmp_path) == 0
    metrics = metrics_of(tmp_path / "out")
    assert metrics["finished"]
    assert metrics["evaluations"] == {"training": 8 * 16 * 6, "buffer": 3 * 32 * 6}
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert arrays["x"].shape == (300, 2)
    tuned = metrics["tuned"]
    weights = (arrays["log_reward"] - arrays["log_ratio"]).astype(np.float64)
    assert tuned["log_normalizer_lower_bound"]["value"] == pytest.approx(weights.mean(), rel=1e-5)
    expected = np.log(np.mean(np.exp(weights)))
    assert tuned["log_normalizer_importance"]["value"] == pytest.approx(expected, rel=1e-5)
    assert tuned["log_normalizer_upper_bound"]["value"] > tuned["log_normalizer_lower_bound"]["value"]
    modes = mode_selection()
    shares = np.bincount(modes.modes(arrays["x"]), minlength=25) / 300
    np.testing.assert_allclose(tuned["shares"], shares)
    assert tuned["total_variation"] == pytest.approx(0.5 * np.abs(shares - modes.shares).sum(), rel=1e-6)
    assert metrics["corrected"]["modes_expected"] == 9
    for name in ("progress.png", "residuals.png", "samples.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Weights, optimiser, buffer, log Z and random state: the samples are the same to the last digit."""
    module = importlib.import_module("rnejax.training.fit")

    assert finetune(tmp_path, output="whole") == 0
    save, calls = module._save, []

    def stop(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save", stop)
    assert finetune(tmp_path, output="parts") == 130
    assert not metrics_of(tmp_path / "parts")["finished"]
    monkeypatch.setattr(module, "_save", save)
    assert finetune(tmp_path, output="parts") == 0
    whole, parts = (np.load(tmp_path / name / "samples.npz") for name in ("whole", "parts"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


def test_other_settings_do_not_go_on_from_a_state(tmp_path, capsys):
    assert finetune(tmp_path) == 0
    assert finetune(tmp_path, "--bound", "3") == 2
    assert "bound was 5.0, now 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["--sources", "{generated: 1}", "--num_particles", "null", "--normalizer", "learned"],
        ["--sources", "{back_and_forth: 1, inflated: 1}", "--reward_gradient", "false", "--bound", "null"],
        ["--gradient_steps", "2", "--covariance", "reference"],
    ],
)
def test_other_ways_to_tune(tmp_path, overrides):
    assert finetune(tmp_path, *overrides) == 0
    metrics = metrics_of(tmp_path / "out")
    assert np.isfinite(metrics["loss"])
    assert ("corrected" in metrics) == ("--num_particles" not in overrides)
    assert ("buffer" in metrics["evaluations"]) == ("{generated: 1}" not in overrides)
    assert ("log_normalizer_learned" in metrics) == ("learned" in overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--sources", "{generated: 0}"], "sources.generated"),
        (["--sources", "{dreamt: 1}"], "sources"),
        (["--sources", "{}"], "one must be positive"),
        (["--buffer.size", "8"], "buffer.size = 8 must not be below training.batch_size = 16"),
        (["--training.save_every", "6"], "must be a multiple of training.report_every = 4"),
        (["--training.warmup_steps", "20"], "warmup_steps + decay_steps must not exceed num_steps"),
        (["--problem.t_max", "2.0"], "problem: "),
        (["--grid.t_max", "1.5"], "grid: "),
        (["--normalizer", "guessed"], "normalizer = guessed"),
        (["--problem.kind", "mode"], "problem.kind"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_its_key(tmp_path, capsys, overrides, words):
    assert finetune(tmp_path, *overrides) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ a model that is there

PRETRAINED = """
problem: {{kind: model, model: {model}, reward: {{kind: function, function: 'test_finetune_cli:first', strength: 0.5}}}}
grid: {{num_steps: 4}}
normalizer: learned
training: {{num_steps: 4, batch_size: 8, report_every: 2, save_every: 2, steps_per_call: 2, warmup_steps: 1}}
num_samples: 40
num_particles: 16
num_groups: 2
chunk_size: 30
"""


def first(x):
    return x.reshape(-1)[0].astype(float)


def no_scalar(x):
    return x


def write_sample(folder: Path, model: Path) -> str:
    path = folder / "sample.yaml"
    path.write_text(f"model: {model}\ngrid: {{num_steps: 3}}\n")
    return str(path)


def stored_mlp(folder: Path) -> str:
    apply, params = functional(build("mlp", jax.random.key(0), shape=(2,), hidden=8, depth=1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    model = rj.DiffusionModel(
        rj.processes.Cosine(t_min=0.01), apply.as_prediction(), "v", shape=(2,), params=params, batched=True
    )
    network = ("mlp", {"shape": [2], "hidden": 8, "depth": 1})
    rj.save_model(folder / "prior.safetensors", model, network=network)
    return str(folder / "prior.safetensors")


def stored_tokens(folder: Path) -> str:
    arguments = {"vocab_size": 5, "length": 4, "width": 16, "num_layers": 1, "num_heads": 2}
    apply, params = functional(build("token_transformer", jax.random.key(0), **arguments))
    model = rj.DiffusionModel(rj.processes.Masked(5, 4), apply.as_prediction(), params=params, batched=True)
    rj.save_model(folder / "prior.safetensors", model, network=("token_transformer", arguments))
    return str(folder / "prior.safetensors")


@pytest.mark.parametrize("kind", ["numbers", "tokens"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["--reward_gradient", "false"],
        ["--problem.rank", "2", "--reward_gradient", "false"],
        ["--sources", "{noised: 1, back_and_forth: 1}", "--buffer.size", "8", "--reward_gradient", "false"],
        [],
    ],
    ids=["weights", "low_rank", "buffer", "gradient"],
)
def test_a_stored_model_is_tuned_and_stored_again(tmp_path, kind, overrides):
    stored = {"numbers": stored_mlp, "tokens": stored_tokens}[kind](tmp_path)
    if kind == "tokens":  # where no reward has a gradient
        overrides = [each for each in overrides if each not in ("--reward_gradient", "false")]
    path = write(tmp_path, PRETRAINED.format(model=stored))
    assert main(["finetune", path, "--output", str(tmp_path / "out"), *overrides]) == 0
    metrics = metrics_of(tmp_path / "out")
    arrays = np.load(tmp_path / "out" / "samples.npz")
    np.testing.assert_allclose(arrays["log_reward"], 0.5 * arrays["x"].reshape(40, -1)[:, 0], rtol=1e-6)
    assert metrics["tuned"]["log_normalizer_upper_bound"] is None
    assert np.isfinite(metrics["corrected"]["log_normalizer"]["value"])
    written = (tmp_path / "out" / "model.safetensors").exists()
    assert written == (kind == "tokens" or bool(overrides)), "a reward's gradient has no form in a file"
    if written:
        before, after = rj.load_model(stored), rj.load_model(tmp_path / "out" / "model.safetensors")
        changes = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), before.params, after.params)
        assert max(jax.tree.leaves(changes)) > 0
        assert "finetuning" in load_metadata(tmp_path / "out" / "model.safetensors")
        # Nothing else takes the folder from it, and it does not take the folder of its own prior.
        again = ["sample", write_sample(tmp_path, tmp_path / "out" / "model.safetensors"), "--num_samples", "2"]
        assert main([*again, "--output", str(tmp_path / "out")]) == 2
        assert main(["finetune", path, "--output", str(tmp_path)]) == 2
        # What is stored is what the samples are of.
        again = rj.log_density(jax.random.key(0), after, arrays["x"][:3], rj.time_grid(after.process, 4))
        assert np.all(np.isfinite(again.log_density))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--problem.model", "nowhere"], "model = nowhere cannot be loaded"),
        (["--problem.reward", "{kind: ink}"], "problem.reward runs on the host"),
        (["--problem.reward", "{kind: each_class}"], "each_class is for models whose condition is a class"),
        (["--problem.reward", "{kind: function, function: 'test_finetune_cli:no_scalar'}"], "must return one number"),
        (["--problem.reward", "{kind: function, function: 'nowhere:f'}"], "nowhere:f cannot be imported"),
        (["--problem.reward", "{kind: word, word: king}"], "problem.reward.kind = word is for tokens"),
        (["--problem.condition", "3"], "this model takes no condition"),
        (["--problem.above", "0.5"], "problem.above is of classes"),
        (["--problem.data", "nothing.npz", "--sources", "{noised: 1}"], "data = nothing.npz is neither a file"),
    ],
)
def test_models_and_rewards_that_do_not_suit_are_refused(tmp_path, capsys, overrides, words):
    path = write(tmp_path, PRETRAINED.format(model=stored_mlp(tmp_path)))
    assert main(["finetune", path, "--output", str(tmp_path / "out"), *overrides]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_are_told_that_they_have_no_gradient(tmp_path, capsys):
    path = write(tmp_path, PRETRAINED.format(model=stored_tokens(tmp_path)))
    assert main(["finetune", path, "--output", str(tmp_path / "out"), "--reward_gradient", "true"]) == 2
    assert "reward_gradient is of models of numbers" in capsys.readouterr().err
