"""CUDA graphs that share memory."""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

WARM_UP_RUNS = 2

T = TypeVar("T")


class GraphPool:
    """Captures work on the device. All graphs use one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        # One for all captures: cuBLAS keeps a workspace for each stream that it has seen. Torch's own stream for
        # captures belongs to the device that was the current one at the process's first capture.
        self._stream = torch.cuda.Stream()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture `work`, and return what replays it. The graph lives as long as that does.

        `work` reads its inputs from where they will lie when it is replayed. It is run a few times before, which
        compiles kernels: what it writes then has to be harmless. The result of a replay is overwritten by the next one
        of any graph. Raises what running out of memory raises; then no graph is kept, and the others are as they were.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    work()
        finally:
            # Also after running out of memory: what was launched by then writes all the same.
            torch.cuda.current_stream().wait_stream(stream)
        if not self._graphs:
            # A pool ends with the last graph in it: after a capture that failed, the one before may be gone.
            self._handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer context leads back to this stream: where ending a broken capture fails too, torch's own does not.
        outer = torch.cuda.stream(torch.cuda.current_stream())
        with outer, torch.cuda.graph(graph, pool=self._handle, stream=stream):
            result = work()
        self._graphs.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay
