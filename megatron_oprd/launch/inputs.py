"""Read and check the inputs of a command before a model is built, so that a mistake ends the command at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.bridge.origin import expected_origin, load_bridge
from megatron_oprd.bridge.record import Bridge, Origin
from megatron_oprd.config import Config, with_settings
from megatron_oprd.data.alignment import Aligner
from megatron_oprd.data.end_tokens import EndTokens, find_end_tokens
from megatron_oprd.data.packing import num_tokens
from megatron_oprd.data.prompts import PromptSet, load_prompts
from megatron_oprd.data.tokenizer import has_tokenizer
from megatron_oprd.launch.evaluation_inputs import check_best_metric, read_evaluation_prompts
from megatron_oprd.launch.lengths import (
    Lengths,
    check_lengths,
    check_replayed_lengths,
    check_room,
    check_rotary_factors,
    longest_prompt,
    longest_row,
)
from megatron_oprd.launch.missing_inputs import MissingInputs, find_missing, longest_prompts
from megatron_oprd.launch.models import ModelInputs
from megatron_oprd.launch.setup import (
    DEFAULT_TOKENS,
    Setup,
    check_model_weights,
    read_setup,
    with_dtype,
    with_end_tokens,
    without_automatic,
)
from megatron_oprd.launch.tokenizers import Tokenizers, read_tokenizers
from megatron_oprd.rollout.horizon import longest_response
from megatron_oprd.rollout.replay import check_enough, load_replay
from megatron_oprd.rollout.server_checks import check_student
from megatron_oprd.runtime import start_profile
from megatron_oprd.training.global_batch import max_num_tokens
from megatron_oprd.training.wandb_curves import check_wandb
from megatron_oprd.types import Prompt, Rollout, UserError

# The keys whose value `auto` is chosen from the memory of an update.
RECOMPUTE, TOKENS = AUTOMATIC = ("recompute.granularity", "batch.max_tokens_per_micro_batch")
UNBOUNDED_TOKENS = 2**30  # until the size of a micro-batch is chosen


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a training run or of a bridge fit. No model is built and no process group exists yet."""

    config: Config
    setup: Setup
    tokenizer: PreTrainedTokenizerBase | None  # the student's; None: replayed rollouts need no tokenizer
    aligner: Aligner | None  # for a single teacher with another tokenizer; None: all models read the same token ids
    prompts: PromptSet | None  # None: rollouts are replayed
    evaluation_prompts: PromptSet | None  # None: training does not evaluate
    replayed: list[Rollout]  # empty if an engine generates
    bridge: Bridge | None  # None: hidden states are compared without maps
    bridge_origin: Origin | None  # models, tokenizers and positions that the bridge must be fitted for
    missing: MissingInputs  # what a dry run does without
    end_tokens: EndTokens | None = None  # at which the student's answers stop; None: nothing is generated
    teacher_answers: bool = False  # True: evaluations measure the student on the teacher's answers
    automatic: frozenset[str] = frozenset()  # of AUTOMATIC: the keys that are still to be chosen

    @property
    def run_dir(self) -> Path:
        """Return the run folder."""
        return Path(self.config.train.run_dir)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids that all models which read the student's ids have.

        Models with one tokenizer may pad their vocabularies to different sizes.
        """
        student, teachers = self.setup.student, self.setup.teachers.values()
        if self.aligner is not None:
            return student.vocab_size
        return min(student.vocab_size, *(teacher.spec.vocab_size for teacher in teachers))

    @property
    def own_teacher_prompts(self) -> bool:
        """Return True if teachers may read other prompts than the student."""
        replayed = any(rollout.teacher_prompt_ids is not None for rollout in self.replayed)
        return self.config.data.own_teacher_prompts or self.aligner is not None or replayed

    @property
    def model_inputs(self) -> ModelInputs:
        """Return the inputs from which the models are built."""
        maps = self.bridge.maps if self.bridge else {}
        return ModelInputs(self.config, self.setup, maps, self.vocab_size, self.own_teacher_prompts)

    @property
    def bridge_rank(self) -> int | None:
        """Return the rank r of the bridge, in a dry run of the bridge to come; None without a bridge."""
        planned = self.config.bridge.ranks[0] if self.missing.bridge else None
        return self.bridge.rank if self.bridge else planned

    @property
    def longest_row(self) -> int:
        """Return the most tokens of a prompt of the student and its generated answer."""
        assert self.prompts is not None  # an engine generates
        return longest_row(self.config, self.setup.student, self.prompts.prompts)

    @property
    def lengths(self) -> Lengths:
        """Return the most tokens that a sequence of this run and its response can have."""
        if self.prompts is None:
            responses = (len(rollout.response_ids) for rollout in self.replayed)
            return Lengths(max(map(max_num_tokens, self.replayed), default=1), max(responses, default=1))
        response = longest_response(self.config)
        longest = longest_prompt(self.prompts.prompts) + response
        generated = max(len(prompt.prompt_ids) for prompt in self.prompts.prompts) + response
        positions = self.setup.student.max_position_embeddings
        return Lengths(min(longest, positions), response, min(generated, positions))


def read_inputs(config: Config, *, fitting: bool = False, dry_run: bool = False, choose_later: bool = False) -> Inputs:
    """Read and check everything except the weights. No communication.

    Args:
        config: The configuration.
        fitting: True if a bridge is fitted between the models.
        dry_run: True if nothing runs: then all inputs but the models' `config.json` may be missing.
        choose_later: True if the caller chooses values for the keys in `Inputs.automatic`. Otherwise nothing is
            recomputed and a micro-batch has the default size.

    Raises:
        UserError: The first mistake, in one line.
    """
    start_profile.enter("models' configurations and headers")
    if not (fitting or dry_run):
        check_wandb(config.logging.wandb)
    automatic = automatic_keys(config) if choose_later else frozenset()
    config = without_automatic(with_dtype(config), *([UNBOUNDED_TOKENS] if automatic else []))
    setup = read_setup(config, config.named_teachers, trains=not fitting, dry_run=dry_run)
    missing = find_missing(config, setup.planned_device) if dry_run else MissingInputs()
    check_model_weights(config, setup, skipped=missing.weights)
    with_bridge = fitting or (config.loss.reads_layers and config.loss.representation.bridge is not None)
    start_profile.enter("tokenizers and prompts")
    with_map = config.loss.reads_layers and config.loss.representation.has_map
    tokenizers = _read_tokenizers(config, setup, missing, with_bridge=with_bridge or with_map)
    end_tokens = None
    if tokenizers.student is not None:
        end_tokens = find_end_tokens(setup.student, tokenizers.student, config.data.chat_template_kwargs)
        setup = with_end_tokens(setup, end_tokens)
    aligner = tokenizers.aligner(config, setup.student)
    if aligner is not None and TOKENS in automatic:  # its tokens of an answer are cut to the size of a micro-batch
        automatic -= {TOKENS}
        config = with_settings(config, {TOKENS: DEFAULT_TOKENS})
    replayed = _read_replayed(config, setup, aligner)
    prompts = _read_prompts(config, tokenizers, missing)
    evaluation_prompts, teacher_answers = _read_evaluation_prompts(config, tokenizers, aligner, missing)
    _check_alignment(config, aligner)
    _check_data_sources(config, prompts.prompts if prompts else replayed)
    _check_lengths(config, setup, prompts, evaluation_prompts, replayed, other_tokenizer=aligner is not None)
    if evaluation_prompts is not None:
        check_best_metric(config, setup.layer_plan, evaluation_prompts, teacher_answers=teacher_answers)
    origin = _bridge_origin(config, setup, tokenizers) if with_bridge else None
    bridge = None
    if origin is not None and not fitting and not missing.bridge:
        bridge = load_bridge(config, setup.layer_plan.pairs, origin)
    inputs = Inputs(
        config=config,
        setup=setup,
        tokenizer=tokenizers.student,
        aligner=aligner,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        replayed=replayed,
        bridge=bridge,
        bridge_origin=origin,
        missing=missing,
        end_tokens=end_tokens,
        teacher_answers=teacher_answers,
        automatic=automatic,
    )
    if config.rollout.engine == "vllm":
        check_student(setup.student, inputs.vocab_size, inputs.longest_row)
    return inputs


def automatic_keys(config: Config) -> frozenset[str]:
    """Return the keys of AUTOMATIC whose value is `auto`."""
    values = (config.recompute.granularity, config.batch.max_tokens_per_micro_batch)
    return frozenset(key for key, value in zip(AUTOMATIC, values, strict=True) if value == "auto")


def _read_tokenizers(config: Config, setup: Setup, missing: MissingInputs, *, with_bridge: bool) -> Tokenizers:
    folders = [config.student.model_files, *(teacher.config.model_files for teacher in setup.teachers.values())]
    needed = (
        config.rollout.generates
        or bool(config.evaluation.every)
        or (with_bridge and any(has_tokenizer(folder) for folder in folders))
    )
    if missing.tokenizers or not needed:
        return Tokenizers()
    return read_tokenizers(config, setup.student, setup.teachers, with_bridge=with_bridge)


def _read_prompts(config: Config, tokenizers: Tokenizers, missing: MissingInputs) -> PromptSet | None:
    if not config.rollout.generates:
        return None
    if missing.tokenizers or missing.prompts:
        return longest_prompts(config)
    assert tokenizers.student is not None  # read, as nothing is missing
    return load_prompts(config.data.prompts, tokenizers.student, config.data, teacher_tokenizer=tokenizers.other)


def _read_evaluation_prompts(
    config: Config, tokenizers: Tokenizers, aligner: Aligner | None, missing: MissingInputs
) -> tuple[PromptSet | None, bool]:
    """Return the prompts of evaluations (None: no evaluation), and whether they measure on the teacher's answers."""
    if tokenizers.student is None or not config.evaluation.every or missing.prompts:
        return None, False
    return read_evaluation_prompts(config, tokenizers.student, lambda: aligner is not None)


def _read_replayed(config: Config, setup: Setup, aligner: Aligner | None) -> list[Rollout]:
    rollout, student_size = config.rollout, setup.student.vocab_size
    if rollout.engine != "replay":
        return []
    assert rollout.path is not None  # required by the configuration
    teacher_sizes = [teacher.spec.vocab_size for teacher in setup.teachers.values()]
    if aligner is None:
        rollouts = load_replay(rollout.path, min(student_size, *teacher_sizes))
    else:
        rollouts = load_replay(rollout.path, student_size, teacher_vocab_size=teacher_sizes[0])
    check_enough(rollouts, config.train.steps, rollout.prompts_per_step * rollout.samples_per_prompt)
    # For a teacher with another tokenizer, tokens beyond its room are cut: only the student's tokens count.
    longest = max(map(max_num_tokens if aligner is None else num_tokens, rollouts), default=0)
    if longest > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"rollout of {rollout.path} ({longest} tokens); raise it to {longest}"
        )
    return rollouts


def _check_alignment(config: Config, aligner: Aligner | None) -> None:
    """Raise UserError for a setting that does not work with a teacher with another tokenizer."""
    if config.rollout.horizon == "auto" and aligner is not None and aligner.student is not None:
        raise UserError(
            "rollout.horizon=auto needs a teacher with the student's tokenizer: the tokens of another tokenizer at the "
            "end of a response depend on what follows; use rollout.horizon={start, grow, every} or null"
        )
    if config.loss.reads_flow and aligner is not None:
        raise UserError(
            f"loss.flow.weight={config.loss.flow.weight:g} needs a teacher with the student's tokenizer, because both "
            "models are compared at the same positions; use such a teacher, or loss.flow.weight=0"
        )


def _check_data_sources(config: Config, taught: Sequence[Prompt] | Sequence[Rollout]) -> None:
    """Raise UserError for a prompt or rollout whose data_source has none of several teachers."""
    if not config.teachers:
        return
    known = f"teachers has {', '.join(config.teachers)}"
    for source, number in Counter(one.data_source for one in taught).items():
        if not source:  # only in rollouts: a prompt without data_source gets the name of its file
            raise UserError(
                f"{number} rollouts of {config.rollout.path} have no data_source to say who teaches; {known}"
            )
        if source not in config.teachers:
            what = "prompts" if config.rollout.generates else "rollouts"
            raise UserError(f"data_source {source!r} of {number} {what} has no teacher; {known}")


def _check_lengths(
    config: Config,
    setup: Setup,
    prompts: PromptSet | None,
    evaluation_prompts: PromptSet | None,
    replayed: Sequence[Rollout],
    *,
    other_tokenizer: bool,
) -> None:
    """Raise UserError if a prompt or a rollout is too long for a micro-batch or for a model."""
    for chosen in filter(None, (prompts, evaluation_prompts)):
        check_room(config, setup.student, chosen.prompts)
    if prompts is not None:
        check_lengths(config, setup.student, setup.teachers, prompts.prompts, other_tokenizer=other_tokenizer)
        check_rotary_factors(config, setup.student, setup.teachers, prompts.prompts)
    check_replayed_lengths(config, setup.student, setup.teachers, replayed, other_tokenizer=other_tokenizer)


def _bridge_origin(config: Config, setup: Setup, tokenizers: Tokenizers) -> Origin:
    if config.teachers:
        raise UserError("loss.representation.bridge joins the student with one teacher; name it as teacher.path")
    (teacher,) = setup.teachers.values()
    return expected_origin(config, setup.student, teacher, tokenizers.hashes())
