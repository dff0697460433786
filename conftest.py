"""Runs the Python examples in the documentation as tests.

The fenced `python` blocks of one page run in order and share their names, as a reader would type them, so a later block
may use what an earlier one made. A page cannot leave an example out: one that does not run is a failure.
"""

from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(
    name="documentation",
    path=str(Path(__file__).parent),
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
).pytest()
