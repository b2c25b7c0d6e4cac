"""Run one student update (teacher pass, forward, backward, AdamW) of a method, by the package or in plain torch.

    python benchmarks/updates.py SIDE METHOD WORKLOAD

SIDE is `megatron_oprd` or `plain torch` (Hugging Face's model). For each line on stdin, `time` or `peak`, the process
runs an update and prints its seconds, or its peak bytes beside weights, gradients, optimizer state and teacher.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.config import Config, load_config
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import Precision
from megatron_oprd.runtime import platform
from megatron_oprd.testing.random_update import build_random_update
from megatron_oprd.types import DeviceBatch, Rollout

Update = Callable[[], None]
K = 16
ALONE = ("loss.representation.weight=0", "loss.output.metrics_every=0")


def _output(objective: str, *more: str) -> tuple[str, ...]:
    return (*ALONE, f"loss.output.objective={objective}", *(f"loss.output.{one}" for one in more))


METHODS = {
    "OPRD, last tokens": (),
    "OPRD, all tokens": ("loss.representation.positions=all",),
    "sampled token": _output("sampled"),
    "sampled token, unchunked": _output("sampled", "chunk_tokens=null"),
    "top-16": _output("topk_surrogate"),
    "top-16, unchunked": _output("topk_surrogate", "chunk_tokens=null"),
    "full KL": _output("full_kl"),
    "full KL, unchunked": _output("full_kl", "chunk_tokens=null"),
}
AUTHORED = "top-16 as authored"  # unchunked, after an extra forward pass of the student that finds its top 16


@dataclass(frozen=True)
class Workload:
    """A model shape and the rollouts of an update.

    Each response follows a prompt of `prompt` tokens. `OPRD, last tokens` compares the last `last` tokens of a
    response; chunked objectives process `chunk` tokens at a time.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    prompt: int
    responses: tuple[int, ...]
    last: int
    chunk: int | str = "auto"
    dtype: str = "fp32"

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture="Qwen2ForCausalLM",
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocabulary,
            norm_epsilon=1e-6,
            rope_theta=10000.0,
            rotary_dim=self.hidden // self.heads,
            max_position_embeddings=131072,
            tied_embeddings=False,
            qkv_bias=True,
            qk_norm=False,
        )

    @property
    def head_over_body(self) -> float:
        """Return the multiplications of the LM head divided by those of all blocks."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.groups * (self.hidden // self.heads)
        return self.vocabulary * self.hidden / (self.layers * (attention + 3 * self.hidden * self.ffn))

    def rollouts(self) -> list[Rollout]:
        draw = torch.Generator().manual_seed(0)
        rows = [
            torch.randint(self.vocabulary, (self.prompt + length,), generator=draw).tolist()
            for length in self.responses
        ]
        return [
            Rollout(tuple(row[: self.prompt]), tuple(row[self.prompt :]), (1,) * (len(row) - self.prompt), "replay")
            for row in rows
        ]

    def config(self, method: str, *changes: str) -> Config:
        """Return the configuration of a method, with full recomputation and one micro-batch; `changes` override it."""
        paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
        settings = [
            "rollout.engine=replay",
            f"precision.dtype={self.dtype}",
            "recompute.granularity=full",
            f"loss.representation.k={self.last}",
            f"loss.output.k={K}",
            f"loss.output.chunk_tokens={self.chunk}",
            f"batch.max_tokens_per_micro_batch={sum(self.responses) + self.prompt * len(self.responses)}",
        ]
        of_method = METHODS["top-16, unchunked" if method == AUTHORED else method]
        return load_config(None, [*paths, *settings, *of_method, *changes])


def megatron_update(
    workload: Workload, method: str, device: torch.device, precision: Precision | None = None
) -> Update:
    """Return an update as `train` runs it, with random weights; `precision` as in `build_random_update`."""
    config = workload.config(method)
    random_update = build_random_update(config, workload.spec, workload.rollouts(), device, precision)

    def update() -> None:
        if method == AUTHORED:
            _rank_tokens(random_update.stage, random_update.micro_batches[0])
        random_update.run()

    return update


@torch.no_grad()
def _rank_tokens(stage: Stage, batch: DeviceBatch) -> None:
    """Run the authors' extra pass: the student's top 16 and entropy from the logits of all tokens."""
    bounds = batch.host.bounds
    micro_batch = MicroBatch(
        position_ids=batch.position_ids, lengths=batch.lengths, bounds=bounds, logit_rows=batch.output.selected
    )
    _top_and_entropy(stage[-1].run(batch.tokens, micro_batch))


def _top_and_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = logits.float().log_softmax(-1)
    return log_probs.topk(K, dim=-1).indices, -(log_probs.exp() * log_probs).sum(-1)


def torch_update(workload: Workload, method: str, device: torch.device) -> Update:
    """Return the same update written by hand on Hugging Face's model: rows padded to the longest, logits of all tokens,
    gradient checkpointing, torch's AdamW."""
    student = _hugging_face(workload).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.01)
    student.gradient_checkpointing_enable()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rollouts = workload.rollouts()
    longest = workload.prompt + max(workload.responses)
    tokens, responds, attends = (torch.zeros(len(rollouts), longest, dtype=torch.int64) for _ in range(3))
    for row, rollout in enumerate(rollouts):
        length = workload.prompt + len(rollout.response_ids)
        tokens[row, :length] = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])
        responds[row, workload.prompt : length] = 1
        attends[row, :length] = 1
    batch = {"input_ids": tokens.to(device), "attention_mask": attends.to(device)}
    selected = responds.bool()
    if method == "OPRD, last tokens":
        selected &= responds.flip(1).cumsum(1).flip(1) <= workload.last
    selected = selected.to(device)

    def update() -> None:
        LOSSES_IN_TORCH[method](student, teacher, batch, selected).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return update


def _hugging_face(workload: Workload) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        intermediate_size=workload.ffn,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.groups,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config).to(DTYPES[workload.dtype])


def _states_loss(student: Any, teacher: Any, batch: dict, selected: torch.Tensor) -> torch.Tensor:
    """Return the OPRD loss of all layers on the selected tokens, a bool mask [rows, tokens]."""
    with torch.no_grad():
        targets = teacher(**batch, output_hidden_states=True).hidden_states[1:]
    states = student(**batch, output_hidden_states=True).hidden_states[1:]
    weights = (1 / (selected.sum(1) * len(selected)))[:, None].expand_as(selected)[selected]
    errors = [
        (one[selected].float() - target[selected].float()).square().mean(-1)
        for one, target in zip(states, targets, strict=True)
    ]
    return (torch.stack(errors) * weights).sum(1).mean()


def _top_loss(student: Any, teacher: Any, batch: dict, selected: torch.Tensor) -> torch.Tensor:
    """Return the top-16 surrogate loss as the authors run it."""
    with torch.no_grad():
        top, _ = _top_and_entropy(_logits(student, batch, selected))
        log_q = _log_probs(teacher, batch, selected).gather(1, top)
    log_p = _log_probs(student, batch, selected).gather(1, top)
    advantages = (log_p.softmax(-1) * (log_p - log_q)).detach()
    return (advantages * log_p).sum(-1).mean()


def _full_kl_loss(student: Any, teacher: Any, batch: dict, selected: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        log_q = _log_probs(teacher, batch, selected)
    log_p = _log_probs(student, batch, selected)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _log_probs(model: Any, batch: dict, selected: torch.Tensor) -> torch.Tensor:
    return _logits(model, batch, selected).float().log_softmax(-1)


def _logits(model: Any, batch: dict, selected: torch.Tensor) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] one position before each selected token."""
    logits: torch.Tensor = model(**batch).logits[selected.roll(-1, 1)]
    return logits


LOSSES_IN_TORCH = {
    "OPRD, last tokens": _states_loss,
    "OPRD, all tokens": _states_loss,
    AUTHORED: _top_loss,
    "full KL, unchunked": _full_kl_loss,
}
SIDES = {"megatron_oprd": megatron_update, "plain torch": torch_update}


def peak_of(update: Update, device: torch.device) -> int:
    """Return the peak bytes of an update above the memory in use before it."""
    gc.collect()
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_cuda else psutil.Process().memory_info().rss
    platform.reset_peak_memory(device)
    update()
    return platform.peak_memory_bytes(device) - before


def seconds_of(update: Update, device: torch.device) -> float:
    begin = time.perf_counter()
    update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    side, method, workload = sys.argv[1], sys.argv[2], Workload(**json.loads(sys.argv[3]))
    device = platform.choose_device("auto")
    update = SIDES[side](workload, method, device)
    update()  # makes the optimizer's state
    for line in sys.stdin:
        print({"time": seconds_of, "peak": peak_of}[line.strip()](update, device), flush=True)


if __name__ == "__main__":
    main()
