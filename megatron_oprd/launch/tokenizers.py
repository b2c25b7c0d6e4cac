"""The tokenizers of student and teachers, checked against the models and against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import MAKE_A_BRIDGE, Config, teacher_section
from megatron_oprd.data.alignment import Aligner, make_aligner
from megatron_oprd.data.end_tokens import end_of_turn_id
from megatron_oprd.data.tokenizer import check_tokenizer, has_tokenizer, load_tokenizer, same_vocabulary, tokenizer_hash
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.types import UserError


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers that a run reads."""

    student: PreTrainedTokenizerBase | None = None  # None: replayed rollouts need no tokenizer
    other: PreTrainedTokenizerBase | None = None  # of a teacher that gives other ids to the same text

    def hashes(self) -> tuple[str | None, str | None]:
        """Return the hashes of the tokenizers whose ids student and teacher read."""
        student, other = (None if one is None else tokenizer_hash(one) for one in (self.student, self.other))
        return student, student if self.other is None else other

    def aligner(self, config: Config, student: ModelSpec) -> Aligner | None:
        """Return what aligns rollouts with the teacher's other tokenizer; None if there is no other tokenizer."""
        if self.student is None or self.other is None:
            return None
        end = end_of_turn_id(self.other, config.data.teacher_kwargs)
        return make_aligner(self.student, self.other, student_eos_ids=student.eos_token_ids, teacher_end_of_turn_id=end)


def read_student_tokenizer(config: Config, student: ModelSpec) -> PreTrainedTokenizerBase:
    """Read the student's tokenizer. Raises UserError if there is none or if the model does not suit it."""
    tokenizer = load_tokenizer(config.student.model_files)
    check_tokenizer(tokenizer, student)
    return tokenizer


def read_tokenizers(
    config: Config, student: ModelSpec, teachers: Mapping[str, PlannedTeacher], *, with_bridge: bool
) -> Tokenizers:
    """Read the tokenizers of student and teachers.

    A teacher whose folder has no tokenizer reads the student's token ids. With a bridge, every folder must have one.

    Raises:
        UserError: A tokenizer is missing, does not suit its model, or differs from the student's where all models must
            read the same token ids.
    """
    tokenizer, other = read_student_tokenizer(config, student), None
    for name, teacher in teachers.items():
        folder = teacher.config.model_files
        model = f"{teacher_section(name)}.path={teacher.config.path}"
        own = load_tokenizer(folder) if has_tokenizer(folder) or with_bridge else tokenizer
        if own is not tokenizer and not same_vocabulary(tokenizer, own):
            _check_another_tokenizer(config, model, with_bridge=with_bridge)
            other = own
        check_tokenizer(tokenizer if other is None else other, teacher.spec, model)
    return Tokenizers(tokenizer, other)


def _check_another_tokenizer(config: Config, teacher: str, *, with_bridge: bool) -> None:
    """Raise UserError if a teacher with another tokenizer than the student's cannot take part."""
    differ = f"the tokenizers of student.path={config.student.path} and {teacher} give the same text other ids"
    if config.teachers:
        raise UserError(
            f"{differ}; use teachers with the student's tokenizer: a bridge joins a single one (teacher.path)"
        )
    if config.loss.reads_output:
        raise UserError(
            f"{differ}, so loss.output.objective={config.loss.output.objective} has no distributions to compare; use "
            "none, with a bridge, or a teacher with the student's tokenizer"
        )
    if not with_bridge:
        raise UserError(
            f"{differ}; use a teacher with the student's tokenizer, or {MAKE_A_BRIDGE} and name it in "
            "loss.representation.bridge"
        )
