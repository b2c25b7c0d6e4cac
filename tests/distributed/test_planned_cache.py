"""The caches that a dry run plans are those that the embedded engine allocates, byte for byte."""

import pytest

from megatron_oprd.launch.assemble import build_models
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_memory import plan_cache
from megatron_oprd.rollout.decoder import Decoder
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import Prompt
from tests.helpers.generating import generating_inputs

PROMPTS = [Prompt(number, (5 + number,) * length) for number, length in enumerate((100, 3, 40))]
SETTINGS = (
    "rollout.samples_per_prompt=2",
    "rollout.max_new_tokens=40",
    "rollout.horizon={start: 25, grow: 1, every: 1}",
    "data.max_prompt_tokens=100",
)


def planned_and_allocated(rank, folder, *settings):
    """Return the plan, and the bytes in which this rank keeps its rows while it generates the rollouts of a step."""
    inputs = generating_inputs(folder, folder, PROMPTS, *SETTINGS, *settings)
    allocated, initialise = [], Decoder.__init__

    def record(self, *arguments, **keywords):
        initialise(self, *arguments, **keywords)
        allocated.append(self.cache.num_bytes + (self.recurrent.num_bytes if self.recurrent else 0))

    Decoder.__init__ = record
    try:
        models = build_models(inputs)
        replicas = models.topology.num_replicas
        models.engine.generate(PROMPTS[models.topology.replica_rank :: replicas], 0)
    finally:
        Decoder.__init__ = initialise
    plan = plan_cache(PlannedRun(inputs.config, inputs.setup, inputs.lengths), 0)
    return plan, allocated


@pytest.mark.parametrize(
    ("world", "settings", "rows", "layers", "heads"),
    [
        (1, (), 6, 3, 2),
        (2, ("parallel.tensor=2",), 6, 3, 1),
        (2, ("parallel.pipeline=2",), 6, 2, 2),
        (2, (), 4, 3, 2),
    ],
)
def test_the_planned_kv_cache_is_the_allocated_one(world, settings, rows, layers, heads, tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=3), tmp_path / "hf")
    results = run_distributed(world, planned_and_allocated, folder, *settings)
    plan = results[0][0]
    assert (plan.rows, plan.rollouts, plan.length) == (rows, rows, 125)
    assert plan.num_bytes == 2 * rows * 125 * layers * heads * 24 * 4  # keys and values, heads of 24 numbers, float32
    assert max(sum(allocated) for _, allocated in results) == plan.num_bytes


def test_the_planned_states_of_gated_deltanet_are_the_allocated_ones(tmp_path):
    folder = save(random_hf_model("Qwen3_5", num_hidden_layers=3), tmp_path / "hf")
    results = run_distributed(2, planned_and_allocated, folder, "parallel.tensor=2")
    keys_and_values = 2 * 125 * 24  # one layer with attention; one key-value head of 24 numbers is on each rank
    states = 2 * 2 * 12 * 20  # two layers; two value heads of 12 x 20 numbers are on each rank
    tails = 2 * 3 * (2 * 12 + 2 * 20)  # three tokens of one query, one key and two values
    assert results[0][0].num_bytes == 6 * 4 * (keys_and_values + states + tails)
    assert [allocated for _, allocated in results] == [[results[0][0].num_bytes]] * 2


def test_rows_take_turns_if_memory_is_short(tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=3), tmp_path / "hf")
    inputs = generating_inputs(folder, folder, PROMPTS, *SETTINGS)
    run = PlannedRun(inputs.config, inputs.setup, inputs.lengths)
    row = plan_cache(run, 0).num_bytes // 6
    plan = plan_cache(run, 1000, 1000 + 3 * 4 * row)  # a third of the free memory holds four rows
    assert (plan.rows, plan.rollouts, plan.num_bytes) == (4, 6, 4 * row)
    assert plan_cache(run, 1000, 999).rows == 1
