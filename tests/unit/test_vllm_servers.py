"""The client of a vLLM server and the spreading of requests over servers, against a stand-in with planted faults."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from megatron_oprd.rollout import server_client
from megatron_oprd.rollout.server_answers import answer_problem, request_seed
from megatron_oprd.rollout.server_client import GenerateRequest, RequestRefused, ServerClient, ServerError, VersionSpan
from megatron_oprd.rollout.server_pool import ServerPool
from tests.helpers.fake_vllm import FakeServer, HashModel


def request(number=0, **changes):
    values = {"max_new_tokens": 40, "seed": request_seed(1, 2, number, 0), "stop_ids": (7, 19), "logprobs": True}
    return GenerateRequest(**{"prompt_ids": (5, 6, number), **values, **changes})


def update(client, version="run:1", info=None):
    client.pause()
    client.start_weight_update()
    client.update_weights(info or {"bucket": version})
    client.finish_weight_update(version)
    client.reset_prefix_cache()
    client.resume()


def check(request, answer):
    return answer_problem(request, answer, label="run:1", vocab_size=131)


def pool(*servers, restart=None, max_running=4, stall_seconds=0.4):
    clients = [ServerClient(server.address) for server in servers]
    for client in clients:
        update(client)
    return ServerPool(clients, max_running=max_running, stall_seconds=stall_seconds, recover=restart)


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.fixture
def other():
    with FakeServer() as server:
        yield server


@pytest.fixture
def expected(server):
    """Return the answers of a server without faults."""
    with FakeServer() as sound:
        return pool(sound).start([request(number) for number in range(12)], check).result()


def test_the_client_speaks_the_protocol(server):
    client = ServerClient(f"http://{server.address}/")
    client.health()
    assert (client.version(), client.max_model_len(), client.weight_info()) == ("0.32.0", 4096, "default")
    before = client.generate(request())
    assert before.weight_versions == (VersionSpan("default", 0, len(before.token_ids)),)
    update(client, "run:3")
    answer = client.generate(request())
    assert client.weight_info() == "run:3" and answer.weight_versions[0].version == "run:3"
    assert answer.token_ids != before.token_ids, "the case needs weights that matter"
    assert len(answer.logprobs) == len(answer.token_ids) and all(value < 0 for value in answer.logprobs)
    assert client.generate(request(logprobs=False)).logprobs is None
    assert client.collective_rpc("name", "a") == [{"method": "name", "args": ["a"]}]
    order = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert [call for call in server.calls if call in [*order, "/resume"]] == [*order, "/resume"]


def test_scores_equal_the_log_probabilities_of_greedy_generation(server):
    client = ServerClient(server.address)
    greedy = client.generate(request(temperature=0.0, stop_ids=(), max_new_tokens=9))
    scores = client.score([5, 6, 0, *greedy.token_ids])
    assert scores[2:] == pytest.approx(greedy.logprobs, abs=1e-12) and len(scores) == 11


def test_a_stop_id_ends_an_answer_and_excluded_ids_are_never_sampled(server):
    client, excluded = ServerClient(server.address), tuple(range(30, 131))
    answers = [client.generate(request(number, excluded_ids=excluded, max_new_tokens=15)) for number in range(8)]
    for answer in answers:
        ended = answer.finish_reason == "stop"
        assert ended == (answer.token_ids[-1] in (7, 19)) and ended | (len(answer.token_ids) == 15)
        assert max(answer.token_ids) < 30
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_the_client_reports_tokens_as_they_arrive(server):
    arrived = []
    answer = ServerClient(server.address).generate(request(stop_ids=()), arrived.append)
    assert arrived == [16, 16, 8] and len(answer.token_ids) == 40


def test_answers_do_not_depend_on_the_number_of_servers(server, other, expected):
    requests = [request(number) for number in range(12)]
    assert pool(server, other).start(requests, check).result() == expected
    server.most_running = 0
    assert pool(server, max_running=2).start(requests, check).result() == expected
    assert server.most_running == 2
    assert len({answer.token_ids for answer in expected}) == 12


def test_servers_share_the_load_by_tokens_in_flight(server, other):
    server.faults = other.faults = {"slow"}
    requests = [request(number, stop_ids=(), max_new_tokens=10 if number else 60) for number in range(9)]
    pool(server, other, max_running=9).start(requests, check).result()
    lengths = [[body["sampling_params"]["max_tokens"] for body in one.requests] for one in (server, other)]
    few, many = sorted(lengths, key=len)
    assert max(few) == 60 and len(few) <= 4 and set(many) == {10}


ONCE = {
    "crash": "IncompleteRead|Connection reset|closed the connection",
    "out of memory": "generation failed: CUDA out of memory",
    "dead engine": "status 500: EngineCore encountered an issue",
    "nonsense": "the answer is not that of a vLLM server: <html>Bad Gateway</html>",
    "wrong id": "token ids that must not be sampled, up to 131",
    "too short": "an answer ended at 1 of 40 tokens",
    "too long": "an answer has 41 tokens; 40 were requested",
    "abort": "finish reason 'abort'",
    "mixed version": r"has the weight versions \[.*'run:1\+.*\]; only run:1 is current",
    "no logprobs": "the answer is not that of a vLLM server",
    "hang": r"no new token for [\d.]+ s with \d requests running \(rollout.server.stall_seconds=0.4\)",
}


@pytest.mark.parametrize("fault", ONCE)
def test_a_failure_is_one_line_and_its_requests_are_asked_again(fault, server, expected, capfd):
    """The server is started again and has the weights of the last update: the answers are those without a failure."""
    requests = [request(number, stop_ids=() if fault == "too long" else (7, 19)) for number in range(12)]
    reasons = []

    def restart(client, problem):
        reasons.append(problem)
        server.faults.clear()
        while server.running:  # a killed server has no requests left
            time.sleep(0.01)
        server.weight_version = "run:1"

    servers = pool(server, restart=restart)
    server.faults.add(fault)
    answers = servers.start(requests, check).result()
    if fault != "too long":
        assert answers == expected
    (reason,) = reasons
    assert reason.startswith(server.address) and "\n" not in reason
    assert re.search(ONCE[fault], reason)
    assert capfd.readouterr().err.startswith(f"warning: rollout server {server.address}: ")


@pytest.mark.parametrize("fault", ["crash", "hang", "mixed version"])
def test_another_server_answers_the_requests_of_a_failed_one(fault, server, other, expected):
    servers = pool(server, other)
    server.faults.add(fault)
    assert servers.start([request(number) for number in range(12)], check).result() == expected
    assert list(servers.lost) == [server.address]
    server.faults.clear()
    assert servers.start([request(number) for number in range(12)], check).result() == expected
    before = len(server.requests)
    update(ServerClient(server.address))
    servers.readmit()
    assert servers.start([request(number) for number in range(12)], check).result() == expected
    assert len(server.requests) > before, "after new weights the server is used again"


def test_the_last_failed_server_ends_generation_with_one_line(server, other):
    servers = pool(server, other)
    server.faults.add("crash")
    other.faults.add("out of memory")
    with pytest.raises(ServerError, match=r"no rollout server is left: .*; .*") as caught:
        servers.start([request(number) for number in range(6)], check).result()
    assert server.address in str(caught.value) and "CUDA out of memory" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ServerError, match="no rollout server is left"):
        servers.start([request()], check).result()


def test_a_server_that_fails_again_after_each_restart_is_given_up(server):
    restarts = []
    servers = pool(server, restart=lambda client, problem: restarts.append(problem))
    server.faults.add("out of memory")
    with pytest.raises(ServerError, match="no rollout server is left"):
        servers.start([request(number) for number in range(3)], check).result()
    assert len(restarts) == 2


def test_a_server_that_does_not_come_back_is_named(server):
    def restart(client, problem):
        raise ServerError("port 8000 is taken")

    servers = pool(server, restart=restart)
    server.faults.add("crash")
    with pytest.raises(ServerError, match="did not come back: port 8000 is taken"):
        servers.start([request()], check).result()


def test_a_slow_server_with_progress_has_not_stalled(server):
    servers = pool(server, stall_seconds=0.5)
    server.faults.add("slow")
    begin = time.monotonic()
    answer = servers.start([request(stop_ids=(), max_new_tokens=40)], check).result()[0]
    assert len(answer.token_ids) == 40 and time.monotonic() - begin > 0.8


def test_a_refused_request_ends_generation_at_once(server):
    servers = pool(server, restart=lambda client, problem: pytest.fail("the server is sound"))
    with pytest.raises(RequestRefused, match=r"generation failed: token_id\(s\) \[131\] in stop_token_ids"):
        servers.start([request(stop_ids=(131,))], check).result()


def test_a_killed_server_is_named_and_another_answers(tmp_path, other, expected):
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "tests.helpers.fake_vllm", "--fault", "slow", "--ready", str(ready)]
    with subprocess.Popen(command) as process:
        try:
            while not ready.exists() or not ready.read_text():
                time.sleep(0.02)
            killed = ServerClient(ready.read_text())
            servers = pool(killed, other)
            pending = servers.start([request(number) for number in range(12)], check)
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGKILL)
            assert pending.result() == expected
            assert "closed the connection" in servers.lost[killed.address] or "reset" in servers.lost[killed.address]
            with pytest.raises(ServerError, match="Connection refused"):
                killed.health()
        finally:
            process.kill()


def test_a_server_whose_engine_dies_during_an_update_is_noticed_although_it_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(server_client, "HEALTH_SECONDS", 0.05)
    server.running = 1  # the stand-in waits for this request, as vLLM waits for its engine
    threading.Timer(0.2, server.faults.add, ["dead engine"]).start()
    try:
        with pytest.raises(ServerError, match=f"^{server.address}: GET /health: status 503"):
            ServerClient(server.address).pause()
    finally:
        server.running = 0


def test_an_address_that_serves_something_else_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def answer():
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ServerError, match=f"^{address}: the answer is not that of a vLLM server: hello$"):
            ServerClient(address).version()


def test_seeds_differ_between_runs_steps_prompts_and_samples():
    seeds = {request_seed(*(int(place == changed) for place in range(4))) for changed in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(3, 1, 4, 1) == request_seed(3, 1, 4, 1)


def test_the_stand_in_samples_in_proportion_to_the_probabilities():
    model = HashModel(5)
    with FakeServer(model) as server:
        client = ServerClient(server.address)
        one = {"stop_ids": (), "max_new_tokens": 1}
        counts = [0] * 5
        for number in range(100):
            counts[client.generate(request(0, prompt_ids=(1,), seed=number, **one)).token_ids[0]] += 1
        answers = {client.generate(request(0, prompt_ids=(1,), seed=n, **one)).token_ids[0]: None for n in range(9)}
        assert len(answers) > 1
        largest = max(range(5), key=model.logits((1,)).__getitem__)
        assert counts[largest] == max(counts)
