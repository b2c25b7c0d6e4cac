"""Mistakes that a trainer under Megatron invites, each put into the product inside a `with`: the certificate sees them.

They are patched in on every rank. `felt_by` says which cells of the matrix such a mistake changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_oprd.data.balance import assign
from megatron_oprd.data.packing import Terms, num_tokens
from megatron_oprd.losses.reduction import count
from megatron_oprd.models import attention, delta_net, taps, targets
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.training import global_batch, overlap
from megatron_oprd.types import DeviceBatch, DeviceSelection, PackedBatch, StateKey
from tests.helpers.layouts import HYBRIDS, Case
from tests.helpers.run_layouts import rollouts_of


@dataclasses.dataclass(frozen=True)
class Defect:
    name: str
    install: Callable[[], contextlib.AbstractContextManager[None]]
    felt_by: Callable[[Case], bool]


@contextlib.contextmanager
def mean_of_micro_batch_means() -> Iterator[None]:
    """Weights sum to one in each micro-batch, and micro-batches are averaged."""
    pack, pack_all = global_batch.pack, global_batch.GlobalBatch.micro_batches

    def pack_by_own_counts(rollouts: Any, numbers: Sequence[int], terms: Terms, *arguments: Any) -> PackedBatch:
        own = (
            dataclasses.replace(term, counts=count(len(term.positions[number]) for number in numbers))
            for term in (terms.representation, terms.output)
        )
        return pack(rollouts, numbers, Terms(*own), *arguments)

    def average(global_batch: Any, topology: Any, **kwargs: Any) -> list[DeviceBatch]:
        batches = pack_all(global_batch, topology, **kwargs)
        number = len(batches) * topology.data_size

        def divided(selection: DeviceSelection) -> DeviceSelection:
            return dataclasses.replace(selection, weights=selection.weights / number)

        return [
            dataclasses.replace(batch, representation=divided(batch.representation), output=divided(batch.output))
            for batch in batches
        ]

    with (
        mock.patch.object(global_batch, "pack", pack_by_own_counts),
        mock.patch.object(global_batch.GlobalBatch, "micro_batches", average),
    ):
        yield


@contextlib.contextmanager
def gradient_summed_over_tensor_ranks() -> Iterator[None]:
    """Send the gradient that the loss adds at a layer through a plain all_reduce, as if each rank had a part of it."""
    backward = taps._WithStageLoss.backward

    def summed(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        group = parallel_state.get_tensor_model_parallel_group()
        if dist.get_world_size(group) == 1:
            return backward(ctx, *gradients)
        own, *_ = backward(ctx, torch.zeros_like(gradients[0]))
        dist.all_reduce(own, group=group)
        return gradients[0] + own, None, None

    with mock.patch.object(taps._WithStageLoss, "backward", staticmethod(summed)):
        yield


@contextlib.contextmanager
def states_gradient_of_own_vocabulary() -> Iterator[None]:
    """Leave out the gradient of the final hidden states from the other ranks' parts of the vocabulary."""

    def own(self: OutputLoss, gradient: torch.Tensor, selection: DeviceSelection) -> torch.Tensor:
        if self.sequence_group is None:
            return gradient
        return gradient.split(selection.rows_per_rank)[dist.get_rank(self.sequence_group)]

    with mock.patch.object(OutputLoss, "_sum_over_vocabulary", own):
        yield


@contextlib.contextmanager
def rows_not_cut_by_sequence_rank() -> Iterator[None]:
    """Give every sequence-parallel rank the rows of the first rank."""
    cut = global_batch.cut
    with mock.patch.object(
        global_batch, "cut", lambda batch, place: cut(batch, dataclasses.replace(place, sequence_rank=0))
    ):
        yield


@contextlib.contextmanager
def loss_in_the_pass_without_gradient() -> Iterator[None]:
    """Under recomputation the loss is applied in the first pass, which keeps no graph, and not in the second."""
    call = taps.StageLoss.__call__

    def in_first_pass(self: taps.StageLoss, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer not in self.targets or layer in self.sums:
            return hidden_states
        if torch.is_grad_enabled():
            return call(self, layer, hidden_states)
        with torch.enable_grad():
            call(self, layer, hidden_states)
        self.targets.release(layer)
        return hidden_states

    with mock.patch.object(taps.StageLoss, "__call__", in_first_pass):
        yield


@contextlib.contextmanager
def target_of_another_micro_batch() -> Iterator[None]:
    """Under interleaving a micro-batch is compared with the one whose states are put down before it (the one after it:
    the last comes first), repeated to its length."""
    put = targets.TeacherTargets.put
    before: dict[int, torch.Tensor] = {}

    def put_late(self: targets.TeacherTargets, micro_batch: int, states: dict[int, torch.Tensor]) -> None:
        if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
            return put(self, micro_batch, states)
        late = {}
        for layer, own in states.items():
            other = before.get(layer, own)
            late[layer] = other[torch.arange(len(own)) % len(other)] if len(other) else torch.zeros_like(own)
        before.update(states)
        return put(self, micro_batch, late)

    with mock.patch.object(targets.TeacherTargets, "put", put_late):
        yield


@contextlib.contextmanager
def gradient_divided_by_data_ranks() -> Iterator[None]:
    """mcore's own scaling is left on: its DDP averages over data- and context-parallel ranks instead of summing."""
    ddp = overlap.DistributedDataParallel

    def averaging(config: Any, *args: Any, **kwargs: Any) -> Any:
        config.calculate_per_token_loss = False
        wrapped = ddp(config, *args, **kwargs)
        config.calculate_per_token_loss = True
        return wrapped

    with mock.patch.object(overlap, "DistributedDataParallel", averaging):
        yield


@contextlib.contextmanager
def window_one_token_too_long() -> Iterator[None]:
    """Let every token attend to one token before its sliding window."""
    attend = attention.causal_attention

    def longer(*states: torch.Tensor, scale: float, window: int) -> torch.Tensor:
        return attend(*states, scale=scale, window=window + 1 if window else 0)

    with mock.patch.object(attention, "causal_attention", longer):
        yield


def _micro_batches(case: Case) -> list[list[list[int]]]:
    """Return the sampled tokens of each sequence, by data-parallel rank and micro-batch; lengths stand for costs."""
    config, parallel = case.config, case.config.parallel
    useful = [rollout for rollout in rollouts_of(case.rollouts) if any(rollout.response_mask)]
    lengths = [num_tokens(rollout) for rollout in useful]
    shares = assign(
        lengths,
        lengths,
        case.data_size,
        config.batch.max_tokens_per_micro_batch,
        multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
        packing=config.batch.packing,
    )
    return [[[sum(useful[number].response_mask) for number in members] for members in share] for share in shares]


def _has_uneven_micro_batches(case: Case) -> bool:
    """Return True unless all micro-batches have equally many sequences and tokens, where a mean of means is right."""
    every = [batch for share in _micro_batches(case) for batch in share]
    by_tokens = case.config.loss.reads_output and case.config.loss.output.aggregation == "token_mean"
    return len(set(map(len, every))) > 1 or (by_tokens and len(set(map(sum, every))) > 1)


def _recomputes_a_compared_layer(case: Case) -> bool:
    parallel, recompute, layers = case.config.parallel, case.config.recompute, case.config.loss.representation.layers
    if recompute.granularity != "full" or not case.config.loss.reads_layers:
        return False
    stages = even_stages(case.layers[0], parallel.pipeline, parallel.virtual_pipeline or 1)
    first_of_stages = {1 + start for start in itertools.accumulate(stages[:-1], initial=0)}
    return recompute.method == "uniform" or layers == "all" or bool(first_of_stages & set(layers))


def _interleaves_several_micro_batches(case: Case) -> bool:
    return "virtual" in case.features and any(any(share[:-1]) for share in _micro_batches(case))


@contextlib.contextmanager
def state_of_the_sequence_before() -> Iterator[None]:
    """Gated DeltaNet and its convolution go on from one packed sequence into the next."""
    plan = delta_net.plan_chunks
    with mock.patch.object(delta_net, "plan_chunks", lambda bounds, device: plan((0, bounds[-1]), device)):
        yield


def _packs_sequences_of_a_hybrid(case: Case) -> bool:
    return case.family in HYBRIDS.values() and any(len(batch) > 1 for share in _micro_batches(case) for batch in share)


DEFECTS = (
    Defect("mean of micro-batch means", mean_of_micro_batch_means, _has_uneven_micro_batches),
    Defect(
        "plain all_reduce in the loss's backward",
        gradient_summed_over_tensor_ranks,
        lambda case: "tensor" in case.features and case.config.loss.reads_layers,
    ),
    Defect(
        "states' gradient not summed over the vocabulary's ranks",
        states_gradient_of_own_vocabulary,
        lambda case: {"tensor", "output"} <= case.features,
    ),
    Defect("tap without sequence parallelism", rows_not_cut_by_sequence_rank, lambda case: "sequence" in case.features),
    Defect("tap dead under recomputation", loss_in_the_pass_without_gradient, _recomputes_a_compared_layer),
    Defect(
        "target of another micro-batch under interleaving",
        target_of_another_micro_batch,
        _interleaves_several_micro_batches,
    ),
    Defect(
        "gradient divided by data and context ranks",
        gradient_divided_by_data_ranks,
        lambda case: case.data_size * case.config.parallel.context > 1,
    ),
    Defect("state of the sequence before", state_of_the_sequence_before, _packs_sequences_of_a_hybrid),
    Defect("sliding window one token too long", window_one_token_too_long, lambda case: case.family == "Mistral"),
)
