#!/usr/bin/env bash
# Makes the environment or reuses one, and prints the Python to use on its last line.
# An environment that has torch and megatron-core already (a container, an active virtual environment) is used as it is;
# otherwise a virtual environment is made in .venv (or $MEGATRON_OPRD_VENV) with the versions of ci/constraints.txt.
# usage: python=$(bash ci/setup.sh [--test])
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=""
needs="torch, megatron.core, transformers, pydantic, omegaconf, datasets, math_verify, tensorboard, psutil, rich"
if [ "${1:-}" = --test ]; then
  extra="[test]"
  needs="$needs, pytest, pytest_timeout, xdist, mypy, ruff, material, wandb"
fi

has() { "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(n.strip()) is None for n in '$2'.split(',')))" 2>/dev/null; }

for python in "${PYTHON:-python3}" python3.11; do
  command -v "$python" >/dev/null || continue
  if has "$python" "torch, megatron"; then
    if ! has "$python" "$needs"; then
      # The container's own torch and megatron-core stay as they are; only what is missing comes.
      "$python" -m pip install --quiet "$root$extra" >&2
    fi
    command -v "$python"
    exit 0
  fi
done

venv=${MEGATRON_OPRD_VENV:-$root/.venv}
python=$venv/bin/python
# Several ranks of one machine may come here at once: the first installs, the others wait.
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
stamp=$venv/.constraints
if ! cmp -s "$root/ci/constraints.txt" "$stamp" || ! has "$python" "$needs"; then
  base=${PYTHON:-}
  [ -n "$base" ] || for candidate in python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$candidate; break; fi
  done
  [ -n "$base" ] || { echo "ci/setup.sh: no Python >= 3.11 found; install one or set PYTHON" >&2; exit 2; }
  echo "installing into $venv (once); to use it in a shell: source $venv/bin/activate" >&2
  "$base" -m venv "$venv" >&2
  # pip would compile the 15,000 modules on one core, which takes 40 s.
  "$python" -m pip install --quiet --no-compile --constraint "$root/ci/constraints.txt" torch >&2
  "$python" -m pip install --quiet --no-compile --constraint "$root/ci/constraints.txt" --editable "$root$extra" >&2
  "$python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true  # templates of some packages are no valid Python
  cp "$root/ci/constraints.txt" "$stamp"
fi
echo "$python"
