"""The run that a dry run describes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oprd.config import Config
from megatron_oprd.hf.names import padded_vocab_size
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.launch.setup import Setup


@dataclass(frozen=True)
class PlannedRun:
    """The configuration and the models of a run, and the sizes on which its memory and time depend."""

    config: Config
    setup: Setup
    lengths: Lengths  # the most tokens of a sequence and of a response
    bridge_rank: int | None = None  # rank r of the bridge; None without a bridge
    evaluation_prompts: tuple[int, ...] = ()  # tokens of each prompt of an evaluation; empty without evaluations

    @classmethod
    def of(cls, inputs: Inputs) -> PlannedRun:
        """Return the run of these inputs."""
        prompts = inputs.evaluation_prompts.prompts if inputs.evaluation_prompts else ()
        lengths = tuple(len(prompt.prompt_ids) for prompt in prompts)
        return cls(inputs.config, inputs.setup, inputs.lengths, inputs.bridge_rank, lengths)

    @property
    def lm_head_rows(self) -> int:
        """Return the rows of an LM head on one rank."""
        tensor_size = self.config.parallel.tensor
        return padded_vocab_size(self.setup.student, tensor_size) // tensor_size

    @property
    def rollouts_per_step(self) -> int:
        """Return the number of rollouts of a step, over all ranks."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt
