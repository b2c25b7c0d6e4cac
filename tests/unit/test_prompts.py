"""Every row of a prompt file becomes a prompt, is counted with a reason, or stops the program with its line."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_oprd.config import DataConfig
from megatron_oprd.data.prompt_files import read_rows
from megatron_oprd.data.prompts import INSTRUCTION, PromptState, load_prompts, take
from megatron_oprd.types import Prompt, UserError
from tests.helpers.tokenizer import CHAT_TEMPLATE, SHARED, byte_tokenizer, qwen_tokenizer
from tests.helpers.vocabularies import llama_3_tokenizer

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(chat=CHAT_TEMPLATE)
GRADED = {"ability": "math", "reward_model": {"ground_truth": "4", "style": "rule"}}


def config(**values) -> DataConfig:
    return DataConfig(**values)


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def texts(path: str, tokenizer=PLAIN, **values) -> list[str]:
    return [prompt.text for prompt in load_prompts([path], tokenizer, config(**values)).prompts]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


# Rendering


def test_a_string_is_one_user_message_for_a_chat_template_and_unchanged_without(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2?"}, {"prompt": user("2+2?")}])
    assert texts(path, CHAT) == ["<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"] * 2
    assert texts(path, PLAIN) == ["2+2?"] * 2


def test_the_ids_are_those_of_the_text_with_each_special_token_once(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "é"}])
    (prompt,) = load_prompts([path], CHAT, config()).prompts
    assert CHAT.decode(list(prompt.prompt_ids)) == prompt.text
    assert prompt.prompt_ids.count(257) == 2 and prompt.prompt_ids.count(258) == 1


@pytest.mark.parametrize(
    ("chat", "text"),
    [(None, "hi"), (None, "<|endoftext|>hi"), ("<|endoftext|>{{ messages[0]['content'] }}", "hi")],
)
def test_bos_comes_once(tmp_path, chat, text):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text}])
    (prompt,) = load_prompts([path], byte_tokenizer(chat=chat, bos=True), config()).prompts
    assert prompt.prompt_ids[0] == 256 and prompt.prompt_ids.count(256) == 1
    assert len(prompt.prompt_ids) == 3


def test_a_chat_template_alone_decides_on_special_tokens(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    (prompt,) = load_prompts([path], byte_tokenizer(chat="{{ messages[0]['content'] }}", bos=True), config()).prompts
    assert 256 not in prompt.prompt_ids


def test_chat_template_kwargs_reach_the_template_and_the_fixed_ones_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    tokenizer = byte_tokenizer(chat="{{ enable_thinking }} {{ messages[0]['content'] }}")
    assert texts(path, tokenizer, chat_template_kwargs={"enable_thinking": False}) == ["False hi"]
    with pytest.raises(UserError, match=r"chat_template_kwargs: tokenize cannot be set"):
        texts(path, tokenizer, chat_template_kwargs={"tokenize": True})


def test_messages_without_a_template_are_joined_if_they_share_a_role(tmp_path):
    rows = [{"prompt": user("a") + user("b")}, {"prompt": [{"role": "system", "content": "s"}, *user("u")]}]
    result = load_prompts([write_jsonl(tmp_path / "p.jsonl", rows)], PLAIN, config())
    assert [prompt.text for prompt in result.prompts] == ["a\nb"]
    assert result.failed == 1 and "row 2: a conversation of several roles" in result.first_failure


# Counting


def test_rows_that_fail_or_are_too_long_are_counted_and_the_others_keep_their_row_number(tmp_path):
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no ' + messages[0]['role']) }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    rows = [
        {"prompt": [{"role": "tool", "content": "x"}]},
        {"prompt": "good"},
        {"prompt": "long!"},
        {"prompt": ""},
        {"prompt": "\ud800"},
        {"prompt": "fine"},
    ]
    second = write_jsonl(tmp_path / "second.jsonl", [{"prompt": "last"}])
    result = load_prompts(
        [write_jsonl(tmp_path / "p.jsonl", rows), second], byte_tokenizer(chat=template), config(max_prompt_tokens=4)
    )
    assert [(p.index, p.text) for p in result.prompts] == [(1, "good"), (5, "fine"), (6, "last")]
    assert (result.total, result.too_long, result.failed) == (7, 1, 3)
    assert result.total == len(result.prompts) + result.too_long + result.failed
    assert result.first_failure == "row 1: the chat template fails: no tool"
    assert (
        result.summary() == "7 rows: 3 kept, 1 too long, 3 not usable (first: row 1: the chat template fails: no tool)"
    )


def test_the_summary_of_an_evaluation_counts_prompts_that_are_trained_on(tmp_path):
    training, held_out = (
        load_prompts([write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])], PLAIN, config())
        for texts in (("a", "b", "c"), ("c", "d", "a"))
    )
    assert held_out.evaluation_summary(training).endswith("; 2 are prompts of training, too")
    assert held_out.evaluation_summary().endswith("no accuracy")


def test_an_error_with_all_counts_is_raised_if_no_prompt_is_left(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "too long"}, {"prompt": ""}])
    with pytest.raises(UserError, match=r"p\.jsonl: 2 rows: 0 kept, 1 too long, 1 not usable.*max_prompt_tokens=3"):
        load_prompts([path], PLAIN, config(max_prompt_tokens=3))


def test_the_error_of_a_chat_template_is_the_reason(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"1 not usable .*row 1: the chat template fails: ") as caught:
        load_prompts([path], byte_tokenizer(chat="{% for %}"), config())
    assert "\n" not in str(caught.value)


# The instruction


@pytest.mark.parametrize(
    ("row", "automatic"),
    [
        ({"prompt": "2+2?"}, False),  # nothing to grade it by
        ({"prompt": "2+2?", **GRADED}, True),
        ({"prompt": "2+2?", **GRADED, "ability": "MATH"}, True),
        ({"prompt": "2+2?", **GRADED, "ability": "code"}, False),
        ({"prompt": "2+2?", **GRADED, "ability": "", "data_source": "aime2025"}, True),
        ({"prompt": "2+2?", **GRADED, "ability": None, "data_source": "trivia"}, False),
        ({"prompt": "2+2?", "ability": "math", "reward_model": {"ground_truth": None}}, False),
        ({"prompt": "2+2?", "ability": "math", "reward_model": {"ground_truth": "4", "style": "exact"}}, False),
    ],
)
def test_the_instruction_is_added_on_request_and_automatically_to_graded_mathematics(tmp_path, row, automatic):
    path = write_jsonl(tmp_path / "p.jsonl", [row])
    assert texts(path, append_instruction=True) == ["2+2?" + INSTRUCTION]
    assert texts(path, append_instruction=False) == ["2+2?"]
    assert texts(path, append_instruction="auto") == ["2+2?" + INSTRUCTION * automatic]


@pytest.mark.parametrize("append", [True, "auto"])
@pytest.mark.parametrize("prompt", ["2+2?" + INSTRUCTION, "Box it: \\boxed{{}}", user("2+2?" + INSTRUCTION)])
def test_the_instruction_is_never_added_twice(tmp_path, append, prompt):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt, **GRADED}])
    content = prompt if isinstance(prompt, str) else prompt[0]["content"]
    assert texts(path, append_instruction=append) == [content]


def test_the_instruction_goes_to_the_last_user_message(tmp_path):
    turns = [*user("first"), {"role": "assistant", "content": "yes?"}, *user("second")]
    (text,) = texts(write_jsonl(tmp_path / "p.jsonl", [{"prompt": turns, **GRADED}]), CHAT)
    assert f"second{INSTRUCTION}<|im_end|>" in text
    assert text.count(INSTRUCTION) == 1


# Reading


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_verl_columns_are_read_from_both_formats(tmp_path, write):
    row = {"prompt": user("q"), "data_source": "AIME", "extra_info": {"index": 3}, **GRADED}
    (prompt,) = load_prompts([write(tmp_path / "p", [row])], PLAIN, config()).prompts
    text = "q" + INSTRUCTION
    assert prompt == Prompt(0, tuple(PLAIN.encode(text)), text, data_source="AIME", ground_truth="4")


def test_files_may_differ_in_their_optional_columns_and_rows_in_their_types(tmp_path):
    rows = [
        {"prompt": "a", "reward_model": {"ground_truth": 142.0}},
        {"prompt": user("b"), "reward_model": {"ground_truth": 7, "style": "rule"}, "data_source": None},
        {"prompt": "c", "reward_model": {"ground_truth": "\\boxed{204}", "style": "exact"}},
        {"prompt": "d", "reward_model": None},
    ]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    second = write_parquet(tmp_path / "second.parquet", [{"prompt": "e", "reward_model": {"ground_truth": "025"}}])
    third = write_parquet(tmp_path / "third.parquet", [{"prompt": "f", "data_source": "s"}])
    prompts = load_prompts([first, second, third], PLAIN, config()).prompts
    assert [p.ground_truth for p in prompts] == ["142.0", "7", "\\boxed{204}", None, "025", None]
    assert [p.answer_style for p in prompts] == ["rule", "rule", "exact", "rule", "rule", "rule"]
    assert [p.index for p in prompts] == [0, 1, 2, 3, 4, 5]
    assert [p.data_source for p in prompts] == ["first", "first", "first", "first", "second", "s"]


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\n  \n{"prompt": "c"}')
    assert texts(str(path)) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0), "is compressed; unpack it with gunzip"),
        ("p.jsonl", gzip.compress(b'{"prompt": "a"}', mtime=0), "is compressed; unpack it with gunzip"),
        ("p.zip", b"PK\x03\x04", "is a zip archive"),
        ("p.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; get the file with"),
        ("p.jsonl", b"<!DOCTYPE html>", "is a page of the web"),
        ("p.arrow", b"ARROW1\0\0", "is an Arrow file; save it as Parquet"),
        ("p.json", b'[{"prompt": "a"}]', "is one JSON array; write one object a line: jq -c"),
        ("p.json", b'[\n  {"prompt": "a"}\n]', "is one JSON array; write one object a line: jq -c"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("p.jsonl", '{"prompt": "é"}'.encode("latin-1"), "line 1: not UTF-8 text; save the file as UTF-8"),
        ("p.csv", b"prompt,answer\na,1\n", "is a table of text; save it as JSONL or Parquet"),
        ("p.jsonl", b'{"prompt": "a"},\n', "line 1: not JSON .*write one object a line"),
        ("p.jsonl", b'{"prompt": "a",}\n', "line 1: not JSON .*write one object a line"),
        ("p.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r', "line 1: not JSON .*write one object a line"),
        ("p.jsonl", b'{"prompt": NaN}\n', "line 1: 'prompt' must be a string or a list"),
    ],
)
def test_a_file_of_another_format_is_refused_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(str(tmp_path / name))


def test_nested_columns_of_parquet_are_read(tmp_path):
    part = {"type": "text", "text": "q", "image_url": None}
    message = {"role": "user", "content": [part, part], "tool_calls": None, "name": None}
    path = write_parquet(tmp_path / "p.parquet", [{"prompt": [message], "images": [], "extra_info": {"a": {"b": [1]}}}])
    assert texts(path) == ["qq"]


def test_another_prompt_column_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "a"}])
    assert texts(path, prompt_key="question") == ["a"]
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: no 'prompt' .*it has: question"):
        texts(path)


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (GOOD + b"\xff\xfe\n", "line 2: not UTF-8"),
        (GOOD + b'\n{"prompt": \n', "line 3: not JSON"),
        (GOOD + b'["a"]\n', "line 2: a list; write one JSON object a line"),
        (GOOD + b"[" * 100_000, r"line 2: not JSON \(nested too deeply\)"),
        (GOOD + b'{"text": "a"}\n', "line 2: no 'prompt' .*it has: text"),
        (GOOD + b"{}\n", "line 2: no 'prompt'"),
        (
            GOOD + b'{"prompt": "a", "prompt": "b"}\n',
            "line 2: the key 'prompt' occurs twice in one object; keep one of",
        ),
        (GOOD + b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
        (GOOD + b'{"prompt": 3}\n', "line 2: 'prompt' must be a string or a list .*, not a int"),
        (GOOD + b'{"prompt": null}\n', "line 2: 'prompt' must be .*, not a NoneType"),
        (GOOD + b'{"prompt": []}\n', "line 2: 'prompt' must be .*, not an empty list"),
        (GOOD + b'{"prompt": ["a"]}\n', "line 2: 'prompt' must be .*, not a list with a"),
        (GOOD + b'{"prompt": [{"role": "user"}]}\n', "line 2: 'prompt' must be"),
        (
            GOOD + b'{"prompt": [{"role": "user", "content": 1}]}\n',
            "line 2: 'prompt' has a message whose content is a int",
        ),
        (GOOD + b'{"prompt": "a", "reward_model": {"ground_truth": {"a": 1}}}\n', "ground_truth is a dict; use text,"),
        (GOOD + b'{"prompt": "a", "reward_model": {"ground_truth": []}}\n', "ground_truth is an empty list"),
        (GOOD + b'{"prompt": "a", "reward_model": {"ground_truth": true}}\n', "ground_truth is a bool"),
        (GOOD + b'{"prompt": [{"from": "human", "value": "a"}]}\n', "rename from and value to role and content"),
        (GOOD + b'{"prompt": [{"role": "human", "content": "a"}]}\n', "the role 'human'; use user"),
        (GOOD + b'{"prompt": [{"role": "narrator", "content": "a"}]}\n', "'narrator'; use system, developer, user"),
        (GOOD + b'{"messages": [{"role": "user", "content": "a"}]}\n', "did you mean data.prompt_key=messages"),
        (GOOD + b'{"problem": "a", "answer": "4"}\n', "did you mean data.prompt_key=problem"),
        (
            GOOD + b'{"prompt": "a", "reward_model": "4"}\n',
            "line 2: reward_model is a str; store an object with the key ground_truth",
        ),
    ],
)
def test_an_error_in_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_parquet_names_the_file_and_the_row(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'prompt' must be"):
        texts(write_parquet(tmp_path / "a.parquet", [{"prompt": "a"}, {"prompt": None}]))
    with pytest.raises(UserError, match=r"b\.parquet has no column 'prompt' .*it has: text, id"):
        texts(write_parquet(tmp_path / "b.parquet", [{"text": "a", "id": 1}]))
    with pytest.raises(UserError, match=r"c\.parquet has no rows"):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "c.parquet")
        texts(str(tmp_path / "c.parquet"))
    for name, content in (("d.parquet", b""), ("e.parquet", b"PAR1 and then something else"), ("f.parquet", GOOD)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            texts(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_file_that_does_not_exist_and_a_folder_are_named(tmp_path):
    for missing in ("nowhere.jsonl", "data/nowhere.parquet", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(UserError, match=r"nowhere\S* does not exist"):
            texts(missing)
    with pytest.raises(UserError, match="is a folder"):
        texts(str(tmp_path))


def test_a_hub_name_is_loaded_from_the_hub_and_without_network_the_message_says_what_works(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"some-owner/some-set are not a file here.*name a Parquet or JSONL") as caught:
        texts("some-owner/some-set")
    assert "\n" not in str(caught.value)

    split = datasets.Dataset.from_list([{"prompt": "a", "other": 1}, {"prompt": "b", "other": 2}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"test": split}))
    assert texts("some-owner/some-set") == ["a", "b"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"x": split, "y": split}))
    with pytest.raises(UserError, match="has the splits x, y"):
        texts("some-owner/some-set")


# The teacher's prompt


def teacher_config(**values) -> DataConfig:
    return config(teacher_prompt_key="solved", **values)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("solved", ["2+2? It is 4.", user("2+2? It is 4.")])
def test_the_teachers_column_is_rendered_like_the_prompt(tmp_path, write, solved):
    tokenizer = byte_tokenizer(chat="{{ mood }}: {{ messages[0]['content'] }}<|im_end|>")
    path = write(tmp_path / "p", [{"prompt": "2+2?", "solved": solved, **GRADED}])
    values = {"chat_template_kwargs": {"mood": "calm"}}
    (prompt,) = load_prompts([path], tokenizer, teacher_config(**values)).prompts
    assert prompt.text == f"calm: 2+2?{INSTRUCTION}<|im_end|>"
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text
    assert tokenizer.decode(prompt.teacher_prompt_ids) == f"calm: 2+2? It is 4.{INSTRUCTION}<|im_end|>"
    (prompt,) = load_prompts([path], tokenizer, teacher_config(**values, append_instruction=False)).prompts
    assert tokenizer.decode(prompt.teacher_prompt_ids) == "calm: 2+2? It is 4.<|im_end|>"
    (prompt,) = load_prompts([path], tokenizer, config(**values)).prompts
    assert prompt.teacher_prompt_ids is None


def test_plain_text_for_the_teacher_gets_the_bos_token_too(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "solved": "bc"}])
    (prompt,) = load_prompts([path], byte_tokenizer(bos=True), teacher_config()).prompts
    assert (prompt.prompt_ids[0], prompt.teacher_prompt_ids[0]) == (256, 256)
    assert (len(prompt.prompt_ids), len(prompt.teacher_prompt_ids)) == (2, 3)


def test_a_row_without_a_usable_prompt_for_the_teacher_is_counted_and_the_others_keep_theirs(tmp_path):
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no ' + messages[0]['role']) }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    tool = [{"role": "tool", "content": "x"}]
    rows = [
        {"prompt": "a", "solved": "four"},
        {"prompt": "b", "solved": tool},
        {"prompt": "c", "solved": "five!"},
        {"prompt": "d", "solved": ""},
        {"prompt": tool, "solved": "yes"},
        {"prompt": "six is", "solved": "f"},
        {"prompt": "g", "solved": "\ud800"},
        {"prompt": "h", "solved": "last"},
    ]
    tokenizer = byte_tokenizer(chat=template)
    result = load_prompts([write_jsonl(tmp_path / "p.jsonl", rows)], tokenizer, teacher_config(max_prompt_tokens=4))
    kept = [(p.index, p.text, tokenizer.decode(p.teacher_prompt_ids)) for p in result.prompts]
    assert kept == [(0, "a", "four"), (7, "h", "last")]
    assert (result.total, result.too_long, result.failed) == (8, 2, 4)
    assert result.first_failure == "row 2: the teacher's prompt: the chat template fails: no tool"

    empty = write_jsonl(tmp_path / "empty.jsonl", [rows[0], rows[3]])
    result = load_prompts([empty], tokenizer, teacher_config())
    assert result.first_failure == "row 2: the teacher's prompt: the prompt is empty"
    both = write_jsonl(tmp_path / "both.jsonl", [rows[0], {"prompt": "", "solved": tool}])
    result = load_prompts([both], tokenizer, teacher_config())
    assert (result.failed, result.first_failure) == (1, "row 2: the prompt is empty")


TEACHER_CHAT = "[{{ mood }}] {{ messages[0]['content'] }}<|eot_id|>"


def test_another_tokenizer_renders_the_same_row_with_its_own_template_and_ids(tmp_path):
    teacher = llama_3_tokenizer()
    rows = [{"prompt": "2+2?", "solved": "2+2? It is 4.", **GRADED}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    kwargs = {"mood": "calm"}
    (plain,) = load_prompts([path], CHAT, config()).prompts
    (prompt,) = load_prompts([path], CHAT, config(), teacher_tokenizer=teacher).prompts
    assert (prompt.text, prompt.prompt_ids) == (plain.text, plain.prompt_ids)
    teacher_text = teacher.apply_chat_template(user(f"2+2?{INSTRUCTION}"), add_generation_prompt=True, tokenize=False)
    assert prompt.teacher_prompt_ids == tuple(teacher(teacher_text, add_special_tokens=False)["input_ids"])
    assert prompt.teacher_prompt_ids.count(teacher.bos_token_id) == 1
    (prompt,) = load_prompts([path], CHAT, teacher_config(), teacher_tokenizer=teacher).prompts
    assert f"2+2? It is 4.{INSTRUCTION}" in teacher.decode(prompt.teacher_prompt_ids)
    teacher.chat_template, student = TEACHER_CHAT, byte_tokenizer(chat=CHAT_TEMPLATE + "{{ mood }}")
    for own, mood in (({}, "calm"), ({"teacher_chat_template_kwargs": {"mood": "wild"}}, "wild")):
        values = config(chat_template_kwargs=kwargs, append_instruction=False, **own)
        (prompt,) = load_prompts([path], student, values, teacher_tokenizer=teacher).prompts
        assert teacher.decode(prompt.teacher_prompt_ids) == f"[{mood}] 2+2?<|eot_id|>"


def test_one_tokenizer_takes_other_template_arguments_for_the_teacher(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2?"}])
    tokenizer = byte_tokenizer(chat=TEACHER_CHAT)
    values = {"chat_template_kwargs": {"mood": "calm"}, "teacher_chat_template_kwargs": {}}
    (prompt,) = load_prompts([path], tokenizer, config(**values)).prompts
    texts_read = [tokenizer.decode(ids) for ids in (prompt.prompt_ids, prompt.teacher_prompt_ids)]
    assert texts_read == ["[calm] 2+2?<|eot_id|>", "[] 2+2?<|eot_id|>"]


def test_a_row_that_the_teachers_tokenizer_cannot_render_is_counted(tmp_path):
    teacher = llama_3_tokenizer()
    teacher.chat_template = (
        "{% if 'x' in messages[0]['content'] %}{{ raise_exception('no x') }}{% endif %}" + TEACHER_CHAT
    )
    rows = [{"prompt": text} for text in ("a", "x", "b" + " c d" * 9, "e")]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    limit = len(teacher("[] a<|eot_id|>", add_special_tokens=False)["input_ids"])
    result = load_prompts([path], PLAIN, config(max_prompt_tokens=max(limit, 1)), teacher_tokenizer=teacher)
    assert [prompt.index for prompt in result.prompts] == [0, 3]
    assert (result.total, result.too_long, result.failed) == (4, 1, 1)
    assert result.first_failure == "row 2: the teacher's prompt: the chat template fails: no x"


@pytest.mark.parametrize("key", ["chat_template_kwargs", "teacher_chat_template_kwargs"])
def test_template_arguments_that_the_program_sets_are_refused_by_their_key(tmp_path, key):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match=rf"^data\.{key}: tokenize cannot be set"):
        load_prompts([path], CHAT, config(**{key: {"tokenize": True}}))


def test_a_mistake_in_the_teachers_column_names_the_file_the_place_and_the_setting(tmp_path):
    good = {"prompt": "a", "solved": "b"}
    cases = [
        (write_jsonl, [good, {"prompt": "a"}], r"line 2: no 'solved' \(data\.teacher_prompt_key\); it has: prompt"),
        (write_jsonl, [good, {"solved": "b"}], r"line 2: no 'prompt' \(data\.prompt_key\); it has: solved"),
        (write_jsonl, [good, {"prompt": "a", "solved": 3}], r"line 2: 'solved' must be a string or .*, not a int"),
        (write_parquet, [{"prompt": "a"}], r"no column 'solved' \(data\.teacher_prompt_key\); it has: prompt"),
        (write_parquet, [good, {"prompt": "a", "solved": None}], r"row 2: 'solved' must be .*, not a NoneType"),
    ]
    for write, rows, message in cases:
        path = write(tmp_path / "p", rows)
        with pytest.raises(UserError, match=message) as caught:
            load_prompts([path], PLAIN, teacher_config())
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_and_the_hub_read_the_teachers_column_only_on_request(tmp_path, monkeypatch):
    import datasets

    rows = [{"prompt": "a", "solved": "b", "other": "c"}]
    read = []

    class Recording(pyarrow.parquet.ParquetFile):
        def read(self, columns):
            read.append(columns)
            return super().read(columns=columns)

    class RecordingSplit(datasets.Dataset):
        def select_columns(self, column_names):
            read.append(column_names)
            return super().select_columns(column_names)

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Recording)
    split = RecordingSplit.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split})
    for source in (write_parquet(tmp_path / "p.parquet", rows), "some-owner/some-set"):
        assert read_rows([source], config())[0].teacher_prompt is None
        assert read_rows([source], teacher_config())[0].teacher_prompt == "b"
    assert read == [["prompt"], ["prompt", "solved"]] * 2
    with pytest.raises(UserError, match=r"some-set has no column 'none' \(data\.teacher_prompt_key\)"):
        read_rows(["some-owner/some-set"], config(teacher_prompt_key="none"))


# The order


def indices(prompts) -> list[int]:
    return [prompt.index for prompt in prompts]


TEN = [Prompt(index=i, prompt_ids=(i,)) for i in range(10)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_takes_every_prompt_once_for_any_step_size(shuffle):
    taken, state = take(TEN, PromptState(), 30, seed=5, shuffle=shuffle)
    assert state == PromptState(epoch=3, position=0)
    for epoch in range(3):
        assert sorted(indices(taken[10 * epoch : 10 * epoch + 10])) == list(range(10))
    pieces, state = [], PromptState()
    for count in (3, 4, 9, 0, 14):
        piece, state = take(
            TEN, PromptState.from_dict(json.loads(json.dumps(state.to_dict()))), count, seed=5, shuffle=shuffle
        )
        pieces += piece
    assert indices(pieces) == indices(taken)


def test_the_order_depends_on_seed_and_epoch_alone():
    order = {
        (seed, epoch): indices(take(TEN, PromptState(epoch, 0), 10, seed=seed, shuffle=True)[0])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(value) for value in order.values()}) == 4
    assert order[1, 0] == list(np.random.default_rng([1, 0]).permutation(10))
    assert indices(take(TEN, PromptState(), 12, seed=0, shuffle=False)[0]) == [*range(10), 0, 1]


@pytest.mark.parametrize(("prompts", "position"), [(TEN, 10), (TEN, -1), ([], 0)])
def test_a_state_that_does_not_fit_the_prompts_is_refused(prompts, position):
    with pytest.raises(UserError, match="the prompt files have changed"):
        take(prompts, PromptState(0, position), 1, seed=0, shuffle=True)


# Real files


def real(name: str) -> str:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return str(path)


def test_all_rows_of_the_dapo_prompts_become_prompts():
    result = load_prompts([real("dapo-math-17k-boxed.parquet")], qwen_tokenizer(), config())
    assert (result.total, len(result.prompts), result.too_long, result.failed) == (17398, 17398, 0, 0)
    assert all(prompt.text.count("\\boxed{}") == 1 for prompt in result.prompts)
    assert all(prompt.data_source == "DAPO" and prompt.answer_style == "rule" for prompt in result.prompts)
    first = result.prompts[0]
    assert first.ground_truth == "162"
    assert first.prompt_ids[0] == 151644 and first.prompt_ids.count(151644) == 2
    assert first.text.endswith(INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n")


def test_the_evaluation_files_are_read_together():
    files = [real(f"eval/{name}/test.parquet") for name in ("AIME24", "AIME25", "AIMO")]
    result = load_prompts(files, qwen_tokenizer(), config())
    sources = [prompt.data_source for prompt in result.prompts]
    assert [sources.count(name) for name in ("AIME24", "AIME25", "AMC23")] == [30, 30, 83]
    assert indices(result.prompts) == list(range(143))
    assert {"025", "336^\\circ", "142.0"} <= {prompt.ground_truth for prompt in result.prompts}
    assert all(prompt.text.count("\\boxed{}") == 1 for prompt in result.prompts)
