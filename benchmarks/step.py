"""Measure the cost of taps and loss: a student update with and without them, in alternation.

    python benchmarks/step.py [--hidden 512 --layers 8 --tokens 1024 --repeats 7 --json FILE]

Both sides run forward and backward over the same tokens through all layers of the same student (no LM head, no
language-model loss) and step the optimizer. Without taps the gradient of the output is zero. The teacher's hidden
states are computed beforehand on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.config import Config, load_config
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.taps import CaptureTap
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.runtime import cpu_stand_ins, platform
from megatron_oprd.testing.random_update import build_random_update
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import Rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of a step, in four sequences of one micro-batch"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    result = measure(options)
    print(
        f"{options.layers} layers of width {options.hidden}, {options.tokens} tokens, {options.dtype}: "
        f"{result['seconds_without']:.3f} s without, {result['seconds_with']:.3f} s with taps and loss; "
        f"ratio {result['ratio']:.3f} (pairs: {min(result['ratios']):.3f} .. {max(result['ratios']):.3f})"
    )
    print(
        f"peak of a step with taps and loss: {result['peak_bytes_above_idle'] / 2**20:.1f} MiB above the idle process"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict:
    """Return the median seconds of both sides, the ratio of each pair, and the peak memory above the idle process."""
    config, device = _config(options), platform.choose_device("auto")
    update = build_random_update(config, _spec(options), _rollouts(options), device)
    student, batches = update.student, update.micro_batches
    targets, _ = teacher_pass([update.teacher], update.global_batch, batches, update.topology)
    states = dict(targets.of(0))

    def step(with_loss: bool) -> float:
        targets = TeacherTargets(states, device)
        targets.put(0, states)
        taps = [stage_loss(student, config.loss, batches[0], targets.of(0)) if with_loss else CaptureTap({})]
        begin = time.perf_counter()
        accumulate_gradients(student, batches, taps)
        with cpu_stand_ins.cpu_devices():
            student.optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    step(True), step(False)
    pairs = [(step(True), step(False)) for _ in range(options.repeats)]
    platform.reset_peak_memory(device)
    idle = platform.peak_memory_bytes(device)
    step(True)
    ratios = [with_loss / without for with_loss, without in pairs]
    return {
        "seconds_with": statistics.median(pair[0] for pair in pairs),
        "seconds_without": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_bytes_above_idle": platform.peak_memory_bytes(device) - idle,
        "device": str(device),
        "torch": torch.__version__,
    }


def _config(options: argparse.Namespace) -> Config:
    size = f"batch.max_tokens_per_micro_batch={options.tokens}"
    paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
    settings = [f"precision.dtype={options.dtype}", "rollout.engine=replay", "loss.representation.positions=all"]
    return load_config(None, [*paths, *settings, size])


def _spec(options: argparse.Namespace) -> ModelSpec:
    heads = options.hidden // 64
    return ModelSpec(
        architecture="Qwen3ForCausalLM",
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=3 * options.hidden,
        num_attention_heads=heads,
        num_query_groups=max(heads // 4, 1),
        head_dim=64,
        vocab_size=1024,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        rotary_dim=64,
        max_position_embeddings=options.tokens,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
    )


def _rollouts(options: argparse.Namespace) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    length = options.tokens // 4
    rows = torch.randint(0, 1024, (4, length), generator=generator).tolist()
    return [Rollout(tuple(row[:8]), tuple(row[8:]), (1,) * (length - 8), "replay") for row in rows]


if __name__ == "__main__":
    main()
