"""Memory and time of an evaluation during training, in which the student answers held-out prompts."""

from __future__ import annotations

import dataclasses

from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning.hardware import Hardware, Links
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_time import rollout_costs


def evaluation_run(run: PlannedRun) -> PlannedRun | None:
    """Return a run whose rollouts are the student's answers in one evaluation, or None if it gives no answers.

    The embedded engine generates these answers, also if servers generate the rollouts of training. Each answer has the
    most tokens, and each prompt those of the longest one.

    What else an evaluation does needs less memory than an update: both models run forward, without gradients, on stored
    answers of the teacher.
    """
    config, prompts = run.config, run.evaluation_prompts
    if not config.evaluation.every or not config.evaluation.samples or not prompts:
        return None
    response = config.evaluation_tokens
    longest = min(max(prompts) + response, run.setup.student.max_position_embeddings)
    rollout = config.rollout.model_copy(
        update={
            "engine": "megatron",
            "prompts_per_step": len(prompts),
            "samples_per_prompt": config.evaluation.samples,
            # The user measured the rate of the engine that generates the rollouts of training.
            "tokens_per_second": config.rollout.tokens_per_second if config.rollout.engine == "megatron" else None,
        }
    )
    lengths = Lengths(longest, min(response, longest), longest)
    return dataclasses.replace(run, config=config.model_copy(update={"rollout": rollout}), lengths=lengths)


def evaluation_seconds(run: PlannedRun, hardware: Hardware) -> float | None:
    """Return the seconds in which the student answers all prompts of an evaluation, or None without answers."""
    answers = evaluation_run(run)
    if answers is None:
        return None
    return sum(cost.seconds for cost in rollout_costs(answers, Links(hardware, run.setup.world_size)))
