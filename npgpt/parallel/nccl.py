"""Sums over ranks that have a GPU each, with NVIDIA's NCCL. CuPy's module is given, so nothing of it is imported here.

The sums are in NCCL's order. It is the same in every run with the same number of ranks on the same machines.
"""

from __future__ import annotations

from typing import Any

from npgpt.kernels.reference import Array

TYPES = {"float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64", "bfloat16": "NCCL_BFLOAT16"}


class NcclSum:
    """`add_up(array)`: the array becomes the sum of those of all ranks, on the current stream."""

    def __init__(self, cupy: Any, unique_id: Any, size: int, rank: int) -> None:
        """unique_id: of `unique_id` on the first rank."""
        self._cupy, self._nccl = cupy, cupy.cuda.nccl
        self._communicator = self._nccl.NcclCommunicator(size, unique_id, rank)

    @staticmethod
    def unique_id(cupy: Any) -> Any:
        """What the first rank makes and all ranks need."""
        return cupy.cuda.nccl.get_unique_id()

    def add_up(self, array: Array) -> None:
        """array: contiguous, of a dtype in TYPES. Returns before the GPU has done it."""
        kind = getattr(self._nccl, TYPES[array.dtype.name])
        stream = self._cupy.cuda.get_current_stream().ptr
        self._communicator.allReduce(array.data.ptr, array.data.ptr, array.size, kind, self._nccl.NCCL_SUM, stream)
