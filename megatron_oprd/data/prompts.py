"""Render the rows of prompt files to token ids, and take prompts in a resumable order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import DataConfig
from megatron_oprd.data.chat_template import as_messages, check_arguments, check_generation_prompt, encode, render_text
from megatron_oprd.data.messages import Message
from megatron_oprd.data.prompt_files import Row, read_rows
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import Prompt, UserError

INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}."
# No prompt has so many characters a token. Longer texts are not tokenised, which takes minutes for 100 MB.
_CHARACTERS_PER_TOKEN = 1000
_MATH_SOURCE = re.compile(r"math|aime|aimo|amc|gsm|olympiad", re.IGNORECASE)


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of some files, and the numbers of the other rows: total = len(prompts) + too_long + failed."""

    prompts: list[Prompt]
    total: int  # rows
    too_long: int  # rows whose prompt, for either model, is longer than data.max_prompt_tokens
    failed: int  # rows whose chat template failed, for either model, or produced no token
    first_failure: str = ""  # why the first failed row failed
    answer_column: str = ""  # a column that may contain right answers and that nothing reads

    def summary(self) -> str:
        """Return one line for the log, with all counts and the first failure."""
        reason = f" (first: {self.first_failure})" if self.failed else ""
        return (
            f"{self.total} rows: {len(self.prompts)} kept, {self.too_long} too long, {self.failed} not usable{reason}"
        )

    def evaluation_summary(self, training: PromptSet | None = None) -> str:
        """Return `summary` for prompts of an evaluation, with the number of prompts that have a right answer.

        With the prompts of `training`, also say how many of them are prompts of the evaluation.
        """
        count = self.num_graded
        graded = f"{count} with a right answer" if count else "none has a right answer, so there is no accuracy"
        trained = {prompt.prompt_ids for prompt in training.prompts} if training is not None else set()
        shared = sum(prompt.prompt_ids in trained for prompt in self.prompts)
        return f"{self.summary()}; {graded}" + (f"; {shared} are prompts of training, too" if shared else "")

    @property
    def num_graded(self) -> int:
        """Return the number of prompts with a right answer."""
        return sum(prompt.ground_truth is not None for prompt in self.prompts)


@dataclass(frozen=True)
class PromptState:
    """The position of training in the prompts, from which a run resumes."""

    epoch: int = 0
    position: int = 0  # prompts of the epoch that have been taken
    # data.group_by_teacher: prompts taken of each data_source, over all epochs; otherwise empty
    of_source: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for a checkpoint."""
        by_source = {"of_source": dict(self.of_source)} if self.of_source else {}
        return {"epoch": self.epoch, "position": self.position, **by_source}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptState:
        """Build the state from the values of `to_dict`."""
        of_source = {str(source): int(taken) for source, taken in values.get("of_source", {}).items()}
        return cls(int(values["epoch"]), int(values["position"]), of_source)


def load_prompts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptSet:
    """Read every row of the sources, render it and leave out the rows that cannot be used. No communication.

    The teacher's prompts are rendered too if they can differ from the student's: with `data.teacher_prompt_key`,
    `data.teacher_chat_template_kwargs` or a `teacher_tokenizer`.

    Args:
        sources: prompt files or names of hub data sets.
        tokenizer: the student's.
        config: the section `data`.
        teacher_tokenizer: the teacher's, with its own chat template and ids; None: the student's.

    Raises:
        UserError: a file cannot be read, a row is malformed (the message names its line), or no prompt is left.
    """
    _check_templates(tokenizer, teacher_tokenizer, config)
    rows = read_rows(sources, config)
    kwargs, longest = config.chat_template_kwargs, _CHARACTERS_PER_TOKEN * config.max_prompt_tokens
    rendered, failures = _render([row.prompt for row in rows], rows, tokenizer, kwargs, config)
    teacher_rendered: dict[int, tuple[str, tuple[int, ...]]] = {}
    teacher_failures: dict[int, str] = {}
    if config.own_teacher_prompts or teacher_tokenizer is not None:
        teacher_prompts = [row.prompt if row.teacher_prompt is None else row.teacher_prompt for row in rows]
        teacher_rendered, teacher_failures = _render(
            teacher_prompts, rows, teacher_tokenizer or tokenizer, config.teacher_kwargs, config
        )
    failures = {index: f"the teacher's prompt: {reason}" for index, reason in teacher_failures.items()} | failures
    prompts: list[Prompt] = []
    too_long = 0
    for index, row in enumerate(rows):
        if index in failures:
            continue
        text, prompt_ids = rendered[index]
        teacher_prompt_ids = teacher_rendered[index][1] if index in teacher_rendered else None
        texts = [one[index][0] for one in (rendered, teacher_rendered) if index in one]
        num_tokens = max(len(prompt_ids), len(teacher_prompt_ids or ()))
        if num_tokens > config.max_prompt_tokens or max(map(len, texts)) > longest:
            too_long += 1
        else:
            about = (text, row.data_source, row.ground_truth, row.answer_style)
            prompts.append(Prompt(index, prompt_ids, *about, teacher_prompt_ids))
    first_failure = f"row {min(failures) + 1}: {failures[min(failures)]}" if failures else ""
    result = PromptSet(prompts, len(rows), too_long, len(failures), first_failure, rows[0].answer_column)
    if not prompts:
        cures = [f"raise data.max_prompt_tokens={config.max_prompt_tokens}"] * bool(too_long)
        cure = " and ".join(cures + ["correct the rows"] * bool(failures))
        raise UserError(f"no prompt is left of {', '.join(sources)}: {result.summary()}; {cure}")
    return result


def _check_templates(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None, config: DataConfig
) -> None:
    """Raise UserError for arguments without effect and for a template that leaves out the header of an answer."""
    check_arguments("data.chat_template_kwargs", config.chat_template_kwargs, tokenizer)
    check_generation_prompt(tokenizer, config.chat_template_kwargs)
    of_teacher = tokenizer if teacher_tokenizer is None else teacher_tokenizer
    if config.teacher_chat_template_kwargs is not None:
        check_arguments("data.teacher_chat_template_kwargs", config.teacher_kwargs, of_teacher)
    if config.own_teacher_prompts or teacher_tokenizer is not None:
        check_generation_prompt(of_teacher, config.teacher_kwargs)


def take(
    prompts: Sequence[Prompt], state: PromptState, count: int, *, seed: int, shuffle: bool
) -> tuple[list[Prompt], PromptState]:
    """Return the next `count` prompts and the state after them. A step may reach into the next epoch.

    The order of an epoch depends on (seed, epoch) alone, so that a run can resume anywhere. No communication.
    Raises UserError if the state does not fit the prompts.
    """
    if not prompts or not 0 <= state.position < len(prompts):
        raise UserError(
            f"cannot continue at prompt {state.position} of {len(prompts)}: the prompt files have changed; put the "
            "earlier files back or name a new train.run_dir"
        )
    taken: list[Prompt] = []
    epoch, position = state.epoch, state.position
    while len(taken) < count:
        order = _order(len(prompts), epoch, seed, shuffle)
        chosen = order[position : position + count - len(taken)]
        taken += [prompts[i] for i in chosen]
        position += len(chosen)
        if position == len(prompts):
            epoch, position = epoch + 1, 0
    return taken, PromptState(epoch, position)


def take_of_one_source(
    prompts: Sequence[Prompt], state: PromptState, count: int, *, seed: int, shuffle: bool
) -> tuple[list[Prompt], PromptState]:
    """Return the next `count` prompts, all of one data_source, and the state after them.

    Sources take turns. A source with twice the prompts has twice the turns, so that each prompt is used as often as
    without groups. The prompts of a source have an order and epochs of their own. No communication.

    Raises UserError if the state does not fit the prompts.
    """
    sources: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        sources.setdefault(prompt.data_source, []).append(prompt)
    if not state.of_source.keys() <= sources.keys():
        raise UserError(
            f"cannot continue with the prompts of {', '.join(state.of_source.keys() - sources.keys())}: the prompt "
            "files have changed; put the earlier files back or name a new train.run_dir"
        )
    taken = {source: state.of_source.get(source, 0) for source in sources}

    def share_after_half_of_a_turn(source: str) -> Fraction:
        return Fraction(2 * taken[source] + count, len(sources[source]))

    source = min(sources, key=share_after_half_of_a_turn)
    position = PromptState(*divmod(taken[source], len(sources[source])))
    chosen, _ = take(sources[source], position, count, seed=seed, shuffle=shuffle)
    taken[source] += count
    return chosen, PromptState(*divmod(sum(taken.values()), len(prompts)), taken)


def _order(count: int, epoch: int, seed: int, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(count))
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(count)]


def _render(
    prompts: list[str | list[Message]],
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict[str, Any],
    config: DataConfig,
) -> tuple[dict[int, tuple[str, tuple[int, ...]]], dict[int, str]]:
    """Return (text, token ids) by row, and the reason by row for prompts that cannot be used.

    Of a text that is certainly too long, the token ids are those of its beginning.
    """
    texts: dict[int, str] = {}
    failures: dict[int, str] = {}
    for index, prompt in enumerate(prompts):
        try:
            messages = as_messages(prompt)
            if not any(message["content"].strip() for message in messages):
                raise ValueError("the prompt is empty")
            if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
                raise ValueError("the last message of the user is empty")
            with_instruction = _with_instruction(prompt, rows[index], config.append_instruction)
            text = render_text(with_instruction, tokenizer, kwargs)
            text.encode("utf-8")  # a lone surrogate, which JSON can contain, would fail the tokenizer for all rows
            texts[index] = text
        except UnicodeEncodeError:
            failures[index] = "the text contains half of a surrogate pair, which is no character"
        except TemplateError as error:
            failures[index] = f"the chat template fails: {error_line(error)}"
        except Exception as error:  # a template is a program and may raise any exception
            failures[index] = error_line(error)
    rendered: dict[int, tuple[str, tuple[int, ...]]] = {}
    longest = _CHARACTERS_PER_TOKEN * config.max_prompt_tokens
    encoded = encode([text[:longest] for text in texts.values()], tokenizer)
    for (index, text), ids in zip(texts.items(), encoded, strict=True):
        if ids:
            rendered[index] = (text, ids)
        else:
            failures[index] = "it renders to no token"
    return rendered, failures


def _with_instruction(prompt: str | list[Message], row: Row, append_instruction: bool | str) -> str | list[Message]:
    """Append the instruction to the last user message if `append_instruction` is set and no message mentions a box."""
    messages = as_messages(prompt)
    has_it = any("\\boxed" in message["content"] for message in messages)
    wanted = append_instruction is True or (append_instruction == "auto" and _is_graded_math(row))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if has_it or not wanted or last is None:
        return prompt
    if isinstance(prompt, str):
        return prompt + INSTRUCTION
    changed = {**messages[last], "content": messages[last]["content"] + INSTRUCTION}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _is_graded_math(row: Row) -> bool:
    """Return True if the row is graded by a boxed mathematical answer.

    Its `ability` decides; in a row without an ability, the name of its `data_source`.
    """
    if row.answer_style != "rule" or row.ground_truth is None:
        return False
    return "math" in row.ability.lower() if row.ability else bool(_MATH_SOURCE.search(row.data_source))
