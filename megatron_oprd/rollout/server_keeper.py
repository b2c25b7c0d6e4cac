"""Keep a managed server running: rank 0 restarts it and loads the last weights, other ranks ask for that and wait."""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.server_process import START_SECONDS, ManagedServer
from megatron_oprd.rollout.server_supervisor import end_session
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import UserError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ServerState:
    """The state of the managed server, which rank 0 writes into a file of the run folder for all ranks."""

    session: int  # session of the processes, with the last weights loaded
    failure: str = ""  # why the server does not run and will not be started again

    @staticmethod
    def read(path: Path) -> ServerState:
        """Return the state that rank 0 wrote last."""
        return ServerState(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Replace the file."""
        write_json(path, asdict(self))


class ServerKeeper:
    """Starts the managed server on rank 0, and starts it again whenever it has ended.

    Args:
        state: file for what other ranks must know.
    """

    def __init__(self, server: ManagedServer, state: Path) -> None:
        self._server = server
        self._state = state
        self._lock = threading.Lock()
        self._stopping = False
        self._failed = False  # the server did not start again; only `restart` tries anew
        self._reload: Callable[[], None] | None = None

    def start(self) -> str:
        """Start the server and return its address. Raises UserError."""
        address = self._server.start()
        self._write()
        atexit.register(self.stop)
        return address

    def watch(self, reload: Callable[[], None]) -> None:
        """Start a thread that restarts the server when it has ended, and then calls `reload`."""
        self._reload = reload
        threading.Thread(target=self._watch, name="rollout server", daemon=True).start()

    def restart(self) -> None:
        """Restart the server without weights, for a transfer that follows. Raises UserError."""
        with self._lock:
            self._server.restart()
            self._failed = False
            self._write()

    def stop(self) -> None:
        """End the server for good."""
        self._stopping = True
        self._server.stop()

    def _watch(self) -> None:
        while not self._stopping:
            time.sleep(POLL_SECONDS)
            with self._lock:
                if not (self._server.is_alive() or self._stopping or self._failed):
                    self._revive()

    def _revive(self) -> None:
        """Restart the server with the last weights, or tell all ranks why that failed."""
        assert self._reload is not None
        try:
            self._server.restart()
            self._reload()
        except (UserError, ServerError) as error:
            self._failed = True
            ServerState(0, str(error)).write(self._state)
            print(f"warning: the rollout server does not start again: {error}", file=sys.stderr, flush=True)
        else:
            self._write()

    def _write(self) -> None:
        ServerState(self._server.session or 0).write(self._state)


class ServerRecovery:
    """Brings the managed server back after a failure, as one rank sees it.

    A rank that finds the server hanging or broken ends its processes. Rank 0 then starts it again.
    """

    def __init__(self, state: Path) -> None:
        self._path = state
        self._known = ServerState.read(state).session

    def __call__(self, client: ServerClient, problem: str) -> None:
        """Wait until the server runs again with the last weights. Raises ServerError if it does not.

        Returns at once if the server was restarted since this rank used it last.
        """
        state = ServerState.read(self._path)
        if state.session == self._known and not state.failure:
            end_session(state.session, grace_seconds=0.0)
        deadline = time.monotonic() + START_SECONDS
        while state.session == self._known and not state.failure and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            state = ServerState.read(self._path)
        if state.failure or state.session == self._known:
            raise ServerError(f"{client.address}: {state.failure or 'the server was not restarted'}")
        self._known = state.session
