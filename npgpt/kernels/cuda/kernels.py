"""The operations that have a CUDA kernel of their own: which kernel is launched, with which arrays.

The kernels are in the `.cu` files beside this file, one family a file. They compute what reference.py and updates.py define.
This file prepares their arguments: memory layout, dtypes, sizes, arrays for results. An operation without a kernel, or with a
dtype that is not in ELEMENTS, falls back to the reference, which runs on CuPy arrays.

Activations may be bfloat16. Parameters, gradients of parameters, losses and sums are then float32. Linear layers round their
weights and biases to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt, prod
from typing import Any

import numpy as np

from npgpt.kernels.cuda.attention import AttentionKernels
from npgpt.kernels.cuda.base import (
    THREADS,
    WARP,
    CudaSaved,
    address,
    are_activations,
    are_parameters,
    fit_activations,
    has_rows,
    parameter_dtype,
    row_stride,
    rows_and_columns,
)
from npgpt.kernels.cuda.launch import Launch
from npgpt.kernels.cuda.products import Gemm, product_with_bias
from npgpt.kernels.cuda.random import NO_DROPOUT, dropout_arguments
from npgpt.kernels.reference import Array, Onto, Saved, added
from npgpt.kernels.updates import AdamWStep

MAX_SUM_BLOCKS = 256  # blocks of the norm of a gradient, and of layer norm's backward pass; each writes partial sums
MOST_COLUMNS_OF_NORM = 512  # with more, layer norm has other kernels
MIN_NORM_CHUNK = 8  # the fewest rows of a block of layer norm's backward pass
MAX_NORM_ROWS = 4096  # rows that layer norm works on at the same time; a warp goes on with other rows
MIN_CHUNK = 64  # the fewest rows that one thread adds up, one after the other
MAX_CHUNKS = 65_535  # the largest second dimension of a CUDA grid
BLOCK_COLUMNS = 256  # columns that a block adds up, as in sums.cu
MOST_BLOCKS = 65_536  # of columns
MOST_UNPADDED = 1024  # columns of a product without a bias; with more, zeros are added so that tensor cores are fast
MAX_PARTIAL = 1 << 24  # elements of the partial sums of an embedding's gradient
MOST_IN_CHUNKS = 1024  # rows of an embedding table whose gradient is added up in chunks


class CudaKernels(AttentionKernels):
    """The reference kernels, with overrides that launch CUDA kernels on CuPy arrays."""

    def __init__(self, xp: Any, launch: Launch, gemm: Gemm) -> None:
        super().__init__(xp, launch, gemm)
        self._arrived = xp.zeros(MOST_BLOCKS, dtype=np.uint32)  # counts the blocks of a sum, which sets it to 0 again
        self._copies: dict[int, tuple[Array, Array]] = {}  # {address of a weight: (the weight, its rounded copy)}

    # ---------------------------------------------------------------- rounded weights

    @contextmanager
    def weights_rounded_ahead(self, flat: Array, weights: list[Array], dtype: np.dtype) -> Iterator[None]:
        """Inside `with`, linear layers take the weights from one copy in `dtype`, which one launch makes now.

        flat: an array whose parts, one after the other, are the weights. They must not change inside.
        """
        copy, start = flat.astype(dtype), 0
        for weight in weights:
            self._copies[address(weight)] = weight, copy[start : start + weight.size].reshape(weight.shape)
            start += weight.size
        try:
            yield
        finally:
            self._copies.clear()

    def _rounded(self, weight: Array, dtype: np.dtype) -> Array:
        """The weight, or its transpose, in a dtype."""
        if weight.dtype != dtype and self._copies:
            original, copy = self._copies.get(address(weight), (weight, weight))
            if copy.dtype == dtype and (weight.shape, weight.strides) == (original.shape, original.strides):
                return copy
            if copy.dtype == dtype and (weight.shape, weight.strides) == (original.T.shape, original.T.strides):
                return copy.T
        return weight.astype(dtype, copy=False)

    # ---------------------------------------------------------------- linear

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        if not (are_activations(x) and fit_activations(x, weight, bias)):
            return super().linear_forward(x, weight, bias)
        rows, rounded = x.reshape(prod(x.shape[:-1]), x.shape[-1]), self._rounded(weight, x.dtype)
        y, columns = None, weight.shape[1]
        if bias is not None:
            bias = self.xp.ascontiguousarray(bias)
            y = product_with_bias(self.xp, self.gemm, rows, rounded, self._rounded(bias, x.dtype))
        elif columns > MOST_UNPADDED and columns % _unit(x.dtype):
            rounded = self._padded(rounded)
        if y is None:
            y = self._product(rows, rounded)
            if bias is not None and y.size:
                self._for_groups("add_bias", y.dtype, y.shape, (y, bias, *y.shape))
        return y[:, :columns].reshape(*x.shape[:-1], columns), CudaSaved((rows, rounded, x.shape, columns))

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True), onto: Onto = (None, None)
    ) -> tuple[Array | None, Array | None, Array | None]:
        if not isinstance(saved, CudaSaved):
            return super().linear_backward(dy, saved, needs, onto)
        rows, weight, x_shape, columns = saved
        dy, dtype = dy.reshape(len(rows), columns), parameter_dtype(rows)
        dbias = self._column_sums(dy, onto[1]) if needs[2] else None
        if weight.shape[1] > columns:
            dy = self._padded(dy)
            dweight = added(self._product(rows.T, dy, dtype)[:, :columns], onto[0]) if needs[1] else None
        else:
            dweight = self._product(rows.T, dy, dtype, onto[0]) if needs[1] else None
        dx = self._product(dy, weight.T).reshape(x_shape) if needs[0] else None
        return dx, dweight, dbias

    def _padded(self, x: Array) -> Array:
        """x (n, c) with zeros on the right, up to a multiple of 16 bytes in each row. If x is transposed, so is the result."""
        n, c = x.shape
        width = c + -c % _unit(x.dtype)
        is_transposed = x.strides[0] < x.strides[1]
        y = self.xp.zeros((width, n), dtype=x.dtype).T if is_transposed else self.xp.zeros((n, width), dtype=x.dtype)
        y[:, :c] = x
        return y

    def _column_sums(self, x: Array, onto: Array | None) -> Array:
        """x (n, c) -> (c,), in the dtype of parameters."""
        x, (n, c) = self.xp.ascontiguousarray(x), x.shape
        if c > MOST_BLOCKS * BLOCK_COLUMNS:
            return added(x.sum(axis=0, dtype=parameter_dtype(x)), onto)
        y = self.xp.empty(c, dtype=parameter_dtype(x)) if onto is None else onto
        if x.size:
            chunk = max(MIN_CHUNK, isqrt(n))
            partial, grid = self.xp.empty((-(-n // chunk), c), dtype=y.dtype), (-(-c // BLOCK_COLUMNS), -(-n // chunk))
            arguments = (x, y, partial, self._arrived, n, c, chunk, int(onto is not None))
            self._launch("column_sums", x.dtype.name, grid, THREADS, arguments)
        elif onto is None:
            y[...] = 0
        return y

    def _sum_of_rows(self, x: Array, *onto: Array | None) -> tuple[Array, ...]:
        """The sum over the rows of x (n, ...), or with two arrays `onto` the sums over those of x[:, 0] and x[:, 1].

        They are added to the arrays of `onto`; where it has None, the sum is a new array.
        """
        shape = x.shape[len(onto) :]
        results = tuple(self.xp.empty(shape, dtype=x.dtype) if total is None else total for total in onto)
        y, z = (*results, None)[:2]
        adds = [int(total is not None) for total in (*onto, None)[:2]]
        blocks = -(-len(onto) * prod(shape) // WARP)
        self._launch("sum_of_rows", x.dtype.name, (blocks, 1), THREADS, (x, y, z, len(x), prod(shape), *adds))
        return results

    # ---------------------------------------------------------------- dropout

    def dropout_draws(self, shape: tuple[int, ...], p: float, rng: Any) -> tuple[Array, int]:
        draws = self.xp.empty(shape, dtype=np.uint16)
        if draws.size:
            self._for_groups("draw", np.dtype(np.float32), shape, (draws, *rows_and_columns(shape), *rng.use()))
        return draws, round(p * 65536)

    def dropout_forward(self, x: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not are_activations(x):
            return super().dropout_forward(x, p, rng)
        drawn = CudaSaved(dropout_arguments(p, rng))
        return self._dropout(x, drawn), drawn

    def dropout_backward(self, dy: Array, saved: Saved) -> Array:
        return self._dropout(dy, saved) if isinstance(saved, CudaSaved) else super().dropout_backward(dy, saved)

    def residual_forward(self, x: Array, branch: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not are_activations(x, branch):
            return super().residual_forward(x, branch, p, rng)
        drawn = CudaSaved(dropout_arguments(p, rng))
        return self._dropout(branch, drawn, onto=x), drawn

    def _dropout(self, x: Array, drawn: tuple[Any, ...], onto: Array | None = None) -> Array:
        y = self.xp.empty(x.shape, dtype=x.dtype)
        x, onto = self.xp.ascontiguousarray(x), None if onto is None else self.xp.ascontiguousarray(onto)
        if x.size:
            self._for_groups("dropout", x.dtype, y.shape, (x, onto, y, *rows_and_columns(y.shape), *drawn))
        return y

    # ---------------------------------------------------------------- sums of gradients

    def add(self, a: Array, b: Array) -> Array:
        if not (are_activations(a, b) and a.shape == b.shape and a.ndim):
            return super().add(a, b)
        return self._dropout(b, NO_DROPOUT, onto=a)

    def add_into(self, total: Array, index: Any, values: Array) -> None:
        view = total[index]
        if not (are_activations(view, values) and view.shape == values.shape and has_rows(view) and has_rows(values)):
            super().add_into(total, index, values)
        elif view.size:
            self._copy(values, view, add=True)

    # ---------------------------------------------------------------- layer norm

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        if not (are_activations(x) and fit_activations(x, weight, bias) and x.size):
            return super().layer_norm_forward(x, weight, bias, eps)
        x, weight = self.xp.ascontiguousarray(x), self.xp.ascontiguousarray(weight)
        bias = None if bias is None else self.xp.ascontiguousarray(bias)
        n, c = rows_and_columns(x.shape)
        y, mean, rstd = self.xp.empty_like(x), *(self.xp.empty(n, dtype=weight.dtype) for _ in range(2))
        arguments = (x, weight, bias, y, mean, rstd, n, c, float(eps))
        self._for_rows(f"layer_norm_forward{_wide(c)}", x.dtype, min(n, MAX_NORM_ROWS), arguments)
        return y, CudaSaved((x, weight, mean, rstd))

    def layer_norm_backward(self, dy: Array, saved: Saved, onto: Onto = (None, None)) -> tuple[Array, Array, Array]:
        if not isinstance(saved, CudaSaved):
            return super().layer_norm_backward(dy, saved, onto)
        x, weight, mean, rstd = saved
        dy, dx = self.xp.ascontiguousarray(dy), self.xp.empty_like(x)
        n, c = rows_and_columns(x.shape)
        chunk = max(MIN_NORM_CHUNK, -(-n // MAX_SUM_BLOCKS))
        partial = self.xp.empty((-(-n // chunk), 2, c), dtype=weight.dtype)
        arguments = (dy, x, weight, mean, rstd, dx, partial, n, c, chunk)
        self._launch(f"layer_norm_backward{_wide(c)}", x.dtype.name, (len(partial), 1), THREADS, arguments)
        dweight, dbias = self._sum_of_rows(partial, *onto)
        return dx, dweight, dbias

    # ---------------------------------------------------------------- GELU

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        if not (are_activations(x) and x.size):
            return super().gelu_forward(x)
        y, x = self.xp.empty(x.shape, dtype=x.dtype), self.xp.ascontiguousarray(x)
        self._for_groups("gelu_forward", x.dtype, (x.size,), (x, y, x.size))
        return y, CudaSaved((x,))

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, CudaSaved):
            return super().gelu_backward(dy, saved)
        (x,) = saved
        dx = self.xp.empty(dy.shape, dtype=x.dtype)
        self._for_groups("gelu_backward", x.dtype, (x.size,), (self.xp.ascontiguousarray(dy), x, dx, x.size))
        return dx

    # ---------------------------------------------------------------- rotary positions

    def rotary_forward(self, x: Array, rotation: Array) -> tuple[Array, Saved]:
        along = [axis for axis in range(1, rotation.ndim) if rotation.shape[-1 - axis] > 1]  # axes from the right
        if not (are_activations(x) and fit_activations(x, rotation) and x.size and len(along) <= 1):
            return super().rotary_forward(x, rotation)
        axis = along[0] if along else 1
        inner = prod(x.shape[x.ndim - axis : -1])  # rows of x from one position to the next
        saved = CudaSaved((self.xp.ascontiguousarray(rotation), inner, rotation.size // rotation.shape[-1]))
        return self._rotary(x, saved, 1.0), saved

    def rotary_backward(self, dy: Array, saved: Saved) -> Array:
        return self._rotary(dy, saved, -1.0) if isinstance(saved, CudaSaved) else super().rotary_backward(dy, saved)

    def _rotary(self, x: Array, saved: tuple[Any, ...], direction: float) -> Array:
        rotation, inner, positions = saved
        y, x = self.xp.empty(x.shape, dtype=x.dtype), self.xp.ascontiguousarray(x)
        n, half = prod(x.shape[:-1]), x.shape[-1] // 2
        self._for_elements("rotary", x.dtype, n * half, (x, rotation, y, n, half, inner, positions, direction))
        return y

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved, onto: Array | None = None) -> Array:
        """Add up the rows of each chunk into a table of its own, then add up the tables. In a large table, go from id to id.

        This needs no atomic additions, so the sum has the same bits every time.
        """
        (v, c), ids = saved
        n = ids.size
        if not (are_activations(dy) and n and c):
            return super().embedding_backward(dy, saved, onto)
        dy, ids = self.xp.ascontiguousarray(dy), self.xp.ascontiguousarray(ids, dtype=np.int64)
        if v > MOST_IN_CHUNKS:
            table = self.xp.empty((v, c), dtype=parameter_dtype(dy)) if onto is None else onto
            self._for_rows("embedding_backward_by_id", dy.dtype, v, (dy, ids, table, n, c, v, int(onto is not None)))
            return table
        chunk = max(MIN_CHUNK, -(-n * v * c // MAX_PARTIAL), -(-n // MAX_CHUNKS))
        partial = self.xp.empty((-(-n // chunk), v, c), dtype=parameter_dtype(dy))
        self._for_columns("embedding_backward", dy.dtype, c, len(partial), (dy, ids, partial, n, c, v, chunk))
        return self._sum_of_rows(partial, onto)[0]

    # ---------------------------------------------------------------- cross-entropy

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Saved]:
        if not (are_activations(logits) and logits.size):
            return super().cross_entropy_forward(logits, targets)
        xp = self.xp
        losses, largest, log_total = (xp.empty(targets.shape, dtype=parameter_dtype(logits)) for _ in range(3))
        logits = logits if row_stride(logits) else xp.ascontiguousarray(logits)
        targets, (n, v) = xp.ascontiguousarray(targets, dtype=np.int64), rows_and_columns(logits.shape)
        arguments = (logits, targets, losses, largest, log_total, n, v, row_stride(logits))
        self._for_rows("cross_entropy_forward", logits.dtype, n, arguments)
        return losses, CudaSaved((logits, targets, largest, log_total))

    def cross_entropy_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, CudaSaved):
            return super().cross_entropy_backward(dy, saved)
        logits, targets, largest, log_total = saved
        n, v = rows_and_columns(logits.shape)
        dlogits = self.xp.empty(logits.shape, dtype=logits.dtype)
        arguments = (self.xp.ascontiguousarray(dy), logits, targets, largest, log_total, dlogits, n, v, row_stride(logits))
        self._for_rows("cross_entropy_backward", logits.dtype, n, arguments)
        return dlogits

    # ---------------------------------------------------------------- clipping, AdamW
    #
    # The GPU decides whether a step may change the weights. If the host decided, it would have to wait for the loss.

    def clip_factor(self, gradient: Array, loss: Array, max_norm: float, scale: Array) -> Array:
        if not (are_parameters(gradient, loss, scale) and gradient.size and gradient.flags.c_contiguous):
            return super().clip_factor(gradient, loss, max_norm, scale)
        dtype, blocks = gradient.dtype, min(MAX_SUM_BLOCKS, -(-gradient.size // THREADS))
        partial, seen = self.xp.empty(blocks * (THREADS // WARP), dtype=dtype), self.xp.empty(2, dtype=dtype)
        self._launch("sum_of_squares", dtype.name, (blocks, 1), THREADS, (gradient, partial, gradient.size))
        arguments = (partial, partial.size, loss, float(max_norm), scale, seen)
        self._launch("clip_factor", dtype.name, (1, 1), WARP, arguments)
        return seen

    def adamw(self, parameter: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, numbers: AdamWStep) -> None:
        arrays = (parameter, gradient, exp_avg, exp_avg_sq)
        if not (are_parameters(*arrays) and parameter.size and all(a.flags.c_contiguous for a in arrays)):
            super().adamw(*arrays, numbers)
            return
        step, lr, (beta1, beta2), eps, weight_decay, n_decay, scale = numbers
        rates = (lr, beta1, beta2, 1 - beta1**step, 1 - beta2**step, eps, weight_decay)
        sizes = (parameter.size, parameter.size if n_decay is None else n_decay)
        arguments = (*arrays, scale, *sizes, *map(float, rates))
        self._for_elements("adamw", parameter.dtype, parameter.size, arguments)


def _unit(dtype: np.dtype) -> int:
    """The number of elements in 16 bytes."""
    return 16 // dtype.itemsize


def _wide(columns: int) -> str:
    """The end of the name of layer norm's kernels."""
    return "_wide" if columns > MOST_COLUMNS_OF_NORM else ""
