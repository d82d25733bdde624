"""What attention.py and kernels.py share: arrays and sizes as the arguments of a launch, grids, products. No operations."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from npgpt.kernels.cuda.launch import ELEMENTS, Launch
from npgpt.kernels.cuda.operands import one_stride
from npgpt.kernels.cuda.products import Gemm, product
from npgpt.kernels.reference import Array, Kernels

THREADS = 256  # threads in a block, unless a kernel fixes them
WARP = 32  # threads in a warp
GROUP = 8  # elements that one thread reads at once; see Group in common.cu
MAX_BLOCKS = 4096  # blocks of an elementwise kernel; each thread loops over further elements


class CudaSaved(tuple[Any, ...]):
    """The saved values of a forward pass of CUDA kernels. Any other value was saved by the reference."""


class LaunchedKernels(Kernels):
    """The reference kernels, with what an override needs to launch a CUDA kernel."""

    def __init__(self, xp: Any, launch: Launch, gemm: Gemm) -> None:
        """launch: runs a kernel. gemm: multiplies matrices. Both are arguments so that tests can run them on a CPU."""
        super().__init__(xp)
        self._launch, self.gemm = launch, gemm

    def _product(self, a: Array, b: Array, dtype: Any = None, onto: Array | None = None) -> Array:
        return product(self.xp, self.gemm, a, b, dtype, onto)

    def _for_elements(self, name: str, dtype: np.dtype, n: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel with one thread for each of n elements, up to MAX_BLOCKS blocks."""
        self._launch(name, dtype.name, (min(MAX_BLOCKS, -(-n // THREADS)), 1), THREADS, arguments)

    def _for_groups(self, name: str, dtype: np.dtype, shape: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch a kernel with one thread for each group of GROUP neighbours along the last axis."""
        n, c = rows_and_columns(shape)
        self._for_elements(name, dtype, n * -(-c // GROUP), arguments)

    def _for_rows(self, name: str, dtype: np.dtype, n: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel with one warp for each of n rows."""
        self._launch(name, dtype.name, (-(-n // (THREADS // WARP)), 1), THREADS, arguments)

    def _for_columns(self, name: str, dtype: np.dtype, c: int, chunks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel with one thread for each of c columns and each chunk of rows."""
        self._launch(name, dtype.name, (-(-c // THREADS), chunks), THREADS, arguments)

    def _copy(self, x: Array, y: Array, add: bool = False) -> None:
        """y = x, or y += x, for views of four axes that `has_rows`."""
        strides = [stride // x.itemsize for array in (x, y) for stride in array.strides[:-1]]
        self._for_groups("copy", x.dtype, x.shape, (x, y, *x.shape, *strides, int(add)))

    def _contiguous(self, x: Array) -> Array:
        """x (B, H, T, head_dim), copied if it is a view."""
        if x.flags.c_contiguous or not has_rows(x):
            return self.xp.ascontiguousarray(x)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        self._copy(x, y)
        return y


def address(x: Array) -> int:
    """Where the first element of x is."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def are_activations(*arrays: Array) -> bool:
    """Whether the arrays share one dtype and the kernels support it."""
    return all(a.dtype.name in ELEMENTS and a.dtype == arrays[0].dtype for a in arrays)


def are_parameters(*arrays: Array) -> bool:
    """Whether the arrays share one dtype and the kernels support it for parameters."""
    return are_activations(*arrays) and arrays[0].dtype == parameter_dtype(arrays[0])


def fit_activations(x: Array, *parameters: Array | None) -> bool:
    """Whether the parameters have the dtype that goes with activations like x."""
    return all(p is None or p.dtype == parameter_dtype(x) for p in parameters)


def parameter_dtype(x: Array) -> np.dtype:
    return ELEMENTS[x.dtype.name][2]


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of an array that is seen as rows along its last axis."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def row_stride(x: Array) -> int:
    """The elements from one row of x (..., c) to the next; 0 if that is not one number, or if a row is not contiguous."""
    n, c = rows_and_columns(x.shape)
    if c > 1 and x.strides[-1] != x.itemsize:
        return 0
    stride = one_stride(list(x.shape[:-1]), [stride // x.itemsize for stride in x.strides[:-1]])
    return c if n < 2 else stride if stride and stride >= c else 0


def has_rows(x: Array) -> bool:
    """Whether x is a view of four axes whose last one is contiguous."""
    return x.ndim == 4 and x.strides[-1] == x.itemsize and min(x.strides) >= 0
