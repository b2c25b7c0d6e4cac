"""Remove the markup of chat templates from the prompts and answers that a run has stored as rendered text."""

from __future__ import annotations

import re

_ROLES = "system|developer|user|assistant|model|human|tool"
# A header that begins a turn, with its role: of ChatML, Llama 3, Gemma, and of Phi, DeepSeek and their likes.
_HEADERS = re.compile(
    rf"<\|im_start\|>(?P<chatml>{_ROLES})\n"
    rf"|<\|start_header_id\|>(?P<llama>{_ROLES})<\|end_header_id\|>\s*"
    rf"|<start_of_turn>(?P<gemma>{_ROLES})\n"
    rf"|<[|\uff5c](?P<tag>{_ROLES})[|\uff5c]>\n?",
    re.IGNORECASE,
)
_INSTRUCTION = re.compile(r"\[INST\](.*?)\[/INST\]", re.DOTALL)  # Llama 2, Mistral
_INSTRUCTION_SYSTEM = re.compile(r"<<SYS>>.*?<</SYS>>\s*", re.DOTALL)
_SPECIAL = re.compile(r"<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")


def question(prompt: str) -> str:
    """Return the last message of the user in a rendered prompt, or the complete text of an unknown template."""
    headers = list(_HEADERS.finditer(prompt))
    ends = [header.start() for header in headers[1:]] + [len(prompt)]
    turns = [(_role(header), prompt[header.end() : end]) for header, end in zip(headers, ends, strict=False)]
    questions = [text for role, text in turns if role in ("user", "human")]
    if not questions:
        questions = [_INSTRUCTION_SYSTEM.sub("", text) for text in _INSTRUCTION.findall(prompt)]
    return answer(questions[-1] if questions else prompt)


def answer(response: str) -> str:
    """Return a response without special tokens such as `<|im_end|>`."""
    return _SPECIAL.sub("", response).strip()


def _role(header: re.Match[str]) -> str:
    return next(role for role in header.groupdict().values() if role is not None).lower()
