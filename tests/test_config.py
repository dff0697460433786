"""Configurations: what they may say, and what is told of mistakes."""

import re
from pathlib import Path

import pytest
import yaml

from rnejax.cli import main
from rnejax.config import (
    ConfigError,
    DensityRun,
    SampleRun,
    SteerRun,
    TrainRun,
    describe_keys,
    dump_config,
    find_config,
    load_config,
    shipped_configs,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GUIDE = "model: toy\ntarget: {kind: guide, condition: 1, scale: 1.5}\ngrid: {num_steps: 5}\nnum_particles: 8\n"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_for_the_command_that_it_names(path):
    words = path.read_text().splitlines()[0].split()
    assert words[:2] == ["#", "rnejax"], "the first line of a configuration says how to run it"
    assert words[3] == f"configs/{path.name}"
    from rnejax.cli import _config_class

    load_config(_config_class(words[2]), path)


ROWS = [path for kind in ("one_sided", "fkc", "tuned", "symmetric") for path in CONFIGS.glob(f"*_anneal_*_{kind}.yaml")]


@pytest.mark.parametrize("path", sorted(ROWS), ids=lambda path: path.stem)
def test_rows_of_one_table_differ_in_the_proposal_only(path):
    base, row = re.fullmatch(r"(.*)_(one_sided|fkc|tuned|symmetric)", path.stem).groups()
    ours, theirs = load_config(SteerRun, path), load_config(SteerRun, CONFIGS / f"{base}.yaml")
    for name in ("model", "target", "num_particles", "num_groups", "ess_threshold", "seed"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.grid.num_steps == theirs.grid.num_steps
    assert ours.molecule.model_copy(update={"reweight": theirs.molecule.reweight}) == theirs.molecule
    proposal = {"one_sided": (1, 0), "fkc": "feynman_kac"}.get(row)  # by default symmetric
    assert ours.proposal == proposal
    assert (ours.pilot_particles is not None) == (row == "tuned")
    # Correctors have a grid of their own, and no weights that lead to the true energy.
    assert (ours.grid != theirs.grid) == (row == "fkc")
    assert ours.molecule.reweight == (row != "fkc")


def test_a_written_configuration_reads_back_as_the_same():
    for name in ("digits_guidance", "digits_tilt_class", "digits_tilt_ink", "digits_composition"):
        config = load_config(SteerRun, name)
        assert SteerRun.model_validate(yaml.safe_load(dump_config(config))) == config


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    path = write(tmp_path, "model: a\nseed: 3\nnum_samples: 5\n")
    config = load_config(SampleRun, path, ["--num-samples", "7", "--grid.num_steps=9"])
    assert (config.model, config.seed, config.num_samples, config.grid.num_steps) == ("a", 3, 7, 9)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = write(tmp_path, "model: a\ngrid: {t_min: 1e-3}\n")
    assert load_config(SampleRun, path).grid.t_min == 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--num_sampels", "3"], "unknown key num_sampels = 3: did you mean num_samples?"),
        (["--grid.num_stepps", "3"], "unknown key grid.num_stepps = 3: did you mean grid.num_steps?"),
        (["--num_steps", "3"], "unknown key num_steps = 3: did you mean grid.num_steps?"),
        (["--num_samples", "many"], "num_samples = many: input should be a valid integer"),
        (["--num_samples", "0"], "num_samples = 0: input should be greater than or equal to 1"),
        (["--grid.kind", "uniformly"], "did you mean uniform?"),
        (["--grid", "3"], "grid = 3: it has keys of its own, num_steps, kind, t_min, t_max"),
        (["--model.name", "x"], "model is 'a', which has no keys of its own"),
        (["--seed"], "--seed needs a value"),
        (["--num_samples", "true"], "num_samples = true: input should be a number, not a truth value"),
        (["--condition", "[]"], "condition = []: list should have at least 1 item"),
        (["--seed", str(2**32)], "seed = 4294967296: input should be less than 4294967296"),  # JAX would wrap it to 0
        (["seed", "3"], "expected --key value, got 'seed'"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_what_would_be_right(tmp_path, overrides, message):
    path = write(tmp_path, "model: a\n")
    with pytest.raises(ConfigError) as error:
        load_config(SampleRun, path, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{kind: gide, condition: 3}", "target.kind = gide: it must be one of model, temper, product, guide, tilt"),
        ("{condition: 3}", "target needs a kind"),
        ("{kind: guide, condition: 3, scael: 2}", "unknown key target.scael = 2: did you mean target.scale?"),
        ("{kind: tilt, reward: {kind: class, lable: 3}}", "target.reward.lable = 3: did you mean target.reward.label?"),
        ("{kind: temper, exponent: .nan}", "target.exponent = .nan"),
        ("3", "target = 3: it has keys of its own, kind: model, temper, product, guide, tilt"),
    ],
)
def test_a_mistake_in_a_target_is_found_where_it_is(tmp_path, target, message):
    with pytest.raises(ConfigError) as error:
        load_config(SteerRun, write(tmp_path, f"model: a\ntarget: {target}\n"))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["2026", "2026-11-24"])
def test_an_output_folder_may_be_a_number_or_a_date(tmp_path, name):
    assert load_config(SampleRun, write(tmp_path, "model: a\n"), ["--output", name]).output == name


def test_a_key_of_another_kind_is_not_suggested_for_itself(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(SteerRun, write(tmp_path, GUIDE), ["--target.kind", "product", "--target.conditions", "[1, 2]"])
    assert "unknown key target.scale = 1.5: the keys here are kind, conditions, models, exponents" in str(error.value)
    assert "unknown key target.condition = 1: did you mean target.conditions?" in str(error.value)


def test_help_has_no_heading_for_a_section_that_is_no_choice():
    names = [name for name, *_ in describe_keys(SteerRun)]
    assert "molecule.temperature" in names
    assert not [name for name in names if name.endswith("None")]


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"^3 mistakes"):
        load_config(SampleRun, write(tmp_path, "model: a\nsede: 1\nnum_samples: x\n"), ["--outptu", "y"])


def test_a_value_that_fits_none_of_several_types_is_one_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"^1 mistake "):
        load_config(SteerRun, write(tmp_path, GUIDE), ["--proposal", "symetric"])


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "grid: {num_steps: 1, num_steps: 2}\n"])
def test_a_key_given_twice_is_an_error(tmp_path, text):
    with pytest.raises(ConfigError, match="is given twice"):
        load_config(SampleRun, write(tmp_path, "model: a\n" + text))


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "must hold keys and values"), ("a: [\n", "cannot be read as YAML")]
)
def test_a_file_that_is_no_configuration_is_an_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(SampleRun, write(tmp_path, text))


def test_a_file_that_is_no_text_or_no_file_is_an_error(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.yaml cannot be read as YAML: .*can't decode byte"):
        load_config(SampleRun, tmp_path / "bytes.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml is a folder"):
        load_config(SampleRun, tmp_path / "folder.yaml")


@pytest.mark.parametrize("value", ["foo", "[a, b]"])
def test_a_proposal_may_also_be_a_pair_of_numbers_and_the_mistake_says_so(tmp_path, value):
    path = write(tmp_path, "model: a\ntarget: {kind: model}\n")
    with pytest.raises(
        ConfigError, match=r"one of symmetric \| feynman_kac \| locally_optimal \| base \| \[float, float\]"
    ):
        load_config(SteerRun, path, ["--proposal", value])


def test_a_missing_file_is_an_error_that_names_the_nearest_shipped_one():
    with pytest.raises(ConfigError, match=r"there is no configuration digits_guidanse; did you mean digits_guidance\?"):
        find_config("digits_guidanse")


def test_a_shipped_configuration_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        find_config("configs/digits_guidance.yaml")
        == find_config("digits_guidance")
        == shipped_configs()["digits_guidance"]
    )


@pytest.mark.parametrize("kind", [TrainRun, SampleRun, DensityRun, SteerRun])
def test_every_key_is_described(kind):
    undescribed = [key for key, _, meaning in describe_keys(kind) if not meaning and not key.endswith(".kind")]
    assert not undescribed


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["steer", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--num_particles" in shown
    assert "--target.reward.strength" in shown


@pytest.mark.parametrize(
    ("data", "expected", "others"),
    [
        ("{corpuss: a.txt}", "unknown key data.corpuss = a.txt: did you mean data.corpus", "data.system"),
        ("verse", "data = verse: it must be 'digits', 'digit_tokens' or 'verses'; did you mean verses", "data.corpus"),
        ("{systm: x, reference: y}", "unknown key data.systm = x: did you mean data.system", "data.corpus"),
        ("{corpus: 3}", "data.corpus = 3: input should be a valid string", "data.system"),
    ],
)
def test_a_choice_without_a_kind_is_told_of_the_one_that_was_meant(tmp_path, data, expected, others):
    path = tmp_path / "train.yaml"
    path.write_text(f"data: {data}\n")
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        load_config(TrainRun, path)
    assert others not in str(error.value)
