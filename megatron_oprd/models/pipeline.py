"""Run a forward pass through all pipeline stages outside mcore's schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.topology import Topology


def pass_through(stage: Stage, topology: Topology, tokens: torch.Tensor, batch: MicroBatch) -> torch.Tensor | None:
    """Run `tokens` [tokens] through the first chunk of every pipeline rank, then through the second, and so on.

    All ranks of the replica call this with the same tokens, and sequence parallelism is off.

    Returns: the output of the last stage, [rows, vocabulary / tensor size] with `logit_rows`; None on other ranks.
    Communicates over: the pipeline-, tensor- and expert-parallel groups.
    """

    def run(chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is not None:
            stage[chunk].set_input_tensor(hidden)
        return stage[chunk].run(tokens, batch)

    return relay(topology, (len(tokens), 1, stage.config.hidden_size), stage.config.params_dtype, run)


def relay(
    topology: Topology,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    run: Callable[[int, torch.Tensor | None], torch.Tensor | None],
) -> torch.Tensor | None:
    """Call `run` for each chunk of this rank, with the result of the chunk before, from another rank.

    Args:
        shape: the shape of the hidden states between chunks.
        run: a function of the chunk's number on this rank and its input (None for the first stage).

    Returns: the result of the last stage; None on other ranks.
    Communicates over: the pipeline-parallel group.
    """
    group, output = topology.groups.pp, None
    for chunk, number in enumerate(topology.stages):
        hidden = None
        if number > 0:
            hidden = torch.empty(shape, dtype=dtype, device=topology.device)
            before = (topology.pipeline_rank - 1) % topology.pipeline_size
            dist.recv(hidden, dist.get_global_rank(group, before), group=group)
        output = run(chunk, hidden)
        if number < topology.num_stages - 1:
            assert output is not None
            after = (topology.pipeline_rank + 1) % topology.pipeline_size
            dist.send(output.contiguous(), dist.get_global_rank(group, after), group=group)
            output = None
    return output


def gather_vocabulary(logits: torch.Tensor, topology: Topology, vocab_size: int) -> torch.Tensor:
    """Gather logits [rows, vocabulary / tensor size] to [rows, vocab_size], without the padding of the vocabulary.

    Communicates over: the tensor-parallel group.
    """
    if topology.tensor_size > 1:
        parts = [torch.empty_like(logits) for _ in range(topology.tensor_size)]
        dist.all_gather(parts, logits.contiguous(), group=topology.groups.tp)
        logits = torch.cat(parts, dim=-1)
    return logits[:, :vocab_size]
