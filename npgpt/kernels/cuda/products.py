"""Matrix products on an NVIDIA GPU, in the terms of cuBLAS. No other arithmetic is here.

CuPy's own `@` copies transposed operands and has no batched products of bfloat16. `product` makes one call to cuBLAS for a
product of views. It reads the operands where they are whenever cuBLAS can. It can return float32 for bfloat16 operands,
and it can round float32 operands to TF32.
"""

from __future__ import annotations

import ctypes
import sys
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from npgpt.kernels.reference import Array

WORKSPACE = 32 << 20  # bytes; what cuBLAS recommends for Hopper GPUs


class Operand(NamedTuple):
    """Matrices in memory, as BLAS describes them: each is stored column after column."""

    array: Array
    transposed: bool  # whether the operand of the product is the transpose of what is stored
    leading: int  # elements from one column to the next
    stride: int  # elements from one matrix to the next


class Gemm(Protocol):
    """A way to multiply matrices. Tests use one that works on NumPy arrays."""

    tf32: bool  # whether float32 operands may be rounded to TF32

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int, add: bool) -> None:
        """out (m, n) = a (m, k) @ b (k, n), or out += that if `add`, for `count` matrices. sizes: (m, n, k)."""


class CublasGemm:
    """cublasGemmStridedBatchedEx, on CuPy's current stream.

    With `tf32`, products of float32 round their operands to the 10 bits of mantissa of TF32.

    The call goes to the library itself. CuPy's own function refuses to be recorded in a CUDA graph. The workspace belongs to
    this object, so cuBLAS chooses the same algorithm for a product in a graph as for the same product outside.
    """

    def __init__(self, cupy: Any) -> None:
        self.tf32 = False
        cublas, runtime = cupy.cuda.cublas, cupy.cuda.runtime
        self._library = _cublas(cublas, runtime.runtimeGetVersion())
        self._gemm, self._current_stream = self._library.cublasGemmStridedBatchedEx, cupy.cuda.get_current_stream
        self._handle, self._stream = cublas.create(), -1  # no stream yet
        self._workspace = cupy.empty(WORKSPACE, dtype=np.uint8)
        self._algorithm, self._tf32 = cublas.CUBLAS_GEMM_DEFAULT, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        self._kinds = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F, "bfloat16": runtime.CUDA_R_16BF}
        self._computing = dict.fromkeys(self._kinds, cublas.CUBLAS_COMPUTE_32F) | {"float64": cublas.CUBLAS_COMPUTE_64F}
        # cuBLAS reads the factors 0 and 1 from host memory, in the type it computes in.
        self._numbers = {name: np.array([0, 1], "float64" if name == "float64" else "float32") for name in self._kinds}
        self._zero_and_one = {name: (n.ctypes.data, n.ctypes.data + n.itemsize) for name, n in self._numbers.items()}

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int, add: bool) -> None:
        name = a.array.dtype.name
        zero, one = self._zero_and_one[name]
        beta = one if add else zero
        computing = self._tf32 if self.tf32 and name == "float32" else self._computing[name]
        first, second, result = self._place(a), self._place(b), self._place(out)
        transposed = int(a.transposed), int(b.transposed)
        self._use_current_stream()
        _check(
            self._gemm(
                self._handle, *transposed, *sizes, one, *first, *second, beta, *result, count, computing, self._algorithm
            )
        )

    def _use_current_stream(self) -> None:
        stream = self._current_stream().ptr
        if stream != self._stream:
            _check(self._library.cublasSetStream_v2(self._handle, stream))
            # After each change of the stream, because that change takes the workspace away.
            _check(self._library.cublasSetWorkspace_v2(self._handle, self._workspace.data.ptr, WORKSPACE))
            self._stream = stream

    def _place(self, operand: Operand) -> tuple[int, int, int, int]:
        return operand.array.data.ptr, self._kinds[operand.array.dtype.name], operand.leading, operand.stride


def _cublas(extension: Any, version: int) -> ctypes.CDLL:
    """The cuBLAS that CuPy has loaded. extension: CuPy's module for it. version: of CUDA, such as 13020."""
    # Elsewhere than on Windows, a search in a library also finds the functions of the libraries that it needs.
    library = ctypes.CDLL(f"cublas64_{version // 1000}.dll" if sys.platform == "win32" else extension.__file__)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    sizes: list[Any] = [pointer, *[integer] * 5]  # handle, transposed, transposed, m, n, k
    matrix: list[Any] = [pointer, integer, integer, ctypes.c_longlong]  # address, type, leading dimension, stride
    last: list[Any] = [integer] * 3  # number of matrices, type of the computation, algorithm
    library.cublasGemmStridedBatchedEx.argtypes = [*sizes, pointer, *matrix, *matrix, pointer, *matrix, *last]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    return library


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS answered with status {status}; https://docs.nvidia.com/cuda/cublas/ lists them")


def product(xp: Any, gemm: Gemm, a: Array, b: Array, dtype: Any = None, onto: Array | None = None) -> Array:
    """a (..., rows, inner) @ b (..., inner, columns) -> (..., rows, columns), or added to the contiguous array `onto`.

    a and b have one dtype and equal leading axes. `dtype` is that of the result, by default theirs.
    """
    *lead, rows, inner = a.shape
    columns = b.shape[-1]
    out = xp.empty((*lead, rows, columns), dtype=dtype or a.dtype) if onto is None else onto
    if out.size == 0 or inner == 0:
        if onto is None:
            out[...] = 0
        return out
    # Arrays here are stored row by row, and BLAS reads column by column: it sees their transposes. So this call computes
    # b^T @ a^T, which is (a @ b)^T.
    first, second = _operand(xp, b), _operand(xp, a)
    result = Operand(out, False, columns, rows * columns)
    gemm(first, second, result, (columns, rows, inner), prod(lead), onto is not None)
    return out


def _operand(xp: Any, x: Array) -> Operand:
    """The transposes of the matrices x (..., rows, columns). Copies x if BLAS cannot read it where it is."""
    found = _in_place_operand(x)
    if found is None:
        x = xp.ascontiguousarray(x)
        found = _in_place_operand(x)
        assert found is not None
    return found


def _in_place_operand(x: Array) -> Operand | None:
    """The matrices x as they lie in memory; None if BLAS cannot describe their layout."""
    *lead, rows, columns = x.shape
    strides = [stride // x.itemsize for stride in x.strides]
    if any(stride % x.itemsize for stride in x.strides) or min(strides) < 0:
        return None
    stride = _one_stride(lead, strides[:-2])
    by_row, by_column = strides[-2:]
    if stride is None:
        return None
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return Operand(x, False, by_row if rows > 1 else columns, stride)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return Operand(x, True, by_column if columns > 1 else rows, stride)
    return None


def _one_stride(lead: list[int], strides: list[int]) -> int | None:
    """The distance from each matrix to the next; None if it is not the same for all."""
    axes = [(n, stride) for n, stride in zip(lead, strides, strict=True) if n > 1]
    if not axes:
        return 0
    for (_, outer), (n, inner) in pairwise(axes):
        if outer != n * inner:
            return None
    return axes[-1][1]
