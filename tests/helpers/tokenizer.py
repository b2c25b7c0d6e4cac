"""Tokenizers for tests, made offline: a tiny byte-level one, and the genuine Qwen one from its published ranks."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[3] / "shared"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(*, chat: str | None = None, bos: bool = False) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per byte (ids 0..255) and special tokens 256..258.

    With `bos`, plain text begins with <|endoftext|>.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 256)]
        )
    names = {"bos_token": SPECIAL[0]} if bos else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], **names)
    wrapped.chat_template = chat
    return wrapped


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Return the genuine Qwen byte-level BPE with its chat template, built once; skip the test if that fails."""
    folder = Path(tempfile.gettempdir()) / f"megatron_oprd-qwen-tokenizer-{os.getuid()}"
    if not (folder / "tokenizer.json").is_file():
        _build_qwen(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _build_qwen(folder: Path) -> None:
    tool = SHARED / "tools" / "make_qwen_tokenizer.py"
    if not tool.is_file():
        pytest.skip(f"no {tool} to build the genuine Qwen tokenizer with")
    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, "dashscope"]
        try:
            subprocess.run(download, check=True, capture_output=True, timeout=120)
            wheel = next(Path(work).glob("dashscope*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                ranks = archive.extract("dashscope/resources/qwen.tiktoken", work)
        except (subprocess.SubprocessError, StopIteration, KeyError, OSError) as error:
            pytest.skip(f"the wheel dashscope, which has Qwen's ranks, cannot be had: {type(error).__name__}")
        made = Path(work) / "tokenizer"
        subprocess.run([sys.executable, str(tool), ranks, str(made)], check=True, capture_output=True, timeout=120)
        folder.mkdir(exist_ok=True)
        moving = folder / f".tokenizer.json-{os.getpid()}"
        shutil.copy(made / "tokenizer.json", moving)
        moving.replace(folder / "tokenizer.json")
