#!/usr/bin/env bash
# Format, lint, types, and the links of the documentation. usage: bash ci/lint.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m mkdocs build --quiet --strict --site-dir "$site"
if grep -rnoE '<(script|img|link)[^>]* (src|href)="?https?://[^ >]*' "$site" --include=*.html; then
  echo "the documentation loads files from another host" >&2
  exit 1
fi
