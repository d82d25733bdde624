"""Matrix products on an NVIDIA GPU: how operands lie in memory, in the terms of cuBLAS.

CuPy's own `@` copies transposed operands, and has no batched products of bfloat16. Here a product of views is one call, with
operands read where they are whenever the library can, float32 results of bfloat16 operands, and TF32 where it is wanted.
No other arithmetic is here.

`gemm` does the product. It is a parameter, so that the same calls can meet NumPy's arrays on a CPU.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from npgpt.kernels.reference import Array


class Operand(NamedTuple):
    """Matrices in memory, as BLAS sees them: column after column, `leading` elements from one to the next, `stride` from one
    matrix to the next. The operand of the product is that, or, if `transposed`, the transpose of that."""

    array: Array
    transposed: bool
    leading: int
    stride: int


class Gemm(Protocol):
    tf32: bool  # whether float32 operands may be rounded to TF32

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int) -> None:
        """out (m, n) = a (m, k) @ b (k, n), `count` times; sizes are m, n, k."""


class CublasGemm:
    """cublasGemmStridedBatchedEx, through CuPy, on its current stream. With `tf32`, products of float32 round their operands to
    TF32's 10 bits of mantissa."""

    def __init__(self, cupy: Any) -> None:
        self.tf32 = False
        cublas, runtime = cupy.cuda.cublas, cupy.cuda.runtime
        self._gemm, self._handle = cublas.gemmStridedBatchedEx, cupy.cuda.device.get_cublas_handle
        self._algorithm, self._tf32 = cublas.CUBLAS_GEMM_DEFAULT, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        self._kinds = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F, "bfloat16": runtime.CUDA_R_16BF}
        self._computing = dict.fromkeys(self._kinds, cublas.CUBLAS_COMPUTE_32F) | {"float64": cublas.CUBLAS_COMPUTE_64F}
        # Numbers are read from the host's memory, in the type that is computed in.
        self._numbers = {name: np.array([0, 1], "float64" if name == "float64" else "float32") for name in self._kinds}
        self._zero_and_one = {name: (n.ctypes.data, n.ctypes.data + n.itemsize) for name, n in self._numbers.items()}

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int) -> None:
        name = a.array.dtype.name
        zero, one = self._zero_and_one[name]
        computing = self._tf32 if self.tf32 and name == "float32" else self._computing[name]
        first, second, result = self._place(a), self._place(b), self._place(out)
        transposed = int(a.transposed), int(b.transposed)
        self._gemm(self._handle(), *transposed, *sizes, one, *first, *second, zero, *result, count, computing, self._algorithm)

    def _place(self, operand: Operand) -> tuple[int, int, int, int]:
        return operand.array.data.ptr, self._kinds[operand.array.dtype.name], operand.leading, operand.stride


def product(xp: Any, gemm: Gemm, a: Array, b: Array, dtype: Any = None) -> Array:
    """a (..., rows, inner) @ b (..., inner, columns), of one dtype and equal leading axes -> (..., rows, columns) of `dtype`,
    by default theirs."""
    *lead, rows, inner = a.shape
    columns = b.shape[-1]
    out = xp.empty((*lead, rows, columns), dtype=dtype or a.dtype)
    if out.size == 0 or inner == 0:
        out[...] = 0
        return out
    # Row by row, what BLAS reads column by column is the transpose; and (a @ b)^T is b^T @ a^T.
    first, second = _operand(xp, b), _operand(xp, a)
    gemm(first, second, Operand(out, False, columns, rows * columns), (columns, rows, inner), prod(lead))
    return out


def _operand(xp: Any, x: Array) -> Operand:
    """The transposes of the matrices x (..., rows, columns)."""
    found = _where_it_is(x)
    if found is None:
        x = xp.ascontiguousarray(x)
        found = _where_it_is(x)
        assert found is not None
    return found


def _where_it_is(x: Array) -> Operand | None:
    """x as it lies in memory; None when BLAS has no word for that."""
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
    """The distance from one matrix to the next, where it is the same throughout."""
    axes = [(n, stride) for n, stride in zip(lead, strides, strict=True) if n > 1]
    if not axes:
        return 0
    for (_, outer), (n, inner) in pairwise(axes):
        if outer != n * inner:
            return None
    return axes[-1][1]
