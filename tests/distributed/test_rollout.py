"""A replica of several ranks generates the tokens of one rank, and all its ranks know them."""

import dataclasses

import pytest
import torch

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.models.weights import load_weights
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.megatron import MegatronEngine
from megatron_oprd.types import Prompt
from tests.helpers.distributed import run_distributed
from tests.helpers.models import random_hf_model, save

EOS = (3, 17, 40, 90, 111)
GREEDY = Sampling(temperature=0.0, max_new_tokens=20, samples_per_prompt=1)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=20, samples_per_prompt=2)


def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (14,), generator=generator).tolist()
    return [Prompt(i, tuple(torch.randint(0, 131, (n,), generator=generator).tolist())) for i, n in enumerate(lengths)]


def generate(rank, folder, tensor, pipeline):
    """This rank's rollouts, greedy and sampled, with fewer slots than prompts."""
    device = torch.device("cpu")
    start_process(device)
    topology = build_topology(ParallelConfig(tensor=tensor, pipeline=pipeline), device, seed=0)
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=EOS)
    model = build_model(spec, topology, torch.float32)
    load_weights(model, folder, spec, topology)
    return [
        MegatronEngine(model, spec, topology, sampling, seed=3, max_batch=5).generate(prompts(), step=1)
        for sampling in (GREEDY, SAMPLED)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # 131 tokens: two tensor-parallel ranks pad the vocabulary. Tied: both pipeline stages hold the embedding.
    hf = random_hf_model("Qwen3", num_hidden_layers=4, tie_word_embeddings=True)
    return save(hf, tmp_path_factory.mktemp("rollout") / "hf")


@pytest.fixture(scope="module")
def one_rank(folder):
    [result] = run_distributed(1, generate, folder, 1, 1)
    lengths = {len(rollout.response_ids) for rollout in result[0]}
    assert len(lengths) > 3, "rows must end at different steps"
    return result


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_replica_generates_what_one_rank_does(tensor, pipeline, folder, one_rank):
    for rank, result in enumerate(run_distributed(2, generate, folder, tensor, pipeline)):
        assert result == one_rank, f"rank {rank}"


def test_tensor_and_pipeline_parallelism_together(folder, one_rank):
    for rank, result in enumerate(run_distributed(4, generate, folder, 2, 2)):
        assert result == one_rank, f"rank {rank}"
