"""rnejax regimes: what a study leaves behind, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from rnejax.cli import main
from rnejax.processes import NonReversible
from rnejax.regimes import speciation_time

SMALL = """
data: {kind: mixture, dimension: 4, ratio: 4.0, directions: [slowest, uniform], skews: [none, rotation, optimal]}
grid: {num_steps: 12, t_max: 6.0}
num_pairs: 40
num_times: 3
num_points: [100]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "study.yaml"
    path.write_text(text)
    return str(path)


def test_a_study_records_theory_beside_experiment(tmp_path):
    assert main(["regimes", write(tmp_path, SMALL), "--output", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = metrics["regimes"]
    assert list(found) == ["none", "rotation", "optimal"]
    rates = 4.0 ** (np.arange(4) / 3)
    rates *= 4 / rates.sum()
    process = NonReversible(rates, data_covariance=1.0)
    expected = speciation_time(process, 2 * np.eye(4)[0], 1.0)
    assert found["none"]["slowest"]["speciation_time"] == pytest.approx(expected)
    assert found["none"]["spectral_gap"] == pytest.approx(rates.min())
    assert found["optimal"]["spectral_gap"] == pytest.approx(1.0)
    assert set(found["none"]["collapse_time"]) == {"classes", "stationary"}
    assert found["none"]["collapse_time"]["classes"]["100"] > 0
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert arrays["uniform_rotation_probability"].shape == (3,)
    assert np.all(arrays["uniform_rotation_lower"] <= arrays["uniform_rotation_probability"])
    assert (tmp_path / "out" / "cloning.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--data.dimension", "1"], "data.dimension = 1: input should be greater than or equal to 2"),
        (["--data.skews", "[swirl]"], "data.skews"),
        (["--num_points", "[1]"], "num_points"),
        (["--grid.t_max", "0.0001"], "data.skews: none: NonReversible needs 0 <= t_min < t_max"),
        (["--data.strength", "-1"], "data.strength"),
    ],
)
def test_what_is_no_study_is_refused_by_its_key(tmp_path, capsys, override, words):
    assert main(["regimes", write(tmp_path, SMALL), "--output", str(tmp_path / "out"), *override]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_goes_on_where_there_is_no_transition(tmp_path):
    """So many points are not told apart in four dimensions, and such wide classes never part: that is an answer."""
    out = tmp_path / "out"
    overrides = ["--num_points", "[100, 1000000000000]", "--data.variance", "50", "--data.skews", "[none]"]
    assert main(["regimes", write(tmp_path, SMALL), "--output", str(out), *overrides]) == 0
    found = json.loads((out / "metrics.json").read_text())["regimes"]["none"]
    assert found["collapse_time"]["classes"]["100"] > 0
    assert found["collapse_time"]["classes"]["1000000000000"] is None
    assert found["slowest"]["speciation_time"] is None
    assert (out / "cloning.png").exists()


TRAINED = """
data:
  {kind: small_digits, digits: [3, 8], num_train: 60, num_seeds: 2, hidden: 8, depth: 1, num_steps: 10,
   batch_size: 16, few_steps: [2], many_steps: 6, num_samples: 8, skews: [optimal]}
grid: {num_steps: 6, t_min: 0.02, kind: log_time}
num_pairs: 10
num_times: 3
"""


def test_networks_on_two_digits_are_trained_cloned_and_judged(tmp_path):
    out = tmp_path / "out"
    assert main(["regimes", write(tmp_path, TRAINED), "--output", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["num_train"], metrics["num_test"]) == (60, 297)
    assert metrics["label_accuracy"] > 0.9
    assert list(metrics["regimes"]) == ["isotropic", "optimal"]
    arrays = np.load(out / "samples.npz")
    assert arrays["train"].shape == (60, 64)
    assert arrays["optimal_to_itself"].shape == (2, 3, 1)  # seeds, grids, numbers of steps
    assert arrays["optimal_image_exact_model_probability"].shape == (3,)
    # Theory is that of the training images, in units in which the mean rate of the noise is 1.
    found = metrics["regimes"]
    assert found["optimal"]["spectral_gap"] == pytest.approx(1.0)
    for name in found:
        assert found[name]["speciation_time"] > 0
        assert len(found[name]["few_steps"]) == 3
        assert 0.5 < found[name]["held_out_loss"]["mean"] < 2
    covariance = np.cov(arrays["train"].T)
    exact = NonReversible(np.ones(64), data_covariance=covariance + np.eye(64), t_min=0.02, t_max=10.0)
    expected = speciation_time(exact, data_covariance=covariance + 1e-9 * np.eye(64))
    assert found["isotropic"]["speciation_time_by_covariance"] == pytest.approx(expected, rel=0.02)
    assert {"network_optimal_1.safetensors", "cloning.png", "quality.png", "samples.png"} <= {
        each.name for each in out.iterdir()
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--data.digits", "[3, 3]"], "data.digits: digits must be different whole numbers"),
        (["--data.digits", "[3, 12]"], "data.digits"),
        (["--data.num_train", "356"], "data.num_train = 356: of 357 images at least 2 must be left to judge"),
        (["--data.shrinkage", "0"], "data.shrinkage"),
        (["--grid.t_max", "0.01"], "grid: NonReversible needs 0 <= t_min < t_max"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_key(tmp_path, capsys, override, words):
    assert main(["regimes", write(tmp_path, TRAINED), "--output", str(tmp_path / "out"), *override]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_energy_distance_is_zero_on_average_for_equal_laws_and_one_far_apart():
    from rnejax.systems.metrics import relative_energy_distance

    rng = np.random.default_rng(0)
    same = [relative_energy_distance(*rng.normal(size=(2, 40, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    x, y = rng.normal(size=(2, 50, 1))
    assert relative_energy_distance(x, y + 1e6) == pytest.approx(1, abs=1e-5)
    # Of two normal laws on a line: E|x - y| = sqrt(2 / pi) std of the difference, by Szekely & Rizzo.
    x, y = rng.normal(size=(4000, 1)), 3 * rng.normal(size=(4000, 1))
    between = 2 * np.sqrt(10)
    assert relative_energy_distance(x, y) == pytest.approx((between - np.sqrt(2) - 3 * np.sqrt(2)) / between, abs=0.02)
