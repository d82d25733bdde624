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
    matrix to the next. `transposed`: as it lies there it is the transpose of what is meant."""

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
        self._cupy = cupy
        self.tf32 = False
        self._one_and_zero = {name: (np.ones(1, name), np.zeros(1, name)) for name in ("float32", "float64")}

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes: tuple[int, int, int], count: int) -> None:
        cublas, runtime = self._cupy.cuda.cublas, self._cupy.cuda.runtime
        kinds = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F, "bfloat16": runtime.CUDA_R_16BF}
        name = a.array.dtype.name
        if name == "float64":
            compute = cublas.CUBLAS_COMPUTE_64F
        elif name == "float32" and self.tf32:
            compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        else:
            compute = cublas.CUBLAS_COMPUTE_32F
        one, zero = self._one_and_zero["float64" if name == "float64" else "float32"]

        def place(operand: Operand) -> tuple[int, int, int, int]:
            return operand.array.data.ptr, kinds[operand.array.dtype.name], operand.leading, operand.stride

        cublas.gemmStridedBatchedEx(
            self._cupy.cuda.device.get_cublas_handle(),
            int(a.transposed),
            int(b.transposed),
            *sizes,
            one.ctypes.data,
            *place(a),
            *place(b),
            zero.ctypes.data,
            *place(out),
            count,
            compute,
            cublas.CUBLAS_GEMM_DEFAULT,
        )


def product(xp: Any, gemm: Gemm, a: Array, b: Array, dtype: Any = None) -> Array:
    """a (..., n, k) @ b (..., k, m), of one dtype and equal leading axes -> (..., n, m) of `dtype`, by default theirs."""
    *lead, n, k = a.shape
    m = b.shape[-1]
    out = xp.empty((*lead, n, m), dtype=dtype or a.dtype)
    if out.size == 0 or k == 0:
        out[...] = 0
        return out
    # Row by row, what BLAS reads column by column is the transpose; and (a @ b)^T is b^T @ a^T.
    first, second = _operand(xp, b), _operand(xp, a)
    gemm(first, second, Operand(out, False, m, n * m), (m, n, k), prod(lead))
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
