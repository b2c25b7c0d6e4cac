#!/usr/bin/env bash
# Run every test, those marked `nightly` too: memory measurements, the whole layout matrix, most kills. See ci/README.md.
# usage: bash ci/nightly.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash ci/run.sh -m "" "$@"
