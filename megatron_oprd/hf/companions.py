"""Write the files beside the weights of a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.runtime.files import read_json, write_json

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "sentencepiece*",
    "spiece.model",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates",
    "LICENSE*",
)


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer, generation config, chat templates and licence. Raises OSError.

    config.json is not copied, because it contains the dtype of the weights.
    """
    source, target = Path(source), Path(target)
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def add_end_tokens(folder: Path, config: dict[str, Any], eos_token_ids: Sequence[int]) -> None:
    """Add token ids to `eos_token_id` in the generation_config.json of a folder. Raises OSError and UserError.

    Without that file, transformers takes the id of `config`, the content of config.json.
    """
    if not eos_token_ids:
        return
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    written = (values or config).get("eos_token_id")
    before = written if isinstance(written, list) else [] if written is None else [written]
    ids = list(dict.fromkeys([*before, *eos_token_ids]))
    if ids != before:
        write_json(path, {**values, "eos_token_id": ids[0] if len(ids) == 1 else ids})


def config_with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json with the dtype of the weights.

    The key is `torch_dtype` if only that one is present, as in transformers 4, else `dtype`.
    """
    text = config.get("text_config")
    if isinstance(text, dict) and {"dtype", "torch_dtype"} & text.keys():
        config = {**config, "text_config": config_with_dtype(text, dtype)}
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}
