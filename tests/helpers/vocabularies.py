"""Tokenizers that cut text in other ways than Qwen's, trained on the spot in the shape of well-known ones."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_oprd.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHI_4_MINI = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI_4_MINI_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


LINES = (
    "def f(x):",
    "    return x + 1",
    "for i in range(10): print(a[i])",
    "The answer is \\boxed{42}. Hello world!",
    "x = 1234 + 5678 = 6912",
    "由此可得 数学证明 中文",
    "emoji 😀 😀 👍🏽",
    "été naïve Ωμέγα",
    "Привет мир",
)


def corpus() -> list[str]:
    """Prose, and a little code and other scripts, in lines; it stays as it is, so the vocabularies do too."""
    return [line for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()] + 20 * list(LINES)


def llama_3_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE that takes digits by threes and whole words before merges, as Llama-3's."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(LLAMA_3, 1000, special, ignore_merges=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[4])
    wrapped.chat_template = LLAMA_3_CHAT
    return wrapped


def phi_4_mini_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE whose EOS is not what ends its answers, with an ordinary added token, as Phi-4-mini's."""
    special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = _byte_level(PHI_4_MINI, 1500, special)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False, lstrip=True, rstrip=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
    wrapped.chat_template = PHI_4_MINI_CHAT
    return wrapped


def llama_2_tokenizer(folder: Path, size: int = 1000) -> PreTrainedTokenizerBase:
    """SentencePiece BPE with byte fallback and a leading space, opened from its `tokenizer.model` as a user's."""
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(size))
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": LLAMA_2_CHAT}))
    return load_tokenizer(folder)


def legacy_llama_2_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Build the same vocabulary with the pipeline of older files, where a normaliser makes the marks."""
    backend = json.loads(llama_2_tokenizer(folder).backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_normalizer(backend, [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        eos_token="</s>",
    )


def gemma_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """SentencePiece pieces without a leading space, as Gemma's."""
    backend = json.loads(llama_2_tokenizer(folder, size=800).backend_tokenizer.to_str())
    tokenizer = _with_normalizer(backend, [normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _sentencepiece_model(size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    return model.getvalue()


def _byte_level(pattern: str, size: int, special: list[str], *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _with_normalizer(pipeline: dict, steps: list[normalizers.Normalizer]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps({**pipeline, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer
