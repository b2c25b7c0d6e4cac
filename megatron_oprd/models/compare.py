"""Compare a Megatron model with the transformers model of the same weights: weights, hidden states and logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_oprd.hf.export import gather_hf_tensors
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import gather_vocabulary, pass_through
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import FINAL_STATES, UserError


@dataclass(frozen=True)
class Comparison:
    """The differences between two models."""

    errors: dict[str, float]  # largest relative error over tokens, by "layer N" (N from 1) and "logits", in this order
    weights: tuple[str, ...]  # Hugging Face names of the tensors that are not equal bit for bit

    def first_difference(self, tolerance: float) -> str | None:
        """Return the first part whose weights differ or whose error exceeds the tolerance or is NaN, else None."""
        wrong = {part_of(name) for name in self.weights}
        wrong |= {name for name, error in self.errors.items() if not error <= tolerance}
        return next((part for part in ("embedding", *self.errors, "head") if part in wrong), None)


def part_of(hf_name: str) -> str:
    """Return the part of the model with a Hugging Face tensor: embedding, layer N (N from 1) or head."""
    layer = re.match(r"model\.layers\.(\d+)\.", hf_name)
    if layer:
        return f"layer {int(layer[1]) + 1}"
    return "embedding" if "embed_tokens" in hf_name else "head"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest |actual - expected| / |expected| over tokens, from Euclidean norms in float64.

    Args:
        actual, expected: [tokens, width].
    """
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max().item()


def compare_weights(
    stage: Stage, reader: HFReader, spec: ModelSpec, topology: Topology, stored: torch.dtype
) -> tuple[str, ...]:
    """Return the names of the tensors that differ from those in the folder, on rank 0; an empty tuple on other ranks.

    Collective over the world. Rank 0 gathers one parameter at a time.

    Args:
        stored: dtype to which the tensors of the folder are rounded before the comparison.
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
    """Return the errors for a `Comparison` on random token sequences, on rank 0; an empty dictionary on other ranks.

    Collective over the world.

    Args:
        hf_model: the transformers model on rank 0; None on other ranks.
        lengths: tokens of each sequence.
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
            errors[name] = largest if error <= largest else error  # max() may drop a NaN
    return errors


@torch.no_grad()
def all_states(stage: Stage, spec: ModelSpec, topology: Topology, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the hidden states of every layer and the logits of one sequence, on the CPU, equal on every rank.

    Context and sequence parallelism are not supported, since each rank then has only a part of the sequence.

    Args:
        tokens: [tokens] int64.

    Returns:
        "layer N": [tokens, hidden] (the last layer after the final norm); "logits": [tokens, vocabulary].

    Communicates over: the tensor-, expert- and pipeline-parallel groups.
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
    return {
        name: state
        for stage_states in gather_objects(states, topology.groups.pp)
        for name, state in stage_states.items()
    }


def open_hf_model(folder: str | Path, stored: torch.dtype, compute: torch.dtype) -> torch.nn.Module:
    """Load a transformers model on the CPU, with weights rounded to `stored` and then cast to `compute`.

    transformers opens FP8 weights only if accelerate is installed. Without it, transformers gets weights that HFReader
    has dequantised. Raises UserError for a folder that needs another package.
    """
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored, local_files_only=True)
    except ImportError as error:
        reader = HFReader(folder)
        if not reader.quantized:
            reason = error_line(error, None)
            raise UserError(f"transformers cannot open {folder}: {reason}; install what it names") from None
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        weights = {name: reader.read(name).to(stored) for name in reader.names()}
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=stored)
    return model.to(compute).eval()
