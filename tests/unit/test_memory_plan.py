"""A plan says whether a run fits into a device, and a change that it recommends has been planned again."""

import dataclasses

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.launch.inputs import AUTOMATIC, read_inputs
from megatron_oprd.planning.dry_run import answer, gigabytes
from megatron_oprd.planning.hardware import GPUS
from megatron_oprd.planning.memory_plan import SAVES, MemoryPlan, plan_memory
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.update_trace import Footprint
from megatron_oprd.runtime.cli import PLAN_DEVICES
from megatron_oprd.runtime.host_memory import host_memory_bytes
from tests.helpers.planning import replay_config, result_of
from tests.helpers.runs import replay_run

CPU = PlanDevice("cpu", "a CPU", 1000, 1, 10, 1000, None)
FIRST, SECOND = Footprint(weights=100, gradients=40, activations=60), Footprint(weights=150, activations=20)
CONFIG = replay_config(100, "checkpoint.every=0")


def test_the_option_device_names_every_gpu_with_a_data_sheet():
    assert set(PLAN_DEVICES) == set(GPUS)


def test_processes_of_a_host_share_its_memory():
    peaks = {range(0, 2): FIRST, range(2, 4): SECOND}
    alone = MemoryPlan(peaks, None, CPU, CONFIG)
    assert (alone.needed, alone.fullest) == (210, range(0, 1))
    pairs = MemoryPlan(peaks, None, dataclasses.replace(CPU, sharers=2), CONFIG)
    assert (pairs.needed, pairs.fullest) == (420, range(0, 2))
    host = MemoryPlan(peaks, None, dataclasses.replace(CPU, sharers=4), CONFIG)
    assert host.needed == 2 * 210 + 2 * 180 and host.fits
    assert not MemoryPlan(peaks, None, dataclasses.replace(CPU, sharers=4, memory=779), CONFIG).fits


def test_a_checkpoint_gathers_the_optimizer_state_in_memory():
    saving = replay_config(100, "checkpoint.every=1")
    memory = MemoryPlan({range(1): FIRST}, None, CPU, saving)
    assert memory.phases(FIRST)[SAVES] == 10 + 140 + 9 * 40 and memory.phase == SAVES
    assert SAVES not in MemoryPlan({range(1): FIRST}, None, CPU, CONFIG).phases(FIRST)


def test_the_memory_of_a_host_is_that_of_its_control_group(tmp_path):
    machine = host_memory_bytes(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job/task\n0::/job/task\n")
    for folder, name, limit in (
        ("memory/job", "memory.limit_in_bytes", "9223372036854771712"),
        ("memory/job/task", "memory.limit_in_bytes", "5000"),
        ("job", "memory.max", "4000"),
        ("job/task", "memory.max", "max"),
    ):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / name).write_text(f"{limit}\n")
    assert machine > 4000 == host_memory_bytes(tmp_path)


def test_sizes_have_one_unit_and_three_digits():
    assert [gigabytes(size) for size in (0, 10, 15_925_248, 3_146_000_000, 80 * 10**9)] == [
        "0",
        "<0.001",
        "0.0159",
        "3.15",
        "80.0",
    ]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return the arguments of a run whose activations are most of its memory."""
    settings = ("loss.representation.positions=all", "batch.max_tokens_per_micro_batch=14", "checkpoint.every=0")
    return replay_run(tmp_path_factory.mktemp("advice"), 1, *settings, num_hidden_layers=2)


def _plan(arguments):
    """Return the inputs of a run and its memory as it is. A process that has had a process group cannot trace it."""
    inputs = read_inputs(load_config(None, arguments), dry_run=True)
    return inputs, plan_memory(PlannedRun.of(inputs), CPU)


def _on_a_device(plain, memory):
    return dataclasses.replace(plain, device=dataclasses.replace(CPU, memory=memory))


def _answers(arguments):
    """Return the answers of a plan with one byte too little, with one byte, and after a choice that does not fit."""
    inputs, plain = _plan(arguments)
    answers = [list(answer(inputs, _on_a_device(plain, memory))) for memory in (plain.needed - 1, 1)]
    return [*answers, list(answer(inputs, _on_a_device(plain, plain.needed - 1), chosen=AUTOMATIC))]


def test_a_plan_that_does_not_fit_names_the_change_if_there_is_one(arguments):
    (first, second, third), without, chosen = result_of(_answers, arguments)
    assert first.startswith("too large  ") and second == "change     recompute=auto"
    assert "(planned again)" in third
    for lines in (without, chosen):
        assert "no setting that was planned suffices; take smaller models or a GPU" in lines[1]
