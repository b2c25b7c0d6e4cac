"""Checkpoints and exports do not depend on the layout that wrote them, and an error is seen by every rank."""

import errno

import pytest
import torch

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf import export
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.models.compare import compare_states, compare_weights, open_hf_model
from megatron_oprd.models.megatron_checkpoint import save_model
from megatron_oprd.models.weights import load_weights
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.platform import choose_device
from megatron_oprd.types import UserError
from tests.helpers.distributed import run_distributed
from tests.helpers.models import random_hf_model, save

LAYOUTS = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "data": {}}


def open_model(folder, layout):
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = read_model_spec(folder)
    model = build_model(spec, topology, torch.float32).eval()
    load_weights(model, folder, spec, topology)
    return model, spec, topology


def save_and_export(rank, folder, layout, megatron, hf):
    """Read `folder`, write it as both kinds."""
    model, spec, topology = open_model(folder, layout)
    if megatron:
        save_model(model, megatron, spec, topology, source=folder)
    if hf:
        export.export_hf(model, spec, topology, folder, hf)


def compare_with(rank, megatron, folder, layout):
    model, spec, topology = open_model(megatron, layout)
    weights = compare_weights(model, HFReader(folder), spec, topology, torch.float32)
    hf_model = open_hf_model(folder, torch.float32, torch.float32) if rank == 0 else None
    return weights, compare_states(model, hf_model, spec, topology, (1, 19))


def assert_same_tensors(actual, expected):
    actual, expected = HFReader(actual), HFReader(expected)
    assert actual.names() == expected.names()
    for name in expected.names():
        assert torch.equal(actual.read(name), expected.read(name)), name


@pytest.mark.parametrize(("first", "second"), [("tensor", "pipeline"), ("pipeline", "tensor"), ("data", "tensor")])
@pytest.mark.parametrize("tied", [False, True])
def test_written_in_one_layout_read_in_another(first, second, tied, tmp_path):
    # 131 words: padded to 132 under tensor parallelism; 5 layers: 3 and 2 on the stages.
    family = "Qwen3" if tied else "Qwen2"
    folder = save(random_hf_model(family, tie_word_embeddings=tied), tmp_path / "hf")
    megatron = tmp_path / "megatron"
    run_distributed(2, save_and_export, folder, LAYOUTS[first], megatron, tmp_path / "first")
    run_distributed(2, save_and_export, megatron, LAYOUTS[second], None, tmp_path / "second")
    assert_same_tensors(tmp_path / "first", folder)
    assert_same_tensors(tmp_path / "second", folder)


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_layout_gives_the_states_of_transformers(layout, tmp_path):
    folder = save(random_hf_model("Qwen3", tie_word_embeddings=True), tmp_path / "hf")
    run_distributed(1, save_and_export, folder, {}, tmp_path / "megatron", None)
    weights, errors = run_distributed(2, compare_with, tmp_path / "megatron", folder, LAYOUTS[layout])[0]
    assert weights == ()
    assert list(errors) == ["layer 1", "layer 2", "layer 3", "layer 4", "layer 5", "logits"]
    assert max(errors.values()) < 1e-5


def _full_disk(self, name, tensor):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_export(rank, folder, target, full):
    model, spec, topology = open_model(folder, LAYOUTS["pipeline"])
    if full and rank == 0:
        export.HFWriter.write = _full_disk
    try:
        export.export_hf(model, spec, topology, folder, target)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("full", [True, False])
def test_every_rank_sees_why_an_export_failed(full, tmp_path):
    folder = save(random_hf_model("Qwen2"), tmp_path / "hf")
    target = tmp_path / "out" if full else folder
    messages = run_distributed(2, failing_export, folder, target, full)
    assert messages[0] == messages[1]
    assert ("No space left" if full else "is not empty") in messages[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def cut_teacher(rank, folder, megatron, stages):
    """Whether every parameter of a cut model is equal, read from both kinds of folder."""
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(pipeline=2), device, seed=0)
    spec = read_model_spec(folder)
    models = []
    for source in (folder, megatron):
        models.append(build_model(spec, topology, torch.float32, stages=stages, lm_head=False, final_norm=False))
        load_weights(models[-1], source, spec, topology)
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    return [name for (name, a), (_, b) in pairs if not torch.equal(a, b)], len(list(models[0].parameters()))


@pytest.mark.parametrize("stages", [(1, 2), (3, 0)])
def test_a_cut_teacher_reads_its_layers_on_every_stage(stages, tmp_path):
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


def test_every_rank_sees_a_corrupt_checkpoint(tmp_path):
    folder = save(random_hf_model("Qwen2", num_hidden_layers=1), tmp_path / "hf")
    run_distributed(2, save_and_export, folder, LAYOUTS["tensor"], tmp_path / "megatron", None)
    # Only the second rank's file: whoever reads it fails, and the other must not wait for it.
    file = tmp_path / "megatron" / "__1_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)
    for message in run_distributed(2, broken_load, tmp_path / "megatron"):
        assert "cannot be read" in message
