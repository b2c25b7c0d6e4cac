"""Sampling of graded answers from the student, on one replica or shared over all of them.

`train` and `evaluate` call `evaluate_over_ranks`; the scores over the samples are in `scores.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.grading import Sample, grade
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import RolloutEngine
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.types import Prompt, Rollout

Generate = Callable[[Sequence[Prompt], int], list[Rollout]]  # (prompts, step) -> the rollouts of each prompt


def evaluate_over_ranks(
    engine: RolloutEngine, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, topology: Topology
) -> list[Sample]:
    """Sample and grade answers to all prompts, split over the replicas of the student.

    Returns: all samples in the order of the prompts, the same on every rank and for any number of replicas.
    Communicates over the world.
    """
    local_prompts = split(prompts, topology.replica_rank, topology.num_replicas)
    # Always "step 0": every evaluation of a run draws the same random numbers, so that only the weights differ.
    samples = sample_and_grade(engine.generate, local_prompts, tokenizer, step=0)
    return [sample for of_replica in gather_objects(samples, topology.groups.dp_cp) for sample in of_replica]


def sample_and_grade(
    generate: Generate, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, step: int
) -> list[Sample]:
    """Sample responses to `prompts` with `generate`, decode them and grade them.

    Raises ValueError when `generate` returns a rollout of a prompt that is not in `prompts`.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    samples = []
    for rollout in generate(prompts, step):
        progress.beat()
        if rollout.prompt_index not in by_index:
            raise ValueError(f"a rollout belongs to prompt {rollout.prompt_index}, which was not asked for")
        samples.append(grade(by_index[rollout.prompt_index], rollout, tokenizer))
    return samples


def write_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Write the samples to a JSONL file, one object a line, and replace an existing file.

    One rank calls this. Raises UserError when the disk does not accept the file.
    """
    lines = [
        {
            "step": step,
            "prompt": sample.prompt.text,
            "response": sample.response_text,
            "prompt_index": sample.prompt.index,
            "sample_index": sample.sample_index,
            "finish_reason": sample.finish_reason,
            "num_tokens": sample.num_tokens,
            "data_source": sample.prompt.data_source,
            "ground_truth": sample.prompt.ground_truth,
            "correct": sample.correct,
            "answered": sample.answered,
        }
        for sample in samples
    ]
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
