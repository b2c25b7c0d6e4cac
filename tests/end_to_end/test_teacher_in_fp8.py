"""The demo's teacher with FP8 weights and no Transformer Engine: the error of its states, and training against them.

The file's name sorts late, so that no pytest worker waits for the demo that the other one runs.
"""

import json

import pytest

from tests.helpers.commands import run

IN_FP8 = "precision.teacher_fp8=weights"


def test_a_trained_teacher_moves_by_less_than_five_per_cent(demo, tmp_path):
    outcome = run(tmp_path, "fp8_error", "--config", f"{demo.folder}/config.yaml", IN_FP8, f"train.run_dir={tmp_path}")
    assert outcome.code == 0, outcome.stderr
    written = json.loads((tmp_path / "fp8_error.json").read_text())
    errors = {row["student_layer"]: row for row in written["layers"]}
    assert errors.keys() == {1, 2, 3, 4}
    assert errors[1]["relative"] == 0, "keep_bf16.first=1"
    assert all(1e-3 < errors[layer]["relative"] < 0.05 for layer in (2, 3, 4))
    assert written["loss_floor"] == sum(row["floor"] for row in written["layers"]) > 0
    assert f"{written['loss_floor']:.3e}" in outcome.stdout and f"{errors[4]['relative']:.4f}" in outcome.stdout


@pytest.mark.nightly  # the demo a second time
def test_the_demo_learns_from_a_teacher_in_fp8(demo, tmp_path):
    arguments = ("--config", f"{demo.folder}/config.yaml", IN_FP8, f"train.run_dir={tmp_path / 'run'}")
    outcome = run(tmp_path, "train", *arguments, timeout_seconds=900)
    assert outcome.code == 0, outcome.stderr
    last = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["name"] == "after" and last["data"]["addition"]["avg@1"] >= 0.95, last


def test_there_is_nothing_to_measure_without_fp8(demo, tmp_path):
    arguments = ("--config", f"{demo.folder}/config.yaml", f"train.run_dir={tmp_path / 'run'}")
    outcome = run(tmp_path, "fp8_error", *arguments)
    assert outcome.code == 2 and outcome.stderr.startswith("error: precision.teacher_fp8=auto: there is nothing to")
    assert not (tmp_path / "run").exists()
