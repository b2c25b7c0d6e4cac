"""Kernels and functions that are compiled on a GPU, and its attention for packed sequences, against float32."""

import pytest
import torch

from benchmarks.fused_losses import Inputs
from megatron_oprd.config import OutputConfig
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.losses.lm_head import HeadInput
from megatron_oprd.losses.reverse_kl import weighted_reverse_kl
from megatron_oprd.models import pointwise, rotary
from megatron_oprd.models.attention import causal_attention
from megatron_oprd.models.flash import CUDNN_FROM, cudnn_attention, flash_attention
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.precision import PLAIN
from megatron_oprd.models.swiglu import _SwiGLU
from megatron_oprd.training import student
from megatron_oprd.types import DeviceSelection
from tests.gpu.models import cosine, gradients, relative, run, save_model, sequences, training


def test_own_modules_in_bf16_agree_with_float32(gpu, tmp_path):
    folder, rows = save_model(tmp_path / "model"), sequences(384)
    exact, found = (gpu.load(folder, PLAIN, dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        states, expected = (run(stage, rows, gpu.device)[1] for stage in (found, exact))
    assert all(relative(states[layer], expected[layer]) < 2e-2 for layer in expected)
    of_found, of_exact = (gradients(stage, rows, gpu.device) for stage in (found, exact))
    for name in of_exact:
        assert cosine(of_found[name], of_exact[name]) > 0.99, name


@pytest.mark.parametrize("options", [{"objective": "sampled"}, {"direction": "reverse"}, {"direction": "forward"}])
def test_an_objective_without_metrics_has_the_gradients_of_one_with(options, gpu):
    """Metrics need the float32 buffers, so that only an update without them runs the compiled functions."""
    inputs = Inputs.random(700, 256, 5000, gpu.device)
    rows = torch.arange(700, device=gpu.device)
    weights = torch.rand(700, dtype=torch.float64, device=gpu.device)
    selection = DeviceSelection(rows, weights, inputs.token_ids, (700,), {0: rows})
    config = OutputConfig.model_validate({"objective": "full_kl", "teacher_temperature": 1.5, **options})
    results = []
    for with_metrics in (True, False):
        head = torch.nn.Parameter(inputs.head.detach().clone())
        head.main_grad = torch.zeros_like(head, dtype=torch.float32)
        heads = Heads(head, (inputs.teacher_head,), 0)
        loss = OutputLoss(config, heads, gpu.topology, temperature=0.8, with_metrics=with_metrics)
        gradient, sums = loss(inputs.student.detach(), inputs.teacher, selection)
        results.append((gradient, head.main_grad, sums[0]))
    (expected, of_head, value), (found, found_of_head, found_value) = results
    assert found_value.item() == pytest.approx(value.item(), rel=1e-4)
    assert relative(found, expected) < 1e-2
    assert relative(found_of_head, of_head) < 1e-2


def test_the_reverse_kl_of_the_library_agrees_with_float32(gpu):
    inputs = Inputs.random(300, 128, 3000, gpu.device)
    weights = torch.rand(300, dtype=torch.float64, device=gpu.device)
    results = []
    for dtype, device in ((torch.bfloat16, gpu.device), (torch.float32, torch.device("cpu"))):
        placed = [
            x.detach().to(device, dtype) for x in (inputs.student, inputs.head, inputs.teacher, inputs.teacher_head)
        ]
        student, head = (x.requires_grad_() for x in placed[:2])
        value, _ = weighted_reverse_kl(HeadInput(student, head), HeadInput(*placed[2:]), weights.to(device))
        value.backward()
        results.append((value.detach().cpu(), student.grad.cpu(), head.grad.cpu()))
    (value, *found), (expected, *exact) = results
    assert value.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(relative(one, other) < 3e-2 for one, other in zip(found, exact, strict=True))


def with_gradient(function, *inputs):
    """Return the output, and the gradients of the inputs for a fixed gradient of the output."""
    inputs = [states.detach().requires_grad_() for states in inputs]
    output = function(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("rotary_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rotary_kernel_agrees_with_torch(rotary_dim, dtype, gpu, on_cuda, monkeypatch):
    queries = torch.randn(333, 12, 256, device=gpu.device, dtype=dtype)[..., :128]  # not contiguous
    angles = torch.randn(333, 1, rotary_dim, device=gpu.device)
    cos, sin = angles.cos().to(dtype), rotary.signed(angles.sin()).to(dtype)
    assert pointwise.kernels_for(queries) is not None
    found = with_gradient(lambda states: rotary.rotate(states, cos, sin), queries)
    monkeypatch.setattr(rotary, "kernels_for", lambda tensor: None)
    wide = [tensor.float() for tensor in (cos, sin)]
    exact = with_gradient(lambda states: rotary.rotate(states, *wide), queries.float())
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert all(relative(one, other) < rounding for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("width", [8960, 1000])
def test_the_swiglu_kernel_agrees_with_autograd(width, gpu, on_cuda):
    states = torch.randn(77, 1, 2 * width, device=gpu.device, dtype=torch.bfloat16)
    found = with_gradient(_SwiGLU.apply, states)

    def written(states):
        gate, up = states.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    exact = with_gradient(written, states.float())
    assert all(relative(one, other) < 2**-8 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("tokens", [CUDNN_FROM, CUDNN_FROM + 700])
def test_the_attention_of_long_and_of_short_sequences_agrees_with_float32(tokens, gpu, on_cuda):
    inputs = [torch.randn(tokens, heads, 128, device=gpu.device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=gpu.device)

    def written(query, key, value):
        batched = (states.transpose(0, 1)[None] for states in (query, key, value))
        return causal_attention(*batched, scale=0.1, window=0)[0].transpose(0, 1)

    exact = with_gradient(written, *(states.float() for states in inputs))
    for function in (
        lambda *states: cudnn_attention(*states, 0.1),
        lambda *states: flash_attention(states, (bounds, bounds), (tokens, tokens), 0.1),
    ):
        found = with_gradient(function, *inputs)
        assert all(relative(one, other) < 2e-2 for one, other in zip(found, exact, strict=True))


def test_weight_gradients_added_by_the_products_equal_those_added_afterwards(gpu, tmp_path, on_cuda, monkeypatch):
    """The second micro-batch adds to the gradients of the first."""
    folder, results = save_model(tmp_path / "model"), []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(student, "_add_to_main_grads", lambda stage: None)
        updates, stage = training(gpu, folder, "precision.attention=te", "batch.max_tokens_per_micro_batch=128")
        next(updates)
        assert any(getattr(module, "fuse_wgrad_accumulation", False) for module in stage.modules()) == fused
        trained = {name: one for name, one in named_parameters(stage).items() if one.requires_grad}
        results.append({name: one.main_grad.clone() for name, one in trained.items()})
    for name, found in results[0].items():
        assert relative(found, results[1][name]) < 2e-2, name
