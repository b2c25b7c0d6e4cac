"""Read and check the inputs of evaluations: the prompts, and whether the teacher answers them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.bridge.origin import expected_origin, load_bridge
from megatron_oprd.config import Config, LossConfig, OutputConfig
from megatron_oprd.data.end_tokens import find_end_tokens
from megatron_oprd.data.prompts import PromptSet, load_prompts
from megatron_oprd.data.tokenizer import has_tokenizer, load_tokenizer, same_vocabulary, tokenizer_hash
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.lengths import check_room
from megatron_oprd.launch.models import ModelInputs
from megatron_oprd.launch.setup import (
    Setup,
    check_model_weights,
    read_setup,
    with_dtype,
    with_end_tokens,
    without_automatic,
)
from megatron_oprd.launch.tokenizers import read_student_tokenizer
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.types import LayerPair, PairBridge, UserError


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of an evaluation without training."""

    config: Config
    setup: Setup  # without teachers if the teacher's answers are not measured
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    bridge: Mapping[LayerPair, PairBridge] = field(default_factory=dict)  # its maps; empty without a bridge

    @property
    def model_inputs(self) -> ModelInputs:
        """Return the inputs from which the models are built, if the teacher's answers are measured."""
        config, setup = self.config, self.setup
        sizes = (setup.student.vocab_size, *(teacher.spec.vocab_size for teacher in setup.teachers.values()))
        return ModelInputs(config, setup, self.bridge, min(sizes), config.data.own_teacher_prompts)


def read_evaluation_inputs(config: Config) -> EvaluationInputs:
    """Read and check what an evaluation of the student needs, except the weights. No communication.

    The teacher is read if the student is measured on its answers. Raises UserError for the first mistake, with the line
    that training has for it.
    """
    config = without_automatic(with_dtype(config))
    tokenizer = read_student_tokenizer(config, read_model_spec(config.student.model_files))
    other = partial(_teacher_has_another_tokenizer, config, tokenizer)
    prompts, takes_answers = read_evaluation_prompts(config, tokenizer, other)
    if takes_answers:
        config = config.model_copy(update={"loss": _measured_loss(config)})
    setup = read_setup(config, config.named_teachers if takes_answers else {}, trains=False)
    check_model_weights(config, setup)
    bridge: Mapping[LayerPair, PairBridge] = {}
    if takes_answers and config.loss.reads_layers and config.loss.representation.bridge is not None:
        (teacher,), own = setup.teachers.values(), tokenizer_hash(tokenizer)
        origin = expected_origin(config, setup.student, teacher, (own, own))
        bridge = load_bridge(config, setup.layer_plan.pairs, origin).maps
    setup = with_end_tokens(setup, find_end_tokens(setup.student, tokenizer, config.data.chat_template_kwargs))
    check_room(config, setup.student, prompts.prompts)
    return EvaluationInputs(config, setup, tokenizer, prompts, bridge)


def _teacher_has_another_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a single teacher gives other ids to the same text. One without a tokenizer does not."""
    if config.teacher is None or not has_tokenizer(config.teacher.model_files):
        return False
    return not same_vocabulary(tokenizer, load_tokenizer(config.teacher.model_files))


def _measured_loss(config: Config) -> LossConfig:
    """Return a loss that compares next-token distributions, and the layers of `loss` where they can be compared."""
    assert config.teacher is not None  # its answers are measured
    representation = config.loss.representation
    student, teacher = (read_model_spec(model.model_files) for model in (config.student, config.teacher))
    same_width = student.hidden_size == teacher.hidden_size
    if not same_width and representation.bridge is None:
        representation = representation.model_copy(update={"weight": 0.0})
    return LossConfig(representation=representation, output=OutputConfig(objective="full_kl"))


def read_evaluation_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, has_other_tokenizer: Callable[[], bool]
) -> tuple[PromptSet, bool]:
    """Return the prompts of `evaluation.data`, and True if the teacher answers them. No communication.

    Only then do the prompts have teacher prompts. `has_other_tokenizer` returns True if the teacher has another
    tokenizer; it is called only where that matters.

    Raises UserError for a mistake in the files, and if the settings leave nothing to measure.
    """
    prompts = _load_prompts(config, tokenizer, for_teacher=False)
    if not takes_teacher_answers(config, prompts, has_other_tokenizer):
        if not config.evaluation.samples:
            raise UserError(
                "evaluation.samples=0 without the teacher's answers leaves nothing to measure; raise it, or name "
                "teacher.path and set evaluation.teacher_answers=true"
            )
        return prompts, False
    return (_load_prompts(config, tokenizer, for_teacher=True) if config.data.own_teacher_prompts else prompts), True


def takes_teacher_answers(config: Config, prompts: PromptSet, has_other_tokenizer: Callable[[], bool]) -> bool:
    """Return True if an evaluation measures the student on the teacher's answers to the prompts.

    Raises UserError if `evaluation.teacher_answers=true` and the teachers do not allow it.
    """
    wanted = config.evaluation.teacher_answers
    if not wanted or (wanted == "auto" and prompts.num_graded):
        return False
    obstacle = ""
    if len(config.named_teachers) != 1:
        obstacle = "several teachers" if config.teachers else "no teacher"
    elif config.teacher is not None and not Path(config.teacher.path).is_dir():
        obstacle = f"no folder teacher.path={config.teacher.path}"
        if wanted == "auto" and os.environ.get("RANK", "0") == "0":
            print(
                f"{obstacle}: the student is not measured on the teacher's answers; name the teacher's folder, or set "
                "evaluation.teacher_answers=false",
                flush=True,
            )
    elif config.teacher is not None and config.teacher.follows_student:
        obstacle = f"teacher.ema={config.teacher.ema:g}, with which no answers stay the teacher's"
    elif has_other_tokenizer():
        obstacle = "a teacher with another tokenizer"
    if wanted is True and obstacle:
        raise UserError(
            f"evaluation.teacher_answers=true needs one teacher with the student's tokenizer, and there is {obstacle}; "
            "use evaluation.teacher_answers=false"
        )
    return not obstacle


def check_best_metric(config: Config, plan: LayerPlan, prompts: PromptSet, *, teacher_answers: bool) -> None:
    """Raise UserError if the evaluations of a training run do not measure `evaluation.best`."""
    metric = config.evaluation.best
    if metric is None:
        return
    if metric.endswith("@n"):
        if prompts.num_graded and config.evaluation.samples:
            return
        missing = "right answers in evaluation.data" if config.evaluation.samples else "evaluation.samples above 0"
        works = "perplexity, on the teacher's answers, needs none"
    elif not teacher_answers:
        missing, works = "the teacher's answers", "set evaluation.teacher_answers=true"
    elif metric == "cosine" and not plan.pairs:
        missing, works = "compared hidden states, and loss.representation.weight is 0", "use reverse_kl"
    elif metric not in ("perplexity", "cosine") and not plan.teacher_final_norm:
        missing, works = "the teacher's last layer, which loss.representation leaves out", "use perplexity or cosine"
    else:
        return
    raise UserError(f"evaluation.best={metric} needs {missing}; {works}")


def _load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, *, for_teacher: bool) -> PromptSet:
    if not config.evaluation.data:
        raise UserError("evaluation.data: name at least one prompt file to evaluate on")
    data = config.data
    if not for_teacher:
        data = data.model_copy(update={"teacher_prompt_key": None, "teacher_chat_template_kwargs": None})
    prompts = load_prompts(config.evaluation.data, tokenizer, data)
    column = prompts.answer_column
    if column and not prompts.num_graded and config.evaluation.teacher_answers is not True:
        raise UserError(
            f"evaluation.data: no row of {', '.join(config.evaluation.data)} has a right answer in "
            f"{config.data.answer_key or 'reward_model.ground_truth'}; if it is in the column {column!r}, set "
            f"data.answer_key={column}"
        )
    return prompts
