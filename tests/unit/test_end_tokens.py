"""Answers stop at every token that the model's files, its tokenizer or its chat template end an answer with."""

import json

import pytest
from transformers import GenerationConfig

from megatron_oprd.data.end_tokens import find_end_tokens
from megatron_oprd.hf.companions import add_end_tokens
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.testing.models import random_hf_model
from megatron_oprd.types import UserError
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

ENDOFTEXT, IM_END = 256, 258


def spec_of(tmp_path, config=None, generation=None):
    folder = tmp_path / "model"
    folder.mkdir()
    values = random_hf_model("Qwen3").config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return read_model_spec(folder)


def tokenizer(*, eos=None, chat=None):
    made = byte_tokenizer(chat=chat)
    made.eos_token = eos
    return made


@pytest.mark.parametrize(
    ("config", "generation", "eos", "chat", "ids"),
    [
        (None, ENDOFTEXT, "<|endoftext|>", CHAT_TEMPLATE, (ENDOFTEXT, IM_END)),  # a base model with a chat template
        (ENDOFTEXT, [IM_END, ENDOFTEXT], "<|im_end|>", CHAT_TEMPLATE, (IM_END, ENDOFTEXT)),
        (ENDOFTEXT, IM_END, None, None, (IM_END, ENDOFTEXT)),
        (None, None, "<|im_end|>", None, (IM_END,)),
        (None, None, None, CHAT_TEMPLATE, (IM_END,)),
        (ENDOFTEXT, None, None, "{{ messages[0].content }}", (ENDOFTEXT,)),
    ],
)
def test_the_end_tokens_are_the_union_of_all_sources(tmp_path, config, generation, eos, chat, ids):
    assert find_end_tokens(spec_of(tmp_path, config, generation), tokenizer(eos=eos, chat=chat), {}).ids == ids


def test_the_summary_names_tokens_and_sources(tmp_path):
    found = find_end_tokens(spec_of(tmp_path, None, ENDOFTEXT), tokenizer(eos="<|endoftext|>", chat=CHAT_TEMPLATE), {})
    assert found.summary() == "<|endoftext|> (256; model files, tokenizer), <|im_end|> (258; chat template)"


def test_a_model_whose_answers_never_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no token ends an answer of .*add it to generation_config\.json"):
        find_end_tokens(spec_of(tmp_path), tokenizer(), {})


@pytest.mark.parametrize(
    ("generation", "config", "ids", "written"),
    [
        ({"eos_token_id": 1, "top_k": 3}, {}, (1, 2), {"eos_token_id": [1, 2], "top_k": 3}),
        ({"eos_token_id": [1, 2]}, {}, (2, 1), {"eos_token_id": [1, 2]}),
        ({"top_k": 3}, {}, (2,), {"eos_token_id": 2, "top_k": 3}),
        (None, {"eos_token_id": 1}, (1, 2), {"eos_token_id": [1, 2]}),
        (None, {"eos_token_id": 1}, (1,), None),
        (None, {}, (), None),
    ],
)
def test_an_export_ends_its_answers_where_training_did(tmp_path, generation, config, ids, written):
    path = tmp_path / "generation_config.json"
    if generation is not None:
        path.write_text(json.dumps(generation))
    add_end_tokens(tmp_path, config, ids)
    assert (json.loads(path.read_text()) if path.exists() else None) == written
    if written is not None:
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == written["eos_token_id"]
