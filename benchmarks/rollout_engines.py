"""The sides that `benchmarks/rollout.py` compares: the embedded engine and Hugging Face's `generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.rollout_workloads import Workload
from megatron_oprd.config import ParallelConfig, PrecisionConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES, build_model
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import plan_precision
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import Prompt

Answers = list[tuple[int, ...]]
Generate = Callable[[Sequence[Prompt], Sequence[int]], Answers]  # prompts and their limits -> responses


@dataclass(frozen=True)
class Side:
    """An engine of the comparison."""

    name: str
    prepare: Callable[[Workload], Generate]  # returns the function that answers a workload's prompts
    version: str | None = None  # if it is not this environment's
    sync: Callable[[], object] | None = None  # transfers the student's weights; None: nothing to transfer
    server_bytes: Callable[[], int] | None = None  # memory of the side's server; None: it runs in this process


def student_stage(
    folder: Path, topology: Topology, dtype: str, machine: Machine, attention: str = "sdpa"
) -> tuple[Stage, ModelSpec]:
    """Return the student with the weights of a Hugging Face folder, as training builds it.

    Args:
        attention: the value of `precision.attention`: sdpa for our own modules, te for Transformer Engine's.
    """
    spec = read_model_spec(folder)
    config = PrecisionConfig(dtype=dtype, attention=attention)
    precision = plan_precision(config, ParallelConfig(), machine).student
    stage = build_model(spec, topology, DTYPES[dtype], precision=precision)
    load_hf(stage, HFReader(folder), spec)
    return stage, spec


def embedded_side(student: Callable[[], tuple[Stage, ModelSpec]], topology: Topology, name: str = "embedded") -> Side:
    """Return the embedded engine.

    Args:
        student: returns the student, which is built when the first workload is prepared.
    """
    built = functools.cache(student)

    def prepare(workload: Workload) -> Generate:
        stage, spec = built()
        sampling = Sampling(temperature=workload.temperature, max_new_tokens=workload.new_tokens[1])
        engine = EmbeddedEngine(stage, spec, topology, sampling, seed=0, max_batch=workload.rows)
        return lambda prompts, limits: [row.response_ids for row in engine.generate(prompts, 0, limits=limits)]

    return Side(name, prepare)


def transformers_side(model: transformers.PreTrainedModel) -> Side:
    """Return Hugging Face's `generate`, as it comes, in consecutive batches of left-padded prompts."""

    def prepare(workload: Workload) -> Generate:
        return lambda prompts, limits: [
            answer
            for start in range(0, len(prompts), workload.rows)
            for answer in _hf_batch(
                model,
                prompts[start : start + workload.rows],
                limits[start : start + workload.rows],
                workload.temperature,
            )
        ]

    return Side("transformers", prepare)


class StopAt(transformers.StoppingCriteria):
    """Stop row i after `limits[i]` new tokens."""

    def __init__(self, prompt_tokens: int, limits: torch.Tensor) -> None:
        self.prompt_tokens, self.limits = prompt_tokens, limits

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_tokens >= self.limits


def _hf_batch(
    model: transformers.PreTrainedModel, prompts: Sequence[Prompt], limits: Sequence[int], temperature: float
) -> Answers:
    width = max(len(prompt.prompt_ids) for prompt in prompts)
    padding = [[0] * (width - len(prompt.prompt_ids)) for prompt in prompts]
    ids = [pad + list(prompt.prompt_ids) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [pad + [1] * len(prompt.prompt_ids) for pad, prompt in zip(padding, prompts, strict=True)]
    criteria = [StopAt(width, torch.tensor(limits, device=model.device))] if len(set(limits)) > 1 else []
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(limits),
        stopping_criteria=transformers.StoppingCriteriaList(criteria),
        pad_token_id=0,
        **sampled,
    )
    return [tuple(row[width : width + limit]) for row, limit in zip(output.tolist(), limits, strict=True)]
