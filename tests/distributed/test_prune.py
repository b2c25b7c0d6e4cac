"""Scores of blocks do not depend on the layout, and a pruned student learns from its pairs in a pipeline."""

import pytest
import torch

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.commands.prune import PAIRS_FILE
from megatron_oprd.config import BatchConfig, LossConfig, ParallelConfig, RepresentationConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import MANY, some_rollouts
from megatron_oprd.testing.update import assert_same_update
from megatron_oprd.training.block_scores import score_blocks
from megatron_oprd.training.global_batch import GlobalBatch
from tests.helpers.commands import run, run_ranks
from tests.helpers.training import megatron_update

LAYOUTS = (
    {"tensor": 2, "sequence": True, "expert": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {},  # data parallel
)
PIPELINES = (("parallel.pipeline=2",), ("parallel.pipeline=2", "parallel.virtual_pipeline=2"))


def scores_in(rank, folder, layouts):
    """Return the scores of a model's blocks in each layout."""
    device = choose_device("auto")
    start_process(device)
    spec = read_model_spec(folder)
    rollouts = some_rollouts(spec.vocab_size, masks=MANY)
    loss, limit = (
        LossConfig(representation=RepresentationConfig(positions="all")),
        BatchConfig(max_tokens_per_micro_batch=64),
    )
    batch = GlobalBatch(tuple(rollouts), (0,) * len(rollouts), loss, limit, spec)
    scores = []
    for layout in layouts:
        topology = build_topology(ParallelConfig(**layout), device, seed=0)
        with topology.active():
            stage = build_model(spec, topology, torch.float32).eval()
            load_weights(stage, folder, spec, topology)
            scores.append(score_blocks(stage, batch, topology))
    return scores


def test_scores_do_not_depend_on_the_layout(tmp_path):
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=4, num_key_value_heads=4), tmp_path / "model")
    (expected,) = run_distributed(1, scores_in, folder, [{}])[0]
    for of_rank in run_distributed(2, scores_in, folder, LAYOUTS):
        for layout, scores in zip(LAYOUTS, of_rank, strict=True):
            assert scores == pytest.approx(expected, rel=1e-5), layout


def updates_in(rank, student, teacher, settings, pipelines):
    """Return the first update of a student in each layout."""
    return [megatron_update(rank, student, teacher, *settings, *layout) for layout in pipelines]


@pytest.mark.parametrize("kind", ["output", "next_input"])
def test_the_pairs_of_a_pruned_student_hold_in_a_pipeline(kind, tmp_path):
    teacher = save(random_hf_model("Qwen3", num_hidden_layers=7), tmp_path / "teacher")
    student = tmp_path / "student"
    arguments = ("--model", str(teacher), "--to", str(student), "--blocks", "3,4,6", "--pairs", kind)
    assert run(tmp_path, "commands.prune", *arguments).code == 0
    settings = (f"loss.representation.pairs={student / PAIRS_FILE}", "loss.representation.positions=all")
    pairs = {"output": "[[1,1],[2,2],[3,5],[4,7]]", "next_input": "[[1,1],[2,4],[3,6],[4,7]]"}[kind]
    expected = reference_update(student, teacher, f"loss.representation.pairs={pairs}", settings[1])
    for update in run_distributed(2, updates_in, student, teacher, settings, PIPELINES)[0]:
        assert_same_update(update, expected)


def test_the_command_scores_stored_rollouts_on_two_ranks(tmp_path):
    teacher = save(random_hf_model("Qwen2", num_hidden_layers=4), tmp_path / "teacher")
    file = tmp_path / "rollouts.jsonl"
    file.write_text('{"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6]}\n')
    arguments = ("--model", str(teacher), "--rollouts", str(file), "--share", "0.5")
    outputs = {
        "one": run(tmp_path, "commands.prune", *arguments, "--to", str(tmp_path / "one")),
        "two": run_ranks(2, tmp_path, "commands.prune", *arguments, "--to", str(tmp_path / "two"), "--pipeline", "2")[
            0
        ],
    }
    for name, outcome in outputs.items():
        assert outcome.code == 0, outcome.stderr
        assert "(2 of 4 blocks" in outcome.stdout and (tmp_path / name / PAIRS_FILE).exists()
    assert (tmp_path / "one" / PAIRS_FILE).read_text() == (tmp_path / "two" / PAIRS_FILE).read_text()
