"""The recomputations that `recompute: auto` chooses from, and the operations that each of them repeats."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.recompute import Recomputation, available_parts
from megatron_oprd.planning.delta_net_costs import rule_flops
from megatron_oprd.planning.flops import attention_flops, linear_flops
from megatron_oprd.planning.planned_run import PlannedRun

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Option:
    """A recomputation of one pipeline rank."""

    recomputation: Recomputation
    operations: float  # of the repeated matrix products and attention, for one of the longest sequences


def part_sets(run: PlannedRun) -> list[frozenset[str]]:
    """Return the sets of parts that are worth recomputing together, those that repeat the fewest operations first.

    Norms and activation repeat no matrix product. `core_attn` is left out: it repeats more operations for each byte
    than a block does once sequences are long, and Megatron-Core adds its gradients in another order.
    """
    fp8, te = run.config.precision.fp8 is not None, run.setup.precision.student.transformer_engine
    available = available_parts(run.setup.student, transformer_engine=te, fp8=fp8)
    norms = frozenset({"layernorm"} & set(available))
    sets = [NOTHING, norms, norms | ({"activation"} & set(available)), norms | ({"mlp"} & set(available))]
    return list(dict.fromkeys(sets))


def recompute_options(run: PlannedRun, pipeline_rank: int) -> list[Option]:
    """Return all options of a pipeline rank, ordered by the operations that they repeat.

    Of options that repeat the same operations, the one with fewer parts comes first.
    """
    chunks, sets = blocks_of_rank(run, pipeline_rank), part_sets(run)
    most = max(map(len, chunks), default=0)
    options = []
    for blocks, number in itertools.product(range(most + 1), range(len(sets) if most else 1)):
        if blocks == most and number:  # no block is left for the parts
            continue
        complete = [layer for chunk in chunks for layer in chunk[:blocks]]
        others = [layer for chunk in chunks for layer in chunk[blocks:]]
        operations = sum(_block_operations(run, layer) for layer in complete)
        if "mlp" in sets[number]:
            operations += sum(_mlp_operations(run, layer) for layer in others)
        options.append((operations, number, blocks, Option(Recomputation(sets[number], blocks), operations)))
    return [option for *_, option in sorted(options, key=lambda one: one[:3])]


def blocks_of_rank(run: PlannedRun, pipeline_rank: int) -> list[range]:
    """Return the layers (0-based) of each chunk of a pipeline rank, without layers above the highest compared one."""
    stages, last = run.setup.student_stages, run.setup.layer_plan.student_last_layer
    ends = list(itertools.accumulate(stages, initial=0))
    own = range(pipeline_rank, len(stages), run.config.parallel.pipeline)
    return [range(min(ends[stage], last), min(ends[stage + 1], last)) for stage in own]


def forward_operations(run: PlannedRun, pipeline_rank: int) -> float:
    """Return the operations of a forward pass of one of the longest sequences through the blocks of a rank."""
    return sum(_block_operations(run, layer) for chunk in blocks_of_rank(run, pipeline_rank) for layer in chunk)


def _block_operations(run: PlannedRun, layer: int) -> float:
    spec, tokens = run.setup.student, run.lengths.sequence
    linear = spec.delta_net if layer in spec.linear_layers else None
    mixing = attention_flops(spec, [tokens]) if linear is None else rule_flops(linear, [tokens])
    return tokens * linear_flops(spec, layer) + mixing


def _mlp_operations(run: PlannedRun, layer: int) -> float:
    """Return the operations that the part `mlp` repeats: a dense MLP's first product, or a layer of experts."""
    return run.lengths.sequence * _repeated_in_mlp(run.setup.student, layer)


def _repeated_in_mlp(spec: ModelSpec, layer: int) -> float:
    if layer in spec.sparse_layers:
        experts = spec.experts_per_token * 3 * spec.moe_ffn_hidden_size
        return 2 * spec.hidden_size * (spec.num_experts + experts)
    return 2 * spec.hidden_size * 2 * spec.ffn_hidden_size
