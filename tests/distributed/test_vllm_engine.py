"""The vLLM engine returns the rollouts of the embedded engine, in every layout and on all ranks of a replica."""

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
from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.server_pool import ServerPool
from megatron_oprd.rollout.vllm_engine import VllmEngine, is_first_of_replica
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import Prompt, UserError
from tests.helpers.fake_vllm import FakeServer, HuggingFaceModel

EOS = (3, 17, 40, 90, 111)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12, logprobs=True)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=12, samples_per_prompt=2)
LAYOUTS = [
    (2, {"context": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
    pytest.param(2, {}, marks=pytest.mark.nightly),
    pytest.param(2, {"tensor": 2}, marks=pytest.mark.nightly),
    pytest.param(2, {"pipeline": 2}, marks=pytest.mark.nightly),
]


def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (9,), generator=generator).tolist()
    ids = [tuple(torch.randint(0, 131, (n,), generator=generator).tolist()) for n in lengths]
    return [Prompt(i, one, data_source=f"s{i}", teacher_prompt_ids=(i,)) for i, one in enumerate(ids)]


class NoTransfer:
    """A transfer to servers that have the weights already."""

    label = ""

    def __init__(self, clients):
        self.clients = clients

    def push(self, version):
        self.label = f"run:{version}"
        for client in self.clients:
            client.finish_weight_update(self.label)
        return {"sync/seconds": 0.0}


def start(folder, layout, address):
    """Return the topology, the embedded engine's constructor and the vLLM engine's."""
    device = torch.device("cpu")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=EOS)
    clients = [ServerClient(address)]
    transfer = NoTransfer(clients)

    def engine(sampling, **arguments):
        pool = ServerPool(clients, max_running=8, stall_seconds=5.0) if is_first_of_replica(topology) else None
        return VllmEngine(spec, topology, sampling, transfer, pool, seed=3, **arguments)

    return topology, spec, engine


def generate(rank, folder, layout, address):
    """Return the rollouts of all replicas, greedy and sampled, also with empty shares."""
    topology, _, engine = start(folder, layout, address)
    results = []
    for sampling in (GREEDY, SAMPLED):
        local = engine(sampling)
        assert local.sync_weights(4) == {"sync/seconds": 0.0}
        for global_prompts in (prompts(), prompts()[:1]):
            pending = local.submit(split(global_prompts, topology.replica_rank, topology.num_replicas), step=1)
            rollouts = pending.result()
            assert pending.result() is rollouts, "a second call communicates nothing"
            results.append(share_rollouts(rollouts, topology))
    return results


def generate_embedded(rank, folder):
    topology, spec, _ = start(folder, {}, "none:1")
    stage = build_model(spec, topology, torch.float32)
    load_weights(stage, folder, spec, topology)
    return EmbeddedEngine(stage, spec, topology, GREEDY, seed=3).generate(prompts(), step=1)


def generate_limited(rank, folder, address, limits):
    _, _, engine = start(folder, {}, address)
    local = engine(GREEDY)
    local.sync_weights(4)
    return local.generate(prompts(), step=1, limits=limits)


def fail(rank, folder, layout, address):
    """Return the error of each rank when the last server fails."""
    _, _, engine = start(folder, layout, address)
    local = engine(GREEDY)
    local.sync_weights(1)
    with pytest.raises((ServerError, RuntimeError)) as caught:
        local.generate(prompts(), step=1)
    return type(caught.value).__name__, str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_hf_model("Qwen3", num_hidden_layers=4), tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return HuggingFaceModel(str(folder))


@pytest.fixture(scope="module")
def one_rank(folder, model):
    with FakeServer(model) as server:
        return run_distributed(1, generate, folder, {}, server.address)[0]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_every_layout_returns_the_rollouts_of_one_rank(world, layout, folder, model, one_rank):
    with FakeServer(model) as server:
        for rank, result in enumerate(run_distributed(world, generate, folder, layout, server.address)):
            assert result == one_rank, f"rank {rank}"
        assert len(server.requests) == 3 * (len(prompts()) + 1), "each rollout is requested once"


def test_greedy_rollouts_equal_those_of_the_embedded_engine(folder, one_rank):
    expected = run_distributed(1, generate_embedded, folder)[0]
    assert [dataclasses.replace(one, logprobs=None) for one in one_rank[0]] == [
        dataclasses.replace(one, logprobs=None) for one in expected
    ]
    assert {one.finish_reason for one in one_rank[0]} == {"eos", "length"}
    assert all(len(one.logprobs) == len(one.response_ids) for one in one_rank[0])
    assert [(one.prompt_index, one.sample_index) for one in one_rank[2]] == [(p, s) for p in range(9) for s in range(2)]


def test_a_limit_ends_a_response_and_changes_no_token(folder, model, one_rank):
    limits = [1, 2, 3, 4, 5, 6, 7, 8, 12]
    with FakeServer(model) as server:
        limited = run_distributed(1, generate_limited, folder, server.address, limits)[0]
    complete = [rollout.response_ids for rollout in one_rank[0]]
    assert [one.response_ids for one in limited] == [ids[:n] for ids, n in zip(complete, limits, strict=True)]
    assert any(len(ids) > limit for ids, limit in zip(complete, limits, strict=True))


def test_all_ranks_of_a_replica_raise_when_the_last_server_fails(folder):
    with FakeServer(faults=["out of memory"]) as server:
        first, other = run_distributed(2, fail, folder, {"tensor": 2}, server.address)
    assert first[0] == "ServerError" and "CUDA out of memory" in first[1]
    assert other == ("RankZeroFailed", f"the first rank of the replica failed: {first[1]}")


def refused_prompts(rank, folder):
    _, spec, engine = start(folder, {}, "none:1")
    messages = []
    for prompt in (Prompt(4, ()), Prompt(5, (1, 131)), Prompt(6, (1,) * spec.max_position_embeddings)):
        with pytest.raises(UserError) as caught:
            engine(GREEDY).submit([Prompt(0, (1,)), prompt], 0)
        messages.append(str(caught.value))
    return messages


def test_a_prompt_that_would_end_the_server_is_refused_before_it_is_sent(folder):
    empty, unknown, long = run_distributed(1, refused_prompts, folder)[0]
    assert "prompt 4 is empty" in empty and "prompt 5 has the token id 131" in unknown
    assert "prompt 6 has" in long and "leaves no room" in long
