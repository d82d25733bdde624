"""Matrices in memory as BLAS describes them: which arrays it can read where they are. No products are here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from npgpt.kernels.reference import Array


class Operand(NamedTuple):
    """Matrices in memory, as BLAS describes them: each is stored column after column."""

    array: Array
    transposed: bool  # whether the operand of the product is the transpose of what is stored
    leading: int  # elements from one column to the next
    stride: int  # elements from one matrix to the next


def operand(xp: Any, x: Array) -> Operand:
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
    stride = one_stride(lead, strides[:-2])
    by_row, by_column = strides[-2:]
    if stride is None:
        return None
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return Operand(x, False, by_row if rows > 1 else columns, stride)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return Operand(x, True, by_column if columns > 1 else rows, stride)
    return None


def one_stride(lead: list[int], strides: list[int]) -> int | None:
    """The distance from each part to the next, for parts that leading axes number; None if it is not the same for all."""
    axes = [(n, stride) for n, stride in zip(lead, strides, strict=True) if n > 1]
    if not axes:
        return 0
    for (_, outer), (n, inner) in pairwise(axes):
        if outer != n * inner:
            return None
    return axes[-1][1]
