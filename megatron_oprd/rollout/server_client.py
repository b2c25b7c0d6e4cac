"""An HTTP client of one vLLM server: generate from token ids, score tokens, and control weight updates.

The client uses the standard library: the version of httpx that transformers installs differs between releases.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from megatron_oprd.rollout.threads import in_thread
from megatron_oprd.types import ServiceFailed

GENERATE = "/inference/v1/generate"
SERVED_MODEL = "student"  # the name under which a managed server serves its model
# Tokens that the server collects before it sends them. One event for each token would cost the trainer too much time.
STREAM_INTERVAL = 16
CONNECT_SECONDS = 10.0
INFO_SECONDS = 60.0  # most seconds for questions that a server answers without computing
HEALTH_SECONDS = 2.0  # between two checks of a server that is working on weights
EXCLUDED = -1e9  # bias of a logit whose token is never sampled; JSON has no infinity


class ServerError(ServiceFailed):
    """A server failed, or its answer breaks the protocol. The message is one line that begins with the address."""


class RequestRefused(ServerError):
    """The server refused a request as wrong (HTTP 4xx). Sending the request again would change nothing."""


@dataclass(frozen=True)
class GenerateRequest:
    """A request for one answer."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    seed: int  # from 0 to 2^63 - 1
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    stop_ids: Sequence[int] = ()  # the answer ends with the first of these tokens, and contains it
    excluded_ids: Sequence[int] = ()  # tokens that are never sampled
    logprobs: bool = False  # return the log-probability of each sampled token

    def body(self, *, stream: bool) -> dict[str, Any]:
        """Return the JSON body of the request."""
        sampling: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,  # the stop ids above decide, not the configuration of the server's model
            "detokenize": False,
        }
        if self.excluded_ids:
            sampling["logit_bias"] = {str(token): EXCLUDED for token in self.excluded_ids}
        if self.logprobs:
            sampling["logprobs"] = 0  # of the sampled token alone
        if stream:
            sampling["stream_interval"] = STREAM_INTERVAL
        return {"token_ids": list(self.prompt_ids), "sampling_params": sampling, "stream": stream}


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of an answer, and the weight version that sampled them."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """The answer to a `GenerateRequest`, as the server sent it."""

    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": ended with a stop id; "length"; "abort"
    weight_versions: tuple[VersionSpan, ...]
    logprobs: tuple[float, ...] | None  # one for each token, if requested


class ServerClient:
    """Sends requests to one vLLM server.

    All methods raise `ServerError` if the server fails, and may run in several threads at once.

    Args:
        address: `host:port` or `http://host:port`.
        timeout_seconds: most seconds without a byte from the server in answer to a request.
    """

    def __init__(self, address: str, timeout_seconds: float = 600.0) -> None:
        self.address = address.removeprefix("http://").rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._streams: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Return the parts of the address."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)

    def health(self) -> None:
        """Raise ServerError unless the server and its engine processes run."""
        self._call("GET", "/health")

    def version(self) -> str:
        """Return the version of vLLM, like `0.32.0`."""
        return str(self._field(self._call("GET", "/version"), "version", str))

    def max_model_len(self) -> int:
        """Return the most tokens of a prompt and its answer."""
        models = self._field(self._call("GET", "/v1/models"), "data", list)
        if not models or not isinstance(models[0], dict):
            raise self._nonsense(models)
        return int(self._field(models[0], "max_model_len", int))

    def generate(
        self,
        request: GenerateRequest,
        on_tokens: Callable[[int], None] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """Return the answer to one request.

        Args:
            on_tokens: called with the number of new tokens whenever tokens arrive.
            timeout_seconds: most seconds between two arrivals; None: the client's. `abort` ends the wait earlier.
        """
        token_ids: list[int] = []
        logprobs: list[float] = []
        finish_reason, spans = None, None
        for event in self._events(request.body(stream=True), timeout_seconds or self.timeout_seconds):
            choice = self._choice(event)
            new_ids = choice.get("token_ids") or []
            if not isinstance(new_ids, list) or not all(type(token) is int for token in new_ids):
                raise self._nonsense(new_ids)
            token_ids += new_ids
            if request.logprobs and new_ids:
                logprobs += self._logprobs(choice, new_ids)
            if on_tokens is not None and new_ids:
                on_tokens(len(new_ids))
            finish_reason = choice.get("finish_reason") or finish_reason
            spans = choice.get("weight_versions") or spans
        if finish_reason is None:
            raise ServerError(f"{self.address}: the server closed the connection in the middle of an answer")
        found = tuple(logprobs) if request.logprobs else None
        return Answer(tuple(token_ids), str(finish_reason), self._spans(spans), found)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first, given the tokens before it.

        The server computes all tokens anew: the prefix cache is not used.
        """
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        reply = self._call("POST", GENERATE, {"token_ids": list(token_ids), "sampling_params": sampling})
        entries = self._field(reply, "prompt_logprobs", list)
        try:
            scores = [
                float(entry[str(token)]["logprob"]) for token, entry in zip(token_ids[1:], entries[1:], strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            raise self._nonsense(entries) from None
        return scores

    def pause(self) -> None:
        """Wait for the running requests to end, then hold back new requests until `resume`."""
        self._control("/pause", query={"mode": "wait"})

    def resume(self) -> None:
        """Start the requests that arrived since `pause`."""
        self._call("POST", "/resume")

    def is_paused(self) -> bool:
        """Return True between `pause` and `resume`, also if the process that called `pause` has ended."""
        return bool(self._field(self._call("GET", "/is_paused"), "is_paused", bool))

    def start_weight_update(self) -> None:
        """Prepare the server for new weights. Nothing may run: generating now would end the engine."""
        self._control("/start_weight_update")

    def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        """Let the workers connect to this process, in the form that the server's weight transfer engine expects."""
        self._control("/init_weight_transfer_engine", {"init_info": dict(info)})

    def update_weights(self, info: Mapping[str, Any]) -> None:
        """Pass one bucket of weights, in the form that the server's weight transfer engine expects."""
        self._control("/update_weights", {"update_info": dict(info)})

    def finish_weight_update(self, version: str) -> None:
        """Complete an update. Answers carry `version` from now on."""
        self._control("/finish_weight_update", {"weight_version": version})

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of all prompts. Raises ServerError if the server still uses some."""
        if not self._field(self._call("POST", "/reset_prefix_cache"), "success", bool):
            raise ServerError(f"{self.address}: the prefix cache could not be reset: requests are still running")

    def weight_info(self) -> str:
        """Return the version of the server's weights."""
        return str(self._field(self._call("GET", "/weight_info"), "weight_version", str))

    def collective_rpc(self, method: str, *arguments: str) -> list[Any]:
        """Call a method on every worker of the server and return the results."""
        reply = self._call("POST", "/collective_rpc", {"method": method, "args": list(arguments)})
        return list(self._field(reply, "results", list))

    def abort(self) -> None:
        """Close the connections of all running `generate` calls: they raise ServerError, and the server stops them."""
        with self._lock:
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def _control(
        self, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> None:
        """Send a request that all workers work on, and wait for its end.

        vLLM never answers such a request if its engine dies meanwhile. Its health tells that.
        """
        call = in_thread(self._call, "POST", path, body, query)
        while not wait([call], timeout=HEALTH_SECONDS).done:
            self.health()
        call.result()

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """Send one request and return the JSON of the reply, or None for an empty reply."""
        target = f"{path}?{urlencode(query)}" if query else path
        timeout = min(self.timeout_seconds, INFO_SECONDS) if method == "GET" else self.timeout_seconds
        with self._response(method, target, body, timeout) as response:
            text = response.read()
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise self._nonsense(text) from None

    def _events(self, body: Mapping[str, Any], timeout_seconds: float) -> Iterator[Any]:
        """Yield the JSON of each server-sent event of a generation."""
        with self._response("POST", GENERATE, body, timeout_seconds, streams=True) as response:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if not data or data.startswith(b":"):  # a blank line ends an event; a colon begins a comment
                    continue
                try:
                    event = json.loads(data)
                except ValueError:
                    raise self._nonsense(data) from None
                if isinstance(event, dict) and "error" in event:
                    # vLLM checks a request after it has sent status 200.
                    code = event["error"].get("code") if isinstance(event["error"], dict) else None
                    kind = RequestRefused if isinstance(code, int) and 400 <= code < 500 else ServerError
                    raise kind(f"{self.address}: generation failed: {_message(event)}")
                yield event

    @contextlib.contextmanager
    def _response(
        self, method: str, target: str, body: Mapping[str, Any] | None, timeout: float, *, streams: bool = False
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request on a connection of its own and yield the response, unless its status is an error."""
        connection = http.client.HTTPConnection(self.address, timeout=min(timeout, CONNECT_SECONDS))
        stream = None
        try:
            connection.connect()
            stream = connection.sock
            stream.settimeout(timeout)
            if streams:
                with self._lock:
                    self._streams.add(stream)
            text = None if body is None else json.dumps(body).encode()
            connection.request(method, target, text, {"Content-Type": "application/json"} if text else {})
            response = connection.getresponse()
            if response.status >= 400:
                kind = RequestRefused if response.status < 500 else ServerError
                problem = _message(response.read())
                raise kind(f"{self.address}: {method} {target}: status {response.status}: {problem}")
            yield response
        except TimeoutError:
            raise ServerError(f"{self.address}: {method} {target}: no answer for {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            raise ServerError(f"{self.address}: {method} {target}: {problem}") from None
        finally:
            with self._lock:
                self._streams.discard(stream)
            connection.close()

    def _choice(self, event: Any) -> dict[str, Any]:
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._nonsense(event)
        return choices[0]

    def _logprobs(self, choice: dict[str, Any], token_ids: list[int]) -> list[float]:
        try:
            content = choice["logprobs"]["content"]
            if [entry["token_id"] for entry in content] == token_ids:
                return [float(entry["logprob"]) for entry in content]
        except (KeyError, TypeError, ValueError):
            pass
        raise self._nonsense(choice)

    def _spans(self, spans: Any) -> tuple[VersionSpan, ...]:
        try:
            return tuple(VersionSpan(str(one["version"]), int(one["start"]), int(one["end"])) for one in spans or ())
        except (KeyError, TypeError, ValueError):
            raise self._nonsense(spans) from None

    def _field(self, reply: Any, name: str, kind: type) -> Any:
        value = reply.get(name) if isinstance(reply, dict) else None
        if not isinstance(value, kind):
            raise self._nonsense(reply)
        return value

    def _nonsense(self, content: Any) -> ServerError:
        text = content.decode(errors="replace") if isinstance(content, bytes) else json.dumps(content, default=str)
        return ServerError(f"{self.address}: the answer is not that of a vLLM server: {_one_line(text)}")


def _message(content: Any) -> str:
    """Return the message in the body of an error, on one line."""
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        except ValueError:
            return _one_line(content.decode(errors="replace"))
    for _ in range(2):
        if isinstance(content, dict):
            content = next((content[key] for key in ("error", "message", "detail") if key in content), content)
    return _one_line(content if isinstance(content, str) else json.dumps(content))


def _one_line(text: str, longest: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest] + " ..."
