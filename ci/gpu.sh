#!/usr/bin/env bash
# What only a GPU can show: tests/gpu, and the benchmarks that add figures to docs/results (ci/gpu.py has the list).
# A Python that has the packages is used as it is, without pip and without network: $PYTHON, python3 (NVIDIA's
# container, an active environment). Otherwise ci/setup.sh makes one.
# usage: bash ci/gpu.sh [--minutes M] [--list]
#   --minutes M: run what fits, the most informative part first, and say what is left out
#   --list: print that choice and end; needs no GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
case " $* " in *" --list "* | *" --help "* | *" -h "*) exec "$python" ci/gpu.py "$@" ;; esac
nvidia-smi >/dev/null 2>&1 || { echo "ci/gpu.sh needs an NVIDIA GPU, and nvidia-smi finds none" >&2; exit 2; }
missing=$("$python" - <<'END'
import importlib.util
needed = "torch megatron.core transformers safetensors pydantic omegaconf psutil rich math_verify tensorboard pytest pytest_timeout"
def found(name):
    try:
        return importlib.util.find_spec(name)
    except ImportError:
        return None
print(*(name for name in needed.split() if not found(name)))
END
)
if [ -n "$missing" ]; then
  echo "$python has no $missing; ci/setup.sh installs what is missing" >&2
  python=$(bash ci/setup.sh --test | tail -n 1) || {
    echo "ci/gpu.sh: install $missing for $python, or name a Python that has them: PYTHON=... bash ci/gpu.sh" >&2
    exit 2
  }
fi
# A folder that is on PYTHONPATH already (packages for a machine without network) stays there.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false CUDA_DEVICE_MAX_CONNECTIONS=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "ci/gpu.sh needs a CUDA device, and the torch of $python sees none" >&2; exit 2; }
exec "$python" ci/gpu.py "$@"
