"""Checkpoints and exports do not depend on the layout that wrote them, and every rank reports an error."""

import errno

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf import export
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import ModelPart, build_model
from megatron_oprd.models.compare import compare_states, compare_weights, open_hf_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError

LAYOUTS = {
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "data": {},
    "virtual": {"pipeline": 2, "virtual_pipeline": 2},
    "expert": {"expert": 2},
    "tensor and expert": {"tensor": 2, "expert": 2},
    "pipeline and expert": {"pipeline": 2, "expert": 2},
    "context and expert": {"context": 2, "expert": 4},
}


def open_model(folder, layout):
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, torch.float32).eval()
    load_weights(stage, folder, spec, topology)
    return stage, spec, topology


def save_and_export(rank, folder, layout, megatron, hf):
    """Load `folder` and write it as a Megatron checkpoint and as a Hugging Face folder."""
    stage, spec, topology = open_model(folder, layout)
    if megatron:
        save_model(stage, megatron, spec, topology, source=folder)
    if hf:
        export.export_hf(stage, spec, topology, folder, hf)


def compare_with(rank, megatron, folder, layout):
    stage, spec, topology = open_model(megatron, layout)
    weights = compare_weights(stage, HFReader(folder), spec, topology, torch.float32)
    hf_model = open_hf_model(folder, torch.float32, torch.float32) if rank == 0 else None
    return weights, compare_states(stage, hf_model, spec, topology, (1, 19))


def assert_same_tensors(actual, expected):
    actual, expected = HFReader(actual), HFReader(expected)
    assert actual.names() == expected.names()
    for name in expected.names():
        assert torch.equal(actual.read(name), expected.read(name)), name


@pytest.mark.parametrize(("first", "second"), [("tensor", "pipeline"), ("pipeline", "tensor"), ("data", "tensor")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_one_layout_loads_in_another(first, second, tied, tmp_path):
    # 131 words: padded to 132 under tensor parallelism; 5 layers: 3 and 2 on the stages.
    family = "Qwen3" if tied else "Qwen2"
    folder = save(random_hf_model(family, tie_word_embeddings=tied), tmp_path / "hf")
    megatron = tmp_path / "megatron"
    run_distributed(2, save_and_export, folder, LAYOUTS[first], megatron, tmp_path / "first")
    run_distributed(2, save_and_export, megatron, LAYOUTS[second], None, tmp_path / "second")
    assert_same_tensors(tmp_path / "first", folder)
    assert_same_tensors(tmp_path / "second", folder)


def test_virtual_stages_write_and_load_the_same_checkpoint(tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=4, tie_word_embeddings=True), tmp_path / "hf")
    run_distributed(2, save_and_export, folder, LAYOUTS["virtual"], tmp_path / "megatron", tmp_path / "first")
    run_distributed(2, save_and_export, tmp_path / "megatron", LAYOUTS["tensor"], None, tmp_path / "second")
    run_distributed(2, save_and_export, tmp_path / "megatron", LAYOUTS["virtual"], None, tmp_path / "third")
    for written in ("first", "second", "third"):
        assert_same_tensors(tmp_path / written, folder)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, "expert"), (2, "pipeline")),
        ((2, "pipeline"), (2, "expert")),
        ((2, "tensor"), (2, "virtual")),
        ((2, "virtual"), (2, "tensor and expert")),
        ((2, "tensor and expert"), (2, "tensor")),
        ((4, "expert"), (2, "tensor")),  # two replicas of each expert
        ((4, "tensor and expert"), (4, "pipeline and expert")),
        ((4, "pipeline and expert"), (4, "context and expert")),
        ((4, "context and expert"), (2, "expert")),  # an expert a rank
    ],
)
def test_a_mixture_of_experts_of_one_layout_loads_in_another(first, second, tmp_path):
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=4), tmp_path / "hf")
    megatron = tmp_path / "megatron"
    run_distributed(first[0], save_and_export, folder, LAYOUTS[first[1]], megatron, tmp_path / "first")
    run_distributed(second[0], save_and_export, megatron, LAYOUTS[second[1]], None, tmp_path / "second")
    assert_same_tensors(tmp_path / "first", folder)
    assert_same_tensors(tmp_path / "second", folder)


def test_fused_experts_keep_their_form_through_every_conversion(tmp_path):
    folder = save(random_hf_model("Qwen2Moe", num_hidden_layers=4), tmp_path / "hf", save_original_format=False)
    run_distributed(2, save_and_export, folder, LAYOUTS["tensor and expert"], tmp_path / "megatron", tmp_path / "first")
    run_distributed(2, save_and_export, tmp_path / "megatron", LAYOUTS["pipeline"], None, tmp_path / "second")
    expected = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in expected
    for written in ("first", "second"):
        actual = load_file(tmp_path / written / "model.safetensors")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "virtual", "expert", "tensor and expert"])
def test_mixture_of_experts_states_equal_transformers_in_every_layout(layout, tmp_path):
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=4), tmp_path / "hf")
    run_distributed(1, save_and_export, folder, {}, tmp_path / "megatron", None)
    weights, errors = run_distributed(2, compare_with, tmp_path / "megatron", folder, LAYOUTS[layout])[0]
    assert weights == ()
    assert list(errors) == ["layer 1", "layer 2", "layer 3", "layer 4", "logits"]
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_other_families_of_one_layout_load_in_another(family, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "hf")
    run_distributed(2, save_and_export, folder, LAYOUTS["tensor"], tmp_path / "megatron", tmp_path / "first")
    run_distributed(2, save_and_export, tmp_path / "megatron", LAYOUTS["pipeline"], None, tmp_path / "second")
    assert_same_tensors(tmp_path / "first", folder)
    assert_same_tensors(tmp_path / "second", folder)


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Phi3"])
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_states_equal_transformers_in_every_layout(layout, family, tmp_path):
    upper_windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
    changes = upper_windows if family == "Qwen3" else {}
    folder = save(random_hf_model(family, tie_word_embeddings=True, **changes), tmp_path / "hf")
    run_distributed(1, save_and_export, folder, {}, tmp_path / "megatron", None)
    weights, errors = run_distributed(2, compare_with, tmp_path / "megatron", folder, LAYOUTS[layout])[0]
    assert weights == ()
    assert list(errors) == ["layer 1", "layer 2", "layer 3", "layer 4", "layer 5", "logits"]
    assert max(errors.values()) < 1e-5


def _full_disk(self, name, tensor):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_export(rank, folder, target, full):
    stage, spec, topology = open_model(folder, LAYOUTS["pipeline"])
    if full and rank == 0:
        export.HFWriter.write = _full_disk
    try:
        export.export_hf(stage, spec, topology, folder, target)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("full", [True, False])
def test_every_rank_raises_the_error_of_a_failed_export(full, tmp_path):
    folder = save(random_hf_model("Qwen2"), tmp_path / "hf")
    target = tmp_path / "out" if full else folder
    messages = run_distributed(2, failing_export, folder, target, full)
    assert messages[0] == messages[1]
    assert ("No space left" if full else "is not empty") in messages[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def names_read(rank, folder, layout):
    names = []

    def recording(read):
        def record(reader, name, *rows):
            names.append(name)
            return read(reader, name, *rows)

        return record

    HFReader.read, HFReader.read_rows = recording(HFReader.read), recording(HFReader.read_rows)
    open_model(folder, layout)
    return names


def test_each_rank_loads_only_its_own_layers_and_experts(tmp_path):
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=4), tmp_path / "hf")
    read = run_distributed(4, names_read, folder, LAYOUTS["pipeline and expert"])
    for rank, names in enumerate(read):
        experts = {int(name.split(".")[5]) for name in names if ".experts." in name}
        layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert experts == ({0, 1}, {2, 3})[rank % 2]
        assert layers == ({0, 1}, {2, 3})[rank // 2]
        assert len(names) == len(set(names))
    assert set().union(*read) == set(HFReader(folder).names())


def export_without(rank, folder, layout, target, lost):
    """Return the error of an export after the last rank has lost a parameter."""
    stage, spec, topology = open_model(folder, layout)
    if rank == topology.world_size - 1:
        owner, _, name = lost.rpartition(".")
        delattr(stage[-1].get_submodule(owner), name)
    try:
        export.export_hf(stage, spec, topology, folder, target)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("layout", "lost", "name"),
    [
        ("expert", "decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight", "experts.3.linear_fc2"),
        ("tensor", "decoder.layers.1.self_attention.linear_proj.weight", "layers.1.self_attention.linear_proj"),
        ("pipeline", "decoder.layers.1.mlp.router.weight", "layers.3.mlp.router"),
    ],
)
def test_every_rank_names_the_missing_parameter(layout, lost, name, tmp_path):
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=4), tmp_path / "hf")
    messages = run_distributed(2, export_without, folder, LAYOUTS[layout], tmp_path / "out", lost)
    assert messages[0] == messages[1]
    assert "only a whole model can be exported" in messages[0]
    assert name in messages[0]
    assert not (tmp_path / "out").exists()


def cut_teacher(rank, folder, megatron, stages):
    """Return True if all parameters of a cut model are equal when loaded from both kinds of folder."""
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(pipeline=2), device, seed=0)
    spec = read_model_spec(folder)
    tables = []
    for source in (folder, megatron):
        stage = build_model(spec, topology, torch.float32, ModelPart(stages, lm_head=False, final_norm=False))
        load_weights(stage, source, spec, topology)
        tables.append(named_parameters(stage))
    first, second = tables
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])], len(first)


@pytest.mark.parametrize("stages", [(1, 2), (3, 0)])
def test_a_cut_teacher_loads_its_layers_on_every_stage(stages, tmp_path):
    folder = save(random_hf_model("Qwen3", tie_word_embeddings=True), tmp_path / "hf")
    run_distributed(2, save_and_export, folder, LAYOUTS["tensor"], tmp_path / "megatron", None)
    results = run_distributed(2, cut_teacher, folder, tmp_path / "megatron", stages)
    assert [different for different, _ in results] == [[], []]
    assert [count for _, count in results] == [1 + 8 * stages[0], 8 * stages[1]]


def broken_load(rank, folder):
    try:
        open_model(folder, LAYOUTS["tensor"])
    except UserError as error:
        return str(error)
    return None


def test_every_rank_reports_a_corrupt_checkpoint(tmp_path):
    folder = save(random_hf_model("Qwen2", num_hidden_layers=1), tmp_path / "hf")
    run_distributed(2, save_and_export, folder, LAYOUTS["tensor"], tmp_path / "megatron", None)
    # Only the second rank's file: whoever reads it fails, and the other must not wait for it.
    file = tmp_path / "megatron" / "__1_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)
    for message in run_distributed(2, broken_load, tmp_path / "megatron"):
        assert "cannot be read" in message
