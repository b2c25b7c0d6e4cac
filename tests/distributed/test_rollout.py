"""A replica of several ranks generates the same tokens as one rank, and all of its ranks return them."""

import dataclasses

import pytest
import torch

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.config import ParallelConfig
from megatron_oprd.data.sharding import split
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import HYBRID, random_hf_model, save
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import Prompt

EOS = (3, 17, 40, 90, 111)
GREEDY = Sampling(temperature=0.0, max_new_tokens=20, samples_per_prompt=1)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=20, samples_per_prompt=2)


def prompts(count=14):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [Prompt(i, tuple(torch.randint(0, 131, (n,), generator=generator).tolist())) for i, n in enumerate(lengths)]


def open_stage(folder, layout):
    device = torch.device("cpu")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=EOS)
    stage = build_model(spec, topology, torch.float32)
    load_weights(stage, folder, spec, topology)
    return stage, spec, topology


def generate_greedy(rank, folder, layout):
    """Return the greedy responses of all replicas to 64 prompts, with five slots in each replica."""
    stage, spec, topology = open_stage(folder, layout)
    engine = EmbeddedEngine(stage, spec, topology, GREEDY, seed=3, max_batch=5)
    rollouts = engine.generate(split(prompts(64), topology.replica_rank, topology.num_replicas), step=0)
    return [rollout.response_ids for rollout in share_rollouts(rollouts, topology)]


def generate(rank, folder, layout):
    """Return the rollouts of all replicas, greedy and sampled, with fewer slots than prompts and with empty shares."""
    stage, spec, topology = open_stage(folder, layout)
    stage.train()
    results = []
    for sampling in (GREEDY, SAMPLED):
        for global_prompts in (prompts(), prompts()[:1]):
            local_prompts = split(global_prompts, topology.replica_rank, topology.num_replicas)
            engine = EmbeddedEngine(stage, spec, topology, sampling, seed=3, max_batch=5)
            rollouts = engine.generate(local_prompts, step=1)
            results.append(share_rollouts(rollouts, topology))
    assert stage.training and stage.config.sequence_parallel == topology.sequence_parallel, "left as it was"
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    # 131 tokens: two tensor-parallel ranks pad the vocabulary. Tied: both pipeline stages hold the embedding.
    return {
        family: save(
            random_hf_model(family, num_hidden_layers=4, tie_word_embeddings=True),
            tmp_path_factory.mktemp("rollout") / family,
        )
        for family in ("Qwen3", "Qwen3Moe", "Qwen2Moe", "Phi3", "Qwen3_5", "Qwen3Next")
    }


@pytest.fixture(scope="module")
def one_rank(folders):
    results = {family: run_distributed(1, generate, folder, {})[0] for family, folder in folders.items()}
    for result in results.values():
        assert len({len(rollout.response_ids) for rollout in result[2]}) > 3, "rows must end at different steps"
    return results


LAYOUTS = [
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {"context": 2}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2}),
]
EXPERT_LAYOUTS = [
    (2, {"expert": 2}),
    (2, {"expert": 2, "tensor": 2}),
    (4, {"expert": 2, "pipeline": 2}),
    (4, {"expert": 4, "tensor": 2, "sequence": True}),
    (4, {"expert": 2, "context": 2}),
]
CASES = [
    *(("Qwen3", *layout) for layout in LAYOUTS),
    *(("Phi3", *LAYOUTS[number]) for number in (0, 2)),
    *(("Qwen3Moe", *layout) for layout in [LAYOUTS[1], LAYOUTS[3], *EXPERT_LAYOUTS]),
    ("Qwen2Moe", *EXPERT_LAYOUTS[1]),
    ("Qwen3_5", *LAYOUTS[2]),
    ("Qwen3Next", *EXPERT_LAYOUTS[1]),
]


@pytest.mark.parametrize(("family", "world", "layout"), CASES, ids=str)
def test_every_layout_generates_the_tokens_of_one_rank(family, world, layout, folders, one_rank):
    for rank, result in enumerate(run_distributed(world, generate, folders[family], layout)):
        assert result == one_rank[family], f"rank {rank}"


@pytest.fixture(scope="module", params=HYBRID)
def hybrid(request, tmp_path_factory):
    """Return a model with Gated DeltaNet in a folder, and the responses of Hugging Face's `generate` to 64 prompts."""
    model = random_hf_model(request.param, num_hidden_layers=4)
    arguments = {"do_sample": False, "max_new_tokens": GREEDY.max_new_tokens, "eos_token_id": list(EOS)}
    responses = []
    for prompt in prompts(64):
        ids = torch.tensor([prompt.prompt_ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **arguments)
        responses.append(tuple(output[0, ids.shape[1] :].tolist()))
    return save(model, tmp_path_factory.mktemp("hybrid") / request.param), responses


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}], ids=str)
def test_hybrid_models_generate_the_tokens_of_hugging_face(hybrid, layout):
    folder, expected = hybrid
    if "expert" in layout and not read_model_spec(folder).num_experts:
        pytest.skip("a dense model has no experts to divide")
    for rank, responses in enumerate(run_distributed(2, generate_greedy, folder, layout)):
        assert responses == expected, f"rank {rank}"
