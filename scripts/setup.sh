#!/usr/bin/env bash
# Make .venv in the repository root (or reuse it) and install rnejax there with the extras named in $1, e.g. "digits".
# Needs a Python >= 3.11 with pip; set PYTHON to choose which one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:?usage: scripts/setup.sh EXTRAS, for example: scripts/setup.sh digits}"

is_recent_python() {
  command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if [[ ! -x .venv/bin/python ]]; then
  found=""
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if is_recent_python "$candidate"; then
      found="$candidate"
      break
    fi
  done
  if [[ -z "$found" ]]; then
    echo "rnejax needs Python 3.11 or newer; none of ${PYTHON:-python3}, python3.13, python3.12, python3.11 is one." >&2
    echo "Install one, or name it: PYTHON=/path/to/python bash ${BASH_SOURCE[0]} $extras" >&2
    exit 1
  fi
  echo "Making .venv with $("$found" --version)"
  "$found" -m venv .venv
fi

echo "Installing rnejax[$extras] into .venv (the first time this downloads some 400 MB)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
