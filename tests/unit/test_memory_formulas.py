"""Parameter counts agree with real models, and the memory formulas with traced updates."""

import dataclasses
import functools
import math

import pytest
import torch

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.names import count_parameters, entries, megatron_shapes
from megatron_oprd.models.build import ModelPart, build_model
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.parallel.topology import build_topology
from megatron_oprd.planning.memory_formulas import layer_activation_bytes, predict_memory
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.planning import (
    dense_spec,
    expert_spec,
    filling_rollouts,
    hybrid_spec,
    planned_run,
    replay_config,
    shared_expert_spec,
    trace_in_process,
)

SHARED_EXPERT = "tied, with a shared expert beside experts"
MODELS = {
    "dense": ("Qwen3", {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "experts": ("Qwen3Moe", {}),
    SHARED_EXPERT: ("Qwen2Moe", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "fused": ("Phi3", {"tie_word_embeddings": True}),
}
# (processes, layout)
LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "virtual": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "expert": (2, {"expert": 2}),
    "tensor and expert": (4, {"tensor": 2, "sequence": True, "expert": 4}),
    "all": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_key_value_heads": 4, "vocab_size": 132}  # a vocabulary that needs no padding
    return {
        name: save(random_hf_model(family, **{**sizes, **of}), folder / name) for name, (family, of) in MODELS.items()
    }


@pytest.fixture(scope="module")
def specs(models):
    return {name: read_model_spec(path) for name, path in models.items()}


def division_of(spec, layout):
    parallel = ParallelConfig(**layout)
    stages = even_stages(spec.num_layers, parallel.pipeline, parallel.virtual_pipeline or 1)
    return ModelDivision(parallel.tensor, parallel.pipeline, parallel.expert, stages)


@pytest.mark.parametrize("model", MODELS)
def test_parameter_counts_agree_with_transformers(model, models, specs):
    family, sizes = MODELS[model]
    network = random_hf_model(family, **{"num_key_value_heads": 4, "vocab_size": 132, **sizes})
    assert count_parameters(specs[model]) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (model, layout)
        for model in MODELS
        for layout in LAYOUTS
        if "experts" in model or "expert" not in LAYOUTS[layout][1]
    ],
)
def test_the_ranks_of_a_replica_have_every_parameter(model, layout, specs):
    """The sum over ranks counts undivided parameters once per tensor-parallel rank."""
    spec, (_, sizes) = specs[model], LAYOUTS[layout]
    division = division_of(spec, sizes)
    ranks = [rank_parameters(spec, division, rank, lm_head=True) for rank in range(division.pipeline)]
    shapes = megatron_shapes(spec)
    copied = sum(math.prod(shapes[entry.megatron]) for entry in entries(spec) if entry.layout == "copy")
    embedding = math.prod(shapes["embedding.word_embeddings.weight"])
    twice = embedding if spec.tied_embeddings and division.pipeline > 1 else 0  # on the first and the last stage
    dense, experts = (sum(kinds) for kinds in zip(*ranks, strict=True))
    assert dense * division.tensor + experts * division.expert == (
        count_parameters(spec) + copied * (division.tensor - 1) + twice
    )


def _built(rank, spec, layout):
    parallel = ParallelConfig(**layout)
    topology = build_topology(parallel, torch.device("cpu"), seed=0)
    counts = []
    for lm_head in (True, False):
        stage = build_model(spec, topology, torch.float32, ModelPart(lm_head=lm_head))
        parameters = list(stage.named_parameters())
        experts = sum(parameter.numel() for name, parameter in parameters if ".experts." in name)
        counts.append((sum(parameter.numel() for _, parameter in parameters) - experts, experts))
    return topology.pipeline_rank, counts, (topology.groups.dp_cp.size(), topology.groups.expt_dp.size())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_counts_of_a_rank_agree_with_real_modules(layout, specs):
    """The vocabulary needs padding, stages are uneven, and models have an LM head (student) or none (teacher).

    The distributed optimizer divides its state over Megatron-Core's own groups.
    """
    world, sizes = LAYOUTS[layout]
    spec = dataclasses.replace(specs[SHARED_EXPERT if layout in ("all", "expert") else "experts"], vocab_size=131)
    if "tensor" in sizes and not sizes.get("sequence"):
        spec = dataclasses.replace(specs["tied"], vocab_size=131)
    division = division_of(spec, sizes)
    fullest = 0
    for pipeline_rank, counts, copies in run_distributed(world, _built, spec, sizes):
        for lm_head, built in zip((True, False), counts, strict=True):
            assert rank_parameters(spec, division, pipeline_rank, lm_head=lm_head) == built
        fullest = max(fullest, sum(count // number for count, number in zip(counts[0], copies, strict=True)))
    overrides = [f"parallel.{name}={str(size).lower()}" for name, size in sizes.items()]
    assert predict({"model": spec}, "model", world, *overrides)["optimizer state"] == fullest * 12


def predict(specs, student, world_size, *overrides, teacher=None):
    """Return the predicted memory of a run. Without `teacher`, the teacher has the student's sizes."""
    config = replay_config(64, "rollout.max_new_tokens=32", "rollout.prompts_per_step=64", *overrides)
    return predict_memory(planned_run(config, specs[student], world_size, teacher=specs[teacher or student]))


def test_memory_of_one_process(specs):
    count = count_parameters(specs["dense"])
    for dtype, size, kept in (("fp32", 4, 8), ("bf16", 2, 12)):
        predicted = predict(specs, "dense", 1, f"precision.dtype={dtype}")
        assert predicted["student weights"] == count * size
        assert predicted["student gradients"] == count * 4
        assert predicted["optimizer state"] == count * kept
        assert predicted["teacher weights"] == (count - 132 * 64) * size  # without its LM head
        heads = specs["dense"].head_dim
        block = 16 * 64 + 14 * 8 * heads + 12 * 4 * heads + 6 * 112  # hidden, queries, keys, MLP
        assert predicted["activations"] == 64 * 5 * block * size / 2
    assert predict(specs, "dense", 1, "precision.dtype=fp32", "optimizer.name=sgd")["optimizer state"] == 0


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_the_distributed_optimizer_divides_its_state_over_copies(model, specs):
    """Experts have fewer copies than the parameters that every rank has."""
    count = count_parameters(specs[model])
    experts = sum(math.prod(s) for name, s in megatron_shapes(specs[model]).items() if ".experts." in name)
    for context in (1, 2):  # every rank has all parameters, also all experts
        state = predict(specs, model, 4, f"parallel.context={context}")["optimizer state"]
        assert state == ((count - experts) // 4 + experts // 4) * 12
    assert predict(specs, model, 4, "parallel.distributed_optimizer=false")["optimizer state"] == count * 12
    if experts:
        state = predict(specs, model, 4, "parallel.expert=2")["optimizer state"]
        assert state == ((count - experts) // 4 + experts // 2 // 2) * 12
        state = predict(specs, model, 4, "parallel.expert=4")["optimizer state"]
        assert state == ((count - experts) // 4 + experts // 4) * 12  # each expert is on one rank


def test_experts_have_copies_on_tensor_parallel_ranks(specs):
    layout = ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")
    spec = specs["experts"]
    dense, experts = rank_parameters(spec, division_of(spec, {"tensor": 2, "expert": 2}), 0, lm_head=True)
    state = predict(specs, "experts", 4, *layout)["optimizer state"]
    assert state == (dense // 2 + experts // 2) * 12


def test_offloaded_targets_need_no_device_memory(specs):
    assert predict(specs, "dense", 2)["teacher states"] > 0
    assert predict(specs, "dense", 2, "teacher.offload_targets=true")["teacher states"] == 0


def test_context_and_sequence_parallelism_divide_activations(specs):
    one = predict(specs, "dense", 4)
    two = predict(specs, "dense", 4, "parallel.context=2")
    four = predict(specs, "dense", 4, "parallel.context=4")
    assert one["activations"] == 2 * two["activations"] == 4 * four["activations"]
    assert one["teacher states"] == 2 * two["teacher states"] == 4 * four["teacher states"]
    sequence = ("parallel.tensor=2", "parallel.sequence=true", "recompute.granularity=full")
    undivided = predict(specs, "dense", 4, "recompute.granularity=full")
    assert undivided["activations"] == 2 * predict(specs, "dense", 4, *sequence)["activations"]
    partly = predict(specs, "dense", 4, sequence[0], sequence[2])["activations"]
    assert undivided["activations"] > partly > undivided["activations"] / 2


def test_a_pipeline_has_a_micro_batch_for_every_stage(specs):
    """The first of P ranks has the most layers and the most micro-batches, but not more than there are rollouts."""
    block = predict(specs, "dense", 1)["activations"] // 5
    assert predict(specs, "dense", 2, "parallel.pipeline=2")["activations"] == 2 * 3 * block
    assert predict(specs, "dense", 4, "parallel.pipeline=4")["activations"] == 4 * 2 * block
    virtual = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert predict(specs, "dense", 2, *virtual)["activations"] == (2 + 2 + 1) * 2 * block
    deep = {"deep": dataclasses.replace(specs["dense"], num_layers=12)}
    virtual = ("parallel.pipeline=3", "parallel.virtual_pipeline=2")
    assert predict(deep, "deep", 3, *virtual)["activations"] == (2 * 2 + 3 + 1) * 2 * block
    few = ("rollout.prompts_per_step=1", "rollout.samples_per_prompt=1")
    assert predict(specs, "dense", 4, "parallel.pipeline=4", *few)["activations"] == 2 * block


@pytest.mark.parametrize("layout", ["{tensor: 4}", "{pipeline: 4}", "{expert: 4}"])
def test_a_teachers_own_layout_divides_the_teacher_only(layout, specs):
    teacher = "experts" if "expert" in layout else "dense"
    shared, own = (predict(specs, "dense", 4, f"teacher.parallel={which}", teacher=teacher) for which in ("{}", layout))
    assert own["teacher weights"] < shared["teacher weights"]
    same = ("student weights", "student gradients", "optimizer state", "activations")
    assert [own[purpose] for purpose in same] == [shared[purpose] for purpose in same]


def test_a_teacher_is_built_up_to_its_highest_compared_layer(specs):
    complete, lower = (predict(specs, "dense", 1, f"loss.representation.layers={which}") for which in ("[5]", "[1]"))
    assert lower["teacher weights"] < complete["teacher weights"] / 2
    assert lower["student weights"] == complete["student weights"]


def test_memory_of_fp8_weights_and_of_the_optimizer(specs):
    """The first and the last layer stay in bf16."""
    name, count = "dense", count_parameters(specs["dense"])
    shapes = megatron_shapes(specs[name]).items()
    linears = 3 * sum(math.prod(shape) for key, shape in shapes if "layers.2." in key and "linear_" in key)
    plain = (count - 132 * 64) * 2  # without the LM head
    cases = {
        ("precision.teacher_fp8=weights",): plain - linears,
        ("precision.teacher_fp8=compute",): plain + linears,
        ("precision.teacher_fp8=weights", "precision.keep_bf16={first: 2, last: 2}"): plain - linears // 3,
    }
    for settings, expected in cases.items():
        assert predict(specs, name, 1, *settings)["teacher weights"] == expected
    assert predict(specs, name, 1, "precision.fp8=hybrid")["student weights"] == count * 2 + 2 * linears
    for setting, bytes_each in (("precision_aware=true", 6), ("cpu_offload=0.5", 6), ("cpu_offload=1.0", 0)):
        assert predict(specs, name, 1, f"optimizer.{setting}")["optimizer state"] == count * bytes_each


def linear_spec(linear_layers, **sizes):
    """Return a hybrid model with Gated DeltaNet in these layers."""
    return hybrid_spec(**sizes, linear_layers=tuple(layer for layer in linear_layers if layer < sizes["layers"]))


ACTIVATIONS = {
    "dense": (dense_spec, 1, ()),
    "experts": (expert_spec, 1, ()),
    "tensor": (dense_spec, 2, ("parallel.tensor=2",)),
    "Gated DeltaNet in every layer": (functools.partial(linear_spec, range(8)), 1, ()),
    "gated attention": (functools.partial(linear_spec, ()), 1, ()),
    "a shared expert, sequence": (
        shared_expert_spec,
        2,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if name != "gated attention" else pytest.param(name, marks=pytest.mark.nightly) for name in ACTIVATIONS],
)
def test_activations_agree_with_a_traced_update(name):
    """Four more layers add their own activations: the loss and temporary tensors cancel out."""
    model, world_size, layout = ACTIVATIONS[name]
    config = replay_config(1024, "precision.dtype=bf16", "loss.representation.layers=last", *layout)
    small, large = (model(layers=layers, hidden=256, vocabulary=256) for layers in (4, 8))
    four, eight = (
        trace_in_process(planned_run(config, spec, world_size), filling_rollouts(1024)).activations
        for spec in (small, large)
    )
    assert 1024 * 4 * layer_activation_bytes(small, 0, config.parallel, 2) == pytest.approx(eight - four, rel=0.1)
