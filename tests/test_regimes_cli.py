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
