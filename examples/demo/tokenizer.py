"""A character tokenizer of 16 symbols in Hugging Face format: every symbol is one token, in both directions."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN = "<pad>", "<eos>", "<unk>"
SYMBOLS = (PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *"0123456789", "+", "=", " ")
PAD_ID, EOS_ID = SYMBOLS.index(PAD_TOKEN), SYMBOLS.index(EOS_TOKEN)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. No special tokens are added to a prompt, and there is no chat template."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    # Without Fuse the decoded characters are joined by spaces; Strip drops the spaces that open an answer.
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(content=" ", left=2, right=0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
