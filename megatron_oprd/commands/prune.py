"""Write a Hugging Face folder without the blocks that change the hidden states least, as the student of its original.

The score of a block is 1 - cosine of its input and its output, averaged over tokens (ShortGPT, arXiv 2403.03853).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_oprd.commands import ranks
from megatron_oprd.commands.dropped_blocks import add_choice, check_choice, lowest_blocks, number_to_drop, parse_blocks
from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.types import UserError

if TYPE_CHECKING:
    from megatron_oprd.model_spec import ModelSpec
    from megatron_oprd.parallel.topology import Topology
    from megatron_oprd.types import Rollout

PAIRS_FILE = "pairs.yaml"
MICRO_BATCH_TOKENS = 8192

PARSER = ArgumentParser(prog="megatron-oprd prune", description=" ".join(__doc__.split()))
PARSER.add_argument("--model", required=True, metavar="DIR", help="the Hugging Face folder of the model to prune")
PARSER.add_argument("--to", required=True, metavar="DIR", help="the new folder to write")
add_choice(PARSER)
PARSER.add_argument("--prompts", nargs="+", metavar="FILE", help="score on all tokens of these prompts")
PARSER.add_argument(
    "--rollouts", metavar="FILE", help="score on the responses of a JSONL file with prompt_ids and response_ids"
)
PARSER.add_argument("--prompt-key", default="prompt", metavar="NAME", help="column with the prompt; default prompt")
PARSER.add_argument(
    "--max-prompts", type=ranks.positive, default=128, metavar="N", help="prompts or rollouts to use; default 128"
)
PARSER.add_argument(
    "--pairs",
    choices=("output", "next_input"),
    default="output",
    help="teacher layer of a kept block: its own output (default), or the input of the next kept block",
)
ranks.add_layout(PARSER, "spread the model over more processes while it is scored")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, in this process or in one that it starts for each rank."""
    args = PARSER.parse_args(arguments)
    check_arguments(args)
    return ranks.run_in_layout(prune, args, "megatron_oprd.commands.prune", arguments, device="auto")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that contradict each other, before the slow imports."""
    if args.prompts and args.rollouts:
        raise UserError("--prompts and --rollouts: name one of them")
    if args.blocks is None and not (args.prompts or args.rollouts):
        raise UserError("--prompts FILE is required to score the blocks; without it, name the blocks with --blocks")
    check_choice(args)


def prune(args: argparse.Namespace) -> int:
    """Score the blocks and write the pruned folder as the parsed arguments say, in one process of the layout."""
    from megatron_oprd.hf.config import read_model_spec
    from megatron_oprd.hf.names import count_parameters
    from megatron_oprd.hf.pruned import pruned_spec, write_pruned
    from megatron_oprd.hf.reader import HFReader
    from megatron_oprd.models.layer_pairs import pairs_of_kept_blocks
    from megatron_oprd.parallel.rank_zero import on_rank_zero
    from megatron_oprd.runtime.files import check_new_folder

    spec = read_model_spec(args.model)
    HFReader(args.model).check(spec)
    check_new_folder(args.to)
    number = number_to_drop(args, spec.num_layers)
    rollouts = _read_tokens(args, spec)
    topology = ranks.start_topology(args.tensor, args.pipeline, device="auto")
    scores = _scores(args.model, spec, rollouts, topology) if rollouts else None
    if args.blocks is not None:
        dropped = parse_blocks(args.blocks)
    else:
        assert scores is not None  # required by check_arguments
        dropped = lowest_blocks(scores, number, args.keep_first, args.keep_last)
    kept = [block for block in range(1, spec.num_layers + 1) if block not in dropped]
    pairs = pairs_of_kept_blocks(kept, spec.num_layers, args.pairs)
    text = pairs_text(args.model, dropped, pairs, scores)

    def write() -> None:
        _print_scores(scores, dropped)
        write_pruned(args.model, args.to, spec, kept, {PAIRS_FILE: text})
        sizes = (f"{count_parameters(one) / 1e6:.1f} M" for one in (spec, pruned_spec(spec, kept)))
        print(f"written: {args.to} ({len(kept)} of {spec.num_layers} blocks, {' -> '.join(sizes)} parameters)")
        print(f"train it with student.path={args.to} teacher.path={args.model}")
        print(f"  loss.representation.pairs={Path(args.to) / PAIRS_FILE}", flush=True)

    on_rank_zero(write)
    return 0


def pairs_text(model: str, dropped: Sequence[int], pairs: Sequence[tuple[int, int]], scores: list[float] | None) -> str:
    """Return the content of pairs.yaml, which `loss.representation.pairs` accepts."""
    from megatron_oprd.config.yaml_core import dump_yaml

    lines = ["# Written by megatron-oprd prune. Blocks and layers count from 1."]
    lines += [dump_yaml({"teacher": model}).strip(), f"dropped: {list(dropped)}"]
    lines += ["# [student layer, teacher layer]", "pairs:", *(f"- {list(pair)}" for pair in pairs)]
    if scores is not None:
        lines += ["# block: 1 - cosine of its input and output", "scores:"]
        lines += [f"  {block}: {score:.6g}" for block, score in enumerate(scores, start=1)]
    return "\n".join(lines) + "\n"


def _read_tokens(args: argparse.Namespace, spec: ModelSpec) -> list[Rollout]:
    """Return at most `--max-prompts` rollouts to score on; the response of a prompt is the prompt itself."""
    from megatron_oprd.config import DataConfig
    from megatron_oprd.data.packing import num_tokens
    from megatron_oprd.data.prompts import PromptState, load_prompts, take
    from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer
    from megatron_oprd.rollout.replay import load_replay
    from megatron_oprd.types import Rollout

    if args.rollouts:
        rollouts = [rollout for rollout in load_replay(args.rollouts, spec.vocab_size) if any(rollout.response_mask)]
        longest = max(map(num_tokens, rollouts), default=0)
        if longest > spec.max_position_embeddings:
            raise UserError(
                f"{args.rollouts}: a rollout of {longest} tokens exceeds the model's {spec.max_position_embeddings} "
                "positions; leave it out"
            )
        if not rollouts:
            raise UserError(
                f"{args.rollouts} has no response tokens to score on; name rollouts with a response_mask of ones"
            )
        return rollouts[: args.max_prompts]
    if not args.prompts:
        return []
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, spec)
    limit = min(DataConfig().max_prompt_tokens, spec.max_position_embeddings)
    data = DataConfig(prompts=args.prompts, prompt_key=args.prompt_key, max_prompt_tokens=limit)
    prompts = load_prompts(args.prompts, tokenizer, data).prompts
    chosen, _ = take(prompts, PromptState(), min(args.max_prompts, len(prompts)), seed=0, shuffle=True)
    return [Rollout((), one.prompt_ids, (1,) * len(one.prompt_ids), "replay", one.index) for one in chosen]


def _scores(folder: str, spec: ModelSpec, rollouts: Sequence[Rollout], topology: Topology) -> list[float]:
    """Return the score of each block, the same on every rank. Collective over the world."""
    import torch

    from megatron_oprd.checkpoint.weights import load_weights
    from megatron_oprd.config import BatchConfig, LossConfig, RepresentationConfig
    from megatron_oprd.data.packing import num_tokens
    from megatron_oprd.models.build import build_model
    from megatron_oprd.training.block_scores import score_blocks
    from megatron_oprd.training.global_batch import GlobalBatch

    dtype = torch.float32 if topology.device.type == "cpu" else torch.bfloat16
    stage = build_model(spec, topology, dtype).eval()
    load_weights(stage, folder, spec, topology)
    loss = LossConfig(representation=RepresentationConfig(positions="all", aggregation="token_mean"))
    batch = BatchConfig(max_tokens_per_micro_batch=max(MICRO_BATCH_TOKENS, *map(num_tokens, rollouts)))
    global_batch = GlobalBatch(tuple(rollouts), (0,) * len(rollouts), loss, batch, spec)
    scores = score_blocks(stage, global_batch, topology)
    broken = next((block for block, score in enumerate(scores, start=1) if not math.isfinite(score)), None)
    if broken is not None:
        raise UserError(
            f"{folder}: the hidden states of block {broken} are not finite, so it has no score; copy the model again, "
            "or name the blocks with --blocks"
        )
    return scores


def _print_scores(scores: Sequence[float] | None, dropped: Sequence[int]) -> None:
    if scores is not None:
        print("block  1 - cosine of input and output")
        for block, score in enumerate(scores, start=1):
            print(f"{block:>5}  {score:.4f}{'  dropped' if block in dropped else ''}")
    print(f"dropped: {', '.join(map(str, dropped)) or 'no block'}")


if __name__ == "__main__":
    run_command(main)
