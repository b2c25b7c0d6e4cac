"""Each key of a config.json has the meaning that it has in transformers, or is refused in one line."""

import contextlib
import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.testing import models
from megatron_oprd.testing.models import random_hf_model
from megatron_oprd.types import UserError
from tests.fuzz.budget import FACTOR
from tests.helpers.config_keys import (
    NAMES_KERNELS,
    STRANGE,
    VALUES,
    config_class_of,
    keys_of_rope,
    keys_of_transformers,
)
from tests.helpers.opened_folder import end_tokens, load
from tests.numerics.test_parity import megatron_states, relative

FAMILIES = list(models.FAMILIES)
SEQUENCE = torch.randint(0, 30, (26,), generator=torch.Generator().manual_seed(1))
# Without them, the model of transformers is large.
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts"}
OF_ROTARY = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
OF_HYBRIDS = {"attn_output_gate", "full_attention_interval", "norm_topk_prob"}
ROPE_KEYS = {
    *("rope_theta", "rope_type", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "mrope_section", "truncate", "type"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_of_transformers_has_values_to_try(family):
    """A new key in transformers makes this test fail: decide what it means, and add unusual values of it to VALUES."""
    assert keys_of_transformers(family) - VALUES.keys() == set()


def test_each_key_of_a_rotary_embedding_was_decided():
    assert keys_of_rope() - ROPE_KEYS == set()


def base(family):
    """Return the content of a config.json of a family."""
    config = random_hf_model(family, num_hidden_layers=2, eos_token_id=3).config
    return {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}


def keys(family):
    """Return the keys to try: those of all families for one of them; for the others those that Llama does not have."""
    if family == "Llama" or FACTOR > 1:
        return list(VALUES)
    fields, of_llama = ({field.name for field in dataclasses.fields(config_class_of(one))} for one in (family, "Llama"))
    own = (fields - of_llama) | OF_ROTARY | {"head_dim", "num_local_experts"}
    own |= OF_HYBRIDS if family in models.HYBRID else set()
    return [key for key in VALUES if key in own]


def changes(family, values):
    """Yield (key, value); a value of ... stands for a key left out."""
    for key in keys(family):
        unusual = VALUES[key]
        tried = [..., None, *unusual]
        if FACTOR > 1:
            tried += [value for value in STRANGE if not (key in NAMES_KERNELS and isinstance(value, str))]
            if key.endswith("_size"):  # transformers builds models of size 1, but cannot run all of them
                tried = [value for value in tried if value != 1]
        for value in tried:
            absent = value is ... and (key not in values or (key in SIZES and FACTOR == 1))
            if not absent:
                yield key, value


def of_transformers(folder):
    """Write random weights for a config.json and return the model that transformers loads; None if it refuses them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        scale = 0.3 if tensor.ndim == 1 else 0.5 if name.endswith("gate.weight") else 0.1
        tensors[name] = torch.randn(tensor.shape, generator=generator) * scale + ("norm" in name)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder, torch.float32)


def describe_difference(folder, topology):
    """Return how the product differs from transformers on a folder with a config.json; None if it does not."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    try:
        spec = read_model_spec(folder)
    except UserError as error:
        return None if "\n" not in str(error) and str(folder) in str(error) else f"the refusal is {error}"
    try:
        model = of_transformers(folder)
        expected = None if model is None else model(SEQUENCE[None], use_cache=False).logits[0].detach()
    except Exception as error:  # transformers refuses a config in many ways
        return f"opened, although transformers fails with {type(error).__name__}: {error}"[:200]
    try:
        HFReader(folder).check(spec)
        logits, _ = megatron_states(folder, topology, torch.float32, [SEQUENCE])
    except UserError:
        return None
    if expected is None:
        return "opened, although transformers does not find its weights"
    if spec.eos_token_ids != end_tokens(model):
        return f"answers end at {spec.eos_token_ids}, in transformers at {end_tokens(model)}"
    error = relative(logits[:, : spec.vocab_size], expected)
    return None if error < 1e-5 else f"the logits differ by {error:.2g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_value_of_each_key_has_the_meaning_of_transformers(family, topology, tmp_path):
    values, wrong, path = base(family), {}, tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert describe_difference(tmp_path, topology) is None
    plain = transformers.AutoConfig.from_pretrained(tmp_path), read_model_spec(tmp_path)
    for key, value in changes(family, values):
        path.write_text(json.dumps({name: one for name, one in (values | {key: value}).items() if one is not ...}))
        if FACTOR == 1 and is_same(tmp_path, *plain):
            continue
        if (problem := describe_difference(tmp_path, topology)) is not None:
            wrong[f"{key}={value!r}"] = problem
    assert wrong == {}


def is_same(folder, config, spec):
    """Return True if a config.json has the config and the specification of another one."""
    with contextlib.suppress(Exception):
        # The product first: it refuses values with which transformers would not end.
        return read_model_spec(folder) == spec and (
            transformers.AutoConfig.from_pretrained(folder).to_dict() == config.to_dict()
        )
    return False
