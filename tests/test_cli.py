"""The command line: what a run leaves behind, and what it says when something goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.checkpoint import save_arrays
from rnejax.cli import main
from rnejax.runs.steer import diversity

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GUIDE = "model: toy\ntarget: {kind: guide, condition: 1, scale: 1.5}\ngrid: {num_steps: 5}\nnum_particles: 8\n"


@pytest.fixture
def toy(monkeypatch):
    """A conditional model of 4 x 4 images around +-0.5, in place of every saved one."""
    process = rj.processes.Cosine()

    def denoiser(params, x, t, condition):
        mean, variance = params[condition], 0.04
        alpha, sigma = process.alpha(t), process.sigma(t)
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    model = rj.DiffusionModel(
        process,
        denoiser,
        prediction="x0",
        params=jnp.array([-0.5, 0.5, 0.0]),
        condition=jnp.array(2),
        shape=(4, 4, 1),
    )

    def load_model(name):
        if name != "toy":
            raise FileNotFoundError(f"there is no model {name}")
        return model

    monkeypatch.setattr(rj, "load_model", load_model, raising=False)
    return model


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


# -------------------------------------------------------------------------------------------------------- what is left


def test_sampling_leaves_configuration_metrics_arrays_and_pictures(toy, tmp_path, capsys):
    path = write(tmp_path, "model: toy\ngrid: {num_steps: 4}\nnum_samples: 5\ncondition: [0, 1]\n")
    assert main(["sample", path, "--output", str(tmp_path / "out")]) == 0
    left = metrics(tmp_path / "out")
    assert left["finished"]
    assert left["network_evaluations"] == 5 * 4
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["config.yaml", "metrics.json", *left["files"]])
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["x"].shape == (5, 4, 4, 1)
        assert arrays["log_density"].shape == (5,)
        # Classes take turns: means -0.5 and 0.5 with a standard deviation of 0.2 over 16 pixels each.
        means = arrays["x"].mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.sign(means), [-1, 1, -1, 1, -1])
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_the_configuration_that_is_left_repeats_the_run(toy, tmp_path):
    path = write(tmp_path, "model: toy\ngrid: {num_steps: 4}\n")
    assert main(["sample", path, "--num_samples", "3", "--output", str(tmp_path / "first")]) == 0
    again = ["sample", str(tmp_path / "first/config.yaml"), "--output", str(tmp_path / "second")]
    assert main(again) == 0
    with np.load(tmp_path / "first/samples.npz") as first, np.load(tmp_path / "second/samples.npz") as second:
        np.testing.assert_array_equal(first["x"], second["x"])


def test_density_of_a_file_of_points(toy, tmp_path):
    points = np.asarray(0.5 + 0.2 * jax.random.normal(jax.random.key(0), (6, 4, 4, 1)))
    np.savez(tmp_path / "points.npz", x=points)
    path = write(tmp_path, "model: toy\ncovariance: full\ncondition: 1\ngrid: {num_steps: 4}\n")
    arguments = ["density", path, "--data", str(tmp_path / "points.npz"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--num_points", "4"]) == 0
    with np.load(tmp_path / "out/samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["x"], points[:4])
        level = toy.process.level(toy.process.t_min)
        variance = float(level.alpha**2 * 0.04 + level.sigma**2)
        residual = (points[:4] - float(level.alpha) * 0.5).reshape(4, -1)
        exact = -0.5 * (residual**2).sum(1) / variance - 8 * np.log(2 * np.pi * variance)
        # Gaussian data and the full covariance: nothing but float32 rounding and the prior at t_max are inexact.
        np.testing.assert_allclose(arrays["log_density"], exact, atol=0.05)
    assert metrics(tmp_path / "out")["num_points"] == 4


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.zeros((3, 4, 4)), "x must have shape (n, 4, 4, 1), got (3, 4, 4)"),
        (np.zeros((4, 4, 1)), "add a batch axis"),
        (np.zeros(()), "x must have shape (n, 4, 4, 1), got ()"),
        (np.zeros((0, 4, 4, 1)), "x holds no points"),
        (np.full((2, 4, 4, 1), np.nan), "x must be finite, but 2 of 2 points are not"),
        (np.zeros((2, 4, 4, 1), int), "x must be floating"),
        (np.asarray(["a"]), "x must be an array of numbers, got <U1"),
        (np.asarray([{}]), "cannot be read as .npz: Object arrays"),
    ],
    ids=["shape", "batch", "number", "none", "nan", "integers", "words", "objects"],
)
def test_a_file_of_something_else_is_named(toy, tmp_path, capsys, points, words):
    file = tmp_path / "points.npz"
    np.savez(file, x=points)
    path = write(tmp_path, "model: toy\ngrid: {num_steps: 2}\n")
    assert main(["density", path, "--data", str(file), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"data = {file}" in told
    assert words in told
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_archive_of_arrays_is_named(toy, tmp_path, capsys):
    path = write(tmp_path, "model: toy\ngrid: {num_steps: 2}\n")
    np.savez(tmp_path / "whole.npz", x=np.zeros((50, 4, 4, 1)))
    np.save(tmp_path / "bare.npy", np.zeros((2, 4, 4, 1)))
    np.savez(tmp_path / "other.npz", y=np.zeros((2, 4, 4, 1)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    (tmp_path / "text.npz").write_text("x")
    for name in ("cut.npz", "bare.npy", "text.npz", "missing.npz", "other.npz"):
        file = str(tmp_path / name)
        assert main(["density", path, "--data", file, "--output", str(tmp_path / "out")]) == 2, name
        assert f"data = {file}" in capsys.readouterr().err


def test_steering_leaves_weighted_particles_and_the_comparison(toy, tmp_path):
    path = write(tmp_path, GUIDE + "compare_uncorrected: true\n")
    assert main(["steer", path, "--output", str(tmp_path / "out")]) == 0
    left = metrics(tmp_path / "out")
    assert left["finished"]
    assert {"log_normalizer_nats", "resamplings", "diversity", "diversity_uncorrected", "warnings"} <= left.keys()
    pictures = {"traces.png", "weights.png", "genealogy.png", "samples.png", "particles.png", "comparison.png"}
    assert pictures <= set(left["files"])
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["x"].shape == (8, 4, 4, 1)
        assert arrays["log_weights"].shape == (8,)
        assert arrays["ess"].shape == arrays["time"].shape == (5,)
        assert np.all(np.diff(arrays["time"]) < 0)


def test_groups_keep_their_axis_in_the_arrays(toy, tmp_path):
    assert main(["steer", write(tmp_path, GUIDE), "--num_groups", "2", "--output", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["x"].shape == (2, 8, 4, 4, 1)
        assert arrays["log_weights"].shape == (2, 8)
        assert arrays["log_normalizer"].shape == (2,)
    assert metrics(tmp_path / "out")["log_normalizer_standard_error_nats"] is not None


SMALL_TRAINING = """
network: {name: unet, arguments: {channels: [8, 8], embedding: 8}}
training: {num_steps: 4, batch_size: 8, warmup_steps: 0, decay_steps: 0, report_every: 2, save_every: 2}
calibration_steps: 3
num_samples: 10
grid: {num_steps: 2}
"""


@pytest.fixture(scope="module")
def few_digits():
    """Twenty images, so that a run takes seconds."""
    from rnejax.systems import digits

    load = digits.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", lambda split: digits.Digits(*(part[:20] for part in load(split))))
        yield


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", write(folder, SMALL_TRAINING), "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_training_leaves_a_model_that_can_be_sampled(trained, tmp_path):
    left = metrics(trained)
    assert left["finished"]
    assert left["step"] == 4
    assert {"model.safetensors", "losses.png", "samples.png", "samples.npz"} <= set(left["files"])
    again = write(tmp_path, f"model: {trained / 'model.safetensors'}\ngrid: {{num_steps: 2}}\nnum_samples: 3\n")
    assert main(["sample", again, "--condition", "[1, null]", "--output", str(tmp_path / "sampled")]) == 0
    model = rj.load_model(trained / "model.safetensors")
    assert type(model.covariance).__name__ == "Analytic"
    assert int(model.condition) == 10  # no class


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    from rnejax.training import fit as whole_fit

    def fit_half(*arguments, on_report, **options):
        def stop_at_the_first_report(report):
            on_report(report)
            raise KeyboardInterrupt

        return whole_fit(*arguments, on_report=stop_at_the_first_report, **options)

    path = write(tmp_path, SMALL_TRAINING)
    monkeypatch.setattr("rnejax.training.fit", fit_half)
    with pytest.warns(UserWarning, match="interrupted after 2 of 4 steps"):
        status = main(["train", path, "--output", str(tmp_path / "halved")])
    monkeypatch.setattr("rnejax.training.fit", whole_fit)
    assert status == 130
    assert "interrupted after 2 of 4 steps" in capsys.readouterr().err
    assert metrics(tmp_path / "halved")["interrupted"]
    assert main(["train", path, "--output", str(tmp_path / "halved")]) == 0
    whole, halved = (rj.load_model(folder / "model.safetensors").params for folder in (trained, tmp_path / "halved"))
    jax.tree.map(np.testing.assert_array_equal, whole, halved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--network.name", "unte"], "did you mean 'unet'?"),
        (["--network.arguments.chanels", "[8, 8]"], "did you mean 'channels'?"),
        (["--training.warmup_steps", "9"], "warmup_steps + decay_steps must not exceed num_steps"),
        (["--process.kind", "cosin"], "did you mean cosine?"),
        (["--grid.t_min", "5"], "grid: "),
        (["--network.name", "mlp", "--network.arguments", "{}"], "network.name = mlp cannot be trained on digits"),
    ],
)
def test_what_cannot_be_trained_is_told_before_a_folder_is_made(few_digits, tmp_path, capsys, change, message):
    assert main(["train", write(tmp_path, SMALL_TRAINING), "--output", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_state_of_other_settings_is_not_gone_on_from(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert "model.safetensors" in before
    assert main(["train", write(tmp_path, SMALL_TRAINING), "--output", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_trained_model_is_not_replaced_by_another_run(trained, toy, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert main(["sample", write(tmp_path, "model: toy\n"), "--output", str(tmp_path / "out")]) == 2
    assert "holds a trained model, which the run would replace" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_run_does_not_replace_its_own_input(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rj, "load_model", lambda name: toy)
    path, out = write(tmp_path, "model: toy\ngrid: {num_steps: 2}\n"), tmp_path / "out"
    assert main(["sample", path, "--output", str(out)]) == 0
    save_arrays(out / "mine.safetensors", {"weight": np.zeros(1)})
    before = contents(out)
    for key, name, command in [("data", "samples.npz", "density"), ("model", "mine.safetensors", "sample")]:
        assert main([command, path, f"--{key}", str(out / name), "--output", str(out)]) == 2
        assert f"{key} = {out / name} lies in output = {out}" in capsys.readouterr().err
        assert contents(out) == before


def test_a_run_removes_the_pictures_of_the_one_before_and_nothing_else(toy, tmp_path):
    path, out = write(tmp_path, GUIDE), tmp_path / "out"
    assert main(["steer", path, "--output", str(out), "--compare_uncorrected", "true"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main(["steer", path, "--output", str(out)]) == 0
    assert not (out / "comparison.png").exists()
    assert (out / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_missing_model_is_told_before_a_folder_is_made(toy, tmp_path, capsys):
    path = write(tmp_path, "model: digts\n")
    assert main(["sample", path, "--output", str(tmp_path / "out")]) == 2
    assert "model = digts cannot be loaded: there is no model digts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rj, "sample", lambda *_, **__: pytest.fail("computed"))
    (tmp_path / "file").write_text("")
    path = write(tmp_path, "model: toy\n")
    assert main(["sample", path, "--output", str(tmp_path / "file/out")]) == 2
    assert f"cannot write into output = {tmp_path / 'file/out'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--target", "{kind: product, conditions: [0, 1], exponents: [1.0]}"], "target: exponents must match models"),
        (["--target", "{kind: tilt, reward: {kind: function, function: 'nowhere:f'}}"], "nowhere:f cannot be imported"),
        (
            ["--target", "{kind: tilt, reward: {kind: function, function: 'math:sin'}}"],
            "math:sin failed on one state of shape",
        ),
        (
            ["--target", "{kind: tilt, reward: {kind: function, function: 'jax.numpy:sin'}}"],
            "jax.numpy:sin must return one number for one state",
        ),
        (["--grid.t_max", "5"], "grid: "),
        (["--judge_label", "1"], "judge_label = 1, but judge is null"),
        (["--judge", "judge", "--judge_label", "12"], "judge_label = 12: input should be less than or equal to 9"),
    ],
)
def test_what_cannot_be_steered_is_told_before_a_folder_is_made(toy, tmp_path, capsys, change, message):
    assert main(["steer", write(tmp_path, GUIDE), "--output", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_keeps_what_it_had_finished_and_says_so(toy, tmp_path, capsys, monkeypatch):
    steer, calls = rj.steer, []

    def interrupted_the_second_time(*arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return steer(*arguments, **options)

    monkeypatch.setattr(rj, "steer", interrupted_the_second_time)
    path = write(tmp_path, GUIDE + "compare_uncorrected: true\n")
    assert main(["steer", path, "--output", str(tmp_path / "out")]) == 130
    left = metrics(tmp_path / "out")
    assert left["interrupted"]
    assert not left["finished"]
    assert "samples.npz" in left["files"]
    assert "samples.npz" in capsys.readouterr().err


def test_a_termination_signal_is_an_interruption(toy, tmp_path, monkeypatch):
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(rj, "sample", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main(["sample", write(tmp_path, "model: toy\n"), "--output", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert metrics(tmp_path / "out")["interrupted"]


def test_a_network_that_returns_nan_ends_the_run_with_the_step(toy, tmp_path, capsys, monkeypatch):
    broken = toy.with_params(jnp.full(3, jnp.nan))
    monkeypatch.setattr(rj, "load_model", lambda name: broken)
    assert main(["sample", write(tmp_path, "model: toy\n"), "--output", str(tmp_path / "out")]) == 1
    assert "NaN" in capsys.readouterr().err
    assert "error" in metrics(tmp_path / "out")


def test_a_mistake_of_ours_is_told_with_what_was_finished(toy, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise IndexError("out of bounds")

    monkeypatch.setattr("rnejax.runs.steer.record_quality", broken)
    with pytest.raises(IndexError):
        main(["steer", write(tmp_path, GUIDE), "--output", str(tmp_path / "out")])
    assert metrics(tmp_path / "out")["error"] == "IndexError: out of bounds"
    assert "what was finished is in" in capsys.readouterr().err


def test_a_file_may_be_named_as_the_shipped_data_are(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "model: toy\ngrid: {num_steps: 2}\n")
    np.savez("digits_mine.npz", x=np.full((2, 4, 4, 1), 0.5))
    assert main(["density", path, "--data", "digits_mine.npz", "--output", "out"]) == 0
    assert main(["density", path, "--data", "digits_tset", "--output", "other"]) == 2
    assert "data = digits_tset is neither a file nor one of digits_train" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- what is said


def test_diversity_is_the_root_mean_squared_distance_of_two_weighted_draws():
    x = np.random.default_rng(0).normal(size=(5, 3))
    w = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    squared = ((x[:, None] - x[None]) ** 2).mean(-1)
    np.testing.assert_allclose(diversity(x, w), np.sqrt(w @ squared @ w), rtol=1e-12)


def test_a_kind_of_device_that_is_not_there_is_told_without_a_traceback(tmp_path):
    # In a process of its own: JAX settles on its devices once.
    config = write(tmp_path, "model: digits\ndevice: {platform: tpu}\n")
    command = [sys.executable, "-m", "rnejax", "sample", config, "--output", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        pytest.skip("there is a TPU here")
    assert run.returncode == 2
    assert "device.platform = tpu, but JAX finds no such device here" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_help_may_be_asked_for_after_the_configuration(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "digits_tokens_prompts", "--help"])
    assert stop.value.code == 0
    assert "--num_samples" in capsys.readouterr().out
