#!/usr/bin/env bash
# Everything that must be green: lint, types and every test. usage: bash ci/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash ci/setup.sh --test | tail -n 1)
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bash ci/lint.sh "$python"
exec "$python" -m pytest "$@"
