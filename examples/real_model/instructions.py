"""Write prompt files with simple instructions, from the sentences of instructions.yaml."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

SOURCE = Path(__file__).with_name("instructions.yaml")
NUM_HELD_OUT = 32


def all_instructions() -> list[str]:
    """Return every instruction once, in a fixed random order."""
    texts = [
        template.format(*(value if isinstance(value, list) else [value]))
        for group in yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
        for template in group["templates"]
        for value in group["values"]
    ]
    return random.Random(0).sample(texts, len(texts))


def write_instructions(folder: Path) -> None:
    """Write the prompt files `train.jsonl` and `heldout.jsonl`.

    Both have the same kinds of instructions, but no instruction is in both.
    """
    texts = all_instructions()
    for name, chosen in (("heldout", texts[:NUM_HELD_OUT]), ("train", texts[NUM_HELD_OUT:])):
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in chosen)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
