"""Servers get the weights of the Hugging Face export from every layout, and the canary finds servers that differ."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import receive_bucket
from megatron_oprd.rollout.group_transport import GroupTransport
from megatron_oprd.rollout.server_client import ServerError
from megatron_oprd.rollout.weight_sync import SyncFailed, SyncSettings, WeightSync, _wait_for_file
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.hf_server import HFServer, equal_tensors

BUCKET_BYTES = 40_000  # a few tensors; some are larger
TRANSPORTS = ["file", "nccl"]


def open_stage(folder, layout):
    device = torch.device("cpu")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, torch.float32)
    load_weights(stage, folder, spec, topology)
    return stage.train(), spec, topology


def transferred_names(folder):
    """Return the tensors that are transferred: a tied LM head is not."""
    names = HFReader(folder).names()
    return [name for name in names if name != "lm_head.weight" or not read_model_spec(folder).tied_embeddings]


def settings_for(transport, work):
    return SyncSettings(work / f"buckets-{transport}", "run", BUCKET_BYTES, transport)


def push_twice(rank, folders, layout, work):
    """Return the results of `push_folders` for each transport."""
    stage, spec, topology = open_stage(folders[0], layout)
    return [push_folders(folders, stage, spec, topology, work, transport) for transport in TRANSPORTS]


def push_folders(folders, stage, spec, topology, work, transport):
    """Push the weights of two folders. Return metrics, files, and whether the server has the tensors of the folder."""
    rank = topology.rank
    server = HFServer(work / f"state-{transport}", folders[0])
    settings = settings_for(transport, work)
    sync = WeightSync(stage, spec, topology, [server], settings)
    results = []
    for version, folder in enumerate(folders):
        load_weights(stage, folder, spec, topology)
        metrics = sync.push(version)
        expected = HFReader(folder)
        equal = rank > 0 or (
            sorted(server.tensors) == transferred_names(folder)
            and all(torch.equal(tensor, expected.read(name)) for name, tensor in server.tensors.items())
        )
        # The copies of a transfer through process groups are written beside other work.
        for info in sync._kept:
            _wait_for_file(Path(info["path"]), server)
        files = sorted(str(path.relative_to(settings.folder)) for path in settings.folder.rglob("*.safetensors"))
        results.append((metrics, equal, files, sync.label))
    assert stage.training and stage.config.sequence_parallel == topology.sequence_parallel, "left as it was"
    return results, server.calls


CASES = [
    pytest.param("Qwen3", True, 4, {"tensor": 2, "pipeline": 2}, (0, 2), id="tied, tensor 2, pipeline 2"),
    pytest.param("Qwen2", False, 2, {"pipeline": 2, "virtual_pipeline": 2}, (0, 1), id="virtual pipeline"),
    pytest.param("Qwen3Moe", False, 4, {"pipeline": 2, "expert": 2}, (0, 1, 2, 3), id="experts, pipeline 2"),
    pytest.param("Llama", True, 2, {"context": 2}, (0,), id="context", marks=pytest.mark.nightly),
    pytest.param("Phi3", False, 2, {"tensor": 2, "sequence": True}, (0,), id="sequence", marks=pytest.mark.nightly),
    pytest.param(
        "Qwen3Moe", False, 4, {"context": 2, "expert": 4}, (0, 1, 2, 3), id="context", marks=pytest.mark.nightly
    ),
    pytest.param("Qwen2", True, 1, {}, (0,), id="one rank", marks=pytest.mark.nightly),
    pytest.param("Qwen2", False, 2, {}, (0,), id="data", marks=pytest.mark.nightly),
]


# With LongRoPE the factors depend on the length of a row, which a server does not know: such a student is refused.
PLAIN_ROTATION = {
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75},
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(("family", "tied", "world", "layout", "writers"), CASES)
def test_a_server_gets_the_tensors_of_the_export_from_every_layout(family, tied, world, layout, writers, tmp_path):
    settings = {"num_hidden_layers": 4, "tie_word_embeddings": tied} | (PLAIN_ROTATION if family == "Phi3" else {})
    folders = [save(random_hf_model(family, seed, **settings), tmp_path / f"hf{seed}") for seed in range(2)]
    names = transferred_names(folders[0])
    ranks = run_distributed(world, push_twice, folders, layout, tmp_path)
    for rank, (results, calls) in [(rank, result) for rank, both in enumerate(ranks) for result in both]:
        for version, (metrics, equal, files, label) in enumerate(results):
            assert equal, f"rank {rank}, version {version}"
            assert label == f"run:{version}"
            assert metrics["sync/canary_difference"] < 1e-5
            assert metrics["sync/bytes"] == sum(HFReader(folders[0]).read(name).nbytes for name in names)
            # Each stage and each group of experts writes its own files, and only the newest version is kept.
            assert {Path(file).name[:9] for file in files} == {f"rank{writer:05d}" for writer in writers}
            assert {Path(file).parts[0] for file in files} == {f"run_{version}"}
            assert len(files) > len(writers), "several buckets"
        assert calls == (["pause", "start", "finish", "reset", "resume"] * 2 if rank == 0 else [])


def push_to_faulty_server(rank, folders, layout, work, fault):
    stage, spec, topology = open_stage(folders[0], layout)
    return [push_with_fault(folders, stage, spec, topology, work, fault, transport) for transport in TRANSPORTS]


def push_with_fault(folders, stage, spec, topology, work, fault, transport):
    load_weights(stage, folders[0], spec, topology)
    server = HFServer(work / f"state-{transport}", folders[0])
    sync = WeightSync(stage, spec, topology, [server], settings_for(transport, work))
    sync.push(0)
    server.fault = fault
    load_weights(stage, folders[1], spec, topology)
    try:
        sync.push(1)
    except SyncFailed as error:
        return str(error), sync.label
    return None, sync.label


@pytest.mark.parametrize("fault", ["old head", "skipped bucket", "old cache"])
def test_the_canary_stops_every_rank_if_the_server_computes_with_old_weights(fault, tmp_path):
    folders = [
        save(random_hf_model("Qwen3", seed, num_hidden_layers=2, tie_word_embeddings=True), tmp_path / f"hf{seed}")
        for seed in range(2)
    ]
    results = run_distributed(2, push_to_faulty_server, folders, {"tensor": 2}, tmp_path, fault)
    assert results[0] == results[1]
    for message, label in results[0]:
        assert "localhost:1: canary: after the transfer of weights run:1" in message
        assert "does not compute with the student's weights" in message
        assert label == "run:0"


class LosingServer(HFServer):
    """Loses the second bucket of rank 1 until it is restarted."""

    buckets = 0

    def update_weights(self, info):
        self.buckets += 1
        if dist.get_rank() == 1 and self.buckets == 2 and not (self.folder / "restarted").exists():
            raise ServerError(f"{self.address}: connection refused")
        super().update_weights(info)


def lose_buckets(rank, folder, work):
    stage, spec, topology = open_stage(folder, {"pipeline": 2})
    return max(lose_a_bucket(rank, folder, stage, spec, topology, work, transport) for transport in TRANSPORTS)


def lose_a_bucket(rank, folder, stage, spec, topology, work, transport):
    """Push to a server that loses a bucket, restart it, and load the kept buckets into two new servers."""
    work = work / transport
    work.mkdir(exist_ok=True)
    server = LosingServer(work / "state", folder)
    settings = settings_for(transport, work)
    with pytest.raises(SyncFailed, match="localhost:1: connection refused"):
        WeightSync(stage, spec, topology, [server], settings).push(3)
    sync = WeightSync(stage, spec, topology, [server], settings, restart=(work / "state" / "restarted").touch)
    metrics = sync.push(3)
    if rank == 0:  # only this rank reloads a server that crashed while it generated
        restarted = HFServer(work / "second", folder)
        sync.reload(restarted)
        assert restarted.label == "run:3"
        assert torch.equal(restarted.tensors["model.norm.weight"], HFReader(folder).read("model.norm.weight"))
        with pytest.raises(ServerError, match="canary"):
            sync.reload(HFServer(work / "third", folder, fault="skipped bucket"))
    return metrics["sync/canary_difference"]


def test_a_lost_bucket_stops_every_rank_and_kept_buckets_load_again(tmp_path):
    folder = save(random_hf_model("Qwen2", num_hidden_layers=4), tmp_path / "hf")
    assert max(run_distributed(2, lose_buckets, folder, tmp_path)) < 1e-5


class FailingServer(HFServer):
    """Fails at the second bucket: one of two workers ends, or the server does not answer."""

    buckets = 0

    def update_weights(self, info):
        self.buckets += 1
        if self.buckets == 1:
            return super().update_weights(info)
        if self.fault == "hang":
            time.sleep(4 * self.timeout_seconds)
        first, second = self.groups[info["group"]]
        second._store.set("ready/2/2", "")  # the trainer sends when both workers wait
        threading.Timer(0.2, lambda: setattr(second, "_group", None)).start()  # closes its connections
        receive_bucket(first, info["layout"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "localhost:1: the transfer of weights run:0 broke off: no answer for 1 s"),
        ("death", "localhost:1: the transfer of weights run:0 broke off: .*[Cc]onnection"),
    ],
)
def test_a_server_that_fails_during_a_transfer_through_a_group_ends_the_transfer(fault, message, tmp_path):
    folder = save(random_hf_model("Qwen2", num_hidden_layers=2), tmp_path / "hf")
    server = FailingServer(tmp_path / "state", folder, fault)
    server.timeout_seconds = 1.0 if fault == "hang" else 60.0
    transport = GroupTransport(None, [server], torch.device("cpu"))
    transport.start("run:0", 2)
    transport.send({"a": torch.ones(1000)})
    transport.send({"b": torch.ones(10_000_000)})  # more than buffers of sockets take
    start = time.monotonic()
    with pytest.raises(ServerError, match=message):
        transport.finish()
    assert time.monotonic() - start < 30


def test_two_servers_get_the_bits_that_each_of_two_ranks_sent(tmp_path):
    """The ranks are two transports of this process, which send at the same time."""
    folder = save(random_hf_model("Qwen2", num_hidden_layers=2), tmp_path / "hf")
    servers = [HFServer(tmp_path / f"state{number}", folder) for number in range(2)]
    servers[1].address = "localhost:2"
    tensors = {
        f"{n}-{kind}": torch.randn(n, 3).to(kind) for n in (1, 5, 64) for kind in (torch.float32, torch.bfloat16)
    }
    transports = [GroupTransport(None, servers, torch.device("cpu")) for _ in range(2)]
    for rank, transport in enumerate(transports):
        transport.start("run:0", 2 * len(tensors))
        for name, tensor in tensors.items():
            changing = tensor.clone()
            transport.send({f"rank{rank}-{name}": changing})
            changing.zero_()
    for transport in transports:
        assert transport.finish() == []
    for server in servers:
        received = {}
        for path in server.folder.glob("*.safetensors"):
            received |= load_file(path)
        expected = {f"rank{rank}-{name}": tensor for rank in range(2) for name, tensor in tensors.items()}
        assert equal_tensors(received, expected)
