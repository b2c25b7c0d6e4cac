"""Measure the time from the command to the end of the first step, phase by phase.

    python benchmarks/start.py [--sizes demo 135M 1.5B --repeats 2 --folder DIR --json FILE]

Student and teacher have random weights and the shape of the demo's pair, SmolLM2-135M or Qwen2.5-1.5B (3 GB each on
disk); nothing is downloaded. Each run is `train --profile-start` in a process of its own, of one step on two short
rollouts. Models are made in --folder, or in a temporary folder that is removed. The first run of a size may read the
files from the disk, the next ones from memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.names import hf_shapes
from megatron_oprd.runtime.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 24}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def shape(layers: int, hidden: int, mlp: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    """Return the sizes of a model as keys of config.json."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }


SIZES = {
    "demo": {**COMMON, **QWEN3, **shape(4, 96, 192, 4, 4, 259)},
    "135M": {**COMMON, **LLAMA, **shape(30, 576, 1536, 9, 3, 49152)},
    "1.5B": {**COMMON, **QWEN2, **shape(28, 1536, 8960, 12, 2, 151936)},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "135M"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the models here, for the next call")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.sizes:
            folder = (options.folder or Path(temporary)) / size
            starts = [first_step(folder, size) for _ in range(options.repeats)]
            figures[size] = starts
            print("\n".join(table(size, starts)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def first_step(folder: Path, size: str) -> dict[str, Any]:
    """Train a pair of this size for one step in a process of its own; return the content of its `start.json`."""
    models = [make_model(folder / name, size, seed) for seed, name in enumerate(("student", "teacher"))]
    rollouts = folder / "rollouts.jsonl"
    row = {"prompt_ids": [2, 3, 4, 5], "response_ids": [6, 7, 8, 1]}
    rollouts.write_text(2 * (json.dumps(row) + "\n"))
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "megatron_oprd", "train", "--profile-start"]
        command += [f"student.path={models[0]}", f"teacher.path={models[1]}", f"train.run_dir={run_dir}"]
        command += ["rollout.engine=replay", f"rollout.path={rollouts}", "rollout.prompts_per_step=2"]
        command += ["rollout.samples_per_prompt=1", "train.steps=1", "checkpoint.export_hf=false"]
        command += ["batch.max_tokens_per_micro_batch=64", "evaluation.every=0", "checkpoint.every=1000"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(run_dir) / "start.json").read_text())


def make_model(folder: Path, size: str, seed: int) -> Path:
    """Write a random model in bf16, unless the folder exists."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES[size]))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()
    tensors = {name: random_like(noise, wanted) for name, wanted in hf_shapes(read_model_spec(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_like(noise: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of a shape that repeats `noise`; a vector (the weights of a norm) is one everywhere."""
    if len(wanted) == 1:
        return torch.ones(wanted, dtype=noise.dtype)
    elements = torch.Size(wanted).numel()
    return noise.repeat(-(-elements // len(noise)))[:elements].reshape(wanted).clone()


def table(size: str, starts: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: the seconds of each phase in each run, and the CPU seconds of the last run."""
    number = range(1, len(starts) + 1)
    lines = [f"**{size}**", "", f"| phase | {' | '.join(f'run {n}, s' for n in number)} | CPU s |"]
    lines.append("| --- |" + " ---: |" * (len(starts) + 1))
    by_run = [{phase["phase"]: phase for phase in start["phases"]} for start in starts]
    for name, last in by_run[-1].items():
        seconds = " | ".join(f"{run[name]['seconds']:.2f}" if name in run else "" for run in by_run)
        lines.append(f"| {name} | {seconds} | {last['cpu_seconds']:.2f} |")
    cpu = sum(phase["cpu_seconds"] for phase in starts[-1]["phases"])
    totals = " | ".join(f"{start['seconds']:.2f}" for start in starts)
    return [*lines, f"| all | {totals} | {cpu:.2f} |", ""]


if __name__ == "__main__":
    run_command(main)
