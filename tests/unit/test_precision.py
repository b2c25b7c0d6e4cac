"""Every row of docs/precision_table.md's table is what the function gives, and no combination drops FP8 in silence."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from megatron_oprd.config import ParallelConfig, PrecisionConfig, load_config
from megatron_oprd.models.precision import (
    MULTIPLE,
    ModelLayout,
    ModelPrecision,
    check_dimensions,
    check_head_exchange,
    plan_precision,
)
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import UserError
from tests.helpers.specs import tiny_spec

PAGE = Path(__file__).parents[2] / "docs" / "precision_table.md"
MACHINES = {
    "CPU": Machine(),
    "CPU + TE": Machine("2.11.0"),
    "A100": Machine("2.11.0", (8, 0), (13, 0)),
    "L40S": Machine("2.11.0", (8, 9), (13, 0)),
    "H100": Machine("2.11.0", (9, 0), (13, 0)),
    "H100, CUDA 12.8": Machine("2.11.0", (9, 0), (12, 8)),
    "H100 without TE": Machine(None, (9, 0), (13, 0)),
    "B200": Machine("2.11.0", (10, 0), (13, 0)),
}
ROW = re.compile(r"^\| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
TABLE = [row for row in ROW.findall(PAGE.read_text()) if row[0] in MACHINES]


def precision_of(settings):
    overrides = [f"precision.{setting}" for setting in ("dtype=bf16", "teacher_fp8=off", *settings.split())]
    required = ("student.path=s", "teacher.path=t", "train.run_dir=r", "rollout.engine=replay", "rollout.path=f")
    return load_config(None, [*required, *overrides]).precision


def in_words(model):
    """Describe a model's precision in the words of docs/precision_table.md."""
    arguments = {name: value for name, value in model.arguments.items() if name != "cp_comm_type"}
    words = ["TE" if model.transformer_engine else "own"]
    if model.scaled_weights:
        words.append("_scaled_mm weights")
    if arguments:
        words.append(f"{arguments.pop('fp8')} {arguments.pop('fp8_recipe')}")
        words += ["fp8_param"] * arguments.pop("fp8_param", False)
        kept = [arguments.pop(f"num_layers_at_{end}_in_bf16") for end in ("start", "end")]
        assert arguments.pop("first_last_layers_bf16") == (sum(kept) > 0)
        words += [f"{kept[0]}+{kept[1]} blocks in bf16"] if sum(kept) else []
    assert arguments == {}
    return ", ".join(words)


def outcome(config, machine, parallel=None):
    try:
        planned = plan_precision(config, parallel or ParallelConfig(), machine)
    except UserError as error:
        return f"error: {error}"
    return f"student: {in_words(planned.student)}; teacher: {in_words(planned.teacher)}; tokens to {planned.pad_tokens}"


@pytest.mark.parametrize(("machine", "settings", "expected"), TABLE, ids=[" ".join(row[:2]).strip() for row in TABLE])
def test_a_row_of_the_table(machine, settings, expected):
    assert outcome(precision_of(settings), MACHINES[machine]) == expected


def test_the_table_has_every_recipe_machine_and_kind_of_modules():
    assert len(TABLE) > 40
    words = " ".join(" ".join(row) for row in TABLE)
    assert all(f"recipe={recipe}" in words for recipe in MULTIPLE if recipe != "tensorwise")
    assert {row[0] for row in TABLE} == MACHINES.keys()


def test_whatever_is_asked_for_is_done_or_refused():
    """Over all combinations: FP8 where it was asked for and nowhere else, on modules that can do it."""
    options = itertools.product(
        ("bf16", "fp32"), ("auto", "te", "sdpa"), (None, "hybrid", "e4m3"), MULTIPLE, ("off", "compute", "weights")
    )
    refused = done = 0
    for dtype, attention, fp8, recipe, teacher in options:
        for keep, machine in itertools.product((0, 1), MACHINES.values()):
            config = PrecisionConfig(
                dtype=dtype,
                attention=attention,
                fp8=fp8,
                recipe=recipe,
                teacher_fp8=teacher,
                keep_bf16={"first": keep, "last": keep},
            )
            try:
                planned = plan_precision(config, ParallelConfig(), machine)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "precision." in str(error)
                continue
            done += 1
            student, of_teacher = planned.student, planned.teacher
            assert student.arguments.get("fp8") == fp8 and not student.scaled_weights
            assert of_teacher.in_fp8 == (teacher != "off")
            assert attention != "te" or (student.transformer_engine and of_teacher.transformer_engine)
            assert attention != "sdpa" or not (student.transformer_engine or of_teacher.transformer_engine)
            for model in (student, of_teacher):
                if "fp8" in model.arguments:
                    assert model.transformer_engine and dtype == "bf16"
                    assert (machine.capability or (0, 0)) >= (8, 9)
                    assert planned.pad_tokens % MULTIPLE[recipe] == 0
                    assert model.arguments["fp8_recipe"] == recipe
            assert of_teacher.arguments.get("fp8_recipe") != "delayed"
            assert (of_teacher.arguments.get("fp8_param") or of_teacher.scaled_weights or False) == (
                teacher == "weights"
            )
    assert refused > done > 100


@pytest.mark.parametrize("name", ["H100", "A100", "CPU", "H100 without TE"])
def test_automatic_fp8_of_the_teacher_has_a_candidate_on_hopper_and_nothing_else_elsewhere(name):
    off, weights, automatic = (precision_of(f"teacher_fp8={value}") for value in ("off", "weights", "auto"))
    machine = MACHINES[name]
    plain, chosen = (plan_precision(one, ParallelConfig(), machine) for one in (off, automatic))
    assert dataclasses.replace(chosen, fp8_candidate=None, pad_tokens=1) == plain
    if name == "H100":
        assert chosen.fp8_candidate == plan_precision(weights, ParallelConfig(), machine).teacher
        assert chosen.pad_tokens == 16
    else:
        assert chosen == plain


def test_a_bare_off_in_yaml_is_off():
    assert precision_of("teacher_fp8=off").teacher_fp8 == "off"


@pytest.mark.parametrize(
    ("requested", "context", "machine", "expected"),
    [
        ("auto", 2, "CPU", None),
        ("auto", 2, "H100", "p2p"),
        ("a2a", 2, "H100", "a2a"),
        ("all_gather", 2, "CPU", None),
        ("all_gather", 2, "H100", "error: parallel.cp_comm_type=all_gather: Transformer Engine does not gather"),
        ("p2p", 2, "CPU", "error: parallel.cp_comm_type=p2p needs Transformer Engine's attention"),
        ("a2a", 1, "H100 without TE", "error: parallel.cp_comm_type=a2a needs Transformer Engine's attention"),
    ],
)
def test_context_parallel_communication_is_chosen_or_refused(requested, context, machine, expected):
    parallel = ParallelConfig(context=context, cp_comm_type=requested)
    if expected is not None and expected.startswith("error"):
        assert outcome(PrecisionConfig(dtype="bf16"), MACHINES[machine], parallel).startswith(expected)
    else:
        planned = plan_precision(PrecisionConfig(dtype="bf16"), parallel, MACHINES[machine])
        assert (
            planned.student.arguments.get("cp_comm_type") == planned.teacher.arguments.get("cp_comm_type") == expected
        )


def student_layout(**sizes):
    return ModelLayout(ParallelConfig(**sizes), (4, 4), "student", "parallel")


IN_FP8 = ModelPrecision(True, False, (1, 1), {"fp8": "hybrid"})
SIZES = tiny_spec(hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=4, head_dim=32)


@pytest.mark.parametrize(
    ("changes", "recipe", "tensor", "expected"),
    [
        ({}, "blockwise", 2, None),
        ({"hidden_size": 264}, "tensorwise", 1, "hidden size is 264"),
        ({"ffn_hidden_size": 544}, "tensorwise", 1, None),
        ({"ffn_hidden_size": 544}, "tensorwise", 4, "intermediate size is 136 on each rank with parallel.tensor=4"),
        ({"ffn_hidden_size": 544}, "blockwise", 1, "needs a multiple of 128"),
        ({"head_dim": 24}, "tensorwise", 4, None),
        ({"head_dim": 20}, "tensorwise", 4, "width of the heads is 40"),
        ({"head_dim": 18}, "tensorwise", 4, "width of query, key and value is 72"),
        ({"head_dim": 24}, "mxfp8", 2, None),
        ({"head_dim": 24}, "mxfp8", 4, "width of the heads is 48"),
    ],
)
def test_sizes_that_have_no_fp8_product_are_named(changes, recipe, tensor, expected):
    spec = dataclasses.replace(SIZES, **changes)
    layout = ModelLayout(ParallelConfig(tensor=tensor, pipeline=2), (4, 4), "teacher", "parallel")
    check = (recipe, spec, layout)
    check_dimensions(ModelPrecision(), *check)  # without FP8 any will do
    if expected is None:
        check_dimensions(IN_FP8, *check)
        return
    with pytest.raises(UserError, match=expected):
        check_dimensions(IN_FP8, *check)


def test_more_blocks_in_bf16_than_megatron_takes_are_refused():
    many = ModelPrecision(True, False, (1, 5), {"fp8": "hybrid"})
    with pytest.raises(UserError, match=r"precision\.keep_bf16\.last=5 is more .* use at most 4"):
        check_dimensions(many, "tensorwise", SIZES, student_layout(pipeline=2))


def test_heads_that_cannot_be_exchanged_are_named():
    all_to_all = ModelPrecision(True, arguments={"cp_comm_type": "a2a"})
    check_head_exchange(all_to_all, SIZES, student_layout(tensor=1, context=4))
    with pytest.raises(UserError, match=r"the student has 2 key-value heads on each rank; use .*p2p"):
        check_head_exchange(all_to_all, SIZES, student_layout(tensor=2, context=4))
