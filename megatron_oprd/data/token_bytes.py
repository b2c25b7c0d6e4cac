"""Convert token ids to bytes, and bytes to token ids. No communication.

A token can be a part of a character, so the texts of two tokenizers are compared as bytes. Two kinds of tokenizer
define the bytes of every token: byte-level BPE (GPT-2's alphabet of 256 printable characters: Qwen, Llama-3,
Phi-4-mini) and SentencePiece with byte fallback (U+2581 for a space, `<0xE4>` for a byte: Llama-2, Mistral, Gemma).
The kind is recognised by the pipeline in `tokenizer.json`, not by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_oprd.types import UserError

_SPACE_MARK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each token of a vocabulary adds to a text."""

    pieces: Mapping[int, bytes]  # id -> bytes; b"" for special tokens; ids without a token are missing
    leading_space: bool  # True if the tokenizer puts a space before every text (SentencePiece)

    def spell(self, ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
        """Return the bytes of a token sequence, and the number of bytes up to the end of each token, [tokens] int64.

        The bytes are not always valid UTF-8. Special tokens, and ids without a token (padding of an embedding), have
        no bytes.
        """
        pieces = [self.pieces.get(index, b"") for index in ids]
        text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if self.leading_space and text.startswith(b" "):
            return text[1:], np.maximum(ends - 1, 0)
        return text, ends


@dataclass(frozen=True)
class ByteEncoder:
    """A tokenizer that keeps every byte: `tokens.spell(encode(text))[0] == text`."""

    tokens: TokenBytes
    backend: Tokenizer  # without the steps that change a text: Unicode normalisation, added spaces, special tokens
    byte_ids: Mapping[int, int]  # byte that is not ASCII -> the id of its token
    not_as_text: re.Pattern[str]  # parts of a text (decoded with `surrogateescape`) that need tokens of single bytes

    def encode(self, text: bytes) -> list[int]:
        """Return the token ids of a text, without special tokens.

        Bytes that are not UTF-8 become tokens of single bytes. A byte that is not in the vocabulary is left out; only
        then does the text change.
        """
        if not text:
            return []
        if self.tokens.leading_space:
            text = b" " + text
        ids: list[int] = []
        for place, stretch in enumerate(self.not_as_text.split(text.decode("utf-8", "surrogateescape"))):
            if place % 2 == 0:
                ids += self.backend.encode(stretch, add_special_tokens=False).ids
            else:
                raw = stretch.encode("utf-8", "surrogateescape")
                ids += [self.byte_ids[byte] for byte in raw if byte in self.byte_ids]
        return ids


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the bytes of every token. Raises UserError, which names the folder, for any other kind of tokenizer."""
    return _token_bytes(tokenizer, *_pipeline(tokenizer))


def byte_encoder(tokenizer: PreTrainedTokenizerBase) -> ByteEncoder:
    """Build an encoder of bytes from a tokenizer, which stays unchanged. Raises UserError as `token_bytes` does."""
    pipeline, byte_level = _pipeline(tokenizer)
    tokens = _token_bytes(tokenizer, pipeline, byte_level)
    # A normaliser that changes bytes would move every later byte away from its place in the student's text.
    kept = [step for step in _steps(pipeline["normalizer"]) if step["type"] == "ByteLevel" or step == _MARKS_SPACES]
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(pipeline["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for added in pipeline["added_tokens"]:
        added["lstrip"] = added["rstrip"] = False  # otherwise they remove spaces
    pipeline["truncation"] = pipeline["padding"] = None
    backend = Tokenizer.from_str(json.dumps(pipeline))
    backend.encode_special_tokens = True  # special tokens in a response are ordinary text
    byte_ids = {piece[0]: index for index, piece in tokens.pieces.items() if len(piece) == 1 and piece[0] >= 0x80}
    # In SentencePiece, only byte tokens distinguish the mark itself from a space.
    not_as_text = re.compile("([\udc80-\udcff]+)" if byte_level else f"([\udc80-\udcff{_SPACE_MARK}]+)")
    return ByteEncoder(tokens, backend, byte_ids, not_as_text)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, pipeline: dict[str, Any], byte_level: bool) -> TokenBytes:
    backend = tokenizer.backend_tokenizer
    alphabet = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    pieces: dict[int, bytes] = {}
    for piece, index in backend.get_vocab(with_added_tokens=False).items():
        pieces[index] = _byte_level_piece(piece, alphabet) if byte_level else _sentencepiece_piece(piece)
    for index, added in backend.get_added_tokens_decoder().items():
        # Added tokens are matched in the text itself, before it is converted to the alphabet.
        pieces[index] = added.content.encode() if byte_level else _sentencepiece_piece(added.content)
        if added.special:
            pieces[index] = b""
    unknown = backend.token_to_id(pipeline["model"].get("unk_token") or "")
    for index in {*tokenizer.all_special_ids, unknown} - {None}:
        pieces[index] = b""
    return TokenBytes(pieces, leading_space=not byte_level and _writes_leading_space(pipeline))


def _pipeline(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], bool]:
    """Return the content of `tokenizer.json`, and True for byte-level BPE or False for SentencePiece."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline: dict[str, Any] = json.loads(backend.to_str())
        before = _steps(pipeline["normalizer"]) + _steps(pipeline["pre_tokenizer"])
        if all(any(step["type"] == "ByteLevel" for step in steps) for steps in (before, _steps(pipeline["decoder"]))):
            return pipeline, True
        marks_spaces = any(step == _MARKS_SPACES or step["type"] == "Metaspace" for step in before)
        if marks_spaces and pipeline["model"].get("byte_fallback"):
            return pipeline, False
    raise UserError(
        f"the tokenizer in {tokenizer.name_or_path or '(unnamed)'} cannot be aligned with another one: that takes a "
        "byte-level BPE or a SentencePiece model with byte fallback, such as tokenizer.json can hold; use models with "
        "such tokenizers, or with the same one"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normaliser, pre-tokenizer or decoder as a flat list."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    children = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [step for child in children for step in _steps(child)]


def _writes_leading_space(pipeline: dict[str, Any]) -> bool:
    return any(step["type"] == "Prepend" for step in _steps(pipeline["normalizer"])) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
        for step in _steps(pipeline["pre_tokenizer"])
    )


def _byte_level_piece(piece: str, alphabet: Mapping[str, bytes]) -> bytes:
    try:
        return b"".join(alphabet[character] for character in piece)
    except KeyError:  # a character outside the alphabet stands for itself, as in the decoder
        return piece.encode()


def _sentencepiece_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE_MARK, " ").encode()
