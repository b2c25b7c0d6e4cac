"""Real vLLM servers on the CPU: they generate what the embedded engine generates, after every update."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.rollout.canary import score_by_student
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.server_client import GenerateRequest, ServerClient, ServerError
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings, write_model_folder
from megatron_oprd.rollout.server_supervisor import end_session, session_processes
from megatron_oprd.rollout.weight_sync import SyncFailed, SyncSettings, WeightSync
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import YARN, random_hf_model, save
from megatron_oprd.types import Prompt, UserError

pytestmark = [pytest.mark.nightly, pytest.mark.vllm]
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_OPRD_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
if shutil.which(PYTHON) is None:
    pytest.skip(
        f"no vLLM: {PYTHON} is missing; bash tools/rollout_server/install.sh .venv-vllm cpu makes it",
        allow_module_level=True,
    )
MODEL_LEN = 256
NEW_TOKENS = 16
EOS = (3, 17, 40, 90, 111)
# vLLM's attention on a CPU has kernels for heads of 32 dimensions and more.
SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LONG = {**YARN, "original_max_position_embeddings": MODEL_LEN // 4}  # with YaRN, vLLM has angles up to MODEL_LEN
MODELS = {
    "Qwen2, untied": ("Qwen2", {"tie_word_embeddings": False, "head_dim": None}),
    "Qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "Qwen3Moe, untied": ("Qwen3Moe", {"tie_word_embeddings": False}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2 with YaRN, untied": ("Qwen2", {"tie_word_embeddings": False, "head_dim": None, "rope_parameters": LONG}),
}
# Each on four ranks: the layouts of fewer ranks have replicas, of which only the first one writes.
LAYOUTS = ({}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"context": 2})
TRANSPORTS = ("file", "nccl")
EXPERT_LAYOUTS = ({"expert": 2}, {"expert": 2, "pipeline": 2})


def make_folders(model, folder, count):
    """Return Hugging Face folders of one model with different weights."""
    family, overrides = MODELS[model]
    settings = {name: value for name, value in {**SIZES, **overrides}.items() if value is not None}
    return [save(random_hf_model(family, seed, **settings), folder / f"weights{seed}") for seed in range(count)]


def server_settings(folder, model, dtype="float32", **changes):
    """Return the settings of a server for the model of a Hugging Face folder."""
    write_model_folder(folder / "model", read_model_spec(model))
    settings = ServerSettings(PYTHON, folder / "model", folder / "server.log", dtype, MODEL_LEN)
    environment = {"OMP_NUM_THREADS": "1", **changes.pop("environment", {})}
    return dataclasses.replace(settings, environment=environment, **changes)


@pytest.fixture(params=list(MODELS), scope="module")
def model(request, tmp_path_factory):
    """Yield a server, three folders of weights for it, and its layouts."""
    folder = tmp_path_factory.mktemp("server")
    folders = make_folders(request.param, folder, 3)
    server = ManagedServer(server_settings(folder, folders[0]))
    try:
        layouts = LAYOUTS + (EXPERT_LAYOUTS if "Moe" in request.param else ())
        yield server.start(), folders, layouts
    finally:
        server.stop()


def make_prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = [*torch.randint(1, 40, (7,), generator=generator).tolist(), 170]  # the last fills blocks of the cache
    return [Prompt(i, tuple(torch.randint(0, 131, (n,), generator=generator).tolist())) for i, n in enumerate(lengths)]


def server_answers(client, prompts):
    """Return greedy answers to all prompts, requested at once."""
    requests = [
        GenerateRequest(one.prompt_ids, NEW_TOKENS, 0, temperature=0.0, stop_ids=EOS, logprobs=True) for one in prompts
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(client.generate, requests))


def open_stage(folder, layout, dtype=torch.float32):
    device = torch.device("cpu")
    start_process(device)
    topology = build_topology(ParallelConfig(**layout), device, seed=0)
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=EOS)
    return build_model(spec, topology, dtype), spec, topology


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers of a server and of the embedded engine after an update."""

    equal: int  # answers with the same tokens
    answers: int
    difference: float  # largest difference of a log-probability
    metrics: dict[str, float]


def compare(stage, spec, topology, client, metrics):
    """Compare the server's greedy answers with those of the embedded engine. Collective over the world."""
    prompts = make_prompts()
    sampling = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS)
    rollouts = EmbeddedEngine(stage, spec, topology, sampling, seed=0).generate(prompts, step=0)
    answers = on_rank_zero(lambda: server_answers(client, prompts))
    sequences = [(*prompt.prompt_ids, *answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    scores = score_by_student(stage, spec, topology, sequences)
    difference = max(
        abs(own - other)
        for score, answer in zip(scores, answers, strict=True)
        for own, other in zip(score[-len(answer.token_ids) :], answer.logprobs, strict=True)
    )
    equal = sum(one.response_ids == answer.token_ids for one, answer in zip(rollouts, answers, strict=True))
    return Comparison(equal, len(prompts), difference, metrics)


def settings_for(transport, work, run):
    """Return settings whose buckets have a few tensors, with a folder for each transport."""
    return SyncSettings(work / transport, run, 50_000, transport)


def follow_updates(rank, address, folders, layouts, work):
    """Compare after pushes of three weights in each layout, and once before the first push.

    The transports take turns.
    """
    client = ServerClient(address)
    results = []
    for number, layout in enumerate(layouts):
        stage, spec, topology = open_stage(folders[0], layout)
        syncs = [
            WeightSync(stage, spec, topology, [client], settings_for(transport, work, f"run{number}"))
            for transport in TRANSPORTS
        ]
        load_weights(stage, folders[0], spec, topology)
        if number == 0:
            results.append(("before", compare(stage, spec, topology, client, {})))
        for version, folder in enumerate(folders):
            load_weights(stage, folder, spec, topology)
            turn = (number + version) % 2
            metrics = syncs[turn].push(version)
            case = f"{layout} {version} {TRANSPORTS[turn]}"
            results.append((case, compare(stage, spec, topology, client, metrics)))
    return results


def test_every_layout_makes_the_server_answer_like_the_embedded_engine(model, shared_memory):
    address, folders, layouts = model
    results = run_distributed(4, follow_updates, address, folders, layouts, shared_memory, timeout_seconds=550)[0]
    (_, before), *after = results
    assert before.equal < before.answers / 2, "a server without the student's weights answers differently"
    assert len(after) == 3 * len(layouts)
    for case, comparison in after:
        print(f"{case}: {comparison}")
        assert comparison.equal == comparison.answers, case
        assert comparison.difference < 1e-4, case
        assert comparison.metrics["sync/canary_difference"] < 1e-4, case


def follow_hybrid_updates(rank, address, folders, layout, work):
    """Compare before the first push and after pushes of all weights. The student computes in bfloat16."""
    stage, spec, topology = open_stage(folders[0], layout, torch.bfloat16)
    client = ServerClient(address)
    sync = WeightSync(stage, spec, topology, [client], settings_for("file", work, "hybrid"))
    load_weights(stage, folders[0], spec, topology)
    results = [compare(stage, spec, topology, client, {})]
    for version, folder in enumerate(folders):
        load_weights(stage, folder, spec, topology)
        results.append(compare(stage, spec, topology, client, sync.push(version)))
    return results


def test_a_server_follows_the_updates_of_a_model_with_gated_deltanet(tmp_path, shared_memory):
    """vLLM's kernels of Gated DeltaNet on a CPU take heads of 128 dimensions in bfloat16."""
    sizes = {**SIZES, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    folders = [save(random_hf_model("Qwen3Next", seed, **sizes), tmp_path / f"weights{seed}") for seed in range(2)]
    server = ManagedServer(server_settings(tmp_path, folders[0], "bfloat16"))
    try:
        layout = {"tensor": 2, "expert": 2}
        results = run_distributed(2, follow_hybrid_updates, server.start(), folders, layout, shared_memory)[0]
    finally:
        server.stop()
    before, *after = results
    assert before.difference > 0.5, "a server without the student's weights answers differently"
    for comparison in after:
        assert comparison.difference < 0.05 and comparison.equal >= comparison.answers / 2, comparison
        assert comparison.metrics["sync/canary_difference"] < 0.02


@pytest.fixture
def shared_memory():
    folder = Path(tempfile.mkdtemp(prefix="test-weights-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


class ForgetfulClient(ServerClient):
    """Never resets the prefix cache. vLLM resets it at a pause too, unless it is told not to."""

    def pause(self):
        self._call("POST", "/pause", query={"mode": "wait", "clear_cache": "false"})

    def reset_prefix_cache(self):
        pass


def push_with_fault(rank, address, folders, work, fault_file, fault, transport):
    """Push right weights, then others to a server that makes a mistake, then again without it. Return the error."""
    stage, spec, topology = open_stage(folders[0], {"tensor": 2})
    client = ForgetfulClient(address) if fault == "old cache" else ServerClient(address)
    settings = settings_for(transport, work, "faults")
    load_weights(stage, folders[0], spec, topology)
    if rank == 0:
        fault_file.write_text("")
    WeightSync(stage, spec, topology, [ServerClient(address)], settings).push(0)
    load_weights(stage, folders[1], spec, topology)
    if rank == 0:
        fault_file.write_text(fault)
    try:
        WeightSync(stage, spec, topology, [client], settings).push(1)
        message = ""
    except SyncFailed as error:
        message = str(error)
    if rank == 0:
        fault_file.write_text("")
    metrics = WeightSync(stage, spec, topology, [ServerClient(address)], settings).push(2)
    return message, metrics["sync/canary_difference"]


def test_planted_faults_are_found_and_a_broken_server_comes_back(tmp_path, shared_memory):
    """Use one server for all faults, since each start takes a minute."""
    folders = make_folders("Qwen3, tied", tmp_path, 2)
    fault_file = tmp_path / "fault"
    environment = {"FAULT_FILE": str(fault_file), "PYTHONPATH": str(ROOT / "tests" / "helpers" / "faulty_plugin")}
    settings = server_settings(tmp_path, folders[0], backend="faulty_buckets", environment=environment)
    server = ManagedServer(settings)
    try:
        address = server.start()
        for fault, transport in itertools.product(("old cache", "stale head", "skipped bucket"), TRANSPORTS):
            results = run_distributed(2, push_with_fault, address, folders, shared_memory, fault_file, fault, transport)
            for message, difference in results:
                assert "canary: after the transfer of weights faults:1" in message, fault
                assert difference < 1e-4, fault
        check_that_mixed_versions_are_told_apart(ServerClient(address))
        settings = dataclasses.replace(settings, port=int(address.rpartition(":")[2]))
        arguments = (settings, server.session, folders[0], shared_memory)
        run_distributed(1, kill_and_reload, *arguments, timeout_seconds=500)
    finally:
        server.stop()


def check_that_mixed_versions_are_told_apart(client):
    """Change the weight version during an answer, which must name both versions."""
    answers = []
    request = GenerateRequest((1, 2, 3), MODEL_LEN - 8, 0, temperature=0.0)
    thread = threading.Thread(target=lambda: answers.append(client.generate(request)))
    thread.start()
    time.sleep(0.3)
    client._call("POST", "/pause", query={"mode": "keep"})
    client._call("POST", "/update_weight_version", {"new_version": "other"})
    client.resume()
    thread.join(60)
    versions = [span.version for span in answers[0].weight_versions]
    assert versions == ["faults:2", "other"]


def kill_engine(session):
    for pid in session_processes(session):
        if "EngineCore" in " ".join(psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)


class KilledServer(ServerClient):
    """Loses its engine when the second bucket arrives."""

    buckets, session = 0, 0

    def update_weights(self, info):
        self.buckets += 1
        if self.buckets == 2:
            kill_engine(self.session)
        super().update_weights(info)


def kill_and_reload(rank, settings, session, folder, work):
    """Kill the engine of a server while it generates, and another one during a transfer through a process group.

    After a restart, kept buckets make the first one answer as before.
    """
    stage, spec, topology = open_stage(folder, {})
    load_weights(stage, folder, spec, topology)
    client = KilledServer(f"127.0.0.1:{settings.port}")
    sync = WeightSync(stage, spec, topology, [ServerClient(client.address)], settings_for("nccl", work, "kill"))
    sync.push(5)
    before = server_answers(client, make_prompts())
    kill_engine(session)
    with pytest.raises(ServerError):
        server_answers(client, make_prompts())
    end_session(session, grace_seconds=0.0)
    server = ManagedServer(settings)
    assert server.start() == client.address
    sync.reload(client)
    assert [one.token_ids for one in server_answers(client, make_prompts())] == [one.token_ids for one in before]
    assert client.weight_info() == "kill:5"

    client.buckets, client.session = 0, server.session
    sync = WeightSync(stage, spec, topology, [client], settings_for("nccl", work, "kill"))
    start = time.monotonic()
    with pytest.raises(SyncFailed, match=client.address):
        sync.push(6)
    assert time.monotonic() - start < 30
    server.stop()
    assert session_processes(server.session or client.session) == []


OWNER = """
import sys, time
from pathlib import Path
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings
python, model, log = sys.argv[1:]
server = ManagedServer(ServerSettings(python, Path(model), Path(log), "float32", 64))
print("checked", flush=True)
server.start()
print(server.session, flush=True)
time.sleep(999)
"""


def test_no_process_of_a_server_survives_sigkill_of_the_trainer(tmp_path):
    settings = server_settings(tmp_path, make_folders("Qwen3, tied", tmp_path, 1)[0])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, settings.python, settings.model, settings.log],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout.readline() == "checked\n"
    session = int(owner.stdout.readline())
    assert len(session_processes(session)) >= 4, "supervisor, server, engine core and worker"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while remaining := session_processes(session):
        assert time.monotonic() < deadline, remaining
        time.sleep(0.2)


def test_a_port_that_is_taken_and_a_wrong_model_are_named(tmp_path):
    settings = server_settings(tmp_path, make_folders("Qwen3, tied", tmp_path, 1)[0])

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken by another process"):
            ManagedServer(dataclasses.replace(settings, port=port)).start()
    (settings.model / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"ended while it started, with exit code 1: .*; read .*server\.log"):
        ManagedServer(settings).start()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the demo's pair of models with heads of 32 dimensions, as vLLM's attention on a CPU needs them."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "examples.demo.make_pair", "--out", folder, "--hidden-size", "128"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=590, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_demo_is_distilled_through_vllm(ahead, pair, tmp_path):
    arguments = [
        *(f"{name}.path={pair / name}" for name in ("student", "teacher")),
        f"data.prompts=[{pair / 'train.jsonl'}]",
        f"evaluation.data=[{pair / 'heldout.jsonl'}]",
        f"train.run_dir={tmp_path / 'run'}",
        "train.steps=100",
        "evaluation.every=100",
        "checkpoint.every=100",
        f"rollout.ahead={ahead}",
        "rollout.engine=vllm",
        f"rollout.server.python={PYTHON}",
    ]
    command = [sys.executable, "-m", "megatron_oprd.train", "--config", "examples/demo.yaml", *arguments]
    outcome = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    accuracy = float(re.search(r"after, addition: avg@1 ([\d.]+)", outcome.stdout)[1])
    assert accuracy >= 0.95
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["rollout/staleness"] for step in steps) == ahead
    assert max(step.get("sync/canary_difference", 0.0) for step in steps) < 1e-4
