#!/usr/bin/env bash
# Format, lint and types. usage: bash ci/lint.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
