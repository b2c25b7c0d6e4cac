#!/usr/bin/env bash
# What only a GPU can show: tests/gpu; benchmarks/gpu.py, which adds a section to docs/results/gpu.md; and the rollout engines by
# benchmarks/rollout.py, which adds figures to docs/results/rollouts.md. usage: bash ci/gpu.sh [arguments of benchmarks/gpu.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvidia-smi >/dev/null 2>&1 || { echo "ci/gpu.sh needs an NVIDIA GPU, and nvidia-smi finds none" >&2; exit 2; }
python=$(bash ci/setup.sh --test | tail -n 1)
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "ci/gpu.sh needs a CUDA device, and the torch of $python sees none" >&2; exit 2; }
status=0
"$python" -m pytest tests/gpu || status=$?
"$python" benchmarks/gpu.py "$@" || status=$?
"$python" benchmarks/rollout.py --preset h100 --repeats 3 --docs docs/results || status=$?
exit "$status"
