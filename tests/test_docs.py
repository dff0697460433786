"""The documentation keeps up with the code. (Its examples run as tests by themselves, see conftest.py in the root.)"""

import re
import types
from pathlib import Path

import pytest
import yaml

import rnejax as rj
from rnejax.cli import COMMANDS
from rnejax.config import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
GUIDES = sorted((ROOT / "docs").glob("*.md"))


def documented_modules():
    return {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)}


@pytest.mark.parametrize("name", sorted(rj.__all__))
def test_every_public_name_is_in_the_api_reference(name):
    value = getattr(rj, name)
    module = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    modules = documented_modules()
    assert any(found == module or found.startswith(module + ".") for found in modules), f"no page documents {module}"


@pytest.mark.parametrize("module", sorted(documented_modules()))
def test_every_documented_module_has_a_docstring(module):
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert re.match(r'r?"""\S', source.read_text())


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_no_example_is_left_out_of_the_tests(page):
    # What the sybil parser does not take for Python it does not run.
    fences = re.findall(r"^\s*```(\S*)", page.read_text(), flags=re.MULTILINE)
    assert {fence for fence in fences if fence} <= {"python", "text", "sh", "yaml"}
    assert not re.search(r"<!--\s*skip", page.read_text())


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_configuration_is_described(name):
    assert f"`configs/{name}.yaml`" in (ROOT / "docs/command_line.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described(command):
    assert f"rnejax {command} " in (ROOT / "docs/command_line.md").read_text()


def test_every_page_is_in_the_navigation():
    # A plain loader stumbles over tags of mkdocs's own, of which there are none.
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/]+\.md", str(navigation)))
    tables = {page for page in PAGES if page.parent.name == "tables"}
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page not in tables}
