"""Compare a Megatron checkpoint, in any layout, with its Hugging Face folder as computed by transformers.

Weights are compared bit for bit, hidden states and logits on random tokens within a tolerance. Exit code 0: equal;
1: different, and the first part that differs is named; 2: bad input.
"""

from __future__ import annotations

import argparse

from megatron_oprd.commands import ranks
from megatron_oprd.runtime.cli import ArgumentParser, run_command

# With equal weights, only the order of sums differs. A bf16 model loses half of its digits after a few layers.
DTYPES = {"fp32": ("float32", 1e-4), "bf16": ("bfloat16", 5e-2)}
LENGTHS = (1, 7, 33, 128)


PARSER = ArgumentParser(prog="megatron-oprd verify", description=__doc__.splitlines()[0])
PARSER.add_argument("--hf", required=True, metavar="DIR", help="the Hugging Face folder")
PARSER.add_argument("--megatron", required=True, metavar="DIR", help="the Megatron checkpoint")
PARSER.add_argument(
    "--dtype",
    choices=DTYPES,
    default="fp32",
    help="dtype to compute in; default fp32. With experts, bf16 differs: its rounding changes who gets a token",
)
PARSER.add_argument(
    "--tolerance", type=float, help="largest relative error per token; default 1e-4 in fp32, 5e-2 in bf16"
)
ranks.add_layout(PARSER, "run the Megatron model in this layout; the processes are started")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, in this process or in one that it starts for each rank."""
    args = PARSER.parse_args(arguments)
    if args.tolerance is not None and not args.tolerance >= 0:
        PARSER.error("--tolerance must be at least 0")
    return ranks.run_in_layout(verify, args, "megatron_oprd.commands.verify", arguments)


def verify(args: argparse.Namespace) -> int:
    """Compare as the parsed arguments say, in one process of the layout."""
    import torch

    from megatron_oprd.checkpoint.format_checks import check_model, checkpoint_dtype
    from megatron_oprd.checkpoint.megatron_format import load_model
    from megatron_oprd.hf.config import read_model_spec
    from megatron_oprd.hf.reader import HFReader
    from megatron_oprd.models.build import build_model
    from megatron_oprd.models.compare import Comparison, compare_states, compare_weights, open_hf_model

    spec, reader = read_model_spec(args.hf), HFReader(args.hf)
    reader.check(spec)
    check_model(args.megatron, spec)
    name, tolerance = DTYPES[args.dtype]
    compute, stored = getattr(torch, name), checkpoint_dtype(args.megatron)
    topology = ranks.start_topology(args.tensor, args.pipeline)
    # The Megatron model uses its own config.json, so that an error in it is found as a difference.
    model = build_model(read_model_spec(args.megatron), topology, compute).eval()
    load_model(model, args.megatron, spec, topology)
    weights = compare_weights(model, reader, spec, topology, stored)
    hf_model = open_hf_model(args.hf, stored, compute) if topology.rank == 0 else None
    lengths = [length for length in LENGTHS if length <= spec.max_position_embeddings]
    comparison = Comparison(compare_states(model, hf_model, spec, topology, lengths), weights)
    return report(comparison, tolerance if args.tolerance is None else args.tolerance) if topology.rank == 0 else 0


def report(comparison, tolerance: float) -> int:
    """Print the table and return the exit code."""
    print(f"{'':<12}max relative error (tolerance {tolerance:g})")
    for name, error in comparison.errors.items():
        print(f"{name:<12}{error:.3e}{'' if error <= tolerance else '  differs'}")
    if comparison.weights:
        print(f"weights     {len(comparison.weights)} tensors differ, the first is {comparison.weights[0]}")
    else:
        print("weights     all equal")
    first = comparison.first_difference(tolerance)
    print("equal" if first is None else f"NOT equal: the first difference is in {first}")
    return 0 if first is None else 1


if __name__ == "__main__":
    run_command(main)
