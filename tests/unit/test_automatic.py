"""`recompute: auto` and `batch.max_tokens_per_micro_batch: auto` become values that fit into the given memory."""

import dataclasses
import json

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.launch.inputs import UNBOUNDED_TOKENS, read_inputs
from megatron_oprd.planning.automatic import CHUNK, choose_automatic, limit_bytes, smaller_chunks
from megatron_oprd.planning.memory_plan import plan_memory
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.types import UserError
from tests.helpers.planning import replay_config, result_of
from tests.helpers.runs import replay_run

AUTO = ("recompute=auto", "batch.max_tokens_per_micro_batch=auto")
CPU = PlanDevice("cpu", "a CPU", 10**9, 1, 0, 10**9, None)


def test_the_margin_stays_free():
    device = dataclasses.replace(CPU, memory=1000, sharers=2)
    assert limit_bytes(replay_config(8), device) == 450
    assert limit_bytes(replay_config(8, "memory.limit_gb=2", "memory.margin=0.25"), device) == 1_500_000_000


def _choices(arguments):
    """Return what is chosen with plenty of memory, and with one byte less than no recomputation needs then."""
    inputs = read_inputs(load_config(None, [*arguments, *AUTO, "memory.margin=0"]), dry_run=True, choose_later=True)
    assert inputs.config.batch.max_tokens_per_micro_batch == UNBOUNDED_TOKENS
    plenty = choose_automatic(inputs, CPU)
    needed = plenty.stages[0].chosen.needed
    tight = dataclasses.replace(inputs, automatic=frozenset({"recompute.granularity"}), config=plenty.inputs.config)
    chosen = choose_automatic(tight, dataclasses.replace(CPU, memory=needed - 1))
    memory = plan_memory(PlannedRun.of(chosen.inputs), CPU)
    return plenty.settings, dict(chosen.settings), list(chosen.lines()), memory.needed, needed


def test_as_little_is_recomputed_as_memory_allows(tmp_path):
    arguments = replay_run(tmp_path, 1, "loss.representation.positions=all", "checkpoint.every=0", num_hidden_layers=2)
    plenty, tight, lines, planned, needed = result_of(_choices, arguments)
    assert set(plenty) == {"batch.max_tokens_per_micro_batch"}
    assert tight == {"recompute.stages": [{"parts": ["layernorm"], "blocks": 0}]}
    assert lines[0].startswith("recompute layernorm of every block: ") and lines[0].endswith("GB allowed")
    assert lines[1].startswith("next cheaper: nothing: ") and lines[1].endswith("does not fit")
    assert planned < needed


def _choice_without_room(arguments):
    """Return what is chosen with one byte less than the most recomputation needs."""
    inputs = read_inputs(load_config(None, arguments), dry_run=True, choose_later=True)
    none_fits = choose_automatic(inputs, dataclasses.replace(CPU, memory=1))
    room = none_fits.stages[0].chosen.needed - 1
    chosen = choose_automatic(inputs, dataclasses.replace(CPU, memory=room))
    return (
        none_fits.settings,
        chosen.settings,
        list(chosen.lines()),
        plan_memory(PlannedRun.of(chosen.inputs), CPU),
        room,
    )


def test_smaller_chunks_of_logits_are_the_last_resort(tmp_path):
    settings = ("loss.representation.weight=0", "loss.output.objective=full_kl", "recompute=auto", "memory.margin=0")
    tokens = ("batch.max_tokens_per_micro_batch=2048", "checkpoint.every=0")
    arguments = replay_run(tmp_path, 1, *settings, *tokens, num_hidden_layers=1, vocab_size=4096)
    row = {"prompt_ids": [1], "response_ids": [2] * 500}
    (tmp_path / "replay.jsonl").write_text((json.dumps(row) + "\n") * 3)
    without, tight, lines, planned, room = result_of(_choice_without_room, arguments)
    assert CHUNK not in without
    assert tight[CHUNK] == 1024 and lines[0] == "logits of 1,024 tokens at a time"
    assert planned.needed <= room


def test_wide_vocabularies_have_small_chunks_already(tmp_path):
    inputs = read_inputs(load_config(None, replay_run(tmp_path, 1, num_hidden_layers=1)), dry_run=True)
    run = PlannedRun.of(inputs)
    wide = dataclasses.replace(run.setup.student, vocab_size=2**18)
    assert smaller_chunks(run) == [1024, 512, 256]
    assert smaller_chunks(dataclasses.replace(run, setup=dataclasses.replace(run.setup, student=wide))) == [256]


def test_other_commands_recompute_nothing_and_take_the_default_size(tmp_path):
    inputs = read_inputs(load_config(None, [*replay_run(tmp_path, 1, num_hidden_layers=1), *AUTO]), dry_run=True)
    assert not inputs.automatic and inputs.config.recompute.granularity == "none"
    assert inputs.config.batch.max_tokens_per_micro_batch == 32768


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("recompute.parts=[mlp]",), "recompute.parts has no effect with recompute.granularity=none"),
        (("recompute.stages=[{}]", "recompute.granularity=full"), "recompute.stages says all that is recomputed"),
        ((AUTO[1], "parallel.tp_comm_overlap=true", "parallel.sequence=true"), "needs micro-batches of one length"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        replay_config(8, *settings)
