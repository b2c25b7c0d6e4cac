"""A conversation of any form is rendered to the ids of the tokenizer's own chat template."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_oprd.config import DataConfig
from megatron_oprd.data.prompts import load_prompts
from tests.fuzz.budget import examples
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer(chat=CHAT_TEMPLATE)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
TEXTS = st.lists(TEXT, min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[object, list[dict[str, str]]]:
    """Return a prompt as a row stores it, and its messages with plain text."""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=3))
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": "".join(parts)} for number, parts in enumerate(texts)
    ]
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": "rules"})
        texts.insert(0, ["rules"])
    if len(messages) == 1 and draw(st.booleans()):
        return messages[0]["content"], messages
    as_parts = [[{"type": "text", "text": part} if draw(st.booleans()) else part for part in parts] for parts in texts]
    stored = [
        message | ({"content": parts} if draw(st.booleans()) else {})
        for message, parts in zip(messages, as_parts, strict=True)
    ]
    return stored, messages


@examples(100)
@given(conversations(), st.sampled_from(["prompt", "messages", "a.b"]))
def test_a_prompt_has_the_ids_of_the_tokenizers_own_template(conversation, column):
    stored, messages = conversation
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_text(json.dumps({column: stored}) + "\n" + json.dumps({column: "sound"}) + "\n")
        config = DataConfig(prompt_key=column, drop_final_answer=True)
        prompts = {prompt.index: prompt for prompt in load_prompts([str(path)], TOKENIZER, config).prompts}
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    has_no_question = messages[-1]["role"] == "user" and not messages[-1]["content"].strip()
    if has_no_question or not any(message["content"].strip() for message in messages):
        assert 0 not in prompts
        return
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompts[0].text == text
    assert prompts[0].prompt_ids == tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
