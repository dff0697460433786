#!/usr/bin/env bash
# Set up and pass the tests: the second README command. Arguments go to pytest, for example: bash scripts/test.sh -k smc
# Two processes, since most of the time goes into compiling, which one process does on one core; the examples of a page and
# the tests of a file stay together, since they share what they made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
