#!/usr/bin/env bash
# Check format, lint and types, then run every test that is not marked `nightly`. About 20 minutes on two cores.
# usage: bash ci/run.sh [pytest arguments]
#   TEST_WORKERS=N: the number of pytest workers, 2 by default; 0 runs the tests in one process, as for a debugger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash ci/setup.sh --test | tail -n 1)
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bash ci/lint.sh "$python"
# A worker takes a whole file at a time, so that the fixtures of a module are made once. Files are taken in order: the
# slow folders come first, and the many quick files of tests/unit last keep both workers busy until the end.
exec "$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
