"""Two byte-level tokenizers that split answers differently, for the pair with unlike tokenizers.

Tokens of two tokenizers can be aligned only if their bytes are known. The bytes of the demo's own tokens are not.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.demo.tokenizer import EOS_TOKEN, PAD_TOKEN, SYMBOLS, UNKNOWN_TOKEN

ANSWER_WIDTH = len("   1998")  # wider than the demo's, for a token of three spaces
DIGITS, SPACE = "0123456789", "Ġ"  # Ġ: how the byte-level alphabet writes a space
END_OF_TEXT, END_OF_TURN, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"
# Three spaces are one token, whatever follows. Digits stay alone: to say two at once, a model has to find the second
# before it has written the first, which a tiny one hardly learns; and its student would not be told about the second.
GROUPS = r" {3}"
MERGES = ((SPACE, SPACE), (2 * SPACE, SPACE))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_student_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per symbol, the ids of the demo's tokenizer and no chat template."""
    vocabulary = {symbol.replace(" ", SPACE): index for index, symbol in enumerate(SYMBOLS)}
    tokenizer = _byte_level(vocabulary, [], [PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN])
    return _wrap(tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, unk_token=UNKNOWN_TOKEN)


def build_teacher_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per symbol, and single tokens for two and for three spaces.

    The chat template ends a turn with another token than the EOS, as Phi-4-mini's does.
    """
    special = [END_OF_TEXT, END_OF_TURN, USER, ASSISTANT]
    tokens = [*special, *DIGITS, "+", "=", SPACE, *(first + second for first, second in MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    wrapped = _wrap(_byte_level(vocabulary, list(MERGES), special), pad_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    groups = pre_tokenizers.Split(Regex(GROUPS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [groups, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _wrap(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, clean_up_tokenization_spaces=False, **tokens
    )
