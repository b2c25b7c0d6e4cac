"""Measurement of stored answers: forward passes of the student and the teacher that do not change training.

The health watch measures the start model's answers with it, an evaluation the teacher's answers. Works in every
parallel layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_oprd.config import BatchConfig, LossConfig, OutputConfig, RepresentationConfig
from megatron_oprd.evaluation.scores import ALL_SOURCES
from megatron_oprd.evaluation.token_sums import SUMS, TokenSums
from megatron_oprd.losses.representation import token_statistics
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads
from megatron_oprd.models.state_map import StateMap
from megatron_oprd.models.tap_rows import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch, max_num_tokens
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import FINAL_STATES, DeviceBatch, Rollout, StateKey

# Selects every token of an answer, at the hidden state that predicts it, as an output-space objective does.
EVERY_TOKEN = OutputConfig(objective="full_kl", positions="all")
NO_LAYER = RepresentationConfig(weight=0.0)
MOST_NATS = 700.0  # per token; the perplexity of a larger loss is not a finite number


@dataclass(frozen=True)
class MeasuredModels:
    """The student and the teacher that it is compared with, on this rank."""

    stage: Stage  # the student's chunks
    spec: ModelSpec  # the student
    topology: Topology  # the student's layout
    batch: BatchConfig
    pad_tokens: int = 1  # as in GlobalBatch
    teacher: Teacher | None = None  # None: nothing is compared
    # Returns the LM heads of both models on the student's last stage, else None. Called for each measurement. None: the
    # next-token distributions are not compared, because the teacher is not built up to its final norm.
    load_heads: Callable[[], Heads | None] | None = None
    # The selection of hidden states of the loss, whose `positions` are replaced by all tokens; None: no layer is
    # compared.
    layers: RepresentationConfig | None = None
    maps: Mapping[int, StateMap] = field(default_factory=dict)  # of a bridge, by student layer, those on this rank


@dataclass(frozen=True)
class Measurement:
    """Means over all tokens of the answers, at temperature 1."""

    perplexity: float  # exp of the student's mean negative log-likelihood
    entropy: float  # of the student's next-token distribution, in nats
    # None without the teacher's next-token distributions:
    reverse_kl: float | None = None  # KL(student || teacher) in nats
    forward_kl: float | None = None  # KL(teacher || student) in nats
    teacher_perplexity: float | None = None
    argmax_agreement: float | None = None  # share of the tokens where both models have the same most likely token
    cosine: Mapping[int, float] = field(default_factory=dict)  # of the hidden states, by compared student layer

    def metrics(self) -> dict[str, float]:
        """Return the metrics of an evaluation by name, without those that were not measured."""
        names = ("perplexity", "teacher_perplexity", "forward_kl", "reverse_kl", "argmax_agreement")
        values: dict[str, float | None] = {name: getattr(self, name) for name in names}
        if self.cosine:
            values["cosine"] = sum(self.cosine.values()) / len(self.cosine)
            values |= {f"cosine/layer_{layer}": value for layer, value in self.cosine.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class AnswerSums:
    """Sums over the tokens of some answers. Sums of several sets of answers can be added."""

    tokens: int
    values: tuple[float, ...]  # SUMS
    layer_tokens: int  # tokens whose hidden states are compared
    cosines: Mapping[int, float]  # by compared student layer
    with_distributions: bool  # True if the teacher's next-token distributions were compared

    def __add__(self, other: AnswerSums) -> AnswerSums:
        return dataclasses.replace(
            self,
            tokens=self.tokens + other.tokens,
            layer_tokens=self.layer_tokens + other.layer_tokens,
            values=tuple(map(sum, zip(self.values, other.values, strict=True))),
            cosines={layer: value + other.cosines[layer] for layer, value in self.cosines.items()},
        )

    def measurement(self) -> Measurement:
        """Return the means over the tokens."""
        means = {name: value / max(self.tokens, 1) for name, value in zip(SUMS, self.values, strict=True)}
        cosine = {layer: value / max(self.layer_tokens, 1) for layer, value in self.cosines.items()}
        perplexity = math.exp(min(means["loss"], MOST_NATS))
        if not self.with_distributions:
            return Measurement(perplexity, means["entropy"], cosine=cosine)
        return Measurement(
            perplexity,
            means["entropy"],
            means["reverse_kl"],
            means["forward_kl"],
            math.exp(min(means["teacher_loss"], MOST_NATS)),
            means["argmax_agreement"],
            cosine,
        )


def has_teacher_distribution(teachers: Sequence[Teacher]) -> bool:
    """Return True if there is a single teacher and it is built up to its final norm, as its logits require."""
    return len(teachers) == 1 and teachers[0].plan.teacher_final_norm


def measure_answers(models: MeasuredModels, answers: Sequence[Rollout]) -> Measurement:
    """Return the means over all tokens of `answers`, which are the same on every rank; see `_sum`."""
    return _sum(models, answers, _heads(models)).measurement()


def measure_by_source(models: MeasuredModels, answers: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    """Return the metrics of the answers of each data source, in order of appearance.

    With several sources the entry `all` has the means over all tokens. One pass runs on about as many answers as fill
    one micro-batch for each stage of the pipelines, so that few of the teacher's hidden states are in memory; the
    result does not depend on that. Communicates over all groups.
    """
    heads, teacher, topology = _heads(models), models.teacher, models.topology
    if teacher is not None:  # a teacher that is loaded anew for each pass is loaded once here
        stage = teacher.load()
        models = dataclasses.replace(models, teacher=dataclasses.replace(teacher, load=lambda: stage))
    most_tokens = models.batch.max_tokens_per_micro_batch * topology.data_size * topology.pipeline_size
    sums: dict[str, AnswerSums] = {}
    for source in dict.fromkeys(answer.data_source for answer in answers):
        parts = divide_answers([answer for answer in answers if answer.data_source == source], most_tokens)
        sums[source] = functools.reduce(operator.add, (_sum(models, part, heads) for part in parts))
    if len(sums) > 1:
        sums[ALL_SOURCES] = functools.reduce(operator.add, list(sums.values()))
    return {source: of_source.measurement().metrics() for source, of_source in sums.items()}


def divide_answers(answers: Sequence[Rollout], most_tokens: int) -> list[list[Rollout]]:
    """Return the answers in parts of at most `most_tokens` tokens; a longer answer is a part of its own."""
    parts: list[list[Rollout]] = []
    room = 0
    for answer in answers:
        tokens = max_num_tokens(answer)
        if not parts or tokens > room:
            parts.append([])
            room = most_tokens
        parts[-1].append(answer)
        room -= tokens
    return parts


def _heads(models: MeasuredModels) -> Heads | None:
    return models.load_heads() if models.load_heads is not None else None


def _sum(models: MeasuredModels, answers: Sequence[Rollout], heads: Heads | None) -> AnswerSums:
    """Sum likelihoods, entropy, divergences and cosines over the tokens of `answers`, the same on every rank.

    Log-softmax is computed in float32 over the vocabulary without padding; for what is compared with the teacher, over
    the token ids that both models have. Weights, gradients and random-number generators are not changed.
    Communicates over all groups.

    Args:
        heads: what `models.load_heads` returned.

    Returns: the same sums on every rank.
    """
    stage, topology, teacher = models.stage, models.topology, models.teacher
    loss = LossConfig(representation=_every_token(models.layers), output=EVERY_TOKEN)
    global_batch = GlobalBatch(tuple(answers), (0,) * len(answers), loss, models.batch, models.spec, models.pad_tokens)
    micro_batches = global_batch.micro_batches(topology)
    layers: tuple[int, ...] = ()
    targets, settings = None, PassSettings()
    if teacher is not None:
        pairs = teacher.plan.pairs if models.layers is not None else ()
        plan = dataclasses.replace(teacher.plan, pairs=pairs, output=models.load_heads is not None)
        teacher, layers = dataclasses.replace(teacher, plan=plan, base=None), plan.student_layers
        targets, _ = teacher_pass([teacher], global_batch, micro_batches, topology)
        settings = PassSettings(normed_layer=plan.student_normed_layer)
    stage.wait_for_parameters()  # the LM head is used outside its module
    is_last = topology.num_stages - 1 in topology.stages
    token_sums = TokenSums(stage[-1].lm_head.detach(), models.spec.vocab_size, topology, heads) if is_last else None
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=topology.device)
    cosines = {layer: torch.zeros((), dtype=torch.float64, device=topology.device) for layer in layers}

    def taps() -> Iterator[_Tap]:
        for number, batch in enumerate(micro_batches):
            yield _Tap(batch, token_sums, sums, cosines, models.maps, None if targets is None else targets.of(number))

    training = stage.training
    stage.eval()
    run_schedule(list(stage), topology, micro_batches, taps(), settings)
    stage.train(training)
    # Tensor-parallel ranks have equal SUMS; their cosines differ under sequence parallelism.
    values = _sum_over_ranks(sums.tolist(), [topology.groups.dp_cp], topology)
    layer_values = _sum_over_ranks([value.item() for value in cosines.values()], topology.token_groups, topology)
    return AnswerSums(
        global_batch.output.counts.tokens,
        tuple(values),
        global_batch.representation.counts.tokens,
        dict(zip(layers, layer_values, strict=True)),
        models.load_heads is not None,
    )


def _every_token(layers: RepresentationConfig | None) -> RepresentationConfig:
    return NO_LAYER if layers is None else layers.model_copy(update={"positions": "all"})


def _sum_over_ranks(
    values: list[float], groups: Sequence[torch.distributed.ProcessGroup], topology: Topology
) -> list[float]:
    """Sum over groups whose ranks have different tokens, then over pipeline ranks, which have different layers."""
    if not values:
        return values
    for group in (*groups, topology.groups.pp):
        values = sum_over(values, group, topology.device)
    return values


@dataclass(frozen=True)
class _Tap:
    """Adds the sums over one micro-batch to `sums` and `cosines`, and returns all states unchanged."""

    batch: DeviceBatch
    token_sums: TokenSums | None  # None: this rank has no last stage
    sums: torch.Tensor
    cosines: Mapping[int, torch.Tensor]
    maps: Mapping[int, StateMap]
    targets: MicroBatchTargets | None

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        has_target = self.targets is not None and key in self.targets
        target = self.targets.take(key) if self.targets is not None and has_target else None
        if key == FINAL_STATES:
            assert self.token_sums is not None  # only the last stage has final states
            states = selected_rows(hidden_states, self.batch.output.selected)
            self.sums.add_(self.token_sums(states, target, self.batch.output))
        elif target is not None:
            states = selected_rows(hidden_states, self.batch.representation.selected)
            compared = self.maps[key](states) if key in self.maps else states
            self.cosines[key].add_(token_statistics(compared, target, "none").cosine.double().sum())
        return hidden_states
