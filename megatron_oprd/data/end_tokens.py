"""Find the tokens with which a model ends an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.types import UserError

_ANSWER = "an answer 4b1d"  # no chat template contains this text


@dataclass(frozen=True)
class EndTokens:
    """The tokens at which generation stops, and where each one comes from."""

    sources: Mapping[int, str]  # token id -> the files or settings that name it
    tokens: Mapping[int, str]  # token id -> its text

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the token ids."""
        return tuple(self.sources)

    def summary(self) -> str:
        """Return one line for the log."""
        return ", ".join(f"{self.tokens[index]} ({index}; {source})" for index, source in self.sources.items())


def find_end_tokens(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> EndTokens:
    """Return the tokens that end an answer of a model.

    They are the union of `eos_token_id` in the model's `generation_config.json` and `config.json`, the tokenizer's EOS
    token and the special token that the chat template writes after an answer: a base model's files often lack the last.

    Raises UserError if there is none, because every answer would then run to the limit.
    """
    sources: dict[int, list[str]] = {index: ["model files"] for index in spec.eos_token_ids}
    if tokenizer.eos_token_id is not None:
        sources.setdefault(int(tokenizer.eos_token_id), []).append("tokenizer")
    of_template = _end_in_template(tokenizer, chat_template_kwargs)
    if of_template is not None:
        sources.setdefault(of_template, []).append("chat template")
    if not sources:
        raise UserError(
            f"no token ends an answer of {tokenizer.name_or_path or 'the student'}: neither generation_config.json nor "
            "config.json has an eos_token_id, the tokenizer has no eos_token, and no chat template writes one; add it "
            "to generation_config.json"
        )
    texts = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in sources}
    return EndTokens({index: ", ".join(names) for index, names in sources.items()}, texts)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
    """Return the token with which a model ends an answer.

    It is the special token that the chat template writes after an answer, otherwise the tokenizer's EOS. For many chat
    models the two differ. Raises UserError if the tokenizer has neither.
    """
    of_template = _end_in_template(tokenizer, chat_template_kwargs or {})
    found = tokenizer.eos_token_id if of_template is None else of_template
    if found is None:
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path or '(unnamed)'} has no token that ends an answer: "
            "set its eos_token or a chat template that writes one"
        )
    return int(found)


def _end_in_template(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> int | None:
    """Return the first special token that the chat template writes after an answer, or None."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    suffix = _text_after_answer(tokenizer, kwargs)
    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    return next((index for index in ids if index in special), None)


def _text_after_answer(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    if not tokenizer.chat_template:
        return ""
    conversation = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
    except Exception:  # a template for single questions may refuse an answer
        return ""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
