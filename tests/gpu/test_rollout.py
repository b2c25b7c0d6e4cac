"""Generation on the device: decode steps that CUDA graphs repeat, and flash attention over the KV cache."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.precision import PLAIN
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.types import Prompt
from tests.gpu.models import TE, run, save_model, sequences

BF16_ROUNDING = 3e-2
LIMITS = [40, 9, 33, 24, 40, 12, 20, 28]


@pytest.fixture(scope="module", params=["Qwen2", "Qwen3"])
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("rollout") / "model", request.param)


def prompts():
    return [
        Prompt(index, tuple(row.tolist())) for index, row in enumerate(sequences(384, (3, 14, 33, 64, 5, 40, 9, 21)))
    ]


@torch.no_grad()
def test_tokens_in_float32_equal_hugging_face(folder, gpu):
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(gpu.device).eval()
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=())
    stage = gpu.load(folder, PLAIN, torch.float32)
    sampling = Sampling(temperature=0.0, max_new_tokens=max(LIMITS))
    rollouts = EmbeddedEngine(stage, spec, gpu.topology, sampling, seed=0, max_batch=3).generate(prompts(), 0, LIMITS)
    for rollout, limit in zip(rollouts, LIMITS, strict=True):
        ids = torch.tensor([rollout.prompt_ids], device=gpu.device)
        settings = dict(do_sample=False, max_new_tokens=limit, eos_token_id=None, pad_token_id=0)
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert rollout.response_ids == tuple(expected[0, ids.shape[1] :].tolist())


@torch.no_grad()
@pytest.mark.parametrize("precision", [PLAIN, TE], ids=["own modules", "Transformer Engine"])
def test_logprobs_in_bf16_are_those_of_the_training_forward(precision, folder, gpu):
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=())
    stage = gpu.load(folder, precision)
    sampling = Sampling(max_new_tokens=max(LIMITS), logprobs=True)
    rollouts = EmbeddedEngine(stage, spec, gpu.topology, sampling, seed=0, max_batch=3).generate(prompts(), 0, LIMITS)
    errors = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        logits, _ = run(stage.eval(), [ids], gpu.device)
        chosen = logits[len(rollout.prompt_ids) - 1 : -1, : spec.vocab_size].float().log_softmax(dim=-1).cpu()
        chosen = chosen.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        errors.append((torch.tensor(rollout.logprobs) - chosen).abs())
    assert [len(error) for error in errors] == LIMITS
    assert torch.cat(errors).mean() < BF16_ROUNDING
    assert torch.cat(errors).max() < 10 * BF16_ROUNDING
