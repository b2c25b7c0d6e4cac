"""Ten steps of AdamW are the same curve in every layout, also when the run changes its layout in the middle."""

import itertools

import pytest
import torch

from megatron_oprd.launch.assemble import build_run
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import make_config, make_inputs
from megatron_oprd.train import fit
from megatron_oprd.types import Rollout
from tests.helpers.runs import metrics

STEPS, SEQUENCES = 10, 6
SETTINGS = (
    "optimizer.name=adamw",
    "optimizer.lr=1e-3",
    "optimizer.clip_grad=1.0",
    "batch.max_tokens_per_micro_batch=24",
    f"rollout.prompts_per_step={SEQUENCES}",
    "checkpoint.export_hf=false",
    "checkpoint.every=5",
)
LAYOUTS = {
    "one rank": (1,),
    "data 2": (2,),
    "tensor 2, sequence, data 2": (4, "parallel.tensor=2", "parallel.sequence=true"),
    "pipeline 2, virtual 2, full recomputation": (
        2,
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "recompute.granularity=full",
    ),
    "context 2, pipeline 2": (4, "parallel.context=2", "parallel.pipeline=2"),
    "tensor 2, pipeline 2, teacher data 4": (
        4,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "teacher.parallel={tensor: 1}",
    ),
}
EXPERT_LAYOUTS = {
    "one rank": (1,),
    "expert 2, data 2": (2, "parallel.expert=2"),
    "expert 2, tensor 2, sequence": (2, "parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"),
    "expert 2, pipeline 2, virtual 2, data 2": (
        4,
        "parallel.expert=2",
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
    ),
}
FAMILIES = {"Qwen3": LAYOUTS, "Qwen3Moe": EXPERT_LAYOUTS}


def rollouts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (STEPS * SEQUENCES,), generator=generator).tolist()
    ids = [torch.randint(0, 131, (3 + n,), generator=generator).tolist() for n in lengths]
    return [Rollout(tuple(row[:3]), tuple(row[3:]), (1,) * (len(row) - 3), "replay") for row in ids]


def train(rank, models, run_dir, steps, *overrides):
    """Train to `steps`, from the newest checkpoint in `run_dir` if there is one."""
    config = make_config(*models, *SETTINGS, f"train.run_dir={run_dir}", f"train.steps={steps}", *overrides)
    fit(build_run(make_inputs(config, rollouts())))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        family: tuple(
            save(random_hf_model(family, seed=seed, tie_word_embeddings=True), folder / f"{family}{seed}")
            for seed in (0, 1)
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    curves = {}
    for family in FAMILIES:
        run_dir = tmp_path_factory.mktemp("one") / family
        run_distributed(1, train, models[family], run_dir, STEPS)
        curves[family] = [row["loss"] for row in metrics(run_dir)]
        assert len(curves[family]) == STEPS and curves[family][-1] < 0.9 * curves[family][0], "it learns"
    return curves


def assert_same_curve(run_dir, expected):
    losses = [row["loss"] for row in metrics(run_dir)]
    assert losses == pytest.approx(expected, rel=1e-4)


CASES = [(family, name) for family, layouts in FAMILIES.items() for name in layouts if name != "one rank"]


@pytest.mark.nightly  # in CI each layout runs five of these steps, in a move below
@pytest.mark.parametrize(("family", "name"), CASES)
def test_ten_steps_are_the_same_curve(family, name, models, expected, tmp_path):
    world, *overrides = FAMILIES[family][name]
    run_distributed(world, train, models[family], tmp_path / "run", STEPS, *overrides)
    assert_same_curve(tmp_path / "run", expected[family])


CHAINS = {family: list(itertools.pairwise([*layouts, "one rank"])) for family, layouts in FAMILIES.items()}
EVERY_MOVE = [(family, *move) for family, chain in CHAINS.items() for move in chain]
# Each layout once, except "expert 2, data 2".
IN_CI = [
    *EVERY_MOVE[: len(LAYOUTS) : 2],
    ("Qwen3Moe", "expert 2, tensor 2, sequence", "expert 2, pipeline 2, virtual 2, data 2"),
]
NIGHTLY = [
    *(move for move in EVERY_MOVE if move not in IN_CI),
    ("Qwen3", "data 2", "tensor 2, pipeline 2, teacher data 4"),
    ("Qwen3Moe", "expert 2, pipeline 2, virtual 2, data 2", "expert 2, data 2"),
]
MOVES = [*IN_CI, *(pytest.param(*move, marks=pytest.mark.nightly) for move in NIGHTLY)]


@pytest.mark.parametrize(("family", "first", "then"), MOVES)
def test_a_run_continues_in_another_layout(family, first, then, models, expected, tmp_path):
    for steps, name in ((STEPS // 2, first), (STEPS, then)):
        world, *overrides = FAMILIES[family][name]
        run_distributed(world, train, models[family], tmp_path / "run", steps, *overrides)
    assert_same_curve(tmp_path / "run", expected[family])
