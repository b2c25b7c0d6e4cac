"""Read the prompt of a row: plain text, or a conversation of messages. A form that would be misread is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from megatron_oprd.data.literals import parse_literal

Message = dict[str, str]  # {"role": ..., "content": ...}
ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    **{name: name for name in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
}
_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "tools", "reasoning_content", "thinking")


def read_prompt(value: Any, *, drop_final_answer: bool = False) -> str | list[Message]:
    """Return the prompt that a cell of a prompt file contains.

    Args:
        value: text, or a list of messages {role, content}; a content may be a list of text parts.
        drop_final_answer: leave out a last message of the assistant, as training data for fine-tuning has it.

    Raises:
        ValueError: the value has another form, or a model would not see what its author meant. Says what would work.
    """
    if isinstance(value, str):
        if _is_written_conversation(value):
            raise ValueError("is a conversation written as text; store it as a list of {role, content}")
        return value
    if not isinstance(value, list):
        advice = "; put the message into a list" if _is_message(value) else ""
        raise ValueError(f"must be a string or a list of {{role, content}}, not a {type(value).__name__}{advice}")
    if not value:
        raise ValueError("must be a string or a list of {role, content}, not an empty list")
    if _is_message(value[-1]) and value[-1]["role"] == "assistant":
        if not drop_final_answer:
            raise ValueError(
                "ends with an answer of the assistant, which the student would see before it is asked; remove it or "
                "set data.drop_final_answer=true"
            )
        value = value[:-1]
        if not value:
            raise ValueError("has no message before the answer of the assistant; leave the row out")
    return [_read_message(message) for message in value]


def _read_message(value: Any) -> Message:
    if not _is_message(value):
        advice = "; rename from and value to role and content" if _is_from_value(value) else ""
        raise ValueError(f"must be a string or a list of {{role, content}}, not a list with {str(value)[:60]}{advice}")
    for key in _UNSUPPORTED:
        if value.get(key):
            raise ValueError(f"has a message with {key}, which is not supported; write it as text into content")
    role = value["role"]
    if role not in ROLES:
        instead = _OTHER_NAMES.get(str(role).lower(), ", ".join(ROLES))
        raise ValueError(f"has a message with the role {role!r}; use {instead}")
    return {"role": role, "content": _read_content(value["content"])}


def _read_content(content: Any) -> str:
    """Return the text of a message. Text parts are joined without a separator, as chat templates join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a message whose content is a {type(content).__name__}; use text or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"has a message with a part {str(part)[:60]}; only text is supported, so leave the row out"
            )
        texts.append(text)
    return "".join(texts)


def _is_message(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def _is_from_value(value: Any) -> bool:
    return isinstance(value, Mapping) and {"from", "value"} <= value.keys()


def _is_written_conversation(text: str) -> bool:
    """Return True for the JSON or Python form of a message, of a list of messages, or of an object with such a list."""
    text = text.strip()
    if not (text.startswith(("[", "{", '"')) and ("role" in text or "from" in text)):
        return False
    value = parse_literal(text)
    if isinstance(value, str) and value != text:  # written twice
        return _is_written_conversation(value)
    if isinstance(value, Mapping):
        value = value.get("messages", value.get("conversations", value))
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(_is_from_value(message) or _is_message(message) for message in messages)
