"""Matrix products on an NVIDIA GPU, in the terms of cuBLAS. No other arithmetic is here.

CuPy's own `@` copies transposed operands and has no batched products of bfloat16. `product` makes one call to cuBLAS for a
product of views. It reads the operands where they are whenever cuBLAS can. It can return float32 for bfloat16 operands,
and it can round float32 operands to TF32.
"""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any, Protocol

import numpy as np

from npgpt.kernels.cuda.cublas import check, loaded_library
from npgpt.kernels.cuda.operands import Operand, operand
from npgpt.kernels.cuda.products_with_bias import CublasLt
from npgpt.kernels.reference import Array

WORKSPACE = 32 << 20  # bytes; what cuBLAS recommends for Hopper GPUs


class Gemm(Protocol):
    """A way to multiply matrices. Tests use one that works on NumPy arrays."""

    tf32: bool  # whether float32 operands may be rounded to TF32

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int, add: bool) -> None:
        """out (m, n) = a (m, k) @ b (k, n), or out += that if `add`, for `count` matrices. sizes: (m, n, k)."""

    def with_bias(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], bias: Array) -> bool:
        """out = a @ b + bias (m,) for each column; False, and nothing is computed, if this cannot be one launch."""


class CublasGemm:
    """cublasGemmStridedBatchedEx, on CuPy's current stream.

    With `tf32`, products of float32 round their operands to the 10 bits of mantissa of TF32.

    The call goes to the library itself. CuPy's own function refuses to be recorded in a CUDA graph. The workspace belongs to
    this object, so cuBLAS chooses the same algorithm for a product in a graph as for the same product outside.
    """

    def __init__(self, cupy: Any) -> None:
        self.tf32 = False
        cublas, runtime = cupy.cuda.cublas, cupy.cuda.runtime
        version = runtime.runtimeGetVersion()
        self._library = _library(cublas, version)
        self._gemm, self._current_stream = self._library.cublasGemmStridedBatchedEx, cupy.cuda.get_current_stream
        self._handle, self._stream = cublas.create(), -1  # no stream yet
        self._workspace = cupy.empty(WORKSPACE, dtype=np.uint8)
        self._with_bias = CublasLt(cublas, version, self._workspace)
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
        computing = self._computing_of(name)
        first, second, result = self._place(a), self._place(b), self._place(out)
        transposed = int(a.transposed), int(b.transposed)
        self._use_current_stream()
        check(
            self._gemm(
                self._handle, *transposed, *sizes, one, *first, *second, beta, *result, count, computing, self._algorithm
            )
        )

    def with_bias(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], bias: Array) -> bool:
        name = out.array.dtype.name
        if name == "float64":
            return False
        kinds = self._kinds[name], self._computing_of(name)
        return self._with_bias((a, b, out), bias, sizes, kinds, self._current_stream().ptr)

    def _computing_of(self, name: str) -> int:
        """The type of the computation, for the name of a dtype."""
        return self._tf32 if self.tf32 and name == "float32" else self._computing[name]

    def _use_current_stream(self) -> None:
        stream = self._current_stream().ptr
        if stream != self._stream:
            check(self._library.cublasSetStream_v2(self._handle, stream))
            # After each change of the stream, because that change takes the workspace away.
            check(self._library.cublasSetWorkspace_v2(self._handle, self._workspace.data.ptr, WORKSPACE))
            self._stream = stream

    def _place(self, operand: Operand) -> tuple[int, int, int, int]:
        return operand.array.data.ptr, self._kinds[operand.array.dtype.name], operand.leading, operand.stride


def _library(cublas: Any, version: int) -> ctypes.CDLL:
    library = loaded_library(cublas, "cublas", version)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    sizes: list[Any] = [pointer, *[integer] * 5]  # handle, transposed, transposed, m, n, k
    matrix: list[Any] = [pointer, integer, integer, ctypes.c_longlong]  # address, type, leading dimension, stride
    last: list[Any] = [integer] * 3  # number of matrices, type of the computation, algorithm
    library.cublasGemmStridedBatchedEx.argtypes = [*sizes, pointer, *matrix, *matrix, pointer, *matrix, *last]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    return library


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
    first, second = operand(xp, b), operand(xp, a)
    result = Operand(out, False, columns, rows * columns)
    gemm(first, second, result, (columns, rows, inner), prod(lead), onto is not None)
    return out


def product_with_bias(xp: Any, gemm: Gemm, a: Array, b: Array, bias: Array) -> Array | None:
    """a (rows, inner) @ b (inner, columns) + bias (columns,), all of one dtype; None if this cannot be one launch."""
    (rows, inner), columns = a.shape, b.shape[-1]
    out = xp.empty((rows, columns), dtype=a.dtype)
    result = Operand(out, False, columns, out.size)
    is_possible = out.size > 0 and inner > 0
    return out if is_possible and gemm.with_bias(operand(xp, b), operand(xp, a), result, (columns, rows, inner), bias) else None
