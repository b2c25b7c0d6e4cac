#!/usr/bin/env bash
# Run every test, those marked `nightly` too: memory measurements, the whole layout matrix, most kills. See ci/README.md.
# Tests marked `vllm` need an environment with vLLM, which is made once in .venv-vllm (3.4 GB). Set
# MEGATRON_OPRD_VLLM_PYTHON to the Python of another one. If it cannot be made, these tests are skipped.
# usage: bash ci/nightly.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${MEGATRON_OPRD_VLLM_PYTHON:-}" ]; then
  bash tools/rollout_server/install.sh "$PWD/.venv-vllm" cpu >&2 || echo "ci/nightly.sh: no environment with vLLM" >&2
fi
export MEGATRON_OPRD_FUZZ=${MEGATRON_OPRD_FUZZ:-20}  # tests/fuzz draws so many times more examples, and others each night
exec bash ci/run.sh -m "" "$@"
