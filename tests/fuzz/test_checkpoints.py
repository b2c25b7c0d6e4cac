"""A Hugging Face folder has the tensors and the specification of the model that transformers loads from it."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.testing.models import EXPERTS, HYBRID, LLAMA3_SCALING, longrope
from megatron_oprd.types import UserError
from tests.fuzz.budget import examples
from tests.helpers.config_keys import config_class_of
from tests.helpers.opened_folder import HEAD, assert_as_transformers, load

FAMILIES = ("Qwen2", "Qwen3", "Qwen3Moe", "Llama", "Phi3", *HYBRID)
EMBEDDING = "model.embed_tokens.weight"
# Fields that a folder may lack. The default of every other field would make the model large.
OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "attention_bias",
    "attention_dropout",
    "eos_token_id",
    "dtype",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "full_attention_interval",
)
# Folders that transformers loads and the product refuses.
STRICTER = re.compile(
    "differs from model.embed_tokens.weight; transformers uses that LM head|is not a multiple of num_key"
    "|exceeds num_(local_)?experts|not supported"
)


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Return the content of a config.json, as transformers 4 or 5 writes it, without some of its fields."""
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([8, 12]))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(37, 41)),
        "hidden_size": head_dim * heads,
        "intermediate_size": draw(st.integers(5, 24)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "max_position_embeddings": 80,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 3e-4])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 5e5, 10]))},
        "eos_token_id": draw(st.sampled_from([2, [3, 2]])),
        "pad_token_id": None,
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
    }
    if family != "Phi3" and draw(st.booleans()):
        values["head_dim"] = draw(st.sampled_from([head_dim, 10]))
    if draw(st.integers(0, 3)) == 0:
        values["sliding_window"] = draw(st.sampled_from([16, 80, 100]))
    if family == "Qwen3Moe":
        values |= EXPERTS | {
            "num_experts": draw(st.integers(2, 5)),
            "moe_intermediate_size": draw(st.integers(3, 12)),
            "mlp_only_layers": draw(st.sampled_from([[], [0]])),
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "norm_topk_prob": draw(st.booleans()),
        }
    if family == "Llama" and draw(st.booleans()):
        values["rope_parameters"] = dict(LLAMA3_SCALING)
    if family == "Phi3":
        values |= draw(st.sampled_from([{}, longrope(head_dim // 2, partial=0.5)]))
    if family in HYBRID:
        values |= draw(hybrid_sizes(family, values["num_hidden_layers"]))
    written = config_class_of(family)(**values, architectures=[f"{family}ForCausalLM"]).to_dict()
    if draw(st.booleans()):  # the form of transformers 4
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        written["torch_dtype"] = written.pop("dtype")
        if "num_local_experts" in written:
            written["num_experts"] = written.pop("num_local_experts")
        if "partial_rotary_factor" in rope:
            written["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        written["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for key in draw(st.lists(st.sampled_from([key for key in OPTIONAL if key in written]), max_size=6, unique=True)):
        if draw(st.integers(0, 5)):
            del written[key]
        else:
            written[key] = None
    return written


@st.composite
def hybrid_sizes(draw: st.DrawFn, family: str, layers: int) -> dict[str, Any]:
    """Return the fields of a config.json that models with Gated DeltaNet add, for `layers` layers."""
    keys = draw(st.integers(1, 3))
    sizes: dict[str, Any] = {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(st.sampled_from([4, 6])),
        "linear_value_head_dim": draw(st.sampled_from([4, 10])),
        "linear_conv_kernel_dim": draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([8, 16])),
    }
    if draw(st.booleans()):
        kinds = st.sampled_from(["linear_attention", "full_attention"])
        sizes["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    else:
        sizes["full_attention_interval"] = draw(st.integers(1, 4))
    if family != "Qwen3_5":
        sizes |= {"num_experts": draw(st.integers(2, 5)), "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": draw(st.integers(3, 12)), "shared_expert_intermediate_size": 7}
    if family == "Qwen3Next":
        sizes |= {"norm_topk_prob": draw(st.booleans()), "mlp_only_layers": draw(st.sampled_from([[], [0]]))}
    return sizes


def add_head(tensors: dict[str, torch.Tensor], _: str) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def add_another_head(tensors: dict[str, torch.Tensor], _: str) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + 1


def add_buffers(tensors: dict[str, torch.Tensor], _: str) -> None:
    for module in ("model", "model.layers.0.self_attn"):
        tensors[f"{module}.rotary_emb.inv_freq"] = torch.ones(4)


def add_unknown(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}_of_another"] = torch.ones(2)


def remove(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def remove_head(tensors: dict[str, torch.Tensor], _: str) -> None:
    tensors.pop(HEAD, None)


def lengthen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat((tensors[name], tensors[name][:1]))


def cast(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.bfloat16 if tensors[name].dtype == torch.float32 else torch.float32)


SAME_NAMES = [cast, cast, cast, lengthen]
NEW_NAMES = [add_head, add_head, add_another_head, add_another_head, add_buffers, add_buffers, remove_head, remove]
CHANGES = [*SAME_NAMES, *NEW_NAMES, add_unknown]


def save(model: torch.nn.Module, folder: Path, data: st.DataObject) -> None:
    """Save a model in one file or in shards, its experts fused or not, and change some of its tensors."""
    shards = data.draw(st.booleans())
    size = "2KB" if shards else "5GB"
    model.save_pretrained(folder, max_shard_size=size, save_original_format=data.draw(st.booleans()))
    (folder / "generation_config.json").unlink(missing_ok=True)  # the ids in config.json count
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(path)
    for change in data.draw(st.lists(st.sampled_from(SAME_NAMES if shards else CHANGES), max_size=2)):
        if change not in (add_head, add_another_head) or EMBEDDING in tensors:
            change(tensors, data.draw(st.sampled_from(sorted(tensors))))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@examples(30)
@given(st.data())
def test_a_folder_has_the_tensors_and_the_specification_of_transformers(family, data):
    written = data.draw(configs(family))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(written))
        torch.manual_seed(0)
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception:  # transformers refuses the config, in one of many ways
            with contextlib.suppress(UserError):
                read_model_spec(folder)
            return
        save(model, folder, data)
        (folder / "config.json").write_text(json.dumps(written))
        try:
            spec, reader = read_model_spec(folder), HFReader(folder)
            reader.check(spec)
        except UserError as error:
            assert load(folder, "auto") is None or STRICTER.search(str(error)), error
            return
        assert_as_transformers(folder, spec, reader)
