"""The whole command in a layout of several processes does what it does in one: tokens, losses, scores and export."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd import train
from megatron_oprd.testing.distributed import run_distributed
from tests.helpers.runs import in_folder, metrics, prompt_run, read_lines

STEPS = 3
LAYOUTS = {
    "Qwen3": (4, "parallel.tensor=2", "parallel.pipeline=2", "teacher.parallel={tensor: 1}"),
    "Qwen3Moe": (2, "parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"),
}


def main(rank, arguments):
    train.main(arguments)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_layout_changes_nothing_that_a_user_sees(family, tmp_path):
    world_size, *layout = LAYOUTS[family]
    settings = ("evaluation.every=3", "evaluation.teacher_answers=true", "optimizer.name=sgd", "optimizer.lr=0.1")
    arguments = prompt_run(tmp_path, STEPS, *settings, family=family, num_hidden_layers=4)
    runs = {"one": (1,), "many": (world_size, *layout)}
    for name, (world, *overrides) in runs.items():
        run_distributed(world, main, [*in_folder(arguments, tmp_path / name), *overrides])
    one, many = (metrics(tmp_path / name) for name in runs)
    assert [row["loss"] for row in many] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    (answers,) = (tmp_path / "one" / "teacher_answers").glob("*.jsonl")
    for what in ("rollouts/step_0000003.jsonl", "evaluations/step_0000003.jsonl", f"teacher_answers/{answers.name}"):
        assert (tmp_path / "many" / what).read_text() == (tmp_path / "one" / what).read_text(), what
    for expected, actual in zip(*(read_lines(tmp_path / name / "evaluations.jsonl") for name in runs), strict=True):
        assert actual["data"].keys() == expected["data"].keys() == {"sums/0", "sums/1", "all"}
        for source, scores in expected["data"].items():
            assert "cosine/layer_4" in scores and "forward_kl" in scores
            assert actual["data"][source] == pytest.approx(scores, rel=1e-5, abs=1e-6), source
    plan = json.loads((tmp_path / "many" / "plan.json").read_text())
    assert plan["aligned"] == (family == "Qwen3Moe")
    assert all((row["teacher/moved_bytes"] > 0) != plan["aligned"] for row in many)
    students = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf") for name in runs]
    for (name, expected), actual in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
