"""The package as a user meets it: what an import costs, what is shipped, and that its metadata tells one story."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import rnejax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HEAVY_MODULES = [
    "flax", "distrax", "tensorflow_probability", "tensorflow", "matplotlib", "diffrax", "openmm",
    "mlxtend", "sklearn", "orbax", "safetensors", "pydantic", "yaml", "tqdm",
]  # fmt: skip


def test_importing_rnejax_imports_nothing_heavy():
    code = f"import sys, rnejax; print([name for name in {HEAVY_MODULES!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "[]"


def test_importing_rnejax_starts_no_jax_backend():
    code = "import rnejax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "False"


def test_citation_and_package_name_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rnejax.__version__


def test_the_workflow_tests_the_oldest_python_and_jax_that_are_allowed():
    (oldest_jax,) = (d.removeprefix("jax>=") for d in PROJECT["dependencies"] if d.startswith("jax>="))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    legs = workflow["jobs"]["everything"]["strategy"]["matrix"]["include"]
    assert any(
        leg["python"] == PROJECT["requires-python"].removeprefix(">=") and f"jax=={oldest_jax}.0" in leg["constraint"]
        for leg in legs
    )


def test_the_newest_python_in_the_classifiers_is_tested_without_constraints():
    newest = max(
        (c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)),
        key=lambda version: int(version.split(".")[1]),
    )
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    legs = workflow["jobs"]["everything"]["strategy"]["matrix"]["include"]
    assert any(leg["python"] == newest and not leg["constraint"] for leg in legs)


def test_ci_runs_the_command_that_the_readme_gives_for_the_tests():
    (command,) = re.findall(r"^bash scripts/test\.sh$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert re.search(rf"^part tests {re.escape(command)}$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", [".ci/run", "scripts/setup.sh", "scripts/test.sh", "scripts/digits.sh"])
def test_shell_scripts_are_executable_and_stop_at_the_first_error(path):
    assert os.access(ROOT / path, os.X_OK)
    assert "set -euo pipefail" in (ROOT / path).read_text()


def test_no_dependency_pins_the_night_of_a_nightly_build():
    everything = PROJECT["dependencies"] + [d for extra in PROJECT["optional-dependencies"].values() for d in extra]
    assert not [d for d in everything if "nightly" in d or ".dev" in d]


def test_shipped_checkpoints_are_small_described_and_no_pickles():
    files = [path for path in (ROOT / "rnejax/checkpoints").glob("**/*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".md"}
    for path in files:
        assert path.stat().st_size <= 8_000_000
        assert path.with_suffix(".md").exists(), f"{path.name} has no model card"
