"""Memory of one update by objective, at the paper's size, predicted on a CPU: docs/cost.md.

    python benchmarks/cost.py [--tokens 2048 16384 --sequences 1 8 --json FILE --markdown FILE]

The real Megatron model, optimizer and losses run on tensors that have sizes and no values
(`megatron_oprd/training/fake_step.py`): nothing of that size is allocated and nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.config import load_config
from megatron_oprd.layouts import plan_teacher
from megatron_oprd.training.fake_step import Footprint, trace_update
from megatron_oprd.types import ModelSpec, Rollout

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PROMPT_TOKENS = 256
# DeepSeek-R1-Distill-Qwen-1.5B, the paper's student; its teacher has the same size.
MODEL = ModelSpec(
    architecture="Qwen2ForCausalLM",
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    head_dim=128,
    vocab_size=151936,
    norm_epsilon=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=131072,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)
ALONE = ("loss.representation.weight=0",)
METHODS = {
    "OPRD, last 2000 tokens": (),
    "OPRD, all tokens": ("loss.representation.positions=all",),
    "sampled token": (*ALONE, "loss.output.objective=sampled"),
    "sampled token, unchunked": (*ALONE, "loss.output.objective=sampled", "loss.output.chunk_tokens=null"),
    "top-16": (*ALONE, "loss.output.objective=topk_surrogate"),
    "top-16, unchunked": (*ALONE, "loss.output.objective=topk_surrogate", "loss.output.chunk_tokens=null"),
    "full KL": (*ALONE, "loss.output.objective=full_kl"),
    "full KL, unchunked": (*ALONE, "loss.output.objective=full_kl", "loss.output.chunk_tokens=null"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384], help="of a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="in a micro-batch")
    parser.add_argument("--layers", type=int, default=MODEL.num_layers)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "cost.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "cost.md")
    options = parser.parse_args()
    model, rows = dataclasses.replace(MODEL, num_layers=options.layers), []
    for sequences in options.sequences:
        for tokens in options.tokens:
            for method, overrides in METHODS.items():
                footprint = predict(model, overrides, tokens, sequences)
                rows.append({"method": method, "sequences": sequences, "tokens": tokens, **as_row(footprint)})
                print(rows[-1], flush=True)
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    record = {"versions": versions, "layers": options.layers, "rows": rows}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    options.markdown.write_text(markdown(record))


def predict(model: ModelSpec, overrides: tuple[str, ...], tokens: int, sequences: int) -> Footprint:
    """The footprint of one update of one process on a micro-batch of equal sequences."""
    paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
    size = f"batch.max_tokens_per_micro_batch={tokens * sequences}"
    config = load_config(None, [*paths, "rollout.engine=replay", size, "recompute.granularity=full", *overrides])
    response = tokens - PROMPT_TOKENS
    rollouts = [Rollout((1,) * PROMPT_TOKENS, (2,) * response, (1,) * response, "replay")] * sequences
    return trace_update(config, model, [plan_teacher(config, model, model)], rollouts, rank=0, world=1)


def as_row(footprint: Footprint) -> dict[str, Any]:
    parts = dataclasses.asdict(footprint)
    resident = sum(parts[name] for name in ("weights", "gradients", "optimizer", "teacher_weights"))
    return {**parts, "resident": resident, "step_peak": footprint.peak - resident}


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# What an update costs in memory",
        "",
        ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "",
        "**Predicted**, not measured: the real update on tensors without values, on a CPU",
        "(`python benchmarks/cost.py`). `tests/unit/test_fake_step.py` holds such predictions against real updates,",
        f"within 10 %. {record['layers']} layers of width 1536, vocabulary 151,936, untied, bf16, AdamW, full",
        "recomputation, one process. Unchunked: all logits of the micro-batch at once (`chunk_tokens: null`), in the",
        "same code. The forward pass more that the paper's authors make for their top-16 baseline is not in it.",
        "",
        "Step peak: the most that is alive during an update, less weights, gradients, optimizer state and the frozen",
        "teacher. GiB.",
        "",
        "| sequences x tokens | method | step peak | of it teacher states | resident beside it |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        size = f"{row['sequences']} x {row['tokens']:,}"
        values = (row["step_peak"], row["targets"], row["resident"])
        lines.append(f"| {size} | {row['method']} | {' | '.join(f'{value / GIB:.2f}' for value in values)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
