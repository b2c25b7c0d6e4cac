"""A damaged Megatron checkpoint is refused in one line, or every weight of it is right."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import build_model
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.fuzz.budget import examples
from tests.helpers.damage import damages
from tests.numerics.conftest import topology  # noqa: F401

WEIGHTS = "__0_0.distcp"
FILES = ("config.json", "megatron_oprd.json", "metadata.json", ".metadata", "common.pt", WEIGHTS)


@pytest.fixture(scope="module")
def checkpoint(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec, Stage]:  # noqa: F811
    """Make a checkpoint and return its folder, its specification and the model with its weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = save(random_hf_model("Qwen3Moe", num_hidden_layers=2, vocab_size=37), folder / "hf")
    spec = read_model_spec(hf)
    model = build_model(spec, topology, torch.float32)
    load_weights(model, hf, spec, topology)
    save_model(model, folder / "megatron", spec, topology, hf)
    return folder / "megatron", spec, model


@examples(80)
@given(st.sampled_from(FILES), damages())
def test_a_damaged_megatron_checkpoint_has_the_right_weights_or_is_refused(checkpoint, topology, name, damage):  # noqa: F811
    source, _, model = checkpoint
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "megatron"
        shutil.copytree(source, folder)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        try:
            spec = read_model_spec(folder)
            loaded = build_model(spec, topology, torch.float32)
            load_weights(loaded, folder, spec, topology)
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 2000
            return
        expected, found = named_parameters(model), named_parameters(loaded)
        assert found.keys() == expected.keys()
        # The files of weights have no checksums, so that a changed byte of a weight is not seen.
        assert name == WEIGHTS or all(torch.equal(found[one], expected[one]) for one in found)
