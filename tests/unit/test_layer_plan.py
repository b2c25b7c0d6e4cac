"""The layer plan: both layers of a pair have a stage, and no teacher layer above the highest compared one is built."""

import itertools
import json

import pytest

from megatron_oprd.config import LossConfig, ParallelConfig, RepresentationConfig
from megatron_oprd.models.layer_plan import even_stages, make_plan
from megatron_oprd.types import LayerPair, UserError
from tests.helpers.specs import tiny_spec

DEPTHS = (1, 2, 3, 4, 5, 7, 12, 28)
SIZES = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (2, 3), (4, 2)]
LAYERS = ("all", "last", "even", "odd")


def plan_of(student, teacher, pipeline=1, virtual=1, teacher_pipeline=None, **representation):
    config = LossConfig(representation=RepresentationConfig(**representation))
    models = tiny_spec(num_layers=student), tiny_spec(num_layers=teacher)
    layout = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual if virtual > 1 else None)
    return make_plan(config, *models, layout, ParallelConfig(pipeline=teacher_pipeline) if teacher_pipeline else None)


def many_plans():
    """Yield plans for all depths of both models and all layouts with enough layers for each stage, with each selection
    of layers, and with a teacher in a layout of its own."""
    for student, teacher, (pipeline, virtual) in itertools.product(DEPTHS, DEPTHS, SIZES):
        if pipeline * virtual > student:
            continue
        for layers, final_norm in itertools.product(LAYERS, (True, False)):
            if layers == "odd" and student == 1:
                continue
            for own in (None, *(size for size in (1, 2, 4) if size <= teacher)):
                yield plan_of(student, teacher, pipeline, virtual, own, layers=layers, final_norm=final_norm), own


@pytest.fixture(scope="module")
def plans():
    return list(many_plans())


@pytest.mark.parametrize(("pipeline", "virtual"), SIZES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_stages_are_even_and_hold_every_block(depth, pipeline, virtual):
    stages = pipeline * virtual
    if stages > depth:
        with pytest.raises(UserError, match=f"pipeline={pipeline}.* more stages than the model's {depth} layers"):
            even_stages(depth, pipeline, virtual)
        return
    blocks = even_stages(depth, pipeline, virtual)
    assert len(blocks) == stages and sum(blocks) == depth
    assert list(blocks) == sorted(blocks, reverse=True) and blocks[0] - blocks[-1] <= 1 <= blocks[-1]


def test_the_sizes_that_an_error_suggests_are_accepted():
    for depth, pipeline, virtual in itertools.product(range(1, 9), range(1, 9), range(1, 5)):
        if pipeline * virtual <= depth or (virtual > 1 and pipeline == 1):
            continue
        with pytest.raises(UserError, match="use parallel") as refused:
            even_stages(depth, pipeline, virtual)
        most = int(str(refused.value).split()[-1])
        still_virtual = "virtual_pipeline=null" not in str(refused.value)
        even_stages(depth, most, virtual if still_virtual else 1)
        assert virtual == 1 or not still_virtual or most >= 2  # one stage cannot be interleaved


def test_every_pair_has_one_stage_on_each_side(plans):
    for plan, _ in plans:
        assert sum(plan.student_stages) == plan.student_depth
        ends = [list(itertools.accumulate(stages)) for stages in (plan.student_stages, plan.teacher_stages)]
        for pair in plan.pairs:
            places = (plan.student_stage(pair.student), plan.teacher_stage(pair.teacher))
            normed = (plan.student_normed_layer, plan.teacher_normed_layer)
            for layer, stage, last_block, after_norm in zip(
                (pair.student, pair.teacher), places, ends, normed, strict=True
            ):
                if layer == after_norm:
                    assert stage == len(last_block) - 1
                else:
                    assert ([0, *last_block])[stage] < layer <= last_block[stage]


def test_the_teacher_is_built_up_to_its_highest_compared_layer(plans):
    for plan, own in plans:
        assert sum(plan.teacher_stages) == max(pair.teacher for pair in plan.pairs)
        assert min(plan.teacher_stages) >= 0
        assert len(plan.teacher_stages) == (own or len(plan.student_stages))


def test_an_aligned_plan_has_both_layers_of_a_pair_on_one_stage(plans):
    aligned = 0
    for plan, own in plans:
        on_one_stage = all(plan.student_stage(pair.student) == plan.teacher_stage(pair.teacher) for pair in plan.pairs)
        assert plan.aligned == (own is None and on_one_stage)
        aligned += plan.aligned
    assert aligned > len(plans) / 5


def test_pairs_in_order_need_no_transfer(plans):
    """The layer map is monotonic, so the teacher can be divided at the student's stages."""
    with_transfer = {plan for plan, own in plans if own is None and not plan.aligned}
    # Exceptions: two student layers on neighbouring stages share a teacher layer; layer L after the final norm.
    for plan in with_transfer:
        teachers = [pair.teacher for pair in sorted(plan.pairs, key=lambda pair: pair.student)]
        assert len(set(teachers)) < len(teachers) or plan.teacher_normed_layer is not None


def test_readers_over_all_pipeline_ranks_are_all_pairs_once(plans):
    for plan, own in plans:
        stages = range(len(plan.student_stages))
        read = [plan.readers(stages[rank :: plan.pipeline_size]) for rank in range(plan.pipeline_size)]
        assert sorted(pair for of_rank in read for pair in of_rank.items()) == [
            (pair.student, pair.teacher) for pair in plan.pairs
        ]
        of_teacher = range(len(plan.teacher_stages))
        computed = [plan.teacher_layers([stage]) for stage in of_teacher]
        assert sorted(itertools.chain(*computed)) == sorted({pair.teacher for pair in plan.pairs})
        if plan.aligned and own is None:
            assert all(set(plan.readers([stage]).values()) == set(computed[stage]) for stage in stages)


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (2, 2)])
def test_pairs_that_cross_stages_need_a_transfer(pipeline, virtual):
    plan = plan_of(8, 12, pipeline, virtual, pairs=[(1, 9), (8, 2)])
    assert not plan.aligned
    assert sum(plan.teacher_stages) == 9 and len(plan.teacher_stages) == pipeline * virtual
    assert max(plan.teacher_stages) - min(plan.teacher_stages) <= 1
    assert (plan.student_stage(1), plan.student_stage(8)) == (0, pipeline * virtual - 1)
    assert plan_of(8, 12, pairs=[(1, 9), (8, 2)]).aligned  # one stage holds everything


@pytest.mark.parametrize("own", [1, 2, 3, 4])
def test_a_teacher_in_its_own_layout_is_divided_evenly(own):
    plan = plan_of(8, 12, 2, 1, own, layers=[2, 5])
    highest = max(pair.teacher for pair in plan.pairs)
    assert not plan.aligned and len(plan.teacher_stages) == own and sum(plan.teacher_stages) == highest < 12
    assert max(plan.teacher_stages) - min(plan.teacher_stages) <= 1


def test_a_teacher_stage_may_be_left_without_a_block():
    assert plan_of(8, 4, 2, 1, 4, pairs=[(1, 2)]).teacher_stages == (1, 1, 0, 0)
    assert plan_of(8, 8, 4, 1, layers=[1]).teacher_stages == (1, 0, 0, 0)
    assert plan_of(8, 8, 2, 2, layers=[5]).teacher_stages == (0, 0, 5, 0)


@pytest.mark.parametrize("own", [None, 2])
def test_the_last_layer_is_compared_after_the_final_norm_or_before_it(own):
    for pairs, student, teacher in (([(4, 6)], 4, 6), ([(4, 5)], 4, None), ([(3, 6)], None, 6), ([(3, 5)], None, None)):
        plan = plan_of(4, 6, 2, 1, own, pairs=pairs)
        assert (plan.student_normed_layer, plan.teacher_normed_layer) == (student, teacher)
        plan = plan_of(4, 6, 2, 1, own, pairs=pairs, final_norm=False)
        assert (plan.student_normed_layer, plan.teacher_normed_layer) == (None, None)


def test_a_layer_after_the_final_norm_is_on_the_stage_of_the_norm():
    plan = plan_of(4, 6, 2, 1, pairs=[(1, 6), (4, 1)])
    assert (plan.student_stage(4), plan.teacher_stage(6)) == (1, 1)
    # The teacher's top layer, read early by the student, leaves its last stage without a block but not without a norm.
    plan = plan_of(4, 6, 4, 1, pairs=[(1, 6)])
    assert not plan.aligned and plan.teacher_stage(6) == 3
    assert plan_of(4, 6, 4, 1, pairs=[(1, 6)], final_norm=False).teacher_stages == (6, 0, 0, 0)


def test_a_teacher_layout_with_more_stages_than_layers_is_refused():
    assert plan_of(8, 2, 4, 2).teacher_depth == 2  # in the student's layout, stages stay without a block
    with pytest.raises(UserError, match=r"teacher\.parallel\.pipeline=3 .* 2 layers; use .*pipeline of at most 2"):
        plan_of(8, 2, 1, 1, 3)


def test_models_of_different_widths_are_refused_without_a_bridge():
    with pytest.raises(UserError, match="hidden_size 64 differs from teacher hidden_size 32"):
        make_plan(LossConfig(), tiny_spec(), tiny_spec(hidden_size=32))


@pytest.mark.parametrize("own", [None, 2])
def test_plan_json_has_rank_and_chunk_of_every_pair(own):
    plan = plan_of(8, 8, 2, 2, own)
    written = json.loads(json.dumps(plan.as_json()))
    assert [(pair["stage"], pair["chunk"]) for pair in written["pairs"]] == [
        (0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1),
    ]  # fmt: skip
    assert [LayerPair(pair["student"], pair["teacher"]) for pair in written["pairs"]] == list(plan.pairs)
    assert written["student_layers_per_stage"] == [2, 2, 2, 2]
    assert written["teacher_layers_per_stage"] == ([2, 2, 2, 2] if own is None else [4, 4])
    assert (written["aligned"], written["teacher_layers_built"], written["teacher_layers_total"]) == (own is None, 8, 8)
