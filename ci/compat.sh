#!/usr/bin/env bash
# The same tests on the newest supported pair: Python 3.12 and megatron-core 0.19.2. Not part of ci/run.sh: without a
# CPU build of torch at hand, pip downloads several GB. usage: bash ci/compat.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A python3.12 on the PATH may be a shim of pyenv that starts nothing.
for python in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
  "$python" -c "" 2>/dev/null && break
  python=
done
[ "$python" ] || {
  echo "ci/compat.sh: needs python3.12 on the PATH or in ~/.pyenv/versions" >&2
  exit 2
}
venv=${MEGATRON_OPRD_COMPAT_VENV:-$PWD/.venv-compat}
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
sed 's/^megatron-core==.*/megatron-core==0.19.2/' ci/constraints.txt >"$constraints"
if ! cmp -s "$constraints" "$venv/.constraints"; then
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --constraint "$constraints" torch
  "$venv/bin/python" -m pip install --quiet --constraint "$constraints" --editable ".[test]"
  cp "$constraints" "$venv/.constraints"
fi
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
