"""Convert a Hugging Face folder (Qwen2 to Qwen3-MoE, Llama, Phi-3, Phi-4) to a Megatron-Core distributed checkpoint."""

from __future__ import annotations

import argparse

from megatron_oprd.commands import ranks
from megatron_oprd.runtime.cli import ArgumentParser, run_command

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


PARSER = ArgumentParser(prog="megatron-oprd convert", description=__doc__)
PARSER.add_argument("--hf", required=True, metavar="DIR", help="the Hugging Face folder to read")
PARSER.add_argument("--megatron", required=True, metavar="DIR", help="the new folder to write")
PARSER.add_argument("--dtype", choices=DTYPES, help="dtype of the weights written; default: as they are")
ranks.add_layout(PARSER, "spread the model over more processes (each holds its part); any layout can read it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, in this process or in one that it starts for each rank."""
    args = PARSER.parse_args(arguments)
    return ranks.run_in_layout(convert, args, "megatron_oprd.commands.convert", arguments)


def convert(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say, in one process of the layout."""
    import torch

    from megatron_oprd.checkpoint.megatron_format import save_model
    from megatron_oprd.checkpoint.weights import load_weights
    from megatron_oprd.hf.config import read_model_spec
    from megatron_oprd.hf.reader import HFReader
    from megatron_oprd.models.build import build_model
    from megatron_oprd.runtime.files import check_new_folder

    spec = read_model_spec(args.hf)
    reader = HFReader(args.hf)
    reader.check(spec)
    check_new_folder(args.megatron)
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else reader.dtype()
    topology = ranks.start_topology(args.tensor, args.pipeline)
    model = build_model(spec, topology, dtype)
    load_weights(model, args.hf, spec, topology)
    save_model(model, args.megatron, spec, topology, source=args.hf)
    if topology.rank == 0:
        name = str(dtype).removeprefix("torch.")
        print(f"written: {args.megatron} ({spec.architecture}, {spec.num_layers} layers, {name})")
    return 0


if __name__ == "__main__":
    run_command(main)
