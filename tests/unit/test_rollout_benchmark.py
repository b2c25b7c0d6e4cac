"""The benchmark of rollout engines: every case of the GPU run at tiny sizes, its figures, and what goes wrong."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import rollout
from benchmarks.rollout_calls import calls_per_decode_step, kind_of
from benchmarks.rollout_engines import Side
from benchmarks.rollout_measurement import Measurement
from benchmarks.rollout_page import decode_steps, line, runs, section
from benchmarks.rollout_training import time_training
from benchmarks.rollout_workloads import REHEARSAL_WORKLOADS, Shape, Workload
from megatron_oprd.types import Prompt, UserError

TINY = Shape("Qwen3", 1, 64, 96, 4, 2, 61, tied=True, deviation=0.1)
CPU = torch.device("cpu")


def test_every_case_of_the_gpu_run_gives_figures(tmp_path, capsys):
    assert rollout.main(["--preset", "h100", "--rehearse", "--repeats", "1", "--docs", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "rollouts.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    expected = [(case.name, case.rows, side) for case in REHEARSAL_WORKLOADS for side in ("embedded", "transformers")]
    assert [(row["workload"], row["rows"], row["engine"]) for row in record["rows"]] == expected
    for row in record["rows"]:
        assert row["seconds"] and row["tokens"] and row["peak_bytes"] is not None and not row["note"]
        assert (
            bool(row["prefill_seconds"])
            == bool(row["short_seconds"])
            == bool(row["calls"])
            == row["workload"].startswith("equal")
        )
    assert (tmp_path / "rollouts.md").read_text() == runs([record])


def test_the_sides_give_the_same_answers_to_prompts_of_any_length(tmp_path):
    embedded, transformers = rollout.build_sides(TINY, tmp_path, CPU)
    workload = Workload("mixed", 2, 5, (1, 9), (1, 6))
    prompts, limits = workload.draw(TINY.vocabulary)
    answers = embedded.prepare(workload)(prompts, limits)
    assert answers == transformers.prepare(workload)(prompts, limits)
    assert [len(answer) for answer in answers] == limits and len(set(limits)) > 1


def test_a_decode_step_is_counted_and_timed_without_prefill_and_capture():
    def generate(prompts, limits):
        one = torch.zeros(())
        for _ in range(7 + 3 * max(limits)):
            one = one.neg()
        return []

    assert calls_per_decode_step(generate, [Prompt(0, (1,))], CPU) == {"operators": 3}
    row = {"new_tokens": (7, 7), "seconds": [0.9], "short_tokens": 3, "short_seconds": [0.1]}
    assert decode_steps(row) == [pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("name", "on_device", "kind"),
    [
        ("aten::add", False, "operators"),
        ("cudaLaunchKernel", False, "launches"),
        ("cudaGraphLaunch", False, "graph_launches"),
        ("void at::native::add_kernel", True, "kernels"),
        ("Memcpy DtoH (Device -> Pinned)", True, "copies_to_host"),
        ("Memcpy HtoD (Pageable -> Device)", True, None),
        ("cudaStreamSynchronize", False, None),
    ],
)
def test_profiled_events_are_counted_by_kind(name, on_device, kind):
    assert kind_of(name, on_device=on_device) == kind


def test_the_cpu_clock_counts_other_processes():
    begin = rollout.cpu_seconds()
    code = "import time; print(flush=True)\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() and process.stdout.readline()
        assert rollout.cpu_seconds() - begin > 0.4
        process.communicate("\n")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (ValueError("no\nsuch kernel"), "failed: ValueError: no such kernel"),
    ],
)
def test_an_engine_that_fails_is_noted_and_the_others_are_measured(error, note):
    def fail(prompts, limits):
        raise error

    sides = [Side("a", lambda workload: fail), Side("b", lambda workload: lambda prompts, limits: [(1,) * limits[0]])]
    workload = Workload("equal", 2, 2, (3, 3), (4, 4))
    failed, measured = Measurement(CPU, rollout.CLOCKS["wall"], repeats=1).run(sides, workload, 61)
    assert line(failed) == f"equal, 2 rows: a: {note}"
    assert measured["seconds"] and not measured["note"] and measured["same_answers"] is None


@pytest.mark.nightly
def test_training_steps_are_timed_at_each_value_of_ahead(tmp_path):
    rows = time_training(dataclasses.replace(TINY, vocabulary=300), tmp_path, {"embedded": ()}, steps=3, threads=1)
    assert [(row["engine"], row["ahead"], row["note"], len(row["time/step"])) for row in rows] == [
        ("embedded", 0, "", 1),
        ("embedded", 1, "", 1),
    ]
    failed = time_training(TINY, tmp_path / "small", {"embedded": ("rollout.top_p=7",)}, steps=3, threads=1)
    assert all("rollout.top_p" in row["note"] for row in failed)


def test_the_table_of_training_steps_has_a_row_for_each_run():
    times = {"time/step": [0.1, 0.3, 0.2], "time/rollout": [0.05], "sync/seconds": [0.004]}
    training = [{"engine": "vllm", "ahead": 1, "note": "", **times}]
    training.append({"engine": "vllm", "ahead": 0, "note": "failed: no server"})
    record = {
        "date": "2030-01-02",
        "device": "CPU",
        "versions": {"torch": "2"},
        "shape": vars(TINY),
        "threads": 1,
        "clock": "wall",
    }
    text = section({**record, "repeats": 3, "rows": [], "training": training})
    assert "| vllm | 1 | 200.0 | 50.0 | 4.0 |" in text
    assert "| vllm | 0 | failed: no server |  |  |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it starts")
def test_the_gpu_run_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--preset h100 needs a CUDA device"):
        rollout.main(["--preset", "h100"])
