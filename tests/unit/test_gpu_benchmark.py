"""Check the figures of benchmarks/gpu.py (operations, MFU, predictions, tables), and that a case frees its memory."""

import dataclasses
import gc
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fused_losses, gpu, profile_update
from benchmarks.cost import PAPER
from benchmarks.gpu_cases import Case, all_cases, held_bytes
from benchmarks.gpu_flops import GPUS, block_weights, find_gpu, forward_flops, training_flops, utilization
from benchmarks.gpu_page import HEADING, line, predictions, runs, section
from benchmarks.pages import with_section
from benchmarks.updates import Workload
from megatron_oprd.config import ParallelConfig
from megatron_oprd.models.build import build_model
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.testing.random_update import fill_randomly
from megatron_oprd.types import UserError
from tests.gpu.conftest import reason_to_skip

ROOT = Path(__file__).parents[2]
UNEVEN = Workload(2, 96, 160, 6, 2, 64, 4, (20, 7), last=8)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def topology():
    device = choose_device("auto")
    start_process(device)
    return build_topology(ParallelConfig(), device, seed=0)


def test_operations_are_those_that_torch_counts(topology):
    model = build_model(UNEVEN.spec, topology, torch.float32)[0]
    fill_randomly(model)
    lengths = torch.tensor([24, 11])
    batch = MicroBatch(
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(topology.device),
        lengths=lengths.repeat_interleave(lengths).to(topology.device),
        bounds=(0, 24, 35),
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        states = model.run(torch.arange(35, device=topology.device), batch)
        forward = counter.get_total_flops()
        states.square().sum().backward()
    # torch counts the half of attention that causal kernels leave out.
    assert forward == forward_flops(UNEVEN, causal=False).total
    assert counter.get_total_flops() == training_flops(UNEVEN, causal=False).total
    unmasked, causal = forward_flops(UNEVEN, causal=False), forward_flops(UNEVEN)
    assert (causal.products, causal.attention) == (unmasked.products, unmasked.attention / 2)
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".linear_" in name and p.ndim == 2)
    assert block_weights(UNEVEN) == matrices


def test_utilization_is_a_part_of_the_bf16_peak():
    assert utilization(989.4e12, 2.0, H100) == pytest.approx(0.5)
    assert utilization(378e12, 1.0, "NVIDIA H100 PCIe") == pytest.approx(0.5)
    assert utilization(1.0, 1.0, "CPU") is None
    assert find_gpu("NVIDIA H200") is GPUS["H200"] and find_gpu("NVIDIA H100 NVL") is GPUS["H100 NVL"]


def test_the_papers_student_has_the_papers_size():
    head_and_embedding = 2 * PAPER.vocabulary * PAPER.hidden
    assert (block_weights(PAPER) + head_and_embedding) / 1e9 == pytest.approx(1.777, abs=0.001)


def test_predictions_are_faster_with_more_and_slower_with_less():
    rows = {(row["part"], row["name"]): row["seconds"] for row in gpu.predicted_rows()}
    for part in ("student update", "blocks, forward"):
        assert rows[part, "FP8 tensorwise"]["H100"] < rows[part, "bf16, Transformer Engine"]["H100"]
    assert all(seconds["H200"] < seconds["H100"] for seconds in rows.values())
    update, teacher = rows["student update", "bf16, own modules"], rows["teacher pass", "bf16, own modules"]
    assert update["H100"] > 4 * teacher["H100"], "forward, recomputation, backward and the step"


def test_docs_have_the_predictions_of_the_code():
    page = (ROOT / "docs" / "results" / "gpu.md").read_text()
    assert predictions(gpu.predicted_rows()) in page
    assert page.endswith(runs(json.loads((ROOT / "docs" / "results" / "gpu.json").read_text())))


def test_peaks_are_predicted_for_the_papers_model_alone():
    rows = json.loads((ROOT / "docs" / "results" / "cost.json").read_text())["predicted"]["rows"]
    one = next(row for row in rows if (row["method"], row["sequences"], row["tokens"]) == ("top-16", 1, 16384))
    assert gpu.predicted_peak(PAPER, "top-16") == one["step_peak"]
    shorter = dataclasses.replace(PAPER, responses=(4096 - 256,))
    assert gpu.predicted_peak(shorter, "top-16 as authored") == gpu.predicted_peak(shorter, "top-16, unchunked") > 0
    assert gpu.predicted_peak(gpu.TINY, "top-16") is None


def test_weights_of_a_teacher_are_predicted_by_counting(topology):
    for case in all_cases(gpu.TINY, gpu.TINY, ()):
        if case.part == "teacher pass" and "own modules" in case.name:
            stage = gpu.prepare(case, topology.device, Machine(None, (9, 0), (13, 0)))
            assert stage.weights == pytest.approx(gpu.teacher_bytes(case), rel=0.02), "but for norms and biases"


def test_what_a_case_built_is_gone_after_it(topology):
    case = next(case for case in all_cases(gpu.TINY, gpu.TINY, ()) if case.name == "bf16, own modules")
    others = {id(one) for one in gc.get_objects() if isinstance(one, HiddenStateModel)}
    row = gpu.measure(case, topology.device, Machine(), repeats=1)
    assert row["seconds"] and not row["note"]
    assert {id(one) for one in gc.get_objects() if isinstance(one, HiddenStateModel)} <= others


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (UserError("precision.fp8=hybrid needs more"), "refused: precision.fp8=hybrid needs more"),
        (ValueError("no\nsuch kernel"), "failed: ValueError: no such kernel"),
    ],
)
def test_what_goes_wrong_is_a_result(error, note, monkeypatch, tmp_path):
    def fail(*args):
        raise error

    monkeypatch.setattr(gpu, "prepare", fail)
    code = gpu.main(["--tiny", "--parts", "teacher pass", "--docs", str(tmp_path)])
    (record,) = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["note"] for row in record["rows"]} == {note}
    assert (tmp_path / "gpu.md").read_text().count(note) == len(record["rows"]) == 5
    assert code == int("failed" in note)


def test_no_case_begins_when_the_time_is_over(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "prepare", lambda *args: pytest.fail("begun"))
    assert gpu.main(["--tiny", "--minutes", "0", "--docs", str(tmp_path)]) == 0
    assert "not begun: no time left" in (tmp_path / "gpu.md").read_text()


def test_the_suite_is_skipped_for_one_clear_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason_to_skip() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason_to_skip() == "Transformer Engine is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it starts")
def test_without_a_gpu_it_says_so_at_once():
    with pytest.raises(UserError, match="needs a CUDA device"):
        gpu.main([])


def row(part="student update", name="FP8 tensorwise", **changes):
    case = Case(part, name, PAPER, passes=3, repeated=1)
    measured = {"seconds": [0.5, 0.6, 0.4], "step_peak": 3 << 30, "weights": 0}
    of_case = {**gpu.not_run(case, ""), **measured, "predicted_seconds": 0.25, "predicted_peak": 2 << 30}
    return {**of_case, "predicted_weights": None, **changes}


def test_a_section_has_measured_beside_predicted():
    rows = [
        row(flops=98.94e12),
        row(name="FP8 blockwise", seconds=[], note="out of memory"),
        *(row("cost", name, seconds=[s]) for name, s in (("OPRD, all tokens", 0.5), ("top-16", 0.6))),
    ]
    record = {"date": "2030-01-02", "device": H100, "versions": {"torch": "2"}, "repeats": 3, "rows": rows}
    text = section(record)
    assert text.startswith(f"### 2030-01-02: {H100}\n\ntorch 2.\nMedians of 3 runs.\n")
    assert "| FP8 tensorwise | 16,384 | 500.0 | 250.0 | 32,768 | 20.0 % | 26.7 % | 3.00 | 2.00 |  |  |" in text
    assert "| FP8 blockwise | 16,384 | out of memory |  |" in text
    assert "| top-16 | 16,384 | 600.0 | 1.20 | 3.00 | 2.00 |" in text
    assert (
        line(rows[0]) == "student update: FP8 tensorwise, 16,384 tokens: 500.0 ms, 250.0 predicted, step peak 3.00 GiB"
    )
    widths = {line.count("|") for line in text.split("**Cost**")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1
    page = with_section("# Title\n\n## Runs\n\nolder", HEADING, runs([record, record]))
    assert page.startswith("# Title\n\n## Runs\n\n### 2030") and page.count("### 2030-01-02") == 2


def test_bytes_of_an_fp8_parameter_are_those_of_its_parts():
    model = torch.nn.Linear(4, 2)
    model.weight._data = torch.zeros(2, 4, dtype=torch.uint8)
    model.weight._scale_inv = torch.zeros(1)
    model.weight.main_grad = torch.zeros(2, 4)
    assert held_bytes(model) == 8 + 4 + 2 * 4
    assert held_bytes(model, lambda name: name == "bias") == 8


def test_a_profile_has_the_launches_of_every_part(tmp_path):
    figures = tmp_path / "profile.json"
    profile_update.main(["--tiny", "--method", "full KL", "--json", str(figures)])
    parts = json.loads(figures.read_text())["parts"]
    assert set(parts) == set(profile_update.PART_NAMES)
    assert all(part["launches"] and part["milliseconds"] for part in parts.values())
    # For each block: two forward in the teacher, two in the student, two in its recomputation, five backward.
    assert parts["MLP activation"]["launches"] == gpu.TINY.layers * (3 * 2 + 5)


def test_fused_losses_are_compared_or_skipped_with_a_reason(tmp_path):
    figures = tmp_path / "losses.json"
    sizes = ("--tokens", "16", "--hidden", "8", "--vocabulary", "64", "--repeats", "1")
    fused_losses.main([*sizes, "--json", str(figures)])
    rows = json.loads(figures.read_text())["rows"]
    skipped = {row["case"] for row in rows if row["note"]}
    assert all(row["seconds"] or row["note"] for row in rows)
    assert skipped <= {"JSD 0.5, Liger", "full KL, Liger", "cross-entropy, cut-cross-entropy"}
