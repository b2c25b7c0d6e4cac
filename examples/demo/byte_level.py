"""Two byte-level tokenizers that cut additions in different ways: what the pair of unlike tokenizers reads and writes.

Only tokens whose bytes are known can be aligned with those of another tokenizer; those of the demo's own are not.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.demo.tokenizer import EOS_TOKEN, PAD_TOKEN, SYMBOLS, UNKNOWN_TOKEN

ANSWER_WIDTH = len("   1998")  # wider than the demo's, for a token of three spaces
DIGITS, SPACE = "0123456789", "Ġ"  # Ġ: how the byte-level alphabet writes a space
END_OF_TEXT, END_OF_TURN, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"
# What may become one token: three spaces, and the last two digits of an answer. The other digits stay alone.
GROUPS = r"\d(?=\d*[+=]|\d\d)| {3}|\d\d(?!\d)"
# Two digits by a fifth of what they can be: were the state that chooses the last digit always in the middle of one of
# the teacher's tokens, the student would never be told about it.
MERGES = ((SPACE, SPACE), (2 * SPACE, SPACE), *((tens, ones) for tens in DIGITS for ones in "05"))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_student_tokenizer() -> PreTrainedTokenizerFast:
    """One token a symbol, with the ids of the demo's tokenizer and without a chat template, as that one."""
    vocabulary = {symbol.replace(" ", SPACE): index for index, symbol in enumerate(SYMBOLS)}
    tokenizer = _byte_level(vocabulary, [], [PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN])
    return _wrap(tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, unk_token=UNKNOWN_TOKEN)


def build_teacher_tokenizer() -> PreTrainedTokenizerFast:
    """Operands by the digit; in answers, two digits, or a space and a digit, may be one token.

    Its chat template ends a turn with another token than its EOS, as Phi-4-mini's does.
    """
    special = [END_OF_TEXT, END_OF_TURN, USER, ASSISTANT]
    tokens = [*special, *DIGITS, "+", "=", SPACE, *(first + second for first, second in MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    wrapped = _wrap(_byte_level(vocabulary, list(MERGES), special), pad_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    operand = pre_tokenizers.Split(Regex(GROUPS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [operand, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _wrap(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, clean_up_tokenization_spaces=False, **tokens
    )
