"""The teacher's answers to evaluation prompts, in a file whose name depends on everything that made them.

`launch/teacher_answers.py` makes the answers that the folder does not have. A folder may hold the answers of several
teachers, prompts and settings, and several runs may share it: no answers are mistaken for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.replay import load_replay, replay_record
from megatron_oprd.runtime.files import explain_os_errors, write_json, write_text
from megatron_oprd.types import Prompt, Rollout, UserError


@dataclass(frozen=True)
class AnswerOrigin:
    """Everything that the teacher's answers depend on."""

    teacher: str  # path of the teacher, for the reader of the file
    teacher_hash: str  # of its weights
    sampling: Sampling
    seed: int
    end_tokens: tuple[int, ...]  # at which an answer stops
    vocab_size: int  # only token ids below it are sampled
    prompts: Sequence[Prompt]
    limits: Sequence[int]  # most tokens of the answer to each prompt

    @property
    def record(self) -> dict[str, object]:
        """Return the settings for the file beside the answers, without the prompts."""
        sampling = {key: value for key, value in asdict(self.sampling).items() if key != "logprobs"}
        return {
            "teacher": {"path": self.teacher, "hash": self.teacher_hash},
            "sampling": sampling,
            "seed": self.seed,
            "end_tokens": sorted(self.end_tokens),
            "vocab_size": self.vocab_size,
        }

    @property
    def key(self) -> str:
        """Return 16 hexadecimal digits that depend on everything but the teacher's path and the sources' names."""
        settings = self.record | {"teacher": self.teacher_hash}
        both = zip(self.prompts, self.limits, strict=True)
        requests = [[prompt.prompt_ids, prompt.teacher_prompt_ids, limit] for prompt, limit in both]
        return hashlib.sha256(json.dumps([settings, requests], sort_keys=True).encode()).hexdigest()[:16]


def answers_path(folder: Path, origin: AnswerOrigin) -> Path:
    """Return the path of the answers, in the format of a replay file."""
    return folder / f"{origin.key}.jsonl"


def read_answers(folder: Path, origin: AnswerOrigin) -> list[Rollout] | None:
    """Return the answers in the order of the prompts, or None if the folder does not have them. No communication.

    Raises UserError for a damaged file.
    """
    path = answers_path(folder, origin)
    if not path.exists():
        return None
    answers = load_replay(path, origin.vocab_size)
    if [answer.prompt_ids for answer in answers] != [prompt.prompt_ids for prompt in origin.prompts]:
        raise UserError(
            f"{path} does not hold the teacher's answers to these prompts; remove it, and they are made anew"
        )
    return answers


def write_answers(
    folder: Path, origin: AnswerOrigin, answers: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the answers, with their text, and what made them. One rank calls this.

    Raises UserError when the disk does not accept the files.
    """
    path = answers_path(folder, origin)
    lines = []
    for prompt, answer in zip(origin.prompts, answers, strict=True):
        text = tokenizer.decode(list(answer.response_ids), skip_special_tokens=True)
        lines.append(json.dumps(replay_record(answer) | {"prompt": prompt.text, "response": text}, ensure_ascii=False))
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), origin.record)
    write_text(path, "".join(f"{line}\n" for line in lines))
