"""CUDA graphs: many launches, recorded once and then launched as one. What is recorded is decided elsewhere.

A launch costs the host some microseconds, and a training step makes hundreds of them. The GPU waits for the host if its kernels
are shorter than that. A graph costs the host one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Recording(Protocol):
    """What a function computed, ready to be computed again on the contents that the same arrays have then."""

    def __call__(self) -> Any:
        """Compute it. Returns what the function returned: the same arrays each time, with new contents."""


class CudaGraph:
    """A recording of what a function launches on the current GPU. Recording computes nothing.

    The function must have run before, so that kernels are compiled. It must not copy from the host or wait for the GPU; CuPy
    then raises an error. Raises cupy.cuda.memory.OutOfMemoryError if the memory for the recording is missing.
    """

    def __init__(self, cupy: Any, function: Callable[[], Any]) -> None:
        cupy.get_default_memory_pool().free_all_blocks()  # the recording needs as much as the last run of the function
        # The arrays inside the function get memory that nothing else uses, since each replay writes to the same addresses.
        self._memory = cupy.cuda.MemoryPool()
        stream = cupy.cuda.Stream(non_blocking=True)  # CUDA does not record the default stream
        with cupy.cuda.using_allocator(self._memory.malloc), stream:
            stream.begin_capture()
            try:
                self._result = function()
            finally:
                self._graph = stream.end_capture()

    def __call__(self) -> Any:
        self._graph.launch()  # on the current stream
        return self._result
