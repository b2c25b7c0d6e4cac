"""A layout that cannot be is refused with a line that names key, value and what would work; every other passes."""

import dataclasses

import pytest

from megatron_oprd.config import ParallelConfig, RecomputeConfig, load_config
from megatron_oprd.launch.layouts import (
    check_experts,
    check_optimizer,
    check_precision,
    check_student_layout,
    check_tp_overlap,
    check_window,
    plan_teacher,
    teacher_layout,
    world_size,
)
from megatron_oprd.model_spec import DeltaNet
from megatron_oprd.models.build import check_divisible, check_recompute
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.models.precision import ModelPrecision, Precision
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import UserError
from tests.helpers.specs import tiny_spec

DENSE = tiny_spec()
EXPERTS = tiny_spec(
    architecture="Qwen3MoeForCausalLM",
    num_experts=6,
    experts_per_token=2,
    moe_ffn_hidden_size=40,
    sparse_layers=tuple(range(8)),
)


def config(*overrides):
    required = ("student.path=s", "teacher.path=t", "train.run_dir=r", "rollout.engine=replay", "rollout.path=f")
    return load_config(None, [*required, *overrides])


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as refused:
        function(*args, **kwargs)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_the_number_of_processes_is_torchruns(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size() == 6


LAYOUTS = {
    "tensor": (
        6,
        {"tensor": 4},
        "{key}.tensor=4 x {key}.pipeline=1 needs a multiple of 4 processes, not 6; start torchrun with "
        "--nproc-per-node 4",
    ),
    "pipeline": (
        5,
        {"pipeline": 2},
        "{key}.tensor=1 x {key}.pipeline=2 needs a multiple of 2 processes, not 5; start torchrun with "
        "--nproc-per-node 2",
    ),
    "context": (
        4,
        {"context": 8},
        "{key}.tensor=1 x {key}.pipeline=1 x {key}.context=8 needs a multiple of 8 processes, not 4; start "
        "torchrun with --nproc-per-node 8",
    ),
    "together": (
        4,
        {"tensor": 2, "pipeline": 2, "context": 2},
        "{key}.tensor=2 x {key}.pipeline=2 x {key}.context=2 needs a multiple of 8 processes, not 4; start "
        "torchrun with --nproc-per-node 8",
    ),
    "virtual": (
        2,
        {"virtual_pipeline": 3},
        "{key}.virtual_pipeline=3 interleaves pipeline stages and {key}.pipeline is 1; use {key}.pipeline of "
        "at least 2 or {key}.virtual_pipeline=null",
    ),
    "sequence": (
        2,
        {"sequence": True},
        "{key}.sequence=true divides activations over tensor-parallel ranks and {key}.tensor is 1; use "
        "{key}.tensor of at least 2 or {key}.sequence=false",
    ),
    "expert": (
        6,
        {"expert": 4},
        "{key}.expert=4 does not divide the 6 processes of a pipeline stage; use one of 1, 2, 3, 6",
    ),
    "expert of a stage": (
        4,
        {"expert": 4, "pipeline": 2},
        "{key}.expert=4 does not divide the 2 processes of a pipeline stage; use one of 1, 2",
    ),
}


@pytest.mark.parametrize("key", ["parallel", "teacher.parallel"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_do_not_fit_the_processes(case, key):
    world, sizes, words = LAYOUTS[case]
    assert message(check_layout, ParallelConfig(**sizes), world, key=key) == words.format(key=key)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (1, {}),
        (7, {}),
        (8, {"tensor": 2, "pipeline": 2, "context": 2}),
        (8, {"tensor": 2, "sequence": True, "expert": 4}),
        (6, {"pipeline": 2, "virtual_pipeline": 2, "expert": 3}),
        (4, {"context": 2, "expert": 4}),
        (4, {"tensor": 4, "expert": 4}),  # experts are divided over tensor-parallel ranks, too
    ],
)
def test_layouts_that_fit_the_processes(world, sizes):
    check_layout(ParallelConfig(**sizes), world)


DIVISIONS = {
    "heads": (
        {},
        {"tensor": 3},
        "{key}.tensor=3 does not divide the {model}'s attention heads (8); use one of 1, 2, 4",
    ),
    "groups": (
        {},
        {"tensor": 8},
        "{key}.tensor=8 does not divide the {model}'s key-value heads (4); use one of 1, 2, 4",
    ),
    "width": (
        {"ffn_hidden_size": 110},
        {"tensor": 4},
        "{key}.tensor=4 does not divide the {model}'s intermediate size (110); use one of 1, 2",
    ),
    "width of the shared expert": (
        {"shared_ffn_hidden_size": 90},
        {"tensor": 4},
        "{key}.tensor=4 does not divide the {model}'s shared expert's intermediate size (90); use one of 1, 2",
    ),
    "experts": (
        {"num_experts": 6},
        {"tensor": 1, "expert": 4},
        "{key}.expert=4 does not divide the {model}'s 6 experts; use one of 1, 2, 3, 6",
    ),
}


@pytest.mark.parametrize(("key", "model"), [("parallel", "student"), ("teacher.parallel", "teacher")])
@pytest.mark.parametrize("case", DIVISIONS)
def test_layouts_that_do_not_divide_a_model(case, key, model):
    changes, sizes, words = DIVISIONS[case]
    spec = dataclasses.replace(DENSE, **changes)
    assert message(check_divisible, spec, **sizes, key=key, model=model) == words.format(key=key, model=model)


@pytest.mark.parametrize(("key", "model"), [("parallel", "student"), ("teacher.parallel", "teacher")])
def test_context_parallelism_does_not_divide_a_sliding_window(key, model):
    spec = dataclasses.replace(DENSE, windowed_layers=(3,), sliding_window=100)
    assert message(check_window, spec, ParallelConfig(context=2), key, model) == (
        f"{key}.context=2 does not support the {model}'s sliding window of 100 tokens; use {key}.context=1"
    )
    check_window(spec, ParallelConfig(tensor=2), key, model)


HYBRID = tiny_spec(linear_layers=(0,), delta_net=DeltaNet(2, 4, 8, 8, 4))
TE, IN_FP8 = ModelPrecision(True, False), ModelPrecision(True, False, (1, 1), {"fp8": "hybrid"})


@pytest.mark.parametrize("own", [TE, IN_FP8], ids=["Transformer Engine", "FP8"])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_gated_deltanet_runs_without_transformer_engine_and_fp8(own, model):
    config = load_config(
        None, ["student.path=s", "teacher.path=t", "train.run_dir=r", "rollout.engine=replay", "rollout.path=p"]
    )
    specs = {"student": tiny_spec(), "teacher": tiny_spec(), model: HYBRID}
    precision = dataclasses.replace(Precision(), **{model: own})
    teacher = plan_teacher(config, tiny_spec(), specs["teacher"], "", 1)
    message = f"the {model} has Gated DeltaNet layers, which run without Transformer Engine and FP8; use precision.att"
    with pytest.raises(UserError, match=message):
        check_precision(config, precision, specs["student"], (2,), {"": teacher})


def test_layouts_that_divide_a_model():
    for tensor in (1, 2, 4):
        check_divisible(DENSE, tensor)
        check_divisible(DENSE, tensor, expert=4)  # a dense model beside one of experts is copied to all of them
        for expert in (1, 2, 3, 6):
            check_divisible(EXPERTS, tensor, expert)


def test_expert_parallelism_needs_experts():
    words = "the model has no experts; use teacher.parallel.expert=1"
    assert message(check_experts, 2, [DENSE], key="teacher.parallel") == f"teacher.parallel.expert=2: {words}"
    assert "parallel.expert=4: " in message(check_experts, 4, [DENSE, DENSE])
    check_experts(1, [DENSE])
    check_experts(2, [DENSE, EXPERTS])


def test_a_student_of_experts_is_trained_on_divided_tokens():
    parallel = ParallelConfig(tensor=2, expert=2)
    words = message(check_student_layout, parallel, EXPERTS)
    assert words.startswith("parallel.tensor=2 with a student of 6 experts needs parallel.sequence=true")
    check_student_layout(parallel.model_copy(update={"sequence": True}), EXPERTS)
    check_student_layout(parallel, DENSE, EXPERTS)  # a teacher is not trained
    check_student_layout(ParallelConfig(expert=3), EXPERTS)


def test_a_shared_layout_names_the_model_that_it_does_not_suit():
    odd = dataclasses.replace(DENSE, num_query_groups=1)
    parallel = ParallelConfig(tensor=2)
    assert "the student's key-value heads (1)" in message(check_student_layout, parallel, odd, DENSE)
    assert "the teacher's key-value heads (1)" in message(check_student_layout, parallel, DENSE, odd)


@pytest.mark.parametrize(
    ("stages", "num_layers", "works"),
    [
        ((8, 7), 8, "use 1, or"),
        ((4, 4), 3, "use 1 or 2 or 4, or"),
        ((6, 3, 3, 3), 2, "use 1 or 3, or"),
        ((2, 2, 2, 2), 4, "use 1 or 2, or"),
    ],
)
def test_recomputed_chunks_fill_every_stage(stages, num_layers, works):
    recompute = RecomputeConfig(granularity="full", num_layers=num_layers)
    words = message(check_recompute, recompute, stages)
    assert words.startswith(f"recompute.num_layers={num_layers} does not divide the blocks of every pipeline stage")
    assert f"({', '.join(map(str, stages))}); {works} recompute.method=block" in words
    for offered in map(int, works.removeprefix("use ").removesuffix(", or").split(" or ")):
        check_recompute(RecomputeConfig(granularity="full", num_layers=offered), stages)
    for other in (
        None,
        RecomputeConfig(granularity="full", method="block", num_layers=num_layers),
        RecomputeConfig(granularity="selective", num_layers=num_layers),
        RecomputeConfig(num_layers=num_layers),
    ):
        check_recompute(other, stages)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 4), "parallel.pipeline=4 has more stages than the model's 3 layers; use parallel.pipeline of at most 3"),
        (
            (9, 4, 4),
            "parallel.pipeline=4 x parallel.virtual_pipeline=4 has more stages than the model's 9 layers; use "
            "parallel.pipeline of at most 2",
        ),
        (
            (3, 2, 2),
            "parallel.pipeline=2 x parallel.virtual_pipeline=2 has more stages than the model's 3 layers; use "
            "parallel.virtual_pipeline=null and parallel.pipeline of at most 3",
        ),
    ],
)
def test_more_stages_than_layers(sizes, words):
    assert message(even_stages, *sizes) == words


PLANS = {
    "stages": (16, DENSE, DENSE, ["parallel.pipeline=16"], "parallel.pipeline=16 has more stages"),
    "virtual stages": (
        4,
        DENSE,
        DENSE,
        ["parallel.pipeline=4", "parallel.virtual_pipeline=3"],
        "parallel.pipeline=4 x parallel.virtual_pipeline=3 has more stages than the model's 8 layers",
    ),
    "recompute of virtual stages": (
        2,
        DENSE,
        DENSE,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "recompute.granularity=full", "recompute.num_layers=4"],
        "recompute.num_layers=4 does not divide the blocks of every pipeline stage (2, 2, 2, 2)",
    ),
    "teacher's stages": (16, DENSE, DENSE, ["teacher.parallel.pipeline=16"], "teacher.parallel.pipeline=16 has more"),
    "teacher's processes": (2, DENSE, DENSE, ["teacher.parallel.pipeline=4"], "needs a multiple of 4 processes, not 2"),
    "teacher's heads": (
        8,
        DENSE,
        DENSE,
        ["teacher.parallel.tensor=8"],
        "teacher.parallel.tensor=8 does not divide the",
    ),
    "teacher without experts": (
        2,
        EXPERTS,
        DENSE,
        ["teacher.parallel.expert=2"],
        "teacher.parallel.expert=2: the model",
    ),
    "teacher's experts": (4, DENSE, EXPERTS, ["teacher.parallel.expert=4"], "divide the teacher's 6 experts"),
    "teacher's experts over a stage": (
        4,
        DENSE,
        EXPERTS,
        ["teacher.parallel={pipeline: 2, expert: 3}"],
        "teacher.parallel.expert=3 does not divide the 2 processes of a pipeline stage; use one of 1, 2",
    ),
    "student without experts": (
        4,
        DENSE,
        EXPERTS,
        ["parallel.expert=2", "teacher.parallel.tensor=2"],
        "parallel.expert=2: the model has no experts",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_cannot_be(case, monkeypatch):
    world, student, teacher, overrides, words = PLANS[case]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert words in message(plan_teacher, config(*overrides), student, teacher)


@pytest.mark.parametrize(
    ("world", "student", "teacher", "overrides"),
    [
        (1, DENSE, DENSE, []),
        (4, DENSE, DENSE, ["parallel.pipeline=2", "parallel.virtual_pipeline=3", "parallel.context=2"]),
        (4, EXPERTS, DENSE, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]),
        (2, DENSE, EXPERTS, ["parallel.expert=2"]),
        (2, DENSE, EXPERTS, ["teacher.parallel.expert=2"]),
        (2, EXPERTS, DENSE, ["parallel.expert=2", "teacher.parallel={tensor: 2}"]),
        (6, DENSE, EXPERTS, ["parallel.pipeline=3", "teacher.parallel={tensor: 2, expert: 6}"]),
        (2, DENSE, DENSE, ["parallel.pipeline=2", "loss.representation.pairs=[[1,8],[8,1]]"]),
    ],
)
def test_plans_that_can_be(world, student, teacher, overrides, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    plan_teacher(config(*overrides), student, teacher)


@pytest.mark.parametrize(
    ("own", "student"),
    [
        ("{}", []),
        ("{tensor: 2}", ["parallel.tensor=2"]),
        ("{pipeline: 2, expert: 2}", ["parallel.pipeline=2", "parallel.expert=2"]),
        ("{tensor: 2}", ["parallel.tensor=2", "parallel.distributed_optimizer=false"]),
        ("{}", ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.world_size=2"]),
    ],
)
def test_a_teacher_in_the_students_layout_has_none_of_its_own(own, student):
    assert teacher_layout(config(f"teacher.parallel={own}", *student)) is None
    assert teacher_layout(config(*student)) is None


@pytest.mark.parametrize(
    ("own", "student"),
    [
        ("{tensor: 2}", []),
        ("{}", ["parallel.tensor=2"]),
        ("{tensor: 2}", ["parallel.tensor=2", "parallel.sequence=true"]),
        ("{pipeline: 2}", ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        ("{}", ["parallel.context=2"]),
    ],
)
def test_a_teacher_in_another_layout_has_its_own(own, student):
    layout = teacher_layout(config(f"teacher.parallel={own}", *student))
    assert layout is not None and not layout.sequence and (layout.context, layout.virtual_pipeline) == (1, None)


GATHER = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
TP_OVERLAP = ("parallel.tensor=2", "parallel.sequence=true", "parallel.tp_comm_overlap=true")
AWARE, OFFLOAD = "optimizer.precision_aware=true", "optimizer.cpu_offload=0.5"
# Settings, whether a GPU and Transformer Engine exist, part of the error.
TP_OVERLAPS = {
    "on a CPU": (TP_OVERLAP, (False, True), "needs a CUDA device, and this process has none; use"),
    "without Transformer Engine": (
        TP_OVERLAP,
        (True, False),
        "needs Transformer Engine, which is not installed; use parallel.tp_c",
    ),
    "micro-batches of any length": (TP_OVERLAP, (True, True), "micro-batches of one length; set precision.pad_tokens"),
    "less than a micro-batch": (
        [*TP_OVERLAP, "precision.pad_tokens=4096"],
        (True, True),
        "precision.pad_tokens=4096 is less than a rank has of the fullest one; set it to 16384 or lower",
    ),
}
OPTIMIZERS = {
    "gather of sgd": (
        [*GATHER, "optimizer.name=sgd"],
        (True, True),
        "use adamw or parallel.overlap_param_gather=false",
    ),
    "both": (
        [AWARE, OFFLOAD],
        (True, True),
        "optimizer.precision_aware=true and optimizer.cpu_offload=0.5: a state in",
    ),
    "aware of sgd": ([AWARE, "optimizer.name=sgd"], (True, True), "true needs optimizer.name=adamw and parallel.dist"),
    "aware of float32": ([AWARE, "precision.dtype=fp32"], (True, True), "needs precision.dtype=bf16; set it or optim"),
    "aware without": (
        [AWARE],
        (True, False),
        f"{AWARE} needs Transformer Engine, which is not installed; use optimizer",
    ),
    "aware on a CPU": (
        [AWARE],
        (False, True),
        f"{AWARE} needs a CUDA device, and this process has none; use optimizer",
    ),
    "offload, whole state": ([OFFLOAD, "parallel.distributed_optimizer=false"], (True, True), f"{OFFLOAD} needs optim"),
    "offload on a CPU": ([OFFLOAD], (False, True), "none; use optimizer.cpu_offload=0"),
}


def machine_with(gpu, te):
    return Machine("2.11.0" if te else None, (9, 0) if gpu else None, (13, 0) if gpu else None)


@pytest.mark.parametrize("case", TP_OVERLAPS)
def test_tensor_parallel_overlap_that_cannot_work_is_refused(case):
    settings, machine, words = TP_OVERLAPS[case]
    assert words in message(check_tp_overlap, config(*settings), machine_with(*machine))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_that_cannot_work_is_refused(case):
    settings, machine, words = OPTIMIZERS[case]
    assert words in message(check_optimizer, config("precision.dtype=bf16", *settings), machine_with(*machine))


@pytest.mark.parametrize(
    ("settings", "machine"),
    [
        ([], (False, False)),
        (["optimizer.name=sgd", "parallel.overlap_grad_reduce=true"], (False, False)),
        (GATHER, (False, False)),
        ([AWARE], (True, True)),
        ([OFFLOAD], (True, True)),
        ([*TP_OVERLAP, "precision.pad_tokens=16384"], (True, True)),
    ],
)
def test_an_optimizer_or_overlap_that_works_is_accepted(settings, machine):
    check_optimizer(config("precision.dtype=bf16", *settings), machine_with(*machine))
    check_tp_overlap(config(*settings), machine_with(*machine))
