"""Load a tokenizer from a local Hugging Face folder, check it against a model, compare and identify tokenizers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import GET_LFS_FILE, check_model_folder, is_lfs_pointer
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: str | Path) -> bool:
    """Return True if the folder has a tokenizer file, even if other tokenizer files are missing."""
    return any((Path(folder) / name).exists() for name in (*_VOCABULARY_FILES, "tokenizer_config.json"))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder. Nothing is downloaded, and no code of the folder runs.

    Raises UserError, which names the folder, if files are missing or broken.
    """
    folder = Path(folder)
    check_model_folder(folder)
    # From a config.json alone, transformers builds a tokenizer without tokens and without a warning.
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"no tokenizer in {folder}: copy the tokenizer files (tokenizer.json, tokenizer_config.json) there"
        )
    pointer = next((name for name in _VOCABULARY_FILES if is_lfs_pointer(folder / name)), None)
    if pointer is not None:
        raise UserError(f"{folder / pointer} is a pointer of Git LFS", GET_LFS_FILE)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # some invalid settings raise only now
    except Exception as error:  # the parsers raise exceptions of any class
        reason = error_line(error)
        raise UserError(f"the tokenizer files in {folder} cannot be read: {reason}; copy them again") from None
    if not tokenizer.get_vocab():
        raise UserError(f"the tokenizer in {folder} has no tokens: its vocabulary file is empty; copy it again")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, model: str = "the model") -> None:
    """Raise UserError if the tokenizer has an id for which the model has no embedding.

    `model`: the name of the model in the message.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= spec.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path or '(unnamed)'} has ids up to {largest}, but {model} "
            f"({spec.architecture}) has a vocabulary of {spec.vocab_size}: use the tokenizer that belongs to the model"
        )


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Return True if every id means the same token in both.

    One tokenizer may have added tokens (`<think>`) at ids that the other does not use, as releases of one model family
    do.
    """
    ids, other_ids = first.get_vocab(), second.get_vocab()
    added = first.get_added_vocab().keys() | second.get_added_vocab().keys()
    if {token for token in ids.keys() ^ other_ids.keys() if token not in added}:
        return False
    tokens = {index: token for token, index in ids.items()}
    return all(
        ids.get(token, index) == index and tokens.get(index, token) == token for token, index in other_ids.items()
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of a tokenizer and its chat template: `sha256:` and 64 hexadecimal digits.

    The hash depends on how the tokenizer works, not on its files. Raises UserError for a tokenizer without a Rust
    backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer in {tokenizer.name_or_path or '(unnamed)'} is no fast one; add tokenizer.json")
    pipeline = json.loads(backend.to_str())
    for setting in ("padding", "truncation"):  # set by the last call; they do not belong to the tokenizer
        pipeline.pop(setting, None)
    text = json.dumps([pipeline, tokenizer.chat_template], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
