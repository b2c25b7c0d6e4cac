"""Render prompts with a chat template, and check that the template uses what it is given."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.messages import Message
from megatron_oprd.types import UserError

FIXED_ARGUMENTS = frozenset({"conversation", "tokenize", "add_generation_prompt", "continue_final_message"})
# Headers of a question in the chat templates of well-known models.
_HEADERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "[INST]")
_PROBE = [{"role": "user", "content": "question"}]


def render_text(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return the text that the model continues: the chat template with a generation prompt.

    Plain text is one user message. Without a chat template, the result is the text itself, or the contents of all
    messages, one a line.

    Raises ValueError for messages of several roles without a chat template, for a template that leaves out a message,
    and for text that was rendered before; also raises any exception of the template.
    """
    if tokenizer.chat_template:
        messages = as_messages(prompt)
        _check_not_rendered_before(messages, tokenizer)
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs))
        _check_nothing_is_left_out(messages, text)
        return text
    if isinstance(prompt, str):
        return prompt
    if len({message["role"] for message in prompt}) > 1:
        raise ValueError(
            "a conversation of several roles needs a chat template, and the tokenizer has none; add "
            "chat_template.jinja to its folder"
        )
    return "\n".join(message["content"] for message in prompt)


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """Return a prompt as messages: plain text is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Return the token ids of rendered texts.

    A chat template writes its own special tokens; without one, the tokenizer adds its special tokens, except an EOS
    token at the end, after which no model continues. Text that starts with the BOS token does not get it twice.
    """
    if not texts:
        return []
    add_special_tokens = not tokenizer.chat_template
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    result = []
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        start = 1 if bos is not None and ids[:2] == [bos, bos] else 0
        written = 1 if text.endswith(str(tokenizer.eos_token)) else 0
        added = eos is not None and ids[-1 - written :] == [eos] * (1 + written)
        result.append(tuple(ids[start : len(ids) - added]))
    return result


def check_arguments(setting: str, kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for an argument that the program sets, that has no effect, or that is text by mistake.

    Args:
        setting: the configuration key of the arguments, for messages.
        kwargs: the arguments of the chat template.
    """
    reserved = FIXED_ARGUMENTS & kwargs.keys()
    if reserved:
        raise UserError(
            f"{setting}: {', '.join(sorted(reserved))} cannot be set, because the program sets it; leave it out"
        )
    for name, value in kwargs.items():
        if isinstance(value, str) and value.lower() in ("true", "false", "none", "null"):
            raise UserError(f"{setting}.{name}={value!r} is text; write {value.lower()} without quotes")
        if isinstance(value, str) and value.lower() in ("no", "off", "0") and _counts_as_true(name, kwargs, tokenizer):
            raise UserError(f"{setting}.{name}={value!r} is text, which counts as true; write false without quotes")
        if not _has_effect(name, value, kwargs, tokenizer):
            known = sorted(_template_variables(tokenizer))
            near = difflib.get_close_matches(name, known, n=1)
            advice = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"{setting}.{name}: the chat template does not read it{advice}; it reads "
                f"{', '.join(known) or 'no variable'}; {'use one of them' if known else 'leave it out'}"
            )


def check_generation_prompt(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Raise UserError if the chat template ignores add_generation_prompt although an answer needs a header before it.

    A template may have no header (`[INST] question [/INST] answer`). Templates that fail on the example are not judged.
    """
    if not tokenizer.chat_template:
        return
    answer = [{"role": "assistant", "content": "ANSWER"}]
    try:
        with_prompt, plain = (
            str(tokenizer.apply_chat_template(_PROBE, add_generation_prompt=flag, tokenize=False, **kwargs))
            for flag in (True, False)
        )
        answered = str(tokenizer.apply_chat_template(_PROBE + answer, tokenize=False, **kwargs))
    except Exception:  # a template is a program and may raise any exception
        return
    header = answered.removeprefix(with_prompt).partition("ANSWER")[0].strip()
    if with_prompt == plain and answered.startswith(plain) and header:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} ignores add_generation_prompt: it "
            f"writes {header!r} before an answer but not after a question; "
            "add {% if add_generation_prompt %} to its end"
        )


def _has_effect(name: str, value: Any, kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if any value of an argument changes the rendered text. The given value may equal the default."""
    if not tokenizer.chat_template:
        return False
    others = {key: other for key, other in kwargs.items() if key != name}
    candidates = (others | {name: candidate} for candidate in (value, True, False, "text"))
    plain = _examples(others, tokenizer)
    return any(_examples(given, tokenizer) != plain for given in candidates)


def _counts_as_true(name: str, kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the chat template only asks whether the argument is true, which any text is."""
    given, true, false = (_examples({**kwargs, **change}, tokenizer) for change in ({}, {name: True}, {name: False}))
    return given == true != false


def _examples(kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return three conversations as the chat template renders them with these arguments."""
    conversations: Sequence[list[Message]] = (
        _PROBE,
        [{"role": "system", "content": "rules"}, *_PROBE],
        [*_PROBE, {"role": "assistant", "content": "<think>thought</think>answer"}, *_PROBE],
    )
    texts = []
    for messages in conversations:
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
        except Exception as error:  # a template is a program and may raise any exception
            text = f"error: {error}"
        texts.append(str(text))
    return texts


def _template_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the names that the chat template reads and does not set; empty for one that jinja2 alone cannot parse."""
    import jinja2
    from jinja2 import meta

    if not tokenizer.chat_template:
        return set()
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(tokenizer.get_chat_template())
    except (jinja2.TemplateError, ValueError):
        return set()
    provided = {f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
    provided |= {"messages", "raise_exception", "strftime_now", *FIXED_ARGUMENTS}
    return meta.find_undeclared_variables(tree) - provided


def _check_nothing_is_left_out(messages: list[Message], text: str) -> None:
    for message in messages:
        # Templates may remove the thoughts of earlier answers.
        content = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
        if content.strip() not in text:
            raise ValueError(
                f"the chat template leaves out the {message['role']} message {message['content'][:40]!r}; "
                "move the text into the user message, or use another chat template"
            )


def _check_not_rendered_before(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    for token in (*_special_tokens(tokenizer, str(tokenizer.chat_template)), *_HEADERS):
        if any(token in message["content"] for message in messages):
            raise ValueError(f"the text contains {token!r}, which a chat template writes; store the plain question")


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[str, ...]:
    """Return the special tokens that a chat template writes. `chat_template` belongs to the key of the cache."""
    answered = [*_PROBE, {"role": "assistant", "content": "answer"}]
    try:
        text = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except Exception:  # a template is a program and may raise any exception
        return ()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(token for token in special | set(tokenizer.all_special_tokens) if token and token in text))
