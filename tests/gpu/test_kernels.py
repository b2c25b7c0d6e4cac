"""Functions that torch compiles on a GPU, and its attention for packed sequences, against float32."""

import pytest
import torch

from benchmarks.fused_losses import Inputs
from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.lm_head import HeadInput
from megatron_oprd.losses.reverse_kl import weighted_reverse_kl
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.precision import PLAIN
from megatron_oprd.types import DeviceSelection
from tests.gpu.models import cosine, gradients, relative, run, save_model, sequences


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
