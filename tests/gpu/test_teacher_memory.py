"""A frozen teacher's weights in FP8 are one byte each, and nothing else of them stays."""

import gc

import pytest
import torch

from benchmarks.gpu_cases import Case, Scene, frozen_teacher, held_bytes
from benchmarks.updates import Workload

ALL_BLOCKS = ("precision.keep_bf16.first=0", "precision.keep_bf16.last=0")
IN_FP8 = ("precision.teacher_fp8=weights", *ALL_BLOCKS)
CASES = {
    "bf16": ((), 2),
    "tensorwise": (IN_FP8, 1),
    "blockwise": ((*IN_FP8, "precision.recipe=blockwise"), 1),
}
SCALES = 0.02  # one for 128 x 128 weights, and the rounding of the allocator


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def scene_of(gpu, case):
    on_cuda = gpu.device.type == "cuda"
    workload = Workload(4, *((1024, 4096, 8, 4) if on_cuda else (128, 256, 4, 2)), 512, 8, (120,), 16, dtype="bf16")
    return Scene.of(Case("teacher pass", case, workload, CASES[case][0]), gpu.device, gpu.machine)


def is_linear(name):
    return ".linear_" in name and name.endswith(".weight")


def test_linear_layers_have_one_byte_per_fp8_weight(case, gpu):
    stage = frozen_teacher(scene_of(gpu, case))
    elements = sum(parameter.numel() for name, parameter in stage.named_parameters() if is_linear(name))
    assert held_bytes(stage, is_linear) / elements == pytest.approx(CASES[case][1], rel=SCALES)


def test_the_allocator_gives_out_one_byte_per_fp8_weight(case, gpu, on_cuda):
    scene = scene_of(gpu, case)
    gc.collect()
    before = torch.cuda.memory_allocated(gpu.device)
    stage = frozen_teacher(scene)
    gc.collect()
    taken = torch.cuda.memory_allocated(gpu.device) - before
    elements = sum(parameter.numel() for name, parameter in stage.named_parameters() if is_linear(name))
    others = held_bytes(stage, lambda name: not is_linear(name))
    assert (taken - others) / elements == pytest.approx(CASES[case][1], rel=2 * SCALES)
