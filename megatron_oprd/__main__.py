"""Run a command: `megatron-oprd COMMAND ...`, also `python -m megatron_oprd COMMAND ...`.

The list of commands is printed without importing any of them.
"""

from __future__ import annotations

import difflib
import runpy
import sys

from megatron_oprd import __version__

# command -> (module, description)
COMMANDS = {
    "train": ("train", "Distil a teacher into a student."),
    "plan": ("commands.plan", "Print what `train` would run and the memory and time that it needs."),
    "status": ("commands.status", "Print where a run stands."),
    "report": ("commands.report", "Write report.html of a run again, or compare several runs on one page."),
    "evaluate": ("evaluate", "Measure a model: on its own answers and on those of a teacher."),
    "fit-bridge": ("bridge.fit", "Fit the bridge to a teacher of another width, depth or tokenizer."),
    "fp8-error": ("fp8_error", "Measure what FP8 does to a teacher's hidden states."),
    "convert": ("commands.convert", "Convert a Hugging Face folder to a Megatron checkpoint."),
    "export": ("commands.export", "Convert a Megatron checkpoint to a Hugging Face folder."),
    "verify": ("commands.verify", "Compare a Megatron checkpoint with its Hugging Face folder."),
    "analyse": ("commands.analyse", "Compare student and teacher on the same rollouts: states, directions, gradients."),
    "prune": ("commands.prune", "Drop the blocks of a model that matter least, to make a student of it."),
    "config": ("commands.config", "Print the configuration: defaults with comments, one key, or a resolved file."),
}
PROGRAM = "megatron-oprd"


def usage() -> str:
    """Return the help text of the program."""
    lines = [f"  {name:<11} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options] [key=value ...]",
            "",
            "On-policy distillation of language models on Megatron-Core.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains a command. Several processes:",
            "torchrun --nproc-per-node 8 -m megatron_oprd train --config FILE [key=value ...]",
        ]
    )


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        module = f"megatron_oprd.{COMMANDS[name][0]}"
        # alter_sys: the command runs exactly as with `python -m megatron_oprd.train`.
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"error: unknown command {name} ({hint})", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
