"""CUDA graphs of functions that run again and again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs functions, and captures each in a CUDA graph at its second call.

    A captured function must read and write tensors that keep their address, start the same kernels at every call, and
    read nothing back to the host. The first call of a key runs the function itself, which also prepares what cannot
    be prepared during a capture (communicators, workspaces). Memory: the graphs share one pool for the tensors inside
    the functions.

    Args:
        enabled: False runs the functions themselves at every call, as on a CPU.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: called once
        self.pool = torch.cuda.graph_pool_handle() if enabled else None

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run `function`, or the graph captured from the function of the same `key`."""
        if not self.enabled:
            function()
        elif key not in self.graphs:
            function()
            self.graphs[key] = None
        else:
            graph = self.graphs[key]
            if graph is None:
                graph = self.graphs[key] = self._capture(function)
            graph.replay()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads (heartbeats, the watchdog of NCCL) may call CUDA during the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph
