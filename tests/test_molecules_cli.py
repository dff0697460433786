"""rnejax reference and rnejax train on molecules, as a user would call them."""

import json

import jax
import numpy as np
import pytest
import yaml

import rnejax as rj
from rnejax.cli import main
from rnejax.systems.references import load_reference

SYSTEM = {"kind": "lennard_jones", "num_particles": 3, "dimension": 2}
SPRING = {"kind": "distance", "atoms": [0, 1], "stiffness": 5.0, "centre": 1.0}
REFERENCE = {
    "system": SYSTEM,
    "temperatures": [1.0, 1.5, 2.0],
    "keep": [1.0, 2.0],
    "num_chains": 4,
    "num_samples": 40,
    "rounds_between": 2,
    "burn_in": 100,
    "integration_steps": 5,
    "step_size": 0.1,
}


def write(folder, tree, name):
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert main(["reference", write(folder, REFERENCE, "r.yaml"), "--output", str(folder / "out")]) == 0
    return folder / "out"


def training(reference, **changes):
    tree = {
        "data": {"system": SYSTEM, "reference": str(reference / "reference.npz"), "temperature": 2.0},
        "process": {"kind": "variance_preserving"},
        "prediction": "v",
        "network": {
            "name": "egnn",
            "arguments": {"shape": [3, 2], "features": 8, "num_layers": 1, "num_radial": 4, "embedding": 8},
        },
        "training": {
            "num_steps": 4, "batch_size": 8, "antithetic": True, "warmup_steps": 1, "decay_steps": 2,
            "dropout": False, "log_snr_range": None, "report_every": 2, "save_every": 2,
        },
        "calibration_steps": 4,
        "num_samples": 8,
        "grid": {"num_steps": 4},
    }  # fmt: skip
    for name, value in changes.items():
        tree[name] = tree[name] | value if isinstance(value, dict) else value
    return tree


def test_reference_leaves_sets_floors_and_diagnostics(reference):
    metrics = json.loads((reference / "metrics.json").read_text())
    assert metrics["finished"]
    assert set(metrics["floor"]) == {"1", "2"}
    assert metrics["floor"]["1"]["energy_w1"] > 0
    for number in (0, 1):
        assert len(metrics[f"set_{number}"]["rhat"]) == 3
        assert len(metrics[f"set_{number}"]["swap_rate"]) == 2
    read = load_reference(reference / "reference.npz", 2.0)
    assert read.x.shape == (2, 160, 3, 2)
    assert read.metadata["config"]["system"]["num_particles"] == 3
    assert not np.allclose(read.x[0], read.x[1]), "the sets are independent"
    assert (reference / "energies.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": [1.0, 3.0, 2.0]}, "temperatures must be strictly increasing or decreasing"),
        ({"temperatures": [1.0, -2.0]}, "temperatures.1"),
        ({"keep": [1.7]}, "keep = 1.7 is none of the temperatures 1, 1.5, 2"),
        ({"num_chains": 3}, "num_chains = 3 must be even"),
        ({"system": {"kind": "lennard_jonse"}}, "lennard_jones"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_written(tmp_path, capsys, change, message):
    assert main(["reference", write(tmp_path, REFERENCE | change, "r.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_a_molecule_is_trained_saved_and_compared(reference, tmp_path):
    out = tmp_path / "out"
    assert main(["train", write(tmp_path, training(reference), "t.yaml"), "--output", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["finished"]
    assert {"energy_w1", "distance_w2", "outside"} <= set(metrics["samples_against_reference"])
    assert np.isfinite(metrics["validation_nats_bound"])
    assert {"losses.png", "validation.png", "energies.png", "distances.png"} <= set(metrics["files"])
    model = rj.load_model(out / "model.safetensors")
    assert model.shape == (3, 2)
    x = np.load(out / "samples.npz")["x"]
    np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-5)
    # In the data's units: the transform is part of the model.
    data = load_reference(reference / "reference.npz", 2.0).x[0]
    np.testing.assert_allclose(float(model.transform.scale), np.sqrt((data**2).sum() / (len(data) * 4)), rtol=1e-5)


def test_an_energy_is_trained_with_residuals_and_goes_on_from_where_it_was_stopped(reference, tmp_path):
    terms = {"score": 1.0, "rne": 0.1, "rne_euler": 0.1, "fokker_planck": 0.1, "prior": 0.1}
    tree = training(reference, prediction="energy", network={"arguments": {}})
    tree["network"] = {"name": "mlp", "arguments": {"shape": [3, 2], "hidden": 8, "depth": 1, "output": "energy"}}
    tree["training"] |= {"antithetic": False, "terms": terms, "residual_covariance": "hutchinson", "decay_steps": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path = write(tmp_path, tree, "t.yaml")
    assert main(["train", path, "--output", str(whole)]) == 0
    for steps in ("2", "4"):  # stopped half-way, and gone on with
        assert main(["train", path, "--output", str(parts), "--training.num_steps", steps]) == 0
    losses = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, parts)]
    names = ("step", "loss", "gradient_norm", "validation_nats_bound")
    for one, two in zip(*losses, strict=True):
        assert [json.loads(one)[name] for name in names] == [json.loads(two)[name] for name in names]
    model = rj.load_model(parts / "model.safetensors")
    assert model.prediction == "energy"
    assert float(model.energy(np.ones((3, 2), np.float32), 0.5)) == float(
        rj.load_model(whole / "model.safetensors").energy(np.ones((3, 2), np.float32), 0.5)
    )


def test_springs_are_calibrated_and_used_where_they_are_asked_for(reference, tmp_path, capsys):
    from rnejax.covariance import Analytic, ElasticNetwork

    out = tmp_path / "out"
    tree = training(reference, network={"arguments": {"kinds": [0, 1, 1]}}, calibration="elastic_network")
    tree["network"]["arguments"] = training(reference)["network"]["arguments"] | {"kinds": [0, 1, 1]}
    path = write(tmp_path, tree | {"calibration_knots": 2}, "t.yaml")
    assert main(["train", path, "--output", str(out)]) == 0
    model = rj.load_model(out / "model.safetensors")
    assert isinstance(model.covariance, ElasticNetwork)
    assert model.covariance.stiffness.shape == (5, 2, 2, 2)  # times, a and b, classes, knots
    assert json.loads((out / "metrics.json").read_text())["finished"]
    assert isinstance(rj.calibrate(jax.random.key(0), model, [0.1, 0.5], np.zeros((2, 3, 2))).covariance, Analytic)
    surface = {"system": {"kind": "muller_brown"}, "reference": "muller_brown", "temperature": 25}
    mlp = {"name": "mlp", "arguments": {"shape": [2]}}
    tree = training(reference, calibration="elastic_network") | {"data": surface, "network": mlp}
    assert main(["train", write(tmp_path, tree, "m.yaml"), "--output", str(tmp_path / "no")]) == 2
    assert "calibration = elastic_network is for particles, not for states of shape (2,)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_frames_of_one_s_own_are_training_data_and_reference_too(tmp_path, reference):
    from rnejax.config import ConfigError, MoleculeData
    from rnejax.runs.training_data import load

    x = load_reference(reference / "reference.npz", 2.0).x[0] + 7.0
    np.savez(tmp_path / "frames.npz", x=x)
    settings = {"system": SYSTEM, "reference": str(tmp_path / "frames.npz"), "temperature": 2.0}
    data = load(MoleculeData(**settings), None)
    assert data.train.shape == (128, 3, 2)
    assert data.reference.shape == (32, 3, 2)
    np.testing.assert_allclose(data.reference, x[128:] - x[128:].mean(axis=1, keepdims=True), atol=1e-5)
    np.savez(tmp_path / "frames.npz", x=x[:, :2])
    with pytest.raises(ConfigError, match=r"data.reference: frames must have shape \(n, 3, 2\), got \(160, 2, 2\)"):
        load(MoleculeData(**settings), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"temperature": 1.5}}, "no samples at temperature 1.5: there are 1, 2"),
        ({"data": {"reference": "nothing"}}, "no shipped samples of that name"),
        (
            {"data": {"system": {"kind": "double_well"}}},
            r"holds samples of LennardJones\(num_particles=3.*, not of DoubleWell",
        ),
        ({"network": {"arguments": {"shape": [4, 2]}}}, r"cannot be trained on configurations of shape \(3, 2\)"),
        ({"training": {"terms": {"rne": 1.0}}}, "training.terms are those of an energy: prediction = v has none"),
        ({"prediction": "energy"}, "training.antithetic and training.weighting are for the other predictions"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(reference, tmp_path, capsys, change, message):
    import re

    path = write(tmp_path, training(reference, **change), "t.yaml")
    assert main(["train", path, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tree = training(reference)
    assert main(["train", write(folder, tree, "t.yaml"), "--output", str(folder / "out")]) == 0
    return folder / "out" / "model.safetensors"


def steering(reference, trained, **changes):
    return {
        "model": str(trained),
        "target": {"kind": "temper", "exponent": 2.0},
        "grid": {"num_steps": 8},
        "num_particles": 32,
        "num_groups": 2,
        "compare_uncorrected": True,
        "molecule": {"system": SYSTEM, "temperature": 1.0, "reference": str(reference / "reference.npz")},
    } | changes


def test_particles_are_held_against_the_reference_and_the_true_energy(reference, trained, tmp_path):
    out = tmp_path / "out"
    assert main(["steer", write(tmp_path, steering(reference, trained), "s.yaml"), "--output", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("against_reference", "reweighted_against_reference", "uncorrected_against_reference"):
        assert {"energy_w1", "distance_w2", "outside", "infinite"} <= set(metrics[name])
    assert 1 <= metrics["reweighted"]["effective_sample_size"] <= 64
    assert metrics["infinite_energies"] == 0
    assert {"energies.png", "distances.png"} <= set(metrics["files"])
    # The weights are used: those of the true energy are other ones.
    assert metrics["against_reference"]["energy_w1"] != metrics["reweighted_against_reference"]["energy_w1"]
    from rnejax.systems import LennardJones
    from rnejax.systems import metrics as measures

    x = np.load(out / "samples.npz")
    weights = measures.weights_of((x["log_weights"] + x["log_normalizer"][:, None]).ravel(), 64)
    energy = measures.energies(LennardJones(3, 2), x["x"].reshape(-1, 3, 2))
    theirs = load_reference(reference / "reference.npz", 1.0)
    expected = measures.energy_wasserstein(energy, measures.energies(LennardJones(3, 2), theirs.x[1]), weights)
    np.testing.assert_allclose(metrics["against_reference"]["energy_w1"], expected, rtol=1e-4)


def test_clashes_are_counted_and_weigh_nothing_for_the_true_energy(reference, trained, tmp_path, monkeypatch):
    from rnejax.systems import LennardJones

    energy = LennardJones.energy
    clash = lambda self, x: jax.numpy.where(x[0, 0] > x[1, 0], jax.numpy.inf, energy(self, x))  # noqa: E731
    monkeypatch.setattr(LennardJones, "energy", clash)
    tree = steering(reference, trained)
    tree["molecule"] = tree["molecule"] | {"reference": None}
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 0
    x = np.load(tmp_path / "out" / "samples.npz")["x"].reshape(-1, 3, 2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    count = int(np.sum(x[:, 0, 0] > x[:, 1, 0]))
    assert 0 < count < 64
    assert metrics["infinite_energies"] == count
    assert 1 <= metrics["reweighted"]["effective_sample_size"] <= 64 - count


@pytest.mark.parametrize(("exponent", "told"), [(4.0, True), (2.0, False)])
def test_a_target_of_another_temperature_is_told(reference, trained, tmp_path, capsys, exponent, told):
    """Trained at T = 2: to the power 4 it is of T = 0.5, and is held against T = 1."""
    tree = steering(reference, trained, target={"kind": "temper", "exponent": exponent}, compare_uncorrected=False)
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 0
    message = "the target is the law of temperature 0.5, and is held against molecule.temperature = 1"
    assert (message in capsys.readouterr().err) == told


def test_feynman_kac_has_no_true_energy(reference, trained, tmp_path, capsys):
    tree = steering(reference, trained, proposal="feynman_kac", compare_uncorrected=False, grid={"num_steps": 4})
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "molecule.reweight is left out" in told.out
    assert "Euler-Maruyama step of feynman_kac" in told.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "against_reference" in metrics
    assert "reweighted" not in metrics


def test_pilots_tune_the_proposal(reference, trained, tmp_path):
    """Their variances are told, and the particles are other ones than those of the symmetric proposal."""
    found = {}
    for name, pilots in (("plain", None), ("tuned", 16)):
        tree = steering(reference, trained, pilot_particles=pilots)
        assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert "pilot_variances_nats2" not in found["plain"]
    before, after = found["tuned"]["pilot_variances_nats2"]
    assert found["tuned"]["seconds_pilots"] > 0
    x = [np.load(tmp_path / name / "samples.npz")["x"] for name in found]
    assert np.allclose(*x) == (before <= after)


def test_pilots_of_what_cannot_be_tuned_are_refused(reference, trained, tmp_path, capsys):
    tree = steering(reference, trained, pilot_particles=16, proposal="feynman_kac")
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "pilot_particles tunes symmetric" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("molecule", "message"),
    [
        ({"temperature": 0}, "molecule.temperature"),
        ({"temperature": 1.5}, "no samples at temperature 1.5"),
        ({"system": {"kind": "double_well"}}, r"configurations of shape \(4, 2\), the model states of shape \(3, 2\)"),
        ({"system": SYSTEM | {"strength": 1.0}}, "'strength': 1.0.*, but model = .* was trained on .*'strength': 2.0"),
        ({"system": SYSTEM | {"biases": [SPRING]}}, "holds samples of .*, not of"),
        (
            {"system": {"kind": "double_well", "num_particles": 3, "dimension": 2}, "reference": None},
            "molecule.system is .*double_well.*, but model = .* was trained on .*lennard_jones",
        ),
    ],
)
def test_another_molecule_is_refused_before_anything_is_written(
    reference, trained, tmp_path, capsys, molecule, message
):
    import re

    tree = steering(reference, trained)
    tree["molecule"] |= molecule
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_models_of_biased_potentials_are_multiplied(reference, tmp_path, capsys):
    """p_biased^1 p_unbiased^1 of two models in one unit of length; of another unit it is refused."""
    biased = SYSTEM | {"biases": [SPRING]}
    made = tmp_path / "reference"
    tree = REFERENCE | {"system": biased, "temperatures": [2.0], "keep": None, "num_samples": 10, "burn_in": 20}
    assert main(["reference", write(tmp_path, tree, "r.yaml"), "--output", str(made)]) == 0
    stored = load_reference(made / "reference.npz", 2.0)
    x = stored.x[0, 0]
    extra = 2.5 * (np.linalg.norm(x[0] - x[1]) - 1) ** 2
    assert float(stored.system.energy(x)) == pytest.approx(float(stored.system.system.energy(x)) + extra, rel=1e-4)
    models = {}
    for name, data, scale in [
        ("biased", {"system": biased, "reference": str(made / "reference.npz")}, 1.5),
        ("plain", {}, 1.5),
        ("other", {}, 2.0),
    ]:
        tree = training(reference, data=data | {"scale": scale})
        assert main(["train", write(tmp_path, tree, "t.yaml"), "--output", str(tmp_path / name)]) == 0
        models[name] = str(tmp_path / name / "model.safetensors")
        assert float(rj.load_model(models[name]).transform.scale) == scale
    target = {"kind": "product", "models": [models["plain"]], "exponents": [1.0, 0.5]}
    tree = steering(reference, models["biased"], target=target)
    tree["molecule"] = {"system": biased, "temperature": 1.0}
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["models"] == 2
    target["models"] = [models["other"]]
    assert main(["steer", write(tmp_path, tree, "s.yaml"), "--output", str(tmp_path / "no")]) == 2
    assert "transform" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reference", "train", "steer"])
def test_a_package_that_is_needed_at_the_end_is_asked_for_at_the_start(
    reference, trained, tmp_path, capsys, monkeypatch, command
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ot" else find(name, *rest))
    trees = {"reference": REFERENCE, "train": training(reference), "steer": steering(reference, trained)}
    assert main([command, write(tmp_path, trees[command], "c.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "pip install pot (rnejax's extra 'molecules')" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_survive_what_fails_after_sampling(tmp_path, monkeypatch):
    from rnejax.runs import reference as run

    def fail(*arguments):
        raise RuntimeError("MBAR did not converge")

    monkeypatch.setattr(run, "free_energy", fail)
    with pytest.raises(RuntimeError, match="did not converge"):
        main(["reference", write(tmp_path, REFERENCE, "r.yaml"), "--output", str(tmp_path / "out")])
    assert load_reference(tmp_path / "out" / "reference.npz", 1.0).x.shape == (2, 160, 3, 2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not metrics["finished"]
    assert "reference.npz" in metrics["files"]
