"""A Megatron model held against the transformers model it was converted from: weights, hidden states and logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_oprd.hf.export import gather_hf_tensors
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import gather_vocabulary, pass_through
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import FINAL_STATES, ModelSpec


@dataclass(frozen=True)
class Comparison:
    """`errors`: the largest relative error over tokens of each layer (1-based) and of the logits, by name in the order
    of the forward pass. `weights`: Hugging Face names of the tensors that are not equal bit for bit."""

    errors: dict[str, float]
    weights: tuple[str, ...]

    def first_difference(self, tolerance: float) -> str | None:
        """The first part whose weights differ or whose error exceeds the tolerance (NaN does), or None."""
        wrong = {part_of(name) for name in self.weights}
        wrong |= {name for name, error in self.errors.items() if not error <= tolerance}
        return next((part for part in ("embedding", *self.errors, "head") if part in wrong), None)


def part_of(hf_name: str) -> str:
    """The part of the model that a Hugging Face tensor belongs to: embedding, layer N (1-based) or head."""
    layer = re.match(r"model\.layers\.(\d+)\.", hf_name)
    if layer:
        return f"layer {int(layer[1]) + 1}"
    return "embedding" if "embed_tokens" in hf_name else "head"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max over tokens of |actual - expected| / |expected|, Euclidean norms in float64; both [tokens, width]."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max().item()


def compare_weights(
    stage: Stage, reader: HFReader, spec: ModelSpec, topology: Topology, stored: torch.dtype
) -> tuple[str, ...]:
    """Names of the tensors that differ from the folder's, both rounded to the dtype `stored`; () except on rank 0.

    Collective over the world: gathers one parameter at a time.
    """
    different = []
    for name, tensor in gather_hf_tensors(stage, spec, topology):
        if not torch.equal(reader.read(name).to(stored).to(tensor.dtype), tensor.cpu()):
            different.append(name)
    return tuple(different)


@torch.no_grad()
def compare_states(
    stage: Stage,
    hf_model: torch.nn.Module | None,
    spec: ModelSpec,
    topology: Topology,
    lengths: Sequence[int],
) -> dict[str, float]:
    """The errors of a `Comparison` over random token sequences of these lengths, on rank 0; {} elsewhere.

    `hf_model`: the transformers model, on rank 0. Collective over the world.
    """
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    for length in lengths:
        tokens = torch.randint(0, spec.vocab_size, (length,), generator=generator)
        states = all_states(stage, spec, topology, tokens)
        if topology.rank != 0:
            continue
        assert hf_model is not None
        output = hf_model(tokens[None], output_hidden_states=True)
        expected = {f"layer {n}": state[0] for n, state in enumerate(output.hidden_states) if n}
        expected["logits"] = output.logits[0]
        for name, tensor in expected.items():
            error, largest = relative_error(states[name], tensor), errors.get(name, 0.0)
            errors[name] = largest if error <= largest else error  # max() could lose a NaN
    return errors


@torch.no_grad()
def all_states(stage: Stage, spec: ModelSpec, topology: Topology, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every layer's hidden state [tokens, hidden] (the last one after the final norm) and the logits
    [tokens, vocabulary] of one sequence, on the CPU, the same on every rank.

    Communicates over the tensor-, expert- and pipeline-parallel groups. Not for context and sequence parallelism,
    under which a rank sees a part of the sequence.
    """
    states: dict[str, torch.Tensor] = {}

    def tap(layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer != FINAL_STATES:
            states[f"layer {layer}"] = hidden_states[:, 0].cpu()
        return hidden_states

    tokens = tokens.to(topology.device)
    rows = torch.arange(len(tokens), device=topology.device)
    batch = MicroBatch(
        position_ids=rows,
        lengths=torch.full_like(rows, len(tokens)),
        bounds=(0, len(tokens)),
        tap=tap,
        normed_layer=spec.num_layers,
        logit_rows=rows,
    )
    logits = pass_through(stage, topology, tokens, batch)
    if logits is not None:
        states["logits"] = gather_vocabulary(logits, topology, spec.vocab_size).cpu()
    return {name: state for held in gather_objects(states, topology.groups.pp) for name, state in held.items()}


def open_hf_model(folder: str | Path, stored: torch.dtype, compute: torch.dtype) -> torch.nn.Module:
    """The transformers model of a folder, its weights rounded to `stored` and then cast to `compute`, on the CPU."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored, local_files_only=True)
    return model.to(compute).eval()
