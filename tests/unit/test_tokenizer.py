"""A tokenizer that is missing, broken or from another model raises an error of one line."""

import dataclasses

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer, same_vocabulary
from megatron_oprd.types import UserError
from tests.helpers.specs import tiny_spec
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer, qwen_tokenizer

SPEC = tiny_spec(vocab_size=259)


def test_a_saved_tokenizer_loads_with_its_chat_template(tmp_path):
    byte_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "naïve 中 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in"),
        ({"config.json": '{"model_type": "qwen3"}'}, "no tokenizer in"),
        ({"tokenizer.json": '{"version"'}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, r"tokenizer\.json is a pointer of Git LFS"),
        ({"tokenizer.json": "\x00\x01"}, "cannot be read"),
    ],
)
def test_missing_and_broken_files_raise_an_error_that_names_the_folder(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named_and_never_looked_up_on_the_hub():
    with pytest.raises(UserError, match=r"Qwen/Qwen3-0\.6B is not a folder"):
        load_tokenizer("Qwen/Qwen3-0.6B")


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused_by_name(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    check_tokenizer(tokenizer, SPEC)  # ids 0..258
    check_tokenizer(tokenizer, dataclasses.replace(SPEC, vocab_size=1000))  # padded embeddings are fine
    with pytest.raises(UserError, match=r"ids up to 258.*vocabulary of 258") as caught:
        check_tokenizer(tokenizer, dataclasses.replace(SPEC, vocab_size=258))
    assert str(tmp_path) in str(caught.value)


def with_tokens(*tokens: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([], [], True),
        ([], ["<think>"], True),
        (["<a>"], ["<b>"], False),  # one id, two tokens
        (["<a>", "<b>"], ["<b>", "<a>"], False),  # one token, two ids
    ],
)
def test_the_same_vocabulary_gives_no_id_two_meanings(first, second, same):
    first, second = with_tokens(*first), with_tokens(*second)
    assert same_vocabulary(first, second) is same
    assert same_vocabulary(second, first) is same


def test_vocabularies_with_different_ordinary_tokens_differ():
    vocabulary = {"a": 0, "b": 1}
    small, large = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")))
        for words in (vocabulary, {**vocabulary, "c": 2})
    )
    assert same_vocabulary(small, small)
    assert not same_vocabulary(small, large)
    assert not same_vocabulary(large, small)


def test_the_genuine_qwen_tokenizer_saves_and_loads(tmp_path):
    original = qwen_tokenizer()
    original.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert same_vocabulary(original, tokenizer)
    check_tokenizer(tokenizer, dataclasses.replace(SPEC, vocab_size=151936))
