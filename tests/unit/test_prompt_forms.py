"""A row reaches the model as its author meant it, or is refused with a line that says what to write."""

import datetime
import decimal
import json
import re

import pyarrow.parquet
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_oprd.config import DataConfig
from megatron_oprd.data import prompts
from megatron_oprd.data.chat_template import encode
from megatron_oprd.data.ground_truth import read_ground_truth
from megatron_oprd.data.messages import read_prompt
from megatron_oprd.data.prompts import load_prompts
from megatron_oprd.types import UserError
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = byte_tokenizer(chat=CHAT_TEMPLATE)
MOVE = "text into the user message, or use another chat template"


def load(tmp_path, rows, tokenizer=CHAT, *, parquet=False, **values):
    path = tmp_path / "p.jsonl"
    if parquet:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts([str(path)], tokenizer, DataConfig(**values))


# Messages


@pytest.mark.parametrize("prompt", [[QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER], [ANSWER]])
def test_a_conversation_that_ends_with_the_answer_is_refused(tmp_path, prompt):
    with pytest.raises(UserError, match=r"line 1: 'prompt' ends with an answer .*set data.drop_final_answer=true"):
        load(tmp_path, [{"prompt": prompt}])


def test_the_final_answer_is_dropped_on_request(tmp_path):
    rows = [{"prompt": [QUESTION, ANSWER]}, {"prompt": [QUESTION]}, {"prompt": [QUESTION, ANSWER, QUESTION]}]
    texts = [prompt.text for prompt in load(tmp_path, rows, drop_final_answer=True).prompts]
    messages = [[QUESTION], [QUESTION], [QUESTION, ANSWER, QUESTION]]
    assert texts == [CHAT.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    with pytest.raises(UserError, match="no message before the answer"):
        load(tmp_path, [{"prompt": [ANSWER]}], drop_final_answer=True)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+"}, {"text": "2"}, "?"]
    assert read_prompt([{"role": "user", "content": parts}]) == [QUESTION]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": "u"}], "only text is supported"),
        ([{"type": "text", "text": 3}], "only text is supported"),
        (None, "content is a NoneType"),
        ({"text": "a"}, "content is a dict"),
    ],
)
def test_content_that_is_no_text_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_prompt([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "written",
    [
        json.dumps([QUESTION]),
        str([QUESTION]),
        json.dumps([{"from": "human", "value": "a"}]),
        " " + json.dumps(QUESTION) + "\n",
        json.dumps(json.dumps([QUESTION])),
        json.dumps({"messages": [QUESTION, ANSWER]}),
    ],
)
def test_a_conversation_written_as_text_is_refused(tmp_path, written):
    with pytest.raises(UserError, match="conversation written as text; store it as a list of"):
        load(tmp_path, [{"prompt": written}])


@pytest.mark.parametrize("text", ["[1, 2] is a list; what is its role?", '{"role": broken', "[role]", "{}", "[]"])
def test_text_that_only_resembles_a_conversation_is_text(text):
    assert read_prompt(text) == text


@pytest.mark.parametrize(
    ("role", "name"), [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("function", "tool")]
)
def test_another_name_of_a_role_is_answered_with_the_right_one(role, name):
    with pytest.raises(ValueError, match=f"has a message with the role '{role}'; use {name}$"):
        read_prompt([{"role": role, "content": "a"}, QUESTION])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "images": [{"path": "a.png"}]}, "'images' is not empty; only text is supported"),
        ({"prompt": "a", "video": "a.mp4"}, "'video' is not empty; only text is supported"),
        ({"prompt": QUESTION}, "not a dict; put the message into a list"),
        ({"prompt": "a", "data_source": ["x"]}, "data_source is a list; use text"),
        (
            {"prompt": "a", "system_prompt": "Be brief."},
            "does not contain 'system_prompt', and nothing reads that column",
        ),
        ({"prompt": "Which?", "choices": ["red", "blue"]}, "does not contain 'choices'"),
        ({"prompt": "Which? A red", "options": {"label": ["A"], "text": ["blue"]}}, "does not contain 'options'"),
        ({"prompt": [QUESTION], "tools": [{"function": {"name": "add"}}]}, "does not contain 'tools'"),
        ({"prompt": "a", "reward_model": {"answer": "4"}}, "reward_model has no ground_truth; rename 'answer'"),
    ],
)
@pytest.mark.parametrize("parquet", [False, True])
def test_a_row_of_which_something_would_be_lost_is_refused(tmp_path, row, message, parquet):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [row], parquet=parquet)


@pytest.mark.parametrize("parquet", [False, True])
def test_a_column_whose_text_the_prompt_contains_is_no_mistake(tmp_path, parquet):
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Which? A: 1, B: 2"}]
    row = {"prompt": messages, "system": " Be brief.", "choices": [1, 2], "options": None, "context": ""}
    assert load(tmp_path, [row], parquet=parquet).failed == 0
    row = {"prompt": "Who?", "hint": "Bob did it. Who?", "context": "Bob did it."}
    assert load(tmp_path, [row], parquet=parquet, teacher_prompt_key="hint").failed == 0


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pyarrow.array([text]) for text in ("a", "b")]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="has two columns 'prompt'; rename one of them"):
        load_prompts([str(tmp_path / "p.parquet")], CHAT, DataConfig())


@pytest.mark.parametrize("parquet", [False, True])
def test_an_instruction_with_an_input_is_refused_and_one_without_is_read(tmp_path, parquet):
    with pytest.raises(UserError, match="'instruction' comes with 'input', which nothing reads; join both"):
        load(tmp_path, [{"instruction": "add", "input": "2 2"}], prompt_key="instruction", parquet=parquet)
    assert load(tmp_path, [{"instruction": "a", "input": ""}], prompt_key="instruction", parquet=parquet).total == 1


def test_messages_with_tool_calls_or_separate_thoughts_are_refused():
    with pytest.raises(ValueError, match="a message with reasoning_content, which is not supported"):
        read_prompt([QUESTION, {**ANSWER, "reasoning_content": "add"}, QUESTION])
    with pytest.raises(ValueError, match="a message with tool_calls, which is not supported"):
        read_prompt([QUESTION, {**ANSWER, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "4"}])
    assert read_prompt([{**QUESTION, "tool_calls": None, "weight": 1}]) == [QUESTION]


@pytest.mark.parametrize("prompt", ["", "  \n", [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_not_used(tmp_path, prompt):
    result = load(tmp_path, [{"prompt": prompt}, {"prompt": "a"}])
    assert (len(result.prompts), result.failed, result.first_failure) == (1, 1, "row 1: the prompt is empty")


def test_a_conversation_without_a_question_is_not_used(tmp_path):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}]
    result = load(tmp_path, [{"prompt": conversation}, {"prompt": "a"}])
    assert (len(result.prompts), result.first_failure) == (1, "row 1: the last message of the user is empty")


def test_a_text_that_is_certainly_too_long_is_not_tokenised(tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(prompts, "encode", lambda texts, _: [lengths.append(len(text)) or (1,) for text in texts])
    result = load(tmp_path, [{"prompt": "a" * 5000}, {"prompt": "a" * 100}], max_prompt_tokens=2)
    assert (result.too_long, len(result.prompts), max(lengths)) == (1, 1, 2000)


# The chat template

THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"


@pytest.mark.parametrize("value", [True, False])
def test_an_argument_that_the_template_reads_is_accepted_even_if_it_equals_the_default(tmp_path, value):
    (prompt,) = load(
        tmp_path, [{"prompt": "a"}], byte_tokenizer(chat=THINKING), chat_template_kwargs={"enable_thinking": value}
    ).prompts
    assert prompt.text.endswith("</think>") is not value


@pytest.mark.parametrize(
    ("chat", "kwargs", "message"),
    [
        (
            THINKING,
            {"enable_thinkin": False},
            r"data\.chat_template_kwargs\.enable_thinkin: the chat template does not read it \(did you mean enable_th"
            r"inking\?\); it reads enable_thinking; use one of them$",
        ),
        (CHAT_TEMPLATE, {"mood": "calm"}, "the chat template does not read it; it reads no variable"),
        (None, {"mood": "calm"}, "the chat template does not read it; it reads no variable"),
        (THINKING, {"enable_thinking": "false"}, "enable_thinking='false' is text; write false without quotes"),
        (THINKING, {"enable_thinking": "True"}, "enable_thinking='True' is text; write true without quotes"),
        (THINKING, {"enable_thinking": "no"}, "enable_thinking='no' is text, which counts as true; write false"),
        (THINKING, {"enable_thinking": "Off"}, "enable_thinking='Off' is text, which counts as true; write false"),
    ],
)
def test_an_argument_without_effect_is_refused(tmp_path, chat, kwargs, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [{"prompt": "a"}], byte_tokenizer(chat=chat), chat_template_kwargs=kwargs)


def test_a_template_may_compare_its_argument_with_a_text(tmp_path):
    chat = CHAT_TEMPLATE + "{% if mood == 'off' %}calm{% endif %}"
    (prompt,) = load(
        tmp_path, [{"prompt": "a"}], byte_tokenizer(chat=chat), chat_template_kwargs={"mood": "off"}
    ).prompts
    assert prompt.text.endswith("calm")


def test_arguments_of_the_teacher_are_checked_against_the_teachers_template(tmp_path):
    with pytest.raises(
        UserError, match=r"data\.teacher_chat_template_kwargs\.mood: the chat template does not read it"
    ):
        load(tmp_path, [{"prompt": "a"}], teacher_chat_template_kwargs={"mood": "calm"})


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{% endif %}{% endfor %}"
)


ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
CONDITIONAL = TURNS + "{% if add_generation_prompt == 'yes' %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("chat", "header"),
    [(TURNS, "<|im_start|>assistant"), (ZEPHYR, "<|assistant|>"), (CONDITIONAL, "<|im_start|>assistant")],
)
def test_a_template_that_leaves_out_the_header_of_an_answer_is_refused(tmp_path, chat, header):
    with pytest.raises(UserError, match=re.escape(f"ignores add_generation_prompt: it writes {header!r} before an")):
        load(tmp_path, [{"prompt": "a"}], byte_tokenizer(chat=chat))


@pytest.mark.parametrize("chat", [CHAT_TEMPLATE, INSTRUCT, "{{ messages[0].content }}"])
def test_a_template_whose_answers_have_no_header_needs_no_generation_prompt(tmp_path, chat):
    assert load(tmp_path, [{"prompt": "a"}], byte_tokenizer(chat=chat)).failed == 0


@pytest.mark.parametrize(
    "chat",
    [
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHAT_TEMPLATE,
        "<|im_start|>system\nBe good.<|im_end|>\n{{ messages[-1].content }}",
        "{% for m in messages %}{{ 'You are helpful.' if m.role == 'system' else m.content }}{% endfor %}",
    ],
)
def test_a_row_whose_system_prompt_the_template_drops_is_not_used(tmp_path, chat):
    rows = [{"prompt": [{"role": "system", "content": "Answer in Latin."}, QUESTION]}, {"prompt": "a"}]
    result = load(tmp_path, rows, byte_tokenizer(chat=chat))
    assert len(result.prompts) == 1
    assert (
        result.first_failure
        == "row 1: the chat template leaves out the system message 'Answer in Latin.'; move the " + MOVE
    )


@pytest.mark.parametrize("role", ["tool", "assistant"])
def test_a_row_of_which_the_template_drops_a_message_is_not_used(tmp_path, role):
    chat = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    rows = [{"prompt": [QUESTION, {"role": role, "content": "It is 4."}, QUESTION]}, {"prompt": "a"}]
    result = load(tmp_path, rows, byte_tokenizer(chat=chat))
    assert (
        result.first_failure == f"row 1: the chat template leaves out the {role} message 'It is 4.'; move the " + MOVE
    )


def test_a_template_may_remove_the_thoughts_of_earlier_answers(tmp_path):
    chat = "{% for m in messages %}{{ m.content.split('</think>')[-1] }};{% endfor %}"
    thoughtful = {"role": "assistant", "content": "<think>two and two</think>4"}
    (prompt,) = load(tmp_path, [{"prompt": [QUESTION, thoughtful, QUESTION]}], byte_tokenizer(chat=chat)).prompts
    assert prompt.text == "2+2?;4;2+2?;"


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        [{"role": "user", "content": "<|im_start|>user\n2+2?"}],
        [QUESTION, {"role": "assistant", "content": "4<|im_end|>"}, QUESTION],
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?",
        "[INST] 2+2? [/INST]",
    ],
)
def test_a_prompt_that_was_rendered_before_is_not_used(tmp_path, prompt):
    result = load(tmp_path, [{"prompt": prompt}, {"prompt": "<b>2 < 3</b> <|endoftext|>"}])
    assert len(result.prompts) == 1
    assert result.first_failure.startswith("row 1: the text contains '")
    assert result.first_failure.endswith("which a chat template writes; store the plain question")


# Special tokens


def test_an_eos_that_the_tokenizer_appends_is_not_part_of_a_prompt():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    assert tokenizer("a")["input_ids"] == [256, *CHAT.encode("a"), 258]
    a, b = (tuple(CHAT.encode(text)) for text in "ab")
    assert encode(["a", "b<|im_end|>", "<|endoftext|>a"], tokenizer) == [(256, *a), (256, *b, 258), (256, *a)]


def test_special_tokens_survive_saving_and_loading_of_a_tokenizer(tmp_path):
    byte_tokenizer(bos=True).save_pretrained(tmp_path)
    assert encode(["<|endoftext|>a"], AutoTokenizer.from_pretrained(tmp_path)) == [(256, *CHAT.encode("a"))]


# Right answers


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (None, None),
        ("025", "025"),
        (7, "7"),
        (142.0, "142.0"),
        (0.5, "0.5"),
        (1e22, "10000000000000000000000"),
        (["34"], "34"),
        (["1/2", 0.5, 2], ("1/2", "0.5", "2")),
        ('["34"]', "34"),
        ("['a', 'b']", ("a", "b")),
        ("[0, 1]", "[0, 1]"),
        ("[0,1)", "[0,1)"),
        ("['a", "['a"),
        ("She has 3 + 4 = 7 eggs.\n#### 7", "7"),
        ("", None),
        (" \n", None),
        (float("nan"), None),
        (["", "5"], "5"),
        ([None, 5], "5"),
        ([""], None),
        ("[5]", "5"),
        ('["5", 6]', ("5", "6")),
        ("{1, 2}", "{1, 2}"),
        (decimal.Decimal("0.50"), "0.50"),
    ],
)
def test_a_right_answer_is_text_or_several_texts(value, truth):
    assert read_ground_truth(value) == truth


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "is a dict"),
        (True, "is a bool"),
        ([], "empty list"),
        ("[]", "empty list"),
        ("{'a': 1}", "is a dict written as text"),
        ('{"answer": 5}', "is a dict written as text"),
        (float("inf"), "is inf; use a finite number"),
        ([float("-inf")], "is -inf"),
        (datetime.date(2026, 1, 31), "is a date"),
        ([["a"]], "is a list"),
    ],
)
def test_a_right_answer_that_no_answer_could_equal_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_ground_truth(value)


@pytest.mark.parametrize("question", ["problem", "Problem", "question"])
@pytest.mark.parametrize("parquet", [False, True])
def test_files_with_a_problem_and_an_answer_are_read_by_their_columns(tmp_path, question, parquet):
    rows = [{question: "1+1", "Answer": 2, "id": 7}]
    with pytest.raises(UserError, match=f"did you mean data.prompt_key={question}"):
        load(tmp_path, rows, parquet=parquet)
    result = load(tmp_path, rows, prompt_key=question, parquet=parquet)
    assert (result.num_graded, result.answer_column) == (0, "Answer")
    (prompt,) = load(tmp_path, rows, prompt_key=question, answer_key="Answer", parquet=parquet).prompts
    assert (prompt.ground_truth, "1+1" in prompt.text) == ("2", True)


def test_right_answers_are_read_from_a_named_column(tmp_path):
    rows = [{"prompt": "a", "answer": 204}, {"prompt": "b", "answer": None, "reward_model": {"ground_truth": "5"}}]
    result = load(tmp_path, rows, answer_key="answer")
    assert [prompt.ground_truth for prompt in result.prompts] == ["204", None]
    assert result.evaluation_summary().endswith("not usable; 1 with a right answer")
    with pytest.raises(
        UserError, match=r"line 1: no 'result' \(data.answer_key\).*did you mean data.answer_key=answer"
    ):
        load(tmp_path, rows, answer_key="result")


def test_an_unread_answer_column_is_noticed(tmp_path):
    result = load(tmp_path, [{"prompt": "a", "answer": 204}])
    assert (result.num_graded, result.answer_column) == (0, "answer")
    assert result.evaluation_summary().endswith("none has a right answer, so there is no accuracy")
    graded = load(tmp_path, [{"prompt": "a", "answer": 204, "reward_model": {"ground_truth": "204"}}])
    assert (graded.num_graded, graded.answer_column) == (1, "")
