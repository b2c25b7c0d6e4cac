#!/usr/bin/env bash
""":"
# On-policy representation distillation of a Qwen model. This file is valid bash and valid Python; all of these work:
#
#   bash examples/run_oprd_qwen.sh [key=value ...]                              one process ($NPROC for more)
#   torchrun --nproc-per-node 2 examples/run_oprd_qwen.sh [key=value ...]
#   torchrun --no-python --nproc-per-node 2 examples/run_oprd_qwen.sh [key=value ...]
#
# Without student.path= it runs the demo: a tiny teacher-student pair, made, converted, distilled, exported, evaluated.
# demo=cross_architecture and demo=cross_tokenizer do the same with a teacher that only a bridge can compare.
# demo=real_model downloads a language model of 135 M parameters, drops four of its blocks, and lets the original heal it.
# With student.path= teacher.path= data.prompts= it runs examples/qwen_same_family.yaml (or --config FILE) on real models.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/ci/setup.sh" | tail -n 1)
if [ -z "${RANK:-}" ] && [ "${NPROC:-1}" -gt 1 ]; then
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  exec "$python" -m megatron_oprd.torchrun --standalone --nproc-per-node "$NPROC" "$root/examples/run_oprd_qwen.sh" "$@"
fi
exec "$python" "$root/examples/run_oprd_qwen.sh" "$@"
: <<'# end of the Python part'
":"""
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def use_the_environment():
    """Restart with the Python of ci/setup.sh if the current one, which torchrun chose, lacks a package."""
    needed = ("torch", "megatron", "transformers", "pydantic", "omegaconf", "datasets", "math_verify")
    if all(importlib.util.find_spec(name) for name in needed):
        return
    setup = subprocess.run(["bash", str(ROOT / "ci" / "setup.sh")], stdout=subprocess.PIPE, text=True)
    if setup.returncode:
        sys.exit(setup.returncode)
    python = setup.stdout.split()[-1]
    os.execv(python, [python, str(Path(__file__).resolve()), *sys.argv[1:]])


if __name__ == "__main__":
    use_the_environment()
    arguments = sys.argv[1:]
    if any(argument.startswith(("student.path=", "--config", "--help")) for argument in arguments):
        if not any(argument.startswith("--config") for argument in arguments):
            arguments = ["--config", str(ROOT / "examples" / "qwen_same_family.yaml"), *arguments]
        sys.argv[1:] = arguments
        runpy.run_module("megatron_oprd.train", run_name="__main__", alter_sys=True)
    else:
        from examples.demo.run import run_demo
        from megatron_oprd.runtime.cli import run_command

        run_command(lambda: run_demo(arguments))
# end of the Python part
