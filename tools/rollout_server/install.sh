#!/usr/bin/env bash
# Make an environment for vLLM servers of `rollout.engine: vllm`, and print its Python on the last line.
# A folder that is complete already is used as it is, except for the plugin, which is installed again if it changed.
# usage: bash tools/rollout_server/install.sh FOLDER [cpu|cuda]     (default: cuda if nvidia-smi is found, else cpu)
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash tools/rollout_server/install.sh FOLDER [cpu|cuda]" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
plugin=$here/../../megatron_oprd/rollout/engine_plugin
folder=$1
device=${2:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}
requirements=$here/requirements-$device.txt
[ -f "$requirements" ] || { echo "install.sh: unknown device $device; use cpu or cuda" >&2; exit 2; }
python=$folder/bin/python

# Several processes may come here at once: the first installs, the others wait.
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9
if ! cmp -s "$requirements" "$folder/.requirements"; then
  base=${PYTHON:-python3.11}
  "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    echo "install.sh: $base is not Python 3.11; set PYTHON" >&2
    exit 2
  }
  echo "installing vLLM into $folder (once; several GB)" >&2
  rm -rf "$folder"
  "$base" -m venv "$folder" >&2
  install=("$python" -m pip install --quiet --only-binary :all: --requirement "$requirements")
  if [ "$device" = cpu ]; then
    # PyPI lacks the CPU build of torch, a mirror may have it. PyTorch's own index has it.
    "${install[@]}" >&2 2>/dev/null ||
      "${install[@]}" --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" >&2
  else
    "${install[@]}" >&2
  fi
  if [ "$device" = cpu ]; then
    # Their CUDA builds break every import of transformers beside a CPU build of torch.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
  fi
  "$python" -m pip install --quiet "setuptools>=77" >&2
  cp "$requirements" "$folder/.requirements"
fi
digest=$(cd "$plugin" && cat pyproject.toml megatron_oprd_vllm/*.py | sha256sum)
if [ "$digest" != "$(cat "$folder/.plugin" 2>/dev/null)" ]; then
  copy=$(mktemp -d) # the build would leave folders beside the sources
  trap 'rm -rf "$copy"' EXIT
  cp -r "$plugin" "$copy/plugin"
  "$python" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall "$copy/plugin" >&2
  echo "$digest" >"$folder/.plugin"
fi
echo "$python"
