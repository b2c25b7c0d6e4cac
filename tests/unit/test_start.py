"""The start of a run: hashes are computed once, reading keeps every bit, and its phases are measured on request."""

import gc
import json
import sys
from types import SimpleNamespace

import pytest

from megatron_oprd.checkpoint.weights import WeightHashes, content_hash
from megatron_oprd.config import load_config
from megatron_oprd.hf import load
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.runtime import cli, progress, start_profile
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.types import UserError
from tests.helpers.bridges import save_random_bridge
from tests.helpers.runs import replay_run


def files_opened_by(action):
    """Return the weight files that Python code opens during `action`; safetensors maps files without it."""
    opened = []

    def note(event, arguments):
        if event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)
    action()
    return sorted(opened)


def _build(rank, arguments):
    return files_opened_by(lambda: build_run(read_inputs(load_config(None, arguments))))


def test_a_start_with_a_bridge_hashes_each_model_once(tmp_path):
    arguments = replay_run(tmp_path, 1)
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    bridge = save_random_bridge(tmp_path / "bridge", student, teacher, rank=2)
    opened = run_distributed(1, _build, [*arguments, f"loss.representation.bridge={bridge}"])[0]
    models = [path for path in opened if not path.startswith(str(bridge))]
    assert models == [str(student / "model.safetensors"), str(teacher / "model.safetensors")]


def test_hashes_of_several_folders_are_those_of_each(tmp_path):
    for name, size in (("a", 3), ("b", 70_000)):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.safetensors").write_bytes(bytes([number]) * size)
    hashes = WeightHashes([tmp_path / "a", str(tmp_path / "b"), tmp_path / "a"])
    assert [hashes.of(tmp_path / name) for name in "ab"] == [content_hash(tmp_path / name) for name in "ab"]
    assert hashes.of(tmp_path / "a") != hashes.of(tmp_path / "b")
    # A bridge or checkpoint of an earlier version has the same hash.
    assert content_hash(tmp_path / "a") == "sha256:256167028e08ee4e9c1084b0c891c5c54fe7e70839227a77f1831ceca1aea950"


def test_a_weight_file_that_cannot_be_read_is_named_when_its_hash_is_needed(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    hashes = WeightHashes([tmp_path])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors: Input/output error"):
        hashes.of(tmp_path)


def test_phases_add_up_to_the_whole_start(tmp_path, capsys, monkeypatch):
    clock = iter(range(100, 200))
    times = SimpleNamespace(monotonic=lambda: float(next(clock)), process_time=lambda: 0.0)
    monkeypatch.setattr(start_profile, "time", times)
    monkeypatch.setattr(start_profile, "_seconds_since_start", lambda process: 2.0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    start_profile.begin(wanted=True)  # at 100; the process began 2 s before
    start_profile.enter("imports")  # 101
    with start_profile.phase("read weights"):  # 102 and 103
        pass
    progress.enter("student", 1)  # 104
    start_profile.enter("imports")  # 105
    start_profile.finish(tmp_path)  # 106
    stored = json.loads((tmp_path / "start.json").read_text())
    seconds = {one["phase"]: one["seconds"] for one in stored["phases"]}
    assert seconds == {start_profile.FIRST_PHASE: 3.0, "imports": 3.0, "read weights": 1.0, "student": 1.0}
    assert stored["seconds"] == sum(seconds.values())
    _, *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split()[-2] for row in (*rows, total)] == ["3.00", "3.00", "1.00", "1.00", "8.00"]
    assert total.startswith("from the command to the end of the first step")
    start_profile.enter("later")
    start_profile.finish(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists() and not capsys.readouterr().out, "the recording ended"


def test_under_torchrun_its_own_start_is_a_phase_and_other_ranks_record_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(start_profile, "_seconds_since_start", lambda process: 2.0 if process == "self" else 7.0)
    monkeypatch.setenv("RANK", "1")
    start_profile.begin(wanted=True)
    start_profile.finish(tmp_path)
    assert not (tmp_path / "start.json").exists()
    monkeypatch.setenv("RANK", "0")
    start_profile.begin(wanted=True)
    start_profile.finish(tmp_path)
    first = json.loads((tmp_path / "start.json").read_text())["phases"][0]
    assert first == {"phase": "torchrun", "seconds": 5.0, "cpu_seconds": 0.0}


def test_the_garbage_collector_rests_only_while_packages_are_imported(capsys):
    frozen = gc.get_freeze_count()
    try:
        cli.start_loading()
        assert not gc.isenabled()
        cli.end_loading()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_ranks_of_a_machine_share_its_processors_for_reading(monkeypatch):
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _: set(range(16)))
    for ranks, threads in (("1", 4), ("8", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert load.reading_threads() == threads
