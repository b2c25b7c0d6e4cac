"""The commands in the READMEs work: they run with tiny models, and every command line is parsed.

ci/run.sh runs one command of each program, without the slow benchmarks. ci/nightly.sh runs all commands.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from examples.demo.make_bridge_pair import KINDS, parts_of
from examples.demo.run import parse_arguments
from examples.demo.task import split_additions, write_rows
from megatron_oprd.__main__ import COMMANDS as COMMANDS_OF_PROGRAM
from megatron_oprd.config import load_config
from megatron_oprd.testing.models import save
from tests.helpers.bridges import save_random_bridge
from tests.helpers.runs import prompt_run

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^ {4}((?:bash|python|torchrun|megatron-oprd) .*?)(?: +#.*)?$", re.MULTILINE)
FILES = ["README.md", "CONTRIBUTING.md", *(f"{d}/README.md" for d in ("examples", "ci", "benchmarks"))]
FILES += ["tools/checkpoint_convert/README.md", "examples/slurm/README.md"]
FILES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Commands of the program, in code blocks and in the text.
PROGRAM = re.compile(r"(?:^ *|`)megatron-oprd ([a-z][^`\n#]*)", re.MULTILINE)
# Lines with a placeholder, of which the options are checked, and the listing of docs/library.md, which
# tests/distributed/test_library.py runs.
FORM = re.compile(r" (?:FILE|DIR|RUN|NAME|MODEL)\b|\[--|example\.py$")

TINY = "train.steps=2 rollout.max_new_tokens=6 rollout.prompts_per_step=2 checkpoint.every=0 precision.dtype=fp32"
PATHS = "student.path={models}/student teacher.path={models}/teacher data.prompts=[{models}/prompts.jsonl]"
RECIPE = f"{PATHS} {TINY} train.run_dir={{out}}"
SHORT_DEMO = "train.steps=1 evaluation.every=0 checkpoint.every=0 train.run_dir={out}"

# A demo of unlike models: the fit of a bridge on two steps of answers, and a step against it.
UNLIKE_DEMO = f"{SHORT_DEMO} rollout.prompts_per_step=32 bridge.prompts=64 bridge.ranks=[4,8] health.every=0"
FIT = f"{PATHS} {TINY} bridge.prompts=4 bridge.ranks=[2] bridge.held_out_fraction=0.5 train.run_dir={{out}}"

OBJECTIVES = "--work {out}/work --output {out} --seeds 0 --steps 1 --learning-rates 1e-3 --objectives oprd full_kl"
BRIDGES = "--work {out}/work --output {out} --seeds 0 --steps 1 --learning-rates 1e-3 --methods bridge full_kl "
BRIDGES += "--kinds cross_architecture"
STALENESS = "--work {out}/work --output {out} --seeds 0 --steps 1 --objectives oprd"
PAIRS = {
    SHORT_DEMO: "pair",
    OBJECTIVES: "work/pair-0",
    STALENESS: "work/pair-0",
}  # arguments -> where the command looks for its pair
UNLIKE = {f"demo={kind}": kind for kind in KINDS}  # the last word of a command -> the kind of its pair

EXAMPLE = "examples/run_oprd_qwen.sh"
MODELS = "student.path=DIR teacher.path=DIR data.prompts=[FILE]"
TRAIN = "torchrun --nproc-per-node 8 -m megatron_oprd.train --config examples/qwen_same_family.yaml"
TOOLS = "python tools/checkpoint_convert"
HF, MEGATRON = "models/Qwen3-0.6B", "models/Qwen3-0.6B-megatron"

SIZES = {"layers": 2, "hidden": 128, "heads": 2, "ffn": 256, "vocabulary": 512}
UPDATE = json.dumps({**SIZES, "prompt": 8, "responses": [64, 32], "last": 8, "chunk": 16})
UPDATE = UPDATE.replace("{", "{{").replace("}", "}}")

# command of a README -> the arguments that are put in or added; None: another test runs the command as it stands.
RUNS = {
    f"bash {EXAMPLE}": None,  # test_demo.py
    f"bash {EXAMPLE} demo=real_model": None,  # test_real_model_demo.py, with a tiny model
    f"bash {EXAMPLE} demo=real_model train.steps=96 evaluation.every=24": None,  # the same with two more keys
    f"bash {EXAMPLE} demo=hybrid": None,  # test_demo.py
    f"bash {EXAMPLE} train.seed=1": SHORT_DEMO,
    f"torchrun --nproc-per-node 2 {EXAMPLE} parallel.tensor=2": SHORT_DEMO,
    f"torchrun --nproc-per-node 2 {EXAMPLE} parallel.pipeline=2": SHORT_DEMO,
    f"torchrun --nproc-per-node 2 {EXAMPLE} parallel.pipeline=2 parallel.virtual_pipeline=2": SHORT_DEMO,
    f"torchrun --nproc-per-node 4 {EXAMPLE} parallel.tensor=2 parallel.pipeline=2": SHORT_DEMO,
    f"torchrun --no-python --nproc-per-node 2 {EXAMPLE}": SHORT_DEMO,
    **{f"bash {EXAMPLE} {word}": UNLIKE_DEMO for word in UNLIKE},
    "torchrun --nproc-per-node 8 -m megatron_oprd.bridge.fit --config examples/cross_architecture.yaml": FIT,
    "torchrun --nproc-per-node 8 -m megatron_oprd.train --config examples/cross_architecture.yaml": f"{RECIPE} "
    "loss.representation.bridge={models}/bridge health.every=0",
    f"torchrun --nproc-per-node 8 {EXAMPLE} {MODELS} parallel.tensor=2": RECIPE,
    f"bash {EXAMPLE} precision.teacher_fp8=weights": SHORT_DEMO,
    "torchrun --nproc-per-node 8 -m megatron_oprd.fp8_error --config examples/qwen_same_family.yaml "
    "precision.teacher_fp8=weights": RECIPE,
    f"torchrun --nproc-per-node 2 {EXAMPLE} {MODELS}": RECIPE,
    "megatron-oprd plan --config examples/qwen_same_family.yaml --device h100": PATHS,
    TRAIN: RECIPE,
    "megatron-oprd plan --config examples/qwen3_32b_to_4b_64xh100.yaml": None,  # test_recipes.py
    "bash ci/run.sh": "--collect-only -q tests/unit",  # this very test is part of it
    "bash ci/run.sh tests/unit -k sharding": "--collect-only -q",
    "bash ci/nightly.sh": "--collect-only -q tests/unit",
    "bash ci/lint.sh": "",
    "bash ci/gpu.sh": None,  # needs a GPU
    "bash ci/gpu.sh --minutes 8": None,
    "bash ci/gpu.sh --minutes 8 --list": None,  # test_gpu_suite.py
    "python benchmarks/rollout.py": "--batch 2 --repeats 1 --layers 1 --hidden 64 --vocabulary 64",
    "bash tools/rollout_server/install.sh models/vllm": None,  # downloads several GB
    f"{TRAIN} rollout.engine=vllm rollout.server.python=models/vllm/bin/python": None,  # needs that environment
    f"{TRAIN} rollout.engine=vllm rollout.server.addresses=[10.0.0.7:8000,10.0.0.8:8000] "
    "rollout.server.sync_dir=/mnt/shared/weights": None,  # needs these servers
    "python benchmarks/rollout.py --preset h100 --rehearse": None,  # test_rollout_benchmark.py
    "python benchmarks/parity.py": "--only 2-qwen3-tp2-sp",
    "python benchmarks/cost.py": "--methods 'OPRD, all tokens' --layers 1 --tokens 512 --sequences 1 --repeats 1 "
    f"--workload '{UPDATE}' --json {{out}}.json --markdown {{out}}.md",
    "python benchmarks/start.py": "--sizes demo --repeats 1",
    "python benchmarks/gpu.py": "--tiny --repeats 1 --parts 'teacher pass'",
    "python benchmarks/objectives.py": OBJECTIVES,
    "python benchmarks/staleness.py": STALENESS,
    "python benchmarks/methods.py": "--work {out} --output {out} --seeds 1 --steps 1 --only layers",
    "python benchmarks/real_model.py": None,  # test_real_model_demo.py, with a tiny model
    "python benchmarks/bridge.py": BRIDGES,
    "python benchmarks/step.py": "--hidden 64 --layers 2 --tokens 64 --repeats 1",
    f"{TOOLS}/hf_to_megatron.py --hf {HF} --megatron {MEGATRON}": "",
    f"{TOOLS}/verify.py --hf {HF} --megatron {MEGATRON} --tensor 2": "",
    f"{TOOLS}/megatron_to_hf.py --megatron {MEGATRON} --hf {HF}-back": "",
}
# One command of each program of the product, and of each branch of the example. ci/run.sh is what runs these tests.
# tests/numerics/test_convert.py starts the conversion tools, and tests/unit/test_rollout_benchmark.py that benchmark.
# Of the other benchmarks, those that take seconds: the others train or start several processes.
IN_CI = {
    f"torchrun --nproc-per-node 2 {EXAMPLE} parallel.tensor=2",
    f"torchrun --nproc-per-node 2 {EXAMPLE} {MODELS}",
    f"bash {EXAMPLE} demo=cross_architecture",
    *(f"python benchmarks/{name}.py" for name in ("gpu", "step")),
}
COMMANDS = [
    pytest.param(command, marks=[] if command in IN_CI else [pytest.mark.nightly])
    for command, arguments in RUNS.items()
    if arguments is not None
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readmes")
    models = folder / "models"
    prompt_run(models, steps=2, max_position_embeddings=4096)
    save_random_bridge(models / "bridge", models / "student", models / "teacher", rank=2)
    (folder / "models" / "Qwen3-0.6B").symlink_to("student")
    return folder


def test_every_command_of_a_readme_is_tested():
    assert set(RUNS) > IN_CI
    found = {match for file in FILES for match in COMMAND.findall((ROOT / file).read_text())}
    assert {command for command in found if not FORM.search(command)} == set(RUNS)


def parse(command):
    """Return the program and the arguments of a command line; a launcher must accept its own options."""
    words = shlex.split(command)
    if words[0] == "megatron-oprd":
        return f"megatron_oprd.{COMMANDS_OF_PROGRAM[words[1]][0]}", words[2:]
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        return options.training_script, options.training_script_args
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


@pytest.mark.parametrize("command", RUNS)
def test_the_program_of_a_readme_exists_and_its_settings_are_valid(command):
    program, arguments = parse(command)
    paths = ["student.path=a", "teacher.path=b", "train.run_dir=c"]
    if program.startswith("megatron_oprd."):
        options = importlib.import_module(program).PARSER.parse_args(arguments)
        if hasattr(options, "overrides"):
            load_config(ROOT / options.config, [*paths, *options.overrides])
    else:
        assert (ROOT / program).is_file()
    if program == EXAMPLE and any(argument.startswith("student.path=") for argument in arguments):
        load_config(ROOT / "examples" / "qwen_same_family.yaml", [*paths, *arguments])
    elif program == EXAMPLE:
        parse_arguments(arguments)


def test_every_command_of_the_program_in_a_page_is_accepted():
    # A command may continue on the next line.
    pages = [(ROOT / file).read_text().replace("\\\n", " ") for file in FILES]
    lines = {match.strip() for page in pages for match in PROGRAM.findall(page)}
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line)
        parser = importlib.import_module(f"megatron_oprd.{COMMANDS_OF_PROGRAM[name][0]}").PARSER
        if arguments:  # a command that is only named has no options
            parser.parse_args(arguments)


def fenced_commands():
    """Yield every line of the pages' bash blocks, but those of the program and the output of `head`."""
    for file in FILES:
        for block in FENCED.findall((ROOT / file).read_text()):
            for line in block.splitlines():
                if line.strip() and not line.startswith(("megatron-oprd", "{")):
                    yield line.partition("  #")[0].strip()


def test_downloads_fill_the_folders_of_the_recipes():
    """The names on the hub cannot be looked up here."""
    downloads = {line for line in fenced_commands() if line.startswith("hf ")}
    for recipe in (ROOT / "examples").glob("*.yaml"):
        text = recipe.read_text()
        lines = set(re.findall(r"^# +(hf download .*)$", text, re.MULTILINE))
        downloads |= lines
        if not recipe.name.startswith("demo"):  # the demo makes its models
            models = {shlex.split(line)[-1] for line in lines if "--repo-type dataset" not in line}
            config = yaml.safe_load(text)
            assert models == {config["student"]["path"], config["teacher"]["path"]}, recipe.name
            row = re.search(rf"\| `{re.escape(recipe.name)}` \| (.*) \|", (ROOT / "README.md").read_text())
            named = {line.split()[2] for line in lines if "--repo-type dataset" not in line}
            assert set(row[1].split(" | ")) == named, recipe.name
    for line in downloads:
        repository, folder = re.fullmatch(
            r"hf download (\S+)(?: --repo-type dataset)? --local-dir (\S+)", line
        ).groups()
        assert folder == "." or Path(folder).name == repository.partition("/")[2]


def test_other_commands_of_a_page_name_what_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in fenced_commands():
        program, *arguments = shlex.split(line)
        if program == "sbatch":
            script = next(word for word in arguments if word.endswith(".sbatch"))
            recipe = yaml.safe_load((ROOT / arguments[arguments.index("--config") + 1]).read_text())
            assert (ROOT / script).is_file()
            assert int(arguments[arguments.index("--nodes") + 1]) * 8 == recipe["parallel"]["world_size"]
        elif program == "pip":
            assert set(re.findall(r"(?:^|[ .])\.?\[(\w+)\]", line)) <= set(extras)
        elif program == "python":
            assert arguments[0] == "-m" and importlib.util.find_spec(arguments[1])
        else:
            assert program in {"hf", "mkdocs", "source", "head", "git", "cd"}, line


def save_untrained_pair(kind, folder):
    """Write the files of `make_bridge_pair`, with models that are not trained."""
    splits = split_additions(0)
    for name, part in zip(("student", "teacher"), parts_of(kind), strict=True):
        part.tokenizer.save_pretrained(save(part.build(0), folder / name))
    for name, problems in (("train", splits.prompts), ("heldout", splits.heldout[:20]), ("validation", splits.heldout)):
        write_rows(folder / f"{name}.jsonl", problems)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_readme_works(command, folder, demo, tmp_path):
    if RUNS[command] in PAIRS:  # making a pair takes a minute; the demo has made it
        shutil.copytree(demo.folder / "pair", tmp_path / "run" / PAIRS[RUNS[command]])
    if command.split()[-1] in UNLIKE:
        save_untrained_pair(UNLIKE[command.split()[-1]], tmp_path / "run" / "pair")
    if RUNS[command] == BRIDGES:
        save_untrained_pair("cross_architecture", tmp_path / "run" / "work" / "cross_architecture-0" / "pair")
    added = RUNS[command].format(models=folder / "models", out=tmp_path / "run")
    words = [w for w in shlex.split(command) if "=DIR" not in w and "=[FILE]" not in w]
    if words[0] == "megatron-oprd":  # this copy, which need not be installed
        words[:1] = [sys.executable, "-m", "megatron_oprd"]
    words = [str(folder / word) if word.startswith("models/") else word for word in words]
    words = ["2" if word == "8" else word for word in words] + shlex.split(added)  # two processes do for eight
    bin_dir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHON": sys.executable}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
