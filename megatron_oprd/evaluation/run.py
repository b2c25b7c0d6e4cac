"""Evaluation over the replicas of the student."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.sample import Sample, evaluate
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import RolloutEngine
from megatron_oprd.types import Prompt


def evaluate_over_ranks(
    engine: RolloutEngine, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, topology: Topology
) -> list[Sample]:
    """Graded samples of all prompts, in their order, on every rank. Each replica makes its share; the
    samples do not depend on how many there are. Collective over the world."""
    mine = split(prompts, topology.replica_rank, topology.num_replicas)
    # Always "step 0": every evaluation of a run draws the same random numbers, so that only the weights differ.
    samples = evaluate(engine.generate, mine, tokenizer, step=0)
    return [sample for part in gather_objects(samples, topology.groups.dp_cp) for sample in part]
