"""Taps and losses on Megatron-Core's own GPTModel, without any other part of the training program, give the loss and
the gradients of plain autograd; and the listing in docs/library.md runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_oprd.config import ParallelConfig
from megatron_oprd.models.layer import tapped_layer_spec
from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.models.tap_params import with_tap
from megatron_oprd.models.taps import CaptureTap, StageLoss
from megatron_oprd.parallel.topology import build_topology
from megatron_oprd.runtime.cpu_stand_ins import cpu_devices
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.reference import token_error
from tests.helpers.commands import run_ranks

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, SEQUENCE, BATCH, VOCABULARY, MICRO_BATCHES = 4, 32, 8, 2, 64, 3
COMPARED = (1, 3, 4)
FULL_RECOMPUTATION = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def build(parallel, *, tapped=True, own_norm=False, **settings):
    """Return this rank's part of a GPTModel of Megatron-Core's local layer spec, in the layout that is in force.

    Without Transformer Engine, Megatron-Core's own norm refuses sequence parallelism: `own_norm` replaces it.
    """
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm" if own_norm else "LayerNorm",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        **settings,
    )
    spec = get_gpt_layer_local_spec()
    if own_norm:
        norms = dataclasses.replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
        layers = [dataclasses.replace(spec, submodules=norms)] * (LAYERS // parallel.pipeline)
        spec = TransformerBlockSubmodules(layers, layer_norm=RMSNorm)
    ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    spec = tapped_layer_spec(spec) if tapped else spec
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, *ends, position_embedding_type="rope")


def micro_batches():
    """Return tokens [batch, sequence], selected rows [N] and weights [N] of each micro-batch, with uneven N."""
    generator = torch.Generator().manual_seed(0)
    for number in range(MICRO_BATCHES):
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
        selected = torch.randperm(SEQUENCE * BATCH, generator=generator)[: 4 + 3 * number].sort().values
        yield tokens, selected, torch.rand(len(selected), generator=generator, dtype=torch.float64)


def forward(model, tokens, packed_seq_params=None):
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), mask, packed_seq_params=packed_seq_params)


def with_hooks(model, tokens):
    """Return the output of each layer, {layer: [sequence * batch, hidden]}, in the autograd graph."""
    states = {}

    def hook(layer, arguments, output):
        states[layer.layer_number] = output[0].flatten(0, 1)

    handles = [layer.register_forward_hook(hook) for layer in model.decoder.layers]
    forward(model, tokens)
    for handle in handles:
        handle.remove()
    return states


def by_autograd(student, teacher, normalize):
    """Return the loss and the gradients of an undivided student whose layers have no taps."""
    total = 0.0
    for tokens, selected, weights in micro_batches():
        with torch.no_grad():
            targets = with_hooks(teacher, tokens)
        states = with_hooks(student, tokens)
        for layer in COMPARED:
            for row, weight in zip(selected.tolist(), weights, strict=True):
                total = total + weight * token_error(states[layer][row], targets[layer][row], normalize)
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


def undivided_name(model, name):
    """Return the name of a parameter in the undivided model."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return name
    number = model.decoder.layers[int(layer[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[layer.end() :]}"


def own_part(tensor, parameter):
    """Return the part of an undivided tensor that this rank holds of a parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return tensor.chunk(size, dim=parameter.partition_dim)[rank]


def load(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own_part(weights[undivided_name(model, name)], parameter))


def own_rows(selected, sequence_parallel):
    """Return the places in `selected` of the tokens of this rank, and their rows of its hidden states."""
    if not sequence_parallel:
        return torch.arange(len(selected)), selected
    rows = SEQUENCE * BATCH // parallel_state.get_tensor_model_parallel_world_size()
    first = rows * parallel_state.get_tensor_model_parallel_rank()
    places = ((selected >= first) & (selected < first + rows)).nonzero().flatten()
    return places, selected[places] - first


def run(model, taps, *, backward):
    """Run all micro-batches through Megatron-Core's pipeline schedule. The pipeline's own loss is zero."""

    def forward_step(work, model):
        (tokens, _, _), tap = next(work)
        output = forward(model, tokens, with_tap(tap, sequence_length=SEQUENCE))
        return output, lambda output: (0.0 * output.sum(), {})

    with torch.set_grad_enabled(backward):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(list(zip(micro_batches(), taps, strict=True))),
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=not backward,
        )


def by_taps(student, teacher, parallel, normalize):
    """Return the loss and the gradients of this rank, from CaptureTap on the teacher and StageLoss on the student."""
    places = [own_rows(selected, parallel.sequence) for _, selected, _ in micro_batches()]
    captures = [CaptureTap(dict.fromkeys(COMPARED, rows)) for _, rows in places]
    run(teacher, captures, backward=False)
    losses = [
        StageLoss(rows, weights[chosen], capture.states, normalize=normalize)
        for (_, _, weights), (chosen, rows), capture in zip(micro_batches(), places, captures, strict=True)
    ]
    run(student, losses, backward=True)
    total = sum((sums[0] for loss in losses for sums in loss.sums.values()), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    if parallel.sequence:
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(total, group=group)
        for parameter in student.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=group)
    return total.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


def check(rank, layout, settings, normalize):
    device, parallel = choose_device("auto"), ParallelConfig(**layout)
    own_norm = parallel.sequence
    with cpu_devices():
        build_topology(ParallelConfig(), device, seed=0)
        undivided = [build(ParallelConfig(), tapped=False, own_norm=own_norm) for _ in range(2)]
        weights = [{name: tensor.detach().clone() for name, tensor in model.named_parameters()} for model in undivided]
        for of_model in weights:  # large enough for states that differ
            of_model.update({name: 3 * tensor for name, tensor in of_model.items() if "norm" not in name})
        for model, of_model in zip(undivided, weights, strict=True):
            load(model, of_model)
        expected_loss, expected = by_autograd(*undivided, normalize)
        build_topology(parallel, device, seed=0)
        student, teacher = (build(parallel, own_norm=own_norm, **settings) for _ in range(2))
        for model, of_model in zip((student, teacher), weights, strict=True):
            load(model, of_model)
        loss, gradients = by_taps(student, teacher, parallel, normalize)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    compared = 0
    for name, parameter in student.named_parameters():
        full, gradient = expected[undivided_name(student, name)], gradients[name]
        if full is None:  # above the highest compared layer
            assert gradient is None or not gradient.any(), name
            continue
        part = own_part(full, parameter)
        assert (gradient - part).norm() <= 1e-5 * part.norm() and part.norm() > 0, name
        compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    ("world", "layout", "settings", "normalize"),
    [
        (1, {}, {}, "none"),
        (1, {}, FULL_RECOMPUTATION, "l2"),
        (2, {"tensor": 2, "sequence": True}, {}, "l2"),
        (2, {"pipeline": 2}, FULL_RECOMPUTATION, "none"),
    ],
    ids=["one-process", "recomputation", "tp2-sp", "pp2-recomputation"],
)
def test_loss_and_gradients_equal_plain_autograd(world, layout, settings, normalize):
    run_distributed(world, check, layout, settings, normalize)


def listing():
    return re.search(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)[1]


def test_the_listing_of_the_page_trains(tmp_path):
    example = tmp_path / "example.py"
    example.write_text(f"{listing()}\nraise SystemExit(0)\n")
    first, second = run_ranks(2, tmp_path, str(example))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    losses = [float(value) for value in re.findall(r"step \d: loss (\S+)", first.stdout)]
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
