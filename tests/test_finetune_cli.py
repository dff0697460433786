"""rnejax finetune: what a run leaves behind, how it goes on, and what it refuses."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from rnejax.cli import main
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
    assert (metrics["log_normalizer_learned"] != 0) == ("learned" in overrides)


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
