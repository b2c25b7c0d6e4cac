"""The options of `megatron-oprd prune` that choose the blocks to drop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_oprd.types import UserError


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options --drop, --layers, --share and --blocks, of which one is required, and the limits of a choice."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--drop", type=int, metavar="N", help="drop the N blocks with the lowest scores")
    group.add_argument("--layers", type=int, metavar="N", help="keep N blocks")
    group.add_argument("--share", type=float, metavar="X", help="drop this share of the blocks, like 0.2")
    group.add_argument("--blocks", metavar="LIST", help="drop these blocks, like 13,14,26; they count from 1")
    parser.add_argument(
        "--keep-first", type=int, default=1, metavar="N", help="never drop the first N blocks; default 1"
    )
    parser.add_argument("--keep-last", type=int, default=1, metavar="N", help="never drop the last N blocks; default 1")


def check_choice(args: argparse.Namespace) -> None:
    """Raise UserError for values that no model can have."""
    if args.share is not None and not 0 <= args.share < 1:
        raise UserError(f"--share {args.share:g} must be at least 0 and below 1")
    for name in ("keep_first", "keep_last"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must not be negative")
    if args.blocks is not None:
        parse_blocks(args.blocks)


def parse_blocks(text: str) -> list[int]:
    """Return the blocks of a comma-separated list, ascending. Raises UserError if they are not different numbers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--blocks {text} must be whole numbers with commas, like 13,14,26")
    blocks = sorted(map(int, parts))
    if len(set(blocks)) != len(blocks):
        raise UserError(f"--blocks {text} names a block twice; name each block once")
    return blocks


def number_to_drop(args: argparse.Namespace, depth: int) -> int:
    """Return how many of `depth` blocks are dropped. Raises UserError if the model does not have them."""
    if args.blocks is not None:
        blocks = parse_blocks(args.blocks)
        missing = next((block for block in blocks if not 1 <= block <= depth), None)
        if missing is not None:
            raise UserError(f"--blocks {args.blocks}: block {missing} does not exist; blocks go from 1 to {depth}")
        if len(blocks) == depth:
            raise UserError(f"--blocks {args.blocks} leaves no block; name fewer blocks")
        return len(blocks)
    if args.layers is not None:
        name, number = f"--layers {args.layers}", depth - args.layers
    elif args.share is not None:
        name, number = f"--share {args.share:g}", round(args.share * depth)
    else:
        name, number = f"--drop {args.drop}", args.drop
    most = min(depth - args.keep_first - args.keep_last, depth - 1)
    if not 0 <= number <= most:
        raise UserError(
            f"{name} drops {number} of {depth} blocks; between 0 and {max(most, 0)} can be dropped with "
            f"--keep-first {args.keep_first} and --keep-last {args.keep_last}"
        )
    return number


def lowest_blocks(scores: Sequence[float], number: int, keep_first: int, keep_last: int) -> list[int]:
    """Return the `number` blocks with the lowest scores, ascending and numbered from 1.

    Args:
        scores: one for each block.
        keep_first, keep_last: blocks at both ends that are never chosen.
    """
    candidates = range(1 + keep_first, len(scores) - keep_last + 1)
    return sorted(sorted(candidates, key=lambda block: scores[block - 1])[:number])
