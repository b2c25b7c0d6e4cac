"""Convert a Megatron-Core distributed checkpoint back to a Hugging Face folder that transformers opens."""

from __future__ import annotations

import argparse
import math

from megatron_oprd.commands import ranks
from megatron_oprd.runtime.cli import ArgumentParser, run_command

PARSER = ArgumentParser(prog="megatron-oprd export", description=__doc__)
PARSER.add_argument("--megatron", required=True, metavar="DIR", help="the Megatron checkpoint to read")
PARSER.add_argument("--hf", required=True, metavar="DIR", help="the new Hugging Face folder to write")
PARSER.add_argument(
    "--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file in 10^9 bytes; default 5"
)
ranks.add_layout(PARSER, "spread the model over more processes (each holds its part)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, in this process or in one that it starts for each rank."""
    args = PARSER.parse_args(arguments)
    if not 0 < args.max_shard_gb < math.inf:
        PARSER.error("--max-shard-gb must be positive")
    return ranks.run_in_layout(export, args, "megatron_oprd.commands.export", arguments)


def export(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say, in one process of the layout."""
    from megatron_oprd.checkpoint.format_checks import check_model, checkpoint_dtype
    from megatron_oprd.checkpoint.megatron_format import load_model
    from megatron_oprd.hf.config import read_model_spec
    from megatron_oprd.hf.export import WrittenWeights, export_hf
    from megatron_oprd.models.build import build_model
    from megatron_oprd.runtime.files import check_new_folder

    spec = read_model_spec(args.megatron)
    check_model(args.megatron, spec)
    check_new_folder(args.hf)
    topology = ranks.start_topology(args.tensor, args.pipeline)
    model = build_model(spec, topology, checkpoint_dtype(args.megatron))
    load_model(model, args.megatron, spec, topology)
    shard_bytes = int(args.max_shard_gb * 1e9)
    export_hf(
        model, spec, topology, source=args.megatron, target=args.hf, written=WrittenWeights(max_shard_bytes=shard_bytes)
    )
    if topology.rank == 0:
        print(f"written: {args.hf} ({spec.architecture}, {spec.num_layers} layers)")
    return 0


if __name__ == "__main__":
    run_command(main)
