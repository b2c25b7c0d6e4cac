"""Build models in any precision and compute their hidden states and gradients, on a GPU or on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import load_hf, named_parameters
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.launch.setup import with_dtype
from megatron_oprd.models.build import build_model
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import ModelPrecision, Precision, plan_precision
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import build_student
from megatron_oprd.training.student_step import student_step
from megatron_oprd.types import FINAL_STATES, Rollout, StepReport

TE = ModelPrecision(transformer_engine=True, arguments={"cp_comm_type": "p2p"})
# Both shapes have grouped queries and widths divisible by the FP8 block size of 128. SMALL is for tests on a CPU.
LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (3, 14, 33, 64, 142)  # 256 tokens in all, a multiple of the FP8 block size


@dataclass(frozen=True)
class Gpu:
    topology: Topology
    machine: Machine

    @property
    def device(self) -> torch.device:
        return self.topology.device

    def config(self, *settings: str) -> Config:
        paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
        return with_dtype(load_config(None, [*paths, "rollout.engine=replay", *settings]))

    def precision(self, *settings: str) -> Precision:
        """Return the planned precision of `precision.*` settings, as `train` plans it."""
        config = self.config(*settings)
        return plan_precision(config.precision, config.parallel, self.machine)

    def load(self, folder: Path, precision: ModelPrecision, dtype: torch.dtype = torch.bfloat16) -> Stage:
        """Load the model of a Hugging Face folder."""
        spec = read_model_spec(folder)
        stage = build_model(spec, self.topology, dtype, precision=precision)
        load_hf(stage, HFReader(folder), spec)
        return stage


def save_model(folder: Path, family: str = "Qwen3", seed: int = 0, **sizes: int | float) -> Path:
    """Save a random model with weights rounded to bf16, so that every reader gets equal weights."""
    of_blocks = LARGE if torch.cuda.is_available() else SMALL
    shape = {**of_blocks, "num_hidden_layers": 4, "initializer_range": 0.03, "vocab_size": 384, **sizes}
    if family == "Qwen3":
        shape["head_dim"] = shape["hidden_size"] // shape["num_attention_heads"]
    model = random_hf_model(family, seed=seed, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return save(model, folder)


def sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=draw) for length in lengths]


def run(stage: Stage, rows: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, dict]:
    """Return the logits [tokens, vocabulary] and the states {layer: [tokens, hidden]} of one packed micro-batch.

    The last layer's states are those after the final norm. FP8 copies of the weights are made anew.
    """
    states = {}

    def tap(layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer != FINAL_STATES:  # equal to the states of the last layer here
            states[layer] = hidden_states[:, 0]
        return hidden_states

    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    batch = MicroBatch(
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]).to(device),
        lengths=torch.cat([torch.full((len(row),), len(row)) for row in rows]).to(device),
        bounds=tuple(bounds),
        tap=tap,
        normed_layer=stage.config.num_layers,
        logit_rows=torch.arange(bounds[-1], device=device),
    )
    stage[0].set_is_first_microbatch()
    return stage[0].run(torch.cat(list(rows)).to(device), batch), states


def gradients(stage: Stage, rows: Sequence[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the gradients of a fixed weighted sum of all hidden states, by global name, on the CPU in float64."""
    stage.train()
    stage.zero_grad()
    _, states = run(stage, rows, device)
    draw = torch.Generator().manual_seed(2)
    total = sum(
        (state.float() * torch.randn(state.shape, generator=draw).to(device)).sum() for state in states.values()
    )
    total.backward()
    named = named_parameters(stage).items()
    return {name: parameter.grad.double().cpu() for name, parameter in named if parameter.grad is not None}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def training(
    gpu: Gpu, folder: Path, *settings: str, weights: dict[str, torch.Tensor] | None = None
) -> tuple[Iterator[StepReport], Stage]:
    """Return an iterator over updates on the same rollouts and targets, and the trained stage.

    Each `next` runs one update. `weights`, if given, replace the weights of the model in `folder`.
    """
    schedule = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0", "optimizer.lr=1.0e-3")
    config = gpu.config(*schedule, *settings)
    spec = read_model_spec(folder)
    plan = plan_teacher(config, spec, spec).plan
    precision = gpu.precision(*settings)
    stage = gpu.load(folder, precision.student)
    if weights is not None:
        with torch.no_grad():
            for name, parameter in named_parameters(stage).items():
                parameter.copy_(weights[name])
    student = build_student(stage, config, plan, gpu.topology)
    rows = [row.tolist() for row in sequences(spec.vocab_size, (64, 96, 96))]
    rollouts = tuple(Rollout(tuple(row[:8]), tuple(row[8:]), (1,) * (len(row) - 8), "replay") for row in rows)
    teachers = (0,) * len(rollouts)
    global_batch = GlobalBatch(rollouts, teachers, config.loss, config.batch, spec, precision.pad_tokens)
    micro_batches = global_batch.micro_batches(gpu.topology)
    readers = plan.readers(gpu.topology.stages)
    draw = torch.Generator().manual_seed(4)
    states = [
        {
            layer: torch.randn(len(batch.representation), spec.hidden_size, generator=draw).to(gpu.device).bfloat16()
            for layer in sorted(readers)
        }
        for batch in micro_batches
    ]

    def reports() -> Iterator[StepReport]:
        while True:
            targets = TeacherTargets(readers, gpu.device)
            for number, one in enumerate(states):
                targets.put(number, one)
            yield student_step(student, global_batch, micro_batches, targets)

    return reports(), stage
