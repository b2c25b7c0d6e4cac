"""Commands answer `--help` and report mistakes before they import torch, Megatron-Core or transformers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oprd.__main__ import COMMANDS as COMMANDS_OF_PROGRAM
from megatron_oprd.runtime.cli import command_parser
from megatron_oprd.types import UserError

ROOT = Path(__file__).parents[2]
MODULES = ("train", "evaluate", "fp8_error", "bridge.fit", "commands.analyse", "commands.plan")
TOOLS = ("hf_to_megatron.py", "megatron_to_hf.py", "verify.py")
EXAMPLE = ROOT / "examples" / "run_oprd_qwen.sh"
PARSER = command_parser("test", "A command.", override="a.b=1")
PARSER.add_argument("--tensor")
REQUIRED = ("student.path=s", "teacher.path=t", "data.prompts=[p]", "train.run_dir=r")
# Run a command as `python -m MODULE` or `python FILE` does, then print which slow packages it has imported.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
command = sys.argv[0]
try:
    if "/" in command:
        sys.path.insert(0, command.rpartition("/")[0])
        runpy.run_path(command, run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
finally:
    slow = "torch megatron.core transformers datasets pandas pyarrow sympy scipy torch._inductor.compile_fx"
    print("imported:", *(name for name in slow.split() if name in sys.modules))
"""


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


COMMANDS = [f"megatron_oprd.{name}" for name in MODULES]
FILES = [str(ROOT / "tools" / "checkpoint_convert" / name) for name in TOOLS]


@pytest.mark.parametrize("command", [*COMMANDS, *FILES, str(EXAMPLE)])
def test_help_imports_nothing_slow(command):
    result = run(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ") and result.stdout.endswith("imported:\n")


@pytest.mark.parametrize("command", [*COMMANDS, str(EXAMPLE)])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensr=2", "error: unknown key parallel.tensr (did you mean parallel.tensor?)\n"),
        ("parallel.tensor=two", "error: parallel.tensor='two': Input should be a valid integer\n"),
    ],
)
def test_a_wrong_override_is_reported_before_the_slow_imports(command, override, message):
    result = run(command, *REQUIRED[1:], override, *([] if command == str(EXAMPLE) else REQUIRED[:1]))
    assert (result.returncode, result.stderr, result.stdout) == (2, message, "imported:\n")


@pytest.mark.parametrize("command", [*COMMANDS, str(EXAMPLE)])
def test_a_misspelt_key_in_a_file_is_reported_before_the_slow_imports(command, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("student: {path: s}\nteacher: {pth: t}\ndata: {prompts: [p]}\ntrain: {run_dir: r}\n")
    result = run(command, "--config", str(path))
    assert (result.returncode, result.stdout) == (2, "imported:\n")
    assert "unknown key teacher.pth (did you mean teacher.path?)" in result.stderr


def test_the_list_of_commands_imports_nothing_at_all():
    result = run("megatron_oprd", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "fit-bridge" in result.stdout and result.stdout.endswith("imported:\n")


def test_every_command_of_the_list_exists_and_names_itself_in_its_help():
    for name, (module, _) in COMMANDS_OF_PROGRAM.items():
        command = importlib.import_module(f"megatron_oprd.{module}")
        assert command.PARSER.prog == f"megatron-oprd {name}" and callable(command.main)


def test_options_and_keys_are_taken_in_any_order():
    options = PARSER.parse_args(["a.b=1", "--config", "f.yaml", "c.d=2", "--tensor", "3", "e.f=4"])
    assert (options.config, options.overrides, options.tensor) == ("f.yaml", ["a.b=1", "c.d=2", "e.f=4"], "3")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--confg", r"unknown option --confg \(did you mean --config\?\)"),
        ("--learning-rate=1", r"no dashes: optimizer\.lr=1"),
    ],
)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(argument, message):
    with pytest.raises(UserError, match=message):
        PARSER.parse_args([argument])


@pytest.mark.parametrize("command", FILES)
def test_a_wrong_option_of_a_tool_is_reported_before_the_slow_imports(command):
    result = run(command, "--hg", "DIR")
    assert (result.returncode, result.stdout) == (2, "imported:\n")
    assert result.stderr.startswith("error: ")


def test_an_unknown_demo_is_reported_before_the_slow_imports():
    result = run(str(EXAMPLE), "demo=other")
    assert (result.returncode, result.stdout) == (2, "imported:\n")
    known = "same_architecture, hybrid, cross_architecture, cross_tokenizer, real_model"
    assert result.stderr == f"error: demo=other: there are {known}\n"


def test_loading_is_announced_and_quiet_and_leaves_the_compiler_out():
    result = run("megatron_oprd.train", *REQUIRED)
    assert (result.returncode, result.stderr) == (
        2,
        "error: s is not a folder with a Hugging Face model; name one with a config.json. A recipe in examples/ begins "
        "with the downloads of its models\n",
    )
    announced, imported = result.stdout.splitlines()
    assert announced == "loading PyTorch and Megatron-Core ..."
    assert "torch" in imported and "megatron.core" in imported and "torch._inductor.compile_fx" not in imported


def test_a_function_that_is_compiled_later_computes_the_same():
    code = """
import torch
from megatron_oprd.runtime import megatron_import
compiled = []
torch.cuda.is_available = lambda: True
torch.compile = lambda function, **options: compiled.append(options) or (lambda x: function(x) + 1)
with megatron_import._compile_on_first_call():
    @torch.compile
    def double(x): return 2 * x
    @torch.compile(mode="default")
    def triple(x): return 3 * x
assert compiled == [] and double.__name__ == "double"
assert [double(1), double(2), triple(1)] == [3, 5, 4] and compiled == [{}, {"mode": "default"}]
assert torch.compile(lambda x: x)(1) == 2
torch.cuda.is_available = lambda: False
with megatron_import._compile_on_first_call():
    @torch.compile
    def half(x): return x / 2
assert [half(1), double(1)] == [0.5, 2] and len(compiled) == 3, "nothing is compiled without a CUDA device"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
