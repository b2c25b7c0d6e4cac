"""Scores of blocks equal those of transformers, and a pruned folder is the model without the dropped blocks."""

import json

import pytest
import torch
import transformers

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.commands.prune import pairs_text
from megatron_oprd.config import LossConfig, RepresentationConfig
from megatron_oprd.config.training import BatchConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.pruned import pruned_spec, write_pruned
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.models.layer_pairs import pairs_of_kept_blocks
from megatron_oprd.testing.models import FAMILIES, random_hf_model, save
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.training.block_scores import score_blocks
from megatron_oprd.training.global_batch import GlobalBatch
from tests.helpers.training import megatron_update

ALL_TOKENS = LossConfig(representation=RepresentationConfig(positions="all"))
MODELS = {
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}, {}),
    "qwen3_layer_types": ("Qwen3", {"layer_types": ["full_attention"] * 5}, {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "phi3": ("Phi3", {}, {}),
    "one_dense_layer": ("Qwen3Moe", {}, {}),
    "experts_in_every_second_layer": ("Qwen3Moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, {}),
    "fused_experts": ("Qwen3Moe", {}, {"save_original_format": False}),
    "shards": ("Qwen2", {}, {"max_shard_size": "100KB"}),
}


def reference_scores(folder, rollouts):
    """Return 1 - cosine of each block's input and output in float64, from hooks on the blocks of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    cosines = [[] for _ in model.model.layers]
    rows = slice(None)

    def keep(values):
        def hook(_, arguments, output):
            before, after = arguments[0][0, rows], output[0] if output.ndim == 3 else output
            values.append((before * after[rows]).sum(-1) / (before.norm(dim=-1) * after[rows].norm(dim=-1)))

        return hook

    for layer, values in zip(model.model.layers, cosines, strict=True):
        layer.register_forward_hook(keep(values))
    for rollout in rollouts:
        mask = torch.tensor((0,) * len(rollout.prompt_ids) + rollout.response_mask, dtype=torch.bool)
        rows = mask.nonzero().flatten()
        with torch.no_grad():
            model(torch.tensor([rollout.prompt_ids + rollout.response_ids]))
    return [1 - torch.cat(values).mean().item() for values in cosines]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_transformers_in_float64(family, topology, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "model")
    spec = read_model_spec(folder)
    rollouts = some_rollouts(spec.vocab_size)
    stage = build_model(spec, topology, torch.float32).eval()
    load_weights(stage, folder, spec, topology)
    batch = GlobalBatch(tuple(rollouts), (0,) * len(rollouts), ALL_TOKENS, BatchConfig(), spec)
    assert score_blocks(stage, batch, topology) == pytest.approx(reference_scores(folder, rollouts), rel=1e-5)


def without_blocks(model, kept):
    """Return transformers' model with the blocks `kept` of a model, numbered from 1."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[block - 1] for block in kept)
    model.config.num_hidden_layers = len(kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    return model


@pytest.mark.parametrize("kept", [[1, 2, 5], [2, 3, 4], [4]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_pruned_folder_are_those_without_the_blocks(name, kept, tmp_path):
    family, overrides, how = MODELS[name]
    folder = save(random_hf_model(family, **overrides), tmp_path / "model", **how)
    spec = read_model_spec(folder)
    write_pruned(folder, tmp_path / "pruned", spec, kept, {})
    pruned = read_model_spec(tmp_path / "pruned")
    assert pruned == pruned_spec(spec, kept)
    HFReader(tmp_path / "pruned").check(pruned)
    original, written = map(transformers.AutoModelForCausalLM.from_pretrained, (folder, tmp_path / "pruned"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = without_blocks(original.eval(), kept)(tokens, use_cache=False).logits
        assert torch.equal(written.eval()(tokens, use_cache=False).logits, expected)


def test_a_pruned_folder_has_the_other_files_and_its_config_counts_the_kept_blocks(tmp_path):
    folder = save(random_hf_model("Qwen3").bfloat16(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text()) | {"max_window_layers": 5}
    (folder / "config.json").write_text(json.dumps(config))
    write_pruned(folder, tmp_path / "pruned", read_model_spec(folder), [1, 4], {"pairs.yaml": "pairs: []\n"})
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "pairs.yaml", "tokenizer.json",
    }  # fmt: skip
    written = json.loads((tmp_path / "pruned/config.json").read_text())
    changed = {key: value for key, value in written.items() if config[key] != value}
    assert changed == {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "max_window_layers": 2}
    assert written.keys() == config.keys()


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    folder = save(random_hf_model("Qwen3"), tmp_path / "model")
    read = HFReader.read

    def fail(reader, name):
        if "layers.3" in name:
            raise KeyboardInterrupt
        return read(reader, name)

    monkeypatch.setattr(HFReader, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(folder, tmp_path / "pruned", read_model_spec(folder), [1, 4], {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["output", "next_input"])
def test_without_a_dropped_block_loss_and_gradient_are_zero(kind, topology, tmp_path):
    folder = save(random_hf_model("Qwen3"), tmp_path / "model")
    write_pruned(folder, tmp_path / "pruned", read_model_spec(folder), range(1, 6), {})
    pairs = pairs_of_kept_blocks([1, 2, 3, 4, 5], 5, kind)
    (tmp_path / "pairs.yaml").write_text(pairs_text(str(folder), [], pairs, None))
    file = f"loss.representation.pairs={tmp_path / 'pairs.yaml'}"
    update = megatron_update(0, tmp_path / "pruned", folder, file, "loss.representation.positions=all")
    assert update.loss == 0 and update.grad_norm == 0
    assert not any(gradient.any() for gradient in update.gradients.values())
