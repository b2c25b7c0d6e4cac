"""Responses in the tokens of several tokenizers, and what each token says, by other means than the code under test."""

import functools

import sentencepiece

from tests.helpers import vocabularies
from tests.helpers.tokenizer import byte_tokenizer, qwen_tokenizer

UNKNOWN_ID = 10**6  # as of a padded embedding


@functools.cache
def tokenizer_named(name, folder):
    """Return a tokenizer of `tests/helpers/vocabularies.py` by its first name, `qwen` or `bytes`.

    `folder` is an empty folder for its files.
    """
    if name in ("qwen", "bytes"):
        return qwen_tokenizer() if name == "qwen" else byte_tokenizer()
    make = getattr(vocabularies, f"{name}_tokenizer")
    return make(folder) if name in ("llama_2", "legacy_llama_2", "gemma") else make()


def ids_of(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def gpt2_bytes():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Speller:
    """The bytes of each token id, by other means than the tested code: GPT-2's rule, or sentencepiece's own library."""

    def __init__(self, tokenizer, model=None, leading_space=False):
        self.tokenizer, self.leading_space = tokenizer, leading_space
        self.model = model and sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.special = set(tokenizer.all_special_ids)
        self.special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.piece = functools.cache(self.piece)

    @classmethod
    def of(cls, name, tokenizer, folder):
        """Return the speller of `tokenizer_named(name)`."""
        if name not in ("llama_2", "gemma"):
            return cls(tokenizer)
        vocabularies.llama_2_tokenizer(folder, {"llama_2": 1000, "gemma": 800}[name])
        return cls(tokenizer, folder / "tokenizer.model", leading_space=name == "llama_2")

    alphabet = gpt2_bytes()

    def piece(self, index):
        if index in self.special or index >= len(self.tokenizer):
            return b""
        if index in self.tokenizer.added_tokens_decoder:
            return self.tokenizer.added_tokens_decoder[index].content.encode()
        if self.model is None:
            return bytes(self.alphabet[character] for character in self.tokenizer.convert_ids_to_tokens(index))
        piece = self.model.IdToPiece(index)
        return bytes([int(piece[1:-1], 16)]) if self.model.IsByte(index) else piece.replace("▁", " ").encode()

    def prefixes(self, ids):
        """Return the bytes up to and including each token."""
        text = b"".join(map(self.piece, ids))
        skip = self.leading_space and text[:1] == b" "
        read = [b"".join(map(self.piece, ids[: end + 1])) for end in range(len(ids))]
        return [prefix[1:] if skip else prefix for prefix in read]


PARTS = (
    ["0", "7", "12", "345", "2024", "3.14159", "1,000,000", "x1"],
    [
        "def f(x):\n    return x+1\n",
        "a[i]->b;",
        "\t{",
        "}\r\n",
        "\\frac{1}{2}",
        "$x^2$",
        "==",
        "//",
        "!!!",
        "```\n\n\n",
    ],
    ["😀", "👍🏽", "👩‍👩‍👧", "🇩🇪", "\u200d", "\ufe0f", "\U0001d538", "\U0010ffff"],
    ["e\u0301", "\u0301", "a\u0308\u0323", "\u212b", "\u2126", "한", "\u1112\u1161", "ﬁ", "क़", "é", "ñ"],
    ["由此可得", "中", "数学", "ありがとう", "龘", "안녕", "Привет", "ω", "שלום"],
    [" ", "  ", "   ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r"],
    ["hello", " world", " the", "Don't", "WE'LL", "Camel", "ALLCAPS", "iPhone", "'s"],
    ["▁", "▁▁a", "<0x41>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", " <think> ", "\ufffd", "\ud83d", "\udc00", "\0"],
)


def random_text(generator):
    parts = [generator.choice(generator.choice(PARTS)) for _ in range(generator.randint(0, 7))]
    text = "".join(parts) + " " * generator.choice([0, 0, 1, 3])
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates replaced


def random_response(generator, tokenizer):
    """Return a response that was encoded, cut anywhere, disturbed, or sampled at random; with and without EOS."""
    ids = ids_of(tokenizer, random_text(generator))
    way = generator.randrange(4)
    if way == 1:
        ids = ids[: generator.randint(0, len(ids))]
    elif way == 2:
        for _ in range(generator.randint(1, 3)):
            ids.insert(generator.randint(0, len(ids)), generator.choice([*range(300), UNKNOWN_ID]))
    elif way == 3:
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randint(0, 12))]
    return ids + [tokenizer.eos_token_id] * generator.choice([0, 1])


def brute_force(said, read):
    """Return every pair of tokens that both add bytes and end at the same byte."""
    grown = [[u for u in range(len(each)) if each[u] != (each[u - 1] if u else b"")] for each in (said, read)]
    return [(t, u) for t in grown[0] for u in grown[1] if said[t] == read[u]]
