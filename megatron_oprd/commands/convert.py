"""Convert a model to a Megatron-Core distributed checkpoint: from a Hugging Face folder (Qwen2 to Qwen3-MoE, Llama,
Phi-3, Phi-4) or from a checkpoint of Megatron-LM or Megatron-Bridge; for this package or for Megatron-LM."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_oprd.commands import ranks
from megatron_oprd.runtime.cli import ArgumentParser, run_command

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


PARSER = ArgumentParser(prog="megatron-oprd convert", description=__doc__)
PARSER.add_argument(
    "--hf",
    metavar="DIR",
    help="the Hugging Face folder to read; with --checkpoint, the folder with the tokenizer of its model",
)
PARSER.add_argument(
    "--checkpoint",
    metavar="DIR",
    help="read the weights from this Megatron checkpoint: of Megatron-LM, Megatron-Bridge or this package",
)
PARSER.add_argument("--megatron", metavar="DIR", help="the new folder to write (required)")
PARSER.add_argument(
    "--format",
    choices=("megatron-oprd", "megatron-lm"),
    default="megatron-oprd",
    help="who reads the new folder; default megatron-oprd. Megatron-Bridge reads megatron-lm, too",
)
PARSER.add_argument("--dtype", choices=DTYPES, help="dtype of the weights written; default: as they are")
ranks.add_layout(PARSER, "spread the model over more processes (each holds its part); any layout can read it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, in this process or in one that it starts for each rank."""
    args = PARSER.parse_args(arguments)
    if args.megatron is None or (args.hf is None and args.checkpoint is None):
        PARSER.error("the following arguments are required: --hf or --checkpoint, and --megatron")
    return ranks.run_in_layout(convert, args, "megatron_oprd.commands.convert", arguments)


def convert(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say, in one process of the layout."""
    import torch

    from megatron_oprd.checkpoint.megatron_format import save_model
    from megatron_oprd.checkpoint.megatron_lm_write import save_megatron_lm
    from megatron_oprd.checkpoint.weights import check_weights, load_weights, weights_dtype
    from megatron_oprd.hf.config import read_model_spec
    from megatron_oprd.models.build import build_model
    from megatron_oprd.runtime.files import check_new_folder

    weights = args.checkpoint or args.hf
    with _model_files(args.hf, args.checkpoint) as source:
        spec = read_model_spec(source)
        check_weights(weights, spec)
        check_new_folder(args.megatron)
        dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else weights_dtype(weights)
        topology = ranks.start_topology(args.tensor, args.pipeline)
        model = build_model(spec, topology, dtype)
        load_weights(model, weights, spec, topology)
        if args.format == "megatron-lm":
            save_megatron_lm(model, args.megatron, spec, topology, source=args.hf or weights)
        else:
            save_model(model, args.megatron, spec, topology, source=source)
    if topology.rank == 0:
        name = str(dtype).removeprefix("torch.")
        print(f"written: {args.megatron} ({spec.architecture}, {spec.num_layers} layers, {name})")
    return 0


@contextlib.contextmanager
def _model_files(hf: str | None, checkpoint: str | None) -> Iterator[str]:
    """Yield a folder with config.json and tokenizer of the model: `hf`, or what a checkpoint has in place of it.

    If `hf` has no config.json, the arguments of a Megatron-LM checkpoint give one.
    """
    from megatron_oprd.checkpoint.megatron_lm import is_megatron_lm, iteration_folder, open_model
    from megatron_oprd.hf.companions import config_with_dtype, copy_companions
    from megatron_oprd.runtime.files import write_json
    from megatron_oprd.types import UserError

    if checkpoint is None or not is_megatron_lm(checkpoint):
        yield hf or str(checkpoint)
        return
    saved = iteration_folder(checkpoint) / "tokenizer"  # Megatron-LM and Megatron-Bridge can save one
    tokenizer = hf or (str(saved) if saved.is_dir() else None)
    if tokenizer is None:
        raise UserError(
            f"--checkpoint {checkpoint} has no tokenizer; name the Hugging Face folder of its model with --hf"
        )
    if not Path(tokenizer).is_dir():
        raise UserError(f"--hf {tokenizer} is not a folder; name one with the tokenizer of {checkpoint}")
    if (Path(tokenizer) / "config.json").exists():
        yield tokenizer
        return
    stored = open_model(checkpoint)
    if stored.arguments is None:
        raise UserError(
            f"{stored.folder} stores no arguments of its model; name a folder with its config.json with --hf"
        )
    config = stored.arguments.hf_config(stored.padded_vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        copy_companions(tokenizer, folder)
        write_json(Path(folder) / "config.json", config_with_dtype(config, stored.dtype))
        yield folder


if __name__ == "__main__":
    run_command(main)
