#!/usr/bin/env bash
# The extras at their lowest versions (floors.txt), in a fresh environment. No part of .ci/run: it takes ten minutes.
# A CPU build of torch: PIP_CONSTRAINT="torch.txt" tests/floors.sh, where torch.txt pins one.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/env"
source "$scratch/env/bin/activate"
export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$PWD/tests/floors.txt"
pip install --quiet -e ".[test]" -r examples/paper/requirements.txt
# Old releases warn of what has changed since, and anyio's plugin does at once.
pytest -q -W default -p no:anyio tests/test_integrations_*.py tests/test_attachment.py tests/test_plots.py \
    tests/test_metrics.py examples/paper/tests/test_metrics.py
