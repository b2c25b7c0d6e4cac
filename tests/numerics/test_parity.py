"""A Megatron-Core model with Hugging Face weights computes the logits and hidden states of transformers."""

import random

import pytest
import torch

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.testing.models import HYBRID, TIED_ONE_LAYER_7_TO_1, YARN, longrope, random_hf_model, save
from megatron_oprd.types import FINAL_STATES

LENGTHS = (1, 7, 16, 17, 30)
LONG_LENGTHS = (1, 7, 64, 65, 131)  # on both sides of the chunks of Gated DeltaNet


def megatron_states(folder, topology, dtype, sequences):
    """Return logits [tokens, vocabulary] and hidden states {layer: [tokens, hidden]} of the packed sequences."""
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, dtype).eval()
    load_hf(stage, HFReader(folder), spec)
    states = {}

    def tap(layer, hidden_states):
        if layer != FINAL_STATES:  # layer L once more
            states[layer] = hidden_states[:, 0]
        return hidden_states

    bounds = [0]
    for sequence in sequences:
        bounds.append(bounds[-1] + len(sequence))
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    batch = MicroBatch(
        position_ids=positions,
        lengths=torch.cat([torch.full((len(sequence),), len(sequence)) for sequence in sequences]),
        bounds=tuple(bounds),
        tap=tap,
        normed_layer=spec.num_layers,
        logit_rows=torch.arange(len(positions)),
    )
    with torch.no_grad():
        return stage[0].run(torch.cat(sequences), batch), states


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "qwen2_bias": ("Qwen2", {}),
    "qwen2_tied_one_layer_7_to_1": (
        "Qwen2",
        TIED_ONE_LAYER_7_TO_1,
    ),
    "qwen3_head_dim_8_to_2": ("Qwen3", {}),
    "qwen3_tied_real_vocabulary": ("Qwen3", {"tie_word_embeddings": True, "vocab_size": 151936}),
    # 30 tokens are beyond the 24 positions before the scaling, and heads are wider than their share.
    "llama3_scaling_head_dim_8_to_2": ("Llama", {}),
    "llama3_scaling_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen3_yarn_attention_factor": ("Qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.4, "truncate": False}}),
    "qwen2_window_in_the_last_layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3_window_in_listed_layers": (
        "Qwen3",
        {
            **{"use_sliding_window": True, "sliding_window": 1, "num_hidden_layers": 3},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral_window": ("Mistral", {}),
    "phi3_4k_window": ("Phi3", {"rope_parameters": PLAIN, "num_key_value_heads": 8, "sliding_window": 15}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama2_shaped": ("Llama", {"rope_parameters": PLAIN, "num_key_value_heads": 8, "head_dim": None}),
    "phi3_4k_shaped": ("Phi3", {"rope_parameters": PLAIN, "num_key_value_heads": 8}),
    "phi4_shaped": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}),
    # Sequences of 1, 7 and 16 tokens have the short factors, 17 and 30 the long ones, in one micro-batch.
    "phi3_longrope": ("Phi3", {"num_attention_heads": 4, **longrope(16, original=16, partial=1.0)}),
    "phi4_mini_shaped": ("Phi3", {"tie_word_embeddings": True, "num_attention_heads": 4, **longrope(12, original=16)}),
    "phi3_attention_factor": ("Phi3", longrope(6, original=16, attention_factor=1.7)),
    "qwen3_5_moe": ("Qwen3_5Moe", {"num_experts_per_tok": 4}),
    "qwen3_next": ("Qwen3Next", {"num_experts_per_tok": 4}),
    "qwen3_5_one_layer": ("Qwen3_5", {"num_hidden_layers": 1}),
    "qwen3_5_nine_layers_tied": (
        "Qwen3_5",
        {"num_hidden_layers": 9, "full_attention_interval": 4, "tie_word_embeddings": True},
    ),
    "phi3_factor": ("Phi3", longrope(6, original=16, factor=2.0)),
}
SPARSE_MODELS = {
    "one_dense_layer": {},
    "probabilities_as_they_are": {"norm_topk_prob": False},
    "every_second_layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "every_expert": {"num_experts_per_tok": 4},
    "one_expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "experts_as_wide_as_the_dense_layer": {"moe_intermediate_size": 112},
    "one_layer_tied": {"num_hidden_layers": 1, "mlp_only_layers": [], "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", SPARSE_MODELS)
def test_mixture_of_experts_states_equal_hugging_face(name, topology, tmp_path):
    assert_same_states("Qwen3Moe", SPARSE_MODELS[name], torch.float32, 1e-5, topology, tmp_path)


SHARED_EXPERTS = {
    "one_dense_layer": {},
    "normalised_probabilities_every_second_layer": {
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
        "tie_word_embeddings": True,
    },
    "wider_than_the_dense_layer": {"shared_expert_intermediate_size": 144, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_states_with_a_shared_expert_equal_hugging_face(name, topology, tmp_path):
    assert_same_states("Qwen2Moe", SHARED_EXPERTS[name], torch.float32, 1e-5, topology, tmp_path)


def test_states_with_a_shared_expert_equal_hugging_face_in_bfloat16(topology, tmp_path):
    assert_same_states("Qwen2Moe", SPARSE_MODELS["every_expert"], torch.bfloat16, 2e-2, topology, tmp_path)


def test_mixture_of_experts_states_equal_hugging_face_in_bfloat16(topology, tmp_path):
    # Where there is no choice to make: otherwise rounding gives some token to another expert, and its states differ.
    assert_same_states("Qwen3Moe", SPARSE_MODELS["every_expert"], torch.bfloat16, 2e-2, topology, tmp_path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_logits_and_every_hidden_state_equal_hugging_face(name, dtype, tolerance, topology, tmp_path):
    assert_same_states(*MODELS[name], dtype, tolerance, topology, tmp_path)


def random_hybrid(blocks):
    """Return a family and random sizes of a model with this number of blocks, of which any may have Gated DeltaNet."""
    chosen = random.Random(blocks)
    key_heads, heads = chosen.choice([1, 2, 3]), chosen.choice([2, 4, 8])
    sizes = {
        "num_hidden_layers": blocks,
        "layer_types": [chosen.choice(["linear_attention", "full_attention"]) for _ in range(blocks)],
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * chosen.choice([1, 2, 3]),
        "linear_key_head_dim": chosen.choice([8, 12, 20]),
        "linear_value_head_dim": chosen.choice([8, 12, 20]),
        "linear_conv_kernel_dim": chosen.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": chosen.choice([1, 2, heads]),
        "head_dim": chosen.choice([8, 24, 32]),
        "tie_word_embeddings": chosen.random() < 0.5,
        "initializer_range": 0.02,  # with larger weights, rounding alone moves the bf16 model of transformers by 2e-2
    }
    family = HYBRID[blocks % len(HYBRID)]
    # In bf16 rounding gives some token to another expert unless every expert is taken.
    return family, sizes if family == "Qwen3_5" else sizes | {"num_experts_per_tok": 4, "mlp_only_layers": []}


@pytest.mark.parametrize(
    "blocks", [pytest.param(blocks, marks=[] if blocks == 8 else pytest.mark.nightly) for blocks in range(1, 10)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_states_of_random_hybrids_equal_hugging_face(blocks, dtype, tolerance, topology, tmp_path):
    assert_same_states(*random_hybrid(blocks), dtype, tolerance, topology, tmp_path)


@pytest.mark.parametrize(
    "name", ["qwen3_yarn_attention_factor", "llama3_scaling_tied", "phi4_mini_shaped", "phi3_factor"]
)
@pytest.mark.parametrize("length", [16, 100_000])
def test_rotary_angles_of_distant_positions_equal_transformers_in_bfloat16(name, length, topology, tmp_path):
    family, overrides = MODELS[name]
    hf = random_hf_model(family, **overrides)
    folder = save(hf, tmp_path / "hf")
    stage = build_model(read_model_spec(folder), topology, torch.bfloat16)
    positions = torch.arange(length)
    expected = hf.model.rotary_emb(torch.zeros(1), positions[None])
    for actual, of_hf in zip(stage[0].rotary(positions, torch.full_like(positions, length)), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual[:, 0], of_hf[0], rtol=0, atol=1e-6)


def assert_same_states(family, overrides, dtype, tolerance, topology, tmp_path):
    hf = random_hf_model(family, **overrides).to(dtype)
    folder = save(hf, tmp_path / "hf")
    lengths = LONG_LENGTHS if family in HYBRID else LENGTHS
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, hf.config.vocab_size, (n,), generator=generator) for n in lengths]
    logits, states = megatron_states(folder, topology, dtype, sequences)
    assert sorted(states) == list(range(1, hf.config.num_hidden_layers + 1))
    start = 0
    for sequence in sequences:
        with torch.no_grad():
            expected = hf(sequence[None], output_hidden_states=True, use_cache=False)
        rows = slice(start, start + len(sequence))
        # Pins "layer L is after the final norm": a transformers release could change what its last entry is.
        assert torch.equal(hf.lm_head(expected.hidden_states[-1]), expected.logits)
        assert relative(logits[rows, : hf.config.vocab_size], expected.logits[0]) < tolerance
        for layer, state in states.items():
            assert relative(state[rows], expected.hidden_states[layer][0]) < tolerance, f"layer {layer}"
        start = rows.stop
