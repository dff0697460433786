"""The command line on tokens: train, sample, fill in, density and steer, and what it says of mistakes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rnejax.cli import main

TINY = "{name: token_unet, arguments: {vocab_size: 16, grid: [14, 14], channels: [8, 8], condition_sizes: [10, 3, 3]}}"
FEW = "{num_steps: 2, batch_size: 8, warmup_steps: 0, decay_steps: 1, report_every: 2, save_every: 2}"
DIGITS = f"""
data: digit_tokens
process: {{kind: masked}}
prediction: logits
network: {TINY}
training: {FEW}
num_samples: 6
grid: {{num_steps: 3}}
"""
SMALL = "{name: token_transformer, arguments: {vocab_size: 2048, length: 32, width: 8, num_layers: 1, num_heads: 2}}"
TEXT = f"""
data: {{corpus: CORPUS}}
process: {{kind: masked}}
prediction: logits
network: {SMALL}
training: {FEW}
num_samples: 4
grid: {{num_steps: 3}}
"""
SENTENCES = "the lord is my shepherd.\nhe that hath ears to hear, let him hear.\n"


def run(folder, command, text, *overrides):
    """Run a configuration; returns (exit code, metrics, folder of the outputs)."""
    path = folder / f"{command}.yaml"
    path.write_text(text)
    output = folder / f"{command}_out"
    code = main([command, str(path), "--output", str(output), *overrides])
    metrics = output / "metrics.json"
    return code, json.loads(metrics.read_text()) if metrics.exists() else None, output


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    code, metrics, output = run(folder, "train", DIGITS)
    assert code == 0
    return output / "model.safetensors", metrics, output


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    corpus = folder / "corpus.txt"
    corpus.write_text(SENTENCES * 20)
    code, metrics, output = run(folder, "train", TEXT.replace("CORPUS", str(corpus)))
    assert code == 0
    return output / "model.safetensors", metrics, output


def test_training_on_digits_reports_a_bound_and_draws_prompts(digits):
    model, metrics, output = digits
    # A network that starts as zero says nothing: 4 bits per token.
    assert metrics["validation_bits_per_token_bound"] == pytest.approx(4, abs=0.2)
    assert {"samples.npz", "samples.png", "model.safetensors"} <= set(metrics["files"])
    assert np.load(output / "samples.npz")["x"].shape == (6, 196)
    assert load_file(model)


def test_training_on_a_text_writes_sentences(verses):
    _, metrics, output = verses
    # At first logits are normal numbers of variance 1, whose log-sum-exp is 1/2 above log V; a few steps are better.
    assert 8 < metrics["validation_bits_per_token_bound"] < 11 + 0.5 / np.log(2)
    assert len((output / "samples.txt").read_text().splitlines()) == 4


def test_samples_of_prompts_take_turns(digits, tmp_path):
    text = f"""
model: {digits[0]}
condition: [a bold slanted seven, a thin digit, null]
num_samples: 7
grid: {{num_steps: 4}}
"""
    code, metrics, output = run(tmp_path, "sample", text)
    assert code == 0
    x = np.load(output / "samples.npz")["x"]
    assert x.shape == (7, 196)
    assert x.dtype == np.int32
    assert "samples.png" in metrics["files"]


def test_blanks_of_a_template_are_filled_in(verses, tmp_path):
    from rnejax.systems import text

    template = "the lord is ____ shepherd."
    config = f"model: {verses[0]}\ntemplate: {template}\nnum_samples: 3\ngrid: {{kind: one_token}}\n"
    code, metrics, output = run(tmp_path, "sample", config)
    assert code == 0
    assert metrics["network_evaluations"] == 3 * 4
    x, given = np.load(output / "samples.npz")["x"], text.encode_template(template)
    known = given != text.MASK
    assert np.all(x[:, known] == given[known])
    assert np.all(x < text.VOCAB_SIZE)


def test_density_of_tokens_is_in_bits_per_token(digits, tmp_path):
    text = f"model: {digits[0]}\ndata: digit_tokens_test\nnum_points: 3\nnum_paths: 2\ngrid: {{num_steps: 3}}\n"
    code, metrics, _ = run(tmp_path, "density", text)
    assert code == 0
    assert metrics["bits_per_token"]["RNE"]["mean"] == pytest.approx(4, abs=0.3)


STEER = """
model: MODEL
target:
  kind: tilt
  base: {kind: guide, condition: a bold seven, scale: 1.5}
  reward: {kind: prompt, prompt: a bold seven, strength: 0.5}
  exact: false
  gradient: true
num_particles: 4
grid: {num_steps: 4}
judge: judge
compare_uncorrected: true
"""


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--proposal", "base", "--candidates", "2", "--target.gradient", "false", "--target.draws", "2"),
        ("--remask", "0.2"),
        ("--grid.kind", "one_token", "--num_particles", "2"),
    ],
    ids=["gradient", "candidates", "remask", "one token"],
)
def test_steering_towards_a_prompt_is_judged(digits, tmp_path, overrides):
    code, metrics, output = run(tmp_path, "steer", STEER.replace("MODEL", str(digits[0])), *overrides)
    assert code == 0
    for suffix in ("", "_uncorrected"):
        assert metrics["judged_log_prob" + suffix] < 0
        assert 0 <= metrics["diversity" + suffix] <= 1
    assert {"samples.png", "uncorrected.png", "genealogy.png"} <= set(metrics["files"])
    assert np.load(output / "samples.npz")["x"].shape[-1] == 196


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a bold seven": "a blod seven"}, "'blod'"),
        ({"prompt: a bold seven": "prompt: a bold house"}, "house"),
        ({"kind: prompt, prompt: a bold seven, strength: 0.5": "kind: ink"}, "kind = ink is for pictures of numbers"),
        ({"condition: a bold seven": "condition: 7"}, "takes a prompt"),
        ({"num_particles: 4": "num_particles: 4\nproposal: symmetric"}, "unknown proposal 'symmetric' for tokens"),
        ({"judge: judge": "judge: reward"}, "judge = reward: of pictures made of tokens only judge is a judge"),
        ({"judge: judge": "judge: judge\njudge_prompt: a bald seven"}, "judge_prompt: unknown word 'bald'"),
    ],
)
def test_mistakes_in_a_steering_configuration_are_named(digits, tmp_path, capsys, changes, message):
    text = STEER.replace("MODEL", str(digits[0]))
    for old, new in changes.items():
        text = text.replace(old, new)
    code, _, _ = run(tmp_path, "steer", text)
    assert code == 2
    assert message in capsys.readouterr().err


WORDS = """
model: MODEL
target: {kind: tilt, base: {kind: model}, reward: REWARD, at: x0}
num_particles: 4
grid: {num_steps: 4}
judge: judge
compare_uncorrected: true
"""


@pytest.mark.parametrize(
    ("reward", "overrides"),
    [
        ("{kind: word, word: lord, penalty: 3}", ("--target.gradient", "true")),
        ("{kind: length, length: 12, spread: 4}", ("--candidates", "2", "--proposal", "base")),
        ("{kind: topic, topic: prophets, strength: 0.5}", ("--target.exact", "false", "--target.draws", "2")),
    ],
    ids=["word", "length", "topic"],
)
def test_sentences_are_steered_judged_and_written_down(verses, tmp_path, reward, overrides):
    text = WORDS.replace("MODEL", str(verses[0])).replace("REWARD", reward)
    code, metrics, output = run(tmp_path, "steer", text, *overrides)
    assert code == 0
    for suffix in ("", "_uncorrected"):
        groups = metrics["judged_groups" + suffix]
        assert list(groups) == ["history", "poetry", "prophets", "gospels"]
        assert sum(groups.values()) == pytest.approx(1)
        assert np.isfinite(metrics[f"reward_{reward[7:].partition(',')[0]}{suffix}"])
    assert len((output / "samples.txt").read_text().splitlines()) == 4
    assert len((output / "uncorrected.txt").read_text().splitlines()) == 4


def test_the_blanks_of_a_template_are_steered(verses, tmp_path):
    from rnejax.systems import text

    config = WORDS.replace("MODEL", str(verses[0])).replace("REWARD", "{kind: word, word: lord, penalty: 3}")
    template = "the _ is my shepherd."
    code, _, output = run(tmp_path, "steer", config, "--template", template)
    assert code == 0
    given = text.encode_template(template)
    for name in ("samples", "uncorrected"):
        x = np.load(output / f"{name}.npz")["x"].reshape(-1, text.LENGTH)
        assert np.all((x == given) | (given == text.MASK))


def test_a_template_is_not_for_a_product_of_several_files(verses, tmp_path, capsys):
    config = (
        f"model: {verses[0]}\ntarget: {{kind: product, models: ['{verses[0]}']}}\ntemplate: the _.\nnum_particles: 4\n"
    )
    code, _, _ = run(tmp_path, "steer", config)
    assert code == 2
    assert "template: it is given to model, and target.models has others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{kind: topic, topic: law}", "'history', 'poetry', 'prophets', 'gospels'"),
        ("{kind: word, word: gött}", "no character 'ö'"),
        ("{kind: word, word: lord, penalty: 100}", "penalty must be"),
    ],
)
def test_rewards_of_sentences_that_do_not_exist_are_named(verses, tmp_path, capsys, reward, message):
    code, _, _ = run(tmp_path, "steer", WORDS.replace("MODEL", str(verses[0])).replace("REWARD", reward))
    assert code == 2
    error = capsys.readouterr().err
    assert "target.reward" in error
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DIGITS.replace("kind: masked", "kind: cosine"), "the data are tokens: take process.kind = masked"),
        (DIGITS.replace("prediction: logits", "prediction: v"), "prediction = v"),
        (DIGITS.replace("vocab_size: 16", "vocab_size: 12"), "cannot be trained on tokens of digits"),
        (DIGITS.replace("grid: [14, 14]", "grid: [14, 12]"), "cannot be trained on tokens of digits"),
        (DIGITS.replace("data: digit_tokens", "data: digits"), "the data are numbers, not tokens"),
        (TEXT, "CORPUS"),
    ],
)
def test_mistakes_in_a_training_configuration_are_named(tmp_path, capsys, text, message):
    code, _, _ = run(tmp_path, "train", text)
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    code, _, _ = run(tmp_path, "train", TEXT.replace("CORPUS", str(tmp_path / "empty.txt")))
    assert code == 2
    assert "empty.txt" in capsys.readouterr().err
