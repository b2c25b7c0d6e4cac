"""Score the blocks of a model by how much each of them turns the hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from megatron_oprd.models.layer import TappedTransformerLayer
from megatron_oprd.models.model import Stage
from megatron_oprd.models.tap_rows import selected_rows
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import PassSettings, run_schedule


@torch.no_grad()
def score_blocks(stage: Stage, global_batch: GlobalBatch, topology: Topology) -> list[float]:
    """Return 1 - cosine of each block's input and output, averaged over the selected tokens of the representation loss.

    The score is ShortGPT's block influence (arXiv 2403.03853). The output of the last block is taken before the final
    norm. Cosines are computed in float64 from hidden states in the model's dtype.

    Args:
        stage: this rank's chunks of the model, in evaluation mode.
        global_batch: the tokens, the same on every rank.

    Returns: the scores of all blocks in order, the same on every rank.
    Communicates over: all groups of the layout.
    """
    depth = global_batch.student.num_layers
    sums = torch.zeros(depth, dtype=torch.float64, device=topology.device)

    def add_cosines(layer: TappedTransformerLayer, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
        selected = keywords["packed_seq_params"].tap.selected
        before, after = (
            selected_rows(states, selected).double()
            for states in (arguments[0] if arguments else keywords["hidden_states"], output[0])
        )
        sums[layer.layer_number - 1] += (1 - torch.cosine_similarity(before, after, dim=-1)).sum()

    micro_batches = global_batch.micro_batches(topology)
    taps: Iterator[_SelectedRows] = (_SelectedRows(batch.representation.selected) for batch in micro_batches)
    layers = [layer for layer in stage.modules() if isinstance(layer, TappedTransformerLayer)]
    with ExitStack() as hooks:
        # Hooks see a block's input too, which taps do not. Nothing is recomputed here, so each block runs once.
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add_cosines, with_kwargs=True))
        run_schedule(list(stage), topology, micro_batches, taps, PassSettings())
    values: list[float] = sums.tolist()
    for group in (*topology.token_groups, topology.groups.pp):
        values = sum_over(values, group, topology.device)
    return [value / global_batch.representation.counts.tokens for value in values]


class _SelectedRows:
    """A tap that changes nothing. It carries the selected rows of its micro-batch to the hooks."""

    def __init__(self, selected: torch.Tensor) -> None:
        self.selected = selected

    def __call__(self, key: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states
