"""A damaged input file is refused in one line, or what it says is still read. No reader fails in another way."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.checkpoint.state_file import read_state_file
from megatron_oprd.config import DataConfig
from megatron_oprd.data.prompt_files import read_rows
from megatron_oprd.data.tokenizer import load_tokenizer
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.rollout.replay import load_replay
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.fuzz.budget import examples
from tests.helpers.bridges import save_random_bridge
from tests.helpers.commands import run_until_start
from tests.helpers.damage import damages
from tests.helpers.opened_folder import assert_as_transformers
from tests.helpers.scene import Scene, assert_refused, make_scene
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

FAMILIES = ("Qwen2", "Qwen3Moe", "Llama", "Phi3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for each family, one of them in shards, and files of prompts and of rollouts."""
    folder = tmp_path_factory.mktemp("inputs")
    for family in FAMILIES:
        size = "20KB" if family == "Qwen2" else "5GB"
        sizes = {"num_hidden_layers": 2, "vocab_size": 259}
        save(random_hf_model(family, **sizes), folder / family, max_shard_size=size)
        byte_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(folder / family)
    rows = [{"prompt": "a", "data_source": "s", "reward_model": {"ground_truth": "5", "style": "rule"}}] * 3
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    rollouts = [{"prompt_ids": [1, 2], "response_ids": [3, 4], "response_mask": [1, 1], "data_source": "s"}] * 3
    (folder / "replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    (folder / "state.json").write_text(json.dumps(STATE))
    for file in save_random_bridge(folder / "Bridge", folder / "Qwen2", folder / "Llama", rank=2).iterdir():
        file.rename(folder / file.name)
    return folder


def read_model(path: Path) -> Callable[[], None]:
    """Open the folder of a file and return a comparison with the model that transformers loads from it."""
    spec, reader = read_model_spec(path.parent), HFReader(path.parent)
    reader.check(spec)
    return lambda: assert_as_transformers(path.parent, spec, reader)


def read_tokenizer(path: Path) -> Callable[[], None]:
    """Load the tokenizer of a folder and return a comparison with the one that transformers loads from it."""
    own = load_tokenizer(path.parent)

    def compare() -> None:
        other, chat = AutoTokenizer.from_pretrained(path.parent), [{"role": "user", "content": "a b"}]
        for tokenizer in (own, other):
            tokenizer.chat_template = tokenizer.chat_template or "{{ messages }}"
        assert own("Zoë <|im_end|>\n").input_ids == other("Zoë <|im_end|>\n").input_ids
        assert own.apply_chat_template(chat, tokenize=False) == other.apply_chat_template(chat, tokenize=False)
        assert (own.eos_token_id, own.bos_token_id) == (other.eos_token_id, other.bos_token_id)

    return compare


STATE = {
    "step": 0,
    "prompts": {"epoch": 0, "position": 4},
    "teachers": {"": {"path": "a", "hash": "sha256:0", "pairs": [[1, 1], [2, 2]], "bridge": None}},
    "student": {"path": "a", "hash": "sha256:0"},
    "best": {"metric": "perplexity", "step": 0, "value": 0.5, "later": 0},
    "layer_squares": {"steps": 2, "means": {"1": 0.5, "2": 1.5}},
    "pending": {"version": 0, "prompts": {"epoch": 0, "position": 8}, "sha256": "0"},
}


def read_state(path: Path) -> Callable[[], None]:
    """Read a state.json as that of step 0 and return a check of its types."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "step_0000000"
        checkpoint.mkdir()
        shutil.copytree(path, checkpoint / path.name) if path.is_dir() else shutil.copy(path, checkpoint)
        state = read_state_file(checkpoint)

    def check() -> None:
        assert (state.step, type(state.prompts.epoch), type(state.prompts.position)) == (0, int, int)
        assert all(type(layer) is int for one in state.teachers.values() for pair in one.pairs for layer in pair)
        assert all(isinstance(one.bridge, str | None) for one in state.teachers.values())
        assert state.best is None or math.isfinite(state.best.value)

    return check


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_model,
    "generation_config.json": read_model,
    "model.safetensors": read_model,
    "model.safetensors.index.json": read_model,
    "tokenizer.json": read_tokenizer,
    "tokenizer_config.json": read_tokenizer,
    "prompts.jsonl": lambda path: read_rows([str(path)], DataConfig()),
    "prompts.parquet": lambda path: read_rows([str(path)], DataConfig()),
    "replay.jsonl": lambda path: load_replay(path, 259),
    "bridge.json": lambda path: read_bridge(path.parent),
    "bridge.safetensors": lambda path: read_bridge(path.parent),
    "state.json": read_state,
}


@examples(300)
@given(st.sampled_from(sorted(READERS)), st.sampled_from(FAMILIES), st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(inputs, name, family, data):
    model = "Qwen2" if "index" in name else "Qwen3Moe" if name == "model.safetensors" else family
    source = inputs if (inputs / name).exists() else inputs / model
    damage = data.draw(damages())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "inputs"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*FAMILIES))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content))
        refuse_or_read(READERS[name], folder / name)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_place_of_a_file_is_refused_in_one_line(inputs, name, tmp_path):
    source = inputs if (inputs / name).exists() else inputs / ("Qwen2" if "index" in name else "Llama")
    shutil.copytree(source, tmp_path / "inputs", ignore=shutil.ignore_patterns(*FAMILIES))
    (tmp_path / "inputs" / name).unlink()
    (tmp_path / "inputs" / name).mkdir()
    refuse_or_read(READERS[name], tmp_path / "inputs" / name)


def refuse_or_read(read: Callable[[Path], object], path: Path) -> None:
    """Assert that a file is refused in one line or has the content that transformers finds in it."""
    try:
        compare = read(path)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 2000
    else:
        if callable(compare):
            compare()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


RUN_INPUTS = ["student/config.json", "student/model.safetensors", "teacher/tokenizer.json", "replay.jsonl"]


@examples(12)
@given(st.sampled_from(RUN_INPUTS), damages())
def test_a_run_with_a_damaged_file_starts_or_is_refused_in_one_line(scene, name, damage):
    path = scene.folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(damage(content))
        outcome = run_until_start("train", *scene.options())
    finally:
        path.write_bytes(content)
    if outcome is not None:
        assert_refused(outcome)
        assert not scene.run.exists()
