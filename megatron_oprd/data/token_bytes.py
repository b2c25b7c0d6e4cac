"""Token ids to bytes and back. A token can be part of a character, so texts of two tokenizers are compared as bytes.

Two kinds of tokenizer say exactly which bytes a token stands for: byte-level BPE (GPT-2's alphabet of 256 printable
characters: Qwen, Llama-3, Phi-4-mini) and SentencePiece with byte fallback (U+2581 for a space, `<0xE4>` for a byte:
Llama-2, Mistral, Gemma). They are told apart by the pipeline in `tokenizer.json`, not by name. No communication.
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

    pieces: Mapping[int, bytes]  # by id: b"" for special tokens; ids without a token are missing
    leading_space: bool  # whether a text is written with a space in front that is not its own (SentencePiece)

    def spell(self, ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
        """The text that a response says, not always valid UTF-8, and [tokens] int64: its bytes up to each token's end.

        Special tokens, and ids that stand for no token (the padding of an embedding), say nothing.
        """
        pieces = [self.pieces.get(index, b"") for index in ids]
        text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if self.leading_space and text.startswith(b" "):
            return text[1:], np.maximum(ends - 1, 0)
        return text, ends


@dataclass(frozen=True)
class ByteEncoder:
    """A tokenizer that reads bytes and changes none: `tokens.spell(encode(text))[0] == text`."""

    tokens: TokenBytes
    backend: Tokenizer  # without what would change the text: Unicode normalisation, spaces of its own, special tokens
    byte_ids: Mapping[int, int]  # the token of each byte that is not ASCII
    not_as_text: re.Pattern[str]  # of a text decoded with `surrogateescape`, what only tokens of single bytes can spell

    def encode(self, text: bytes) -> list[int]:
        """Token ids of a whole text on its own, as the tokenizer cuts it, without special tokens.

        Bytes that are no UTF-8 become tokens of single bytes, in place. A byte that the vocabulary does not have is
        left out, the one case in which the text changes.
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
    """The bytes of every token. Raises UserError, one line that names the folder, for any other kind of tokenizer."""
    return _token_bytes(tokenizer, *_pipeline(tokenizer))


def byte_encoder(tokenizer: PreTrainedTokenizerBase) -> ByteEncoder:
    """The tokenizer as an encoder of bytes; its own object is not changed. Raises UserError as `token_bytes`."""
    pipeline, byte_level = _pipeline(tokenizer)
    tokens = _token_bytes(tokenizer, pipeline, byte_level)
    # What a normaliser changes would put every later byte at another place than in the student's text.
    kept = [step for step in _steps(pipeline["normalizer"]) if step["type"] == "ByteLevel" or step == _MARKS_SPACES]
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(pipeline["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for added in pipeline["added_tokens"]:
        added["lstrip"] = added["rstrip"] = False  # they would swallow spaces
    pipeline["truncation"] = pipeline["padding"] = None
    backend = Tokenizer.from_str(json.dumps(pipeline))
    backend.encode_special_tokens = True  # the text of a special token is text, whoever wrote it
    byte_ids = {piece[0]: index for index, piece in tokens.pieces.items() if len(piece) == 1 and piece[0] >= 0x80}
    # SentencePiece has no other way to tell the mark itself from a space.
    not_as_text = re.compile("([\udc80-\udcff]+)" if byte_level else f"([\udc80-\udcff{_SPACE_MARK}]+)")
    return ByteEncoder(tokens, backend, byte_ids, not_as_text)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, pipeline: dict[str, Any], byte_level: bool) -> TokenBytes:
    backend = tokenizer.backend_tokenizer
    alphabet = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    pieces: dict[int, bytes] = {}
    for piece, index in backend.get_vocab(with_added_tokens=False).items():
        pieces[index] = _byte_level_piece(piece, alphabet) if byte_level else _sentencepiece_piece(piece)
    for index, added in backend.get_added_tokens_decoder().items():
        # Added tokens are cut out of the text as they are written, before any alphabet.
        pieces[index] = added.content.encode() if byte_level else _sentencepiece_piece(added.content)
        if added.special:
            pieces[index] = b""
    unknown = backend.token_to_id(pipeline["model"].get("unk_token") or "")
    for index in {*tokenizer.all_special_ids, unknown} - {None}:
        pieces[index] = b""
    return TokenBytes(pieces, leading_space=not byte_level and _writes_leading_space(pipeline))


def _pipeline(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], bool]:
    """The content of `tokenizer.json`, and whether it is byte-level BPE; if not, it is SentencePiece."""
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
        "byte-level BPE or a SentencePiece model with byte fallback, such as tokenizer.json can hold"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, without the sequences around them."""
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
    except KeyError:  # not of the alphabet: written as it is, as the decoder does
        return piece.encode()


def _sentencepiece_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE_MARK, " ").encode()
