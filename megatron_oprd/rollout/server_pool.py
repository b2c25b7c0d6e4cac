"""Spread requests over vLLM servers by tokens in flight, and ask again where a server fails."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from megatron_oprd.rollout.server_client import Answer, GenerateRequest, RequestRefused, ServerClient, ServerError

MOST_FAILURES = 3  # of one server in one step, with a restart after each
# Return what is wrong with an answer, or None.
CheckAnswer = Callable[[GenerateRequest, Answer], str | None]
# Bring a failed server back with the weights of the last transfer. The text says why it failed.
Recover = Callable[[ServerClient, str], None]


class ServerPool:
    """The servers of a run, as one model replica uses them.

    Args:
        max_running: most requests of this replica that run on one server at once.
        stall_seconds: a server that has requests of this replica and sends no token for this time has failed.
        recover: raises ServerError if the server does not come back. None: a server that fails is not used again
            before the next `readmit`.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        *,
        max_running: int,
        stall_seconds: float,
        recover: Recover | None = None,
    ) -> None:
        self.clients = tuple(clients)
        self.max_running = max_running
        self.stall_seconds = stall_seconds
        self.recover = recover
        self.lost: dict[str, str] = {}  # address -> why the server is not used

    def readmit(self) -> None:
        """Use all servers again: they have just received weights."""
        self.lost.clear()

    def start(self, requests: Sequence[GenerateRequest], check: CheckAnswer) -> PendingAnswers:
        """Send the requests from threads of their own, and return at once.

        An answer that `check` finds wrong counts as a failure of its server, and its request is sent again.
        """
        return PendingAnswers(self, requests, check)


class PendingAnswers:
    """The requests of one step and their answers, as they arrive."""

    def __init__(self, pool: ServerPool, requests: Sequence[GenerateRequest], check: CheckAnswer) -> None:
        self._pool = pool
        self._requests = requests
        self._check = check
        self._answers: list[Answer | None] = [None] * len(requests)
        self._waiting = deque(range(len(requests)))
        self._missing = len(requests)
        self._servers = [_Server(client) for client in pool.clients if client.address not in pool.lost]
        self._error: ServerError | None = None
        self._changed = threading.Condition()
        if requests and not self._servers:
            self._error = self._no_server()
        else:
            threads = min(len(requests), pool.max_running * len(self._servers))
            for target in [self._work] * threads + [self._watch] * bool(requests):
                threading.Thread(target=target, name="rollout", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most this long, and return True if all answers are there or generation has failed."""
        with self._changed:
            return self._changed.wait_for(self._ended, seconds)

    def result(self) -> list[Answer]:
        """Wait for all answers and return them in the order of the requests.

        Raises:
            ServerError: no server is left, or a server refuses a request.
        """
        with self._changed:
            self._changed.wait_for(self._ended)
            if self._error is not None:
                raise self._error
            return [answer for answer in self._answers if answer is not None]

    def _ended(self) -> bool:
        return self._error is not None or not self._missing

    def _work(self) -> None:
        """Send one request after the other, until all are answered."""
        while (taken := self._take()) is not None:
            number, server, generation = taken
            request = self._requests[number]
            answer = None
            try:
                # `_watch` ends the wait: a socket time-out would count the time that a request waits in the server.
                answer = server.client.generate(request, partial(self._arrived, server), timeout_seconds=10**6)
                problem = self._check(request, answer)
                if problem is not None:
                    problem = f"{server.client.address}: {problem}"
            except RequestRefused as error:
                self._end(error)
                return
            except ServerError as error:
                problem = str(error)
            except Exception as error:  # a thread that dies silently would leave the run waiting
                self._end(ServerError(f"{server.client.address}: {type(error).__name__}: {error}"))
                return
            if problem is None:
                self._finish(number, server, answer)
            elif self._fail(number, server, generation, problem):
                self._recover(server)

    def _take(self) -> tuple[int, _Server, int] | None:
        """Wait for a request and a server with room for it. Return None if nothing is left to do."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ended() or (self._waiting and self._usable()))
                if self._ended():
                    return None
                server = min(self._usable(), key=lambda one: one.tokens_in_flight)
                number = self._waiting.popleft()
                if not server.running:
                    server.last_token = time.monotonic()
                server.running += 1
                server.tokens_in_flight += _tokens(self._requests[number])
                return number, server, server.generation

    def _usable(self) -> list[_Server]:
        return [one for one in self._servers if one.problem is None and one.running < self._pool.max_running]

    def _arrived(self, server: _Server, tokens: int) -> None:
        server.last_token = time.monotonic()

    def _finish(self, number: int, server: _Server, answer: Answer | None) -> None:
        with self._changed:
            self._release(number, server)
            self._answers[number] = answer
            self._missing -= 1
            self._changed.notify_all()

    def _fail(self, number: int, server: _Server, generation: int, problem: str) -> bool:
        """Put a request back. Return True if the server has to be recovered, by the thread that calls this."""
        with self._changed:
            self._release(number, server)
            self._waiting.appendleft(number)
            first = server.generation == generation
            if first:  # the other requests of the server fail with it, and say nothing new
                server.generation += 1
                server.failures += 1
                server.problem = server.stalled or problem
            self._changed.notify_all()
            return first

    def _release(self, number: int, server: _Server) -> None:
        server.running -= 1
        server.tokens_in_flight -= _tokens(self._requests[number])

    def _recover(self, server: _Server) -> None:
        """Bring a failed server back, or go on without it."""
        assert server.problem is not None
        problem = server.problem
        server.client.abort()
        if self._pool.recover is not None and server.failures < MOST_FAILURES:
            _warn(f"{problem}; starting the server again")
            try:
                self._pool.recover(server.client, problem)
            except ServerError as error:
                problem = f"{problem}; the server did not come back: {error}"
            else:
                with self._changed:
                    server.problem = server.stalled = None
                    server.last_token = time.monotonic()
                    self._changed.notify_all()
                return
        with self._changed:
            self._pool.lost[server.client.address] = problem
            if all(one.client.address in self._pool.lost for one in self._servers):
                self._error = self._error or self._no_server()
            else:
                _warn(f"{problem}; its requests go to the other servers")
            self._changed.notify_all()

    def _no_server(self) -> ServerError:
        return ServerError("no rollout server is left: " + "; ".join(self._pool.lost.values()))

    def _end(self, error: ServerError) -> None:
        """Stop generating because of an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        for server in self._servers:
            server.client.abort()

    def _watch(self) -> None:
        """Close the connections of servers that send no tokens. Their requests then fail and are sent again."""
        limit = self._pool.stall_seconds
        while not self.wait(min(limit / 4, 5.0)):
            for server in self._servers:
                quiet = time.monotonic() - server.last_token
                if server.problem is not None:
                    server.client.abort()  # a request that was connecting when the server failed
                elif server.running and quiet > limit:
                    server.stalled = (
                        f"{server.client.address}: no new token for {quiet:.1f} s with {server.running} requests "
                        f"running (rollout.server.stall_seconds={limit:g})"
                    )
                    server.client.abort()


class _Server:
    """The state of one server during a step."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.running = 0  # requests
        self.tokens_in_flight = 0  # tokens of their prompts, and most tokens of their answers
        self.last_token = 0.0  # time of the last arrival
        self.failures = 0
        self.generation = 0  # counts failures; a request that started before a failure reports nothing new
        self.stalled: str | None = None  # why `_watch` closed the connections
        self.problem: str | None = None  # why the server is not used at the moment


def _tokens(request: GenerateRequest) -> int:
    return len(request.prompt_ids) + request.max_new_tokens


def _warn(message: str) -> None:
    print(f"warning: rollout server {message}", file=sys.stderr, flush=True)
