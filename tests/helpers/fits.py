"""Fit a bridge on real ranks, record the states that went into it, and compute the states of Hugging Face's models."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers

from megatron_oprd.bridge.fitting import procedure
from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.setup import FitRun, check_inputs, fitting_config
from megatron_oprd.bridge.fitting.streamed_moments import StreamedMoments
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.config import load_config
from megatron_oprd.launch.assemble import build_models
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.reference import selected_indices
from megatron_oprd.types import LayerPair, PairBridge

States = dict[LayerPair, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # student's, teacher's, held out


@dataclass(frozen=True)
class RecordedFit:
    """The states that the ranks of a fit used, each token once, the sums of them, and the folder of the fit."""

    folder: Path
    states: States
    moments: dict[LayerPair, dict[str, Moments]]

    def maps(self, rank: int) -> Mapping[LayerPair, PairBridge]:
        return read_bridge(self.folder / f"rank_{rank}").maps

    def reported_fits(self) -> dict[tuple[LayerPair, int], dict[str, float]]:
        """Return the rows of fit.json by pair and rank."""
        rows = json.loads((self.folder / "fit.json").read_text())["fits"]
        return {(LayerPair(row["student"], row["teacher"]), row["rank"]): row for row in rows}


def write_replay(path: Path, lengths: Sequence[int], vocab_size: int) -> list[dict]:
    """Write rollouts with responses of these lengths, in which some tokens are not sampled, and return the rows."""
    draw = random.Random(11)
    rows = []
    for number, length in enumerate(lengths):
        prompt, response = (draw.choices(range(vocab_size), k=size) for size in (1 + number % 5, length))
        mask = [1] * length if number % 3 else [int(place % 4 != 1) for place in range(length)]
        rows.append({"prompt_ids": prompt, "response_ids": response, "response_mask": mask})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def recorded_fit(world_size: int, arguments: Sequence[str]) -> RecordedFit:
    """Run `megatron_oprd.bridge.fit` with these arguments on several ranks."""
    return run_distributed(world_size, _recorded_fit, list(arguments))[0]


def fit_quietly(arguments: Sequence[str]) -> FitRun:
    """Run the command without its output. Collective over the world."""
    inputs = read_inputs(fitting_config(load_config(None, list(arguments))), fitting=True)
    check_inputs(inputs)
    fit_run = FitRun(inputs, build_models(inputs))
    with contextlib.redirect_stdout(io.StringIO()):
        procedure.fit_bridge(fit_run)
    return fit_run


def _recorded_fit(rank: int, arguments: list[str]) -> RecordedFit | None:
    local_states, kept = defaultdict(list), {}
    add, compute_moments = StreamedMoments.add, procedure.compute_moments

    def recording_add(self, pair, *states):
        local_states[pair].append(tuple(tensor.clone() for tensor in states))
        add(self, pair, *states)

    def recording_moments(*arguments):
        kept["moments"] = compute_moments(*arguments)
        return kept["moments"]

    with (
        mock.patch.object(StreamedMoments, "add", recording_add),
        mock.patch.object(procedure, "compute_moments", recording_moments),
    ):
        fit_run = fit_quietly(arguments)
    topology = fit_run.models.topology
    if topology.tensor_rank and not topology.sequence_parallel:
        local_states.clear()  # they are those of tensor rank 0
    world = torch.distributed.group.WORLD
    seen = gather_objects(dict(local_states), world)
    sums = gather_objects(kept["moments"].total, world)
    if rank:
        return None
    moments: dict[LayerPair, dict[str, Moments]] = {}
    for of_rank in sums:
        for pair, parts in of_rank.items():
            first = moments.setdefault(pair, parts)
            for part, one in parts.items():
                for name, tensor in one.tensors().items():
                    assert torch.equal(tensor, first[part].tensors()[name]), (pair, part, name)
    return RecordedFit(fit_run.folder, _joined(seen), moments)


def _joined(seen: Sequence[Mapping[LayerPair, list]]) -> States:
    states = {}
    for pair in sorted({pair for of_rank in seen for pair in of_rank}, key=lambda pair: pair.student):
        batches = [batch for of_rank in seen for batch in of_rank.get(pair, [])]
        states[pair] = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return states


def layer_map(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Return the layer pairs of equation (11) of OPRD: equal fractions of the depth, halves rounded up."""
    scale = (teacher_layers - 1) / (student_layers - 1)
    return [LayerPair(n + 1, math.floor(n * scale + 0.5) + 1) for n in range(student_layers)]


def reference_states(
    student: Path, teacher: Path, rows: Sequence[Mapping], pairs: Sequence[LayerPair], *, k: int, held_out: set[int]
) -> States:
    """Return the hidden states of Hugging Face's models in float64 at the last k sampled tokens.

    `held_out` has the numbers of the held-out rows.
    """
    read_by = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (student, teacher)
    ]
    collected: dict[LayerPair, list] = {pair: [] for pair in pairs}
    for number, row in enumerate(rows):
        ids, start = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["prompt_ids"])
        chosen = [start + t for t in selected_indices(row["response_mask"], "last_k", k)]
        with torch.no_grad():
            of_student, of_teacher = (model(ids, output_hidden_states=True).hidden_states for model in read_by)
        for pair in pairs:
            judged = torch.full((len(chosen),), number in held_out)
            collected[pair].append((of_student[pair.student][0, chosen], of_teacher[pair.teacher][0, chosen], judged))
    return _joined([collected])
