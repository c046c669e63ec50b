#!/usr/bin/env bash
# Tests the extras at their lowest versions (floors.txt) in a new environment. It takes ten minutes, so .ci/run does not
# run it. For a CPU build of torch, run PIP_CONSTRAINT="torch.txt" tests/floors.sh with a torch.txt that pins one.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/env"
source "$scratch/env/bin/activate"
export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$PWD/tests/floors.txt"
pip install --quiet -e ".[test]" -r examples/paper/requirements.txt
# Old releases warn about later changes. The plugin of anyio does this at its import.
pytest -q -W default -p no:anyio tests/test_integrations_*.py tests/test_attachment.py tests/test_plots.py \
    tests/test_metrics.py examples/paper/tests/test_metrics.py
