"""The operations that have a CUDA kernel of their own: which kernel is launched, with which arrays.

The kernels are in the `.cu` files beside this file, one family a file. They compute what reference.py and updates.py define.
This file prepares their arguments: memory layout, dtypes, sizes, arrays for results. An operation without a kernel, or with a
dtype that is not in ELEMENTS, falls back to the reference, which runs on CuPy arrays.

Activations may be bfloat16. Parameters, gradients of parameters, losses and sums are then float32. A weight is rounded to
bfloat16 where it is multiplied with an activation.
"""

from __future__ import annotations

from math import isqrt, prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.cuda.launch import ELEMENTS, Launch
from npgpt.kernels.cuda.products import Gemm, product
from npgpt.kernels.cuda.random import NO_DROPOUT, dropout_arguments
from npgpt.kernels.reference import Array, Kernels, Onto, Saved
from npgpt.kernels.updates import AdamWStep

THREADS = 256  # threads in a block
WARP = 32  # threads in a warp
GROUP = 8  # elements that one thread reads at once; see Group in common.cu
MAX_BLOCKS = 4096  # blocks of an elementwise kernel; each thread loops over further elements
MAX_SUM_BLOCKS = 256  # blocks of a sum; each warp writes one partial sum
MIN_CHUNK = 64  # the fewest rows that one thread adds up, one after the other
MAX_CHUNKS = 65_535  # the largest second dimension of a CUDA grid
MAX_PARTIAL = 1 << 24  # elements of the partial sums of an embedding's gradient
MOST_IN_CHUNKS = 1024  # rows of an embedding table whose gradient is added up in chunks


class CudaSaved(tuple[Any, ...]):
    """The saved values of a forward pass of this file. Any other value was saved by the reference."""


class CudaKernels(Kernels):
    """The reference kernels, with overrides that launch CUDA kernels on CuPy arrays."""

    def __init__(self, xp: Any, launch: Launch, gemm: Gemm) -> None:
        """launch: runs a kernel. gemm: multiplies matrices. Both are arguments so that tests can run them on a CPU."""
        super().__init__(xp)
        self._launch, self.gemm = launch, gemm

    def _product(self, a: Array, b: Array, dtype: Any = None, onto: Array | None = None) -> Array:
        return product(self.xp, self.gemm, a, b, dtype, onto)

    # ---------------------------------------------------------------- linear

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        if not (_are_activations(x) and _fit_activations(x, weight, bias)):
            return super().linear_forward(x, weight, bias)
        rows, rounded = x.reshape(prod(x.shape[:-1]), x.shape[-1]), weight.astype(x.dtype, copy=False)
        y = self._product(rows, rounded)
        if bias is not None and y.size:
            grid = _elementwise_grid(y.shape[0] * _groups(y.shape[1]))
            self._launch("add_bias", y.dtype.name, grid, THREADS, (y, self.xp.ascontiguousarray(bias), *y.shape))
        return y.reshape(*x.shape[:-1], weight.shape[-1]), CudaSaved((rows, rounded, x.shape))

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True), onto: Onto = (None, None)
    ) -> tuple[Array | None, Array | None, Array | None]:
        if not isinstance(saved, CudaSaved):
            return super().linear_backward(dy, saved, needs, onto)
        rows, weight, x_shape = saved
        dy = dy.reshape(len(rows), weight.shape[-1])
        dx = self._product(dy, weight.T).reshape(x_shape) if needs[0] else None
        dweight = self._product(rows.T, dy, _parameter_dtype(rows), onto[0]) if needs[1] else None
        return dx, dweight, self._column_sums(dy, onto[1]) if needs[2] else None

    def _column_sums(self, x: Array, onto: Array | None) -> Array:
        """x (n, c) -> (c,), in the dtype of parameters."""
        x, (n, c) = self.xp.ascontiguousarray(x), x.shape
        if not x.size:
            return self.xp.zeros(c, dtype=_parameter_dtype(x)) if onto is None else onto
        chunk, chunks = _chunks(n)
        partial = self.xp.empty((chunks, c), dtype=_parameter_dtype(x))
        self._launch("column_sums", x.dtype.name, (-(-c // THREADS), chunks), THREADS, (x, partial, n, c, chunk))
        return self._sum_of_rows(partial, onto)[0]

    # ---------------------------------------------------------------- dropout

    def dropout_draws(self, shape: tuple[int, ...], p: float, rng: Any) -> tuple[Array, int]:
        draws = self.xp.empty(shape, dtype=np.uint16)
        n, c = _rows_and_columns(shape)
        if draws.size:
            self._launch("draw", "float32", _elementwise_grid(n * _groups(c)), THREADS, (draws, n, c, *rng.use()))
        return draws, round(p * 65536)

    def dropout_forward(self, x: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _are_activations(x):
            return super().dropout_forward(x, p, rng)
        drawn = CudaSaved(dropout_arguments(p, rng))
        return self._dropout(x, drawn), drawn

    def dropout_backward(self, dy: Array, saved: Saved) -> Array:
        return self._dropout(dy, saved) if isinstance(saved, CudaSaved) else super().dropout_backward(dy, saved)

    def residual_forward(self, x: Array, branch: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _are_activations(x, branch):
            return super().residual_forward(x, branch, p, rng)
        drawn = CudaSaved(dropout_arguments(p, rng))
        return self._dropout(branch, drawn, onto=x), drawn

    def _dropout(self, x: Array, drawn: tuple[Any, ...], onto: Array | None = None) -> Array:
        y = self.xp.empty(x.shape, dtype=x.dtype)
        x, onto = self.xp.ascontiguousarray(x), None if onto is None else self.xp.ascontiguousarray(onto)
        n, c = _rows_and_columns(y.shape)
        if x.size:
            self._launch("dropout", x.dtype.name, _elementwise_grid(n * _groups(c)), THREADS, (x, onto, y, n, c, *drawn))
        return y

    # ---------------------------------------------------------------- causal attention
    #
    # The heads arrive as views into the output of the projection. They are copied once, because cuBLAS needs matrices with
    # one constant distance between them. The result is a view again, so that the next projection reads whole rows.

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        if not (_are_activations(q, k, v) and q.size):
            return super().causal_attention_forward(q, k, v, dropout, rng)
        q, k, v = map(self._contiguous, (q, k, v))
        p = self._product(q, k.swapaxes(-1, -2))  # the scores; the kernel replaces them by probabilities
        kept, drawn = None, NO_DROPOUT
        if dropout > 0 and rng is not None:
            kept, drawn = self.xp.empty_like(p), dropout_arguments(dropout, rng)
        sizes, scale = _attention_sizes(q, k), 1 / sqrt(q.shape[-1])
        self._launch("causal_softmax_forward", p.dtype.name, _row_grid(sizes[0]), THREADS, (p, p, kept, *sizes, scale, *drawn))
        kept = p if kept is None else kept
        y = self._contiguous(self._product(kept, v).swapaxes(1, 2)).swapaxes(1, 2)
        return y, CudaSaved((q, k, v, p, kept, scale, drawn))

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if not isinstance(saved, CudaSaved):
            return super().causal_attention_backward(dy, saved)
        q, k, v, p, kept, scale, drawn = saved
        dy = self._contiguous(dy)
        dv = self._product(kept.swapaxes(-1, -2), dy)
        ds = self._product(dy, v.swapaxes(-1, -2))
        sizes = _attention_sizes(q, k)
        self._launch("causal_softmax_backward", ds.dtype.name, _row_grid(sizes[0]), THREADS, (ds, p, ds, *sizes, scale, *drawn))
        return self._product(ds, k), self._product(ds.swapaxes(-1, -2), q), dv

    def split_heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().split_heads(qkv)
        if not (_are_activations(qkv) and qkv.size and qkv.flags.c_contiguous):
            return q, k, v
        heads = self.xp.empty((3, *q.shape), dtype=q.dtype)
        self._copy_heads((q, k, v, heads), q, merge=0)
        return heads[0], heads[1], heads[2]

    def merge_heads(self, q: Array, k: Array, v: Array) -> Array:
        if not (_are_activations(q, k, v) and q.size and all(x.flags.c_contiguous for x in (q, k, v))):
            return super().merge_heads(q, k, v)
        b, h, t, head_dim = q.shape
        qkv = self.xp.empty((b, t, 3, h, head_dim), dtype=q.dtype)
        self._copy_heads((q, k, v, qkv), super().split_heads(qkv)[0], merge=1)
        return qkv

    def _copy_heads(self, arrays: tuple[Array, ...], part: Array, merge: int) -> None:
        """part: one of the three parts of qkv."""
        blocks, _ = _elementwise_grid(prod(part.shape[:-1]) * _groups(part.shape[-1]))
        strides = [stride // part.itemsize for stride in part.strides[:-1]]
        self._launch("copy_heads", part.dtype.name, (blocks, 3), THREADS, (*arrays, *part.shape, *strides, merge))

    def _contiguous(self, x: Array) -> Array:
        """x (B, H, T, head_dim), copied if it is a view."""
        if x.flags.c_contiguous or not _has_rows(x):
            return self.xp.ascontiguousarray(x)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        self._copy(x, y, add=0)
        return y

    def _copy(self, x: Array, y: Array, add: int) -> None:
        strides = [stride // x.itemsize for array in (x, y) for stride in array.strides[:-1]]
        grid = _elementwise_grid(prod(x.shape[:-1]) * _groups(x.shape[-1]))
        self._launch("copy", x.dtype.name, grid, THREADS, (x, y, *x.shape, *strides, add))

    # ---------------------------------------------------------------- sums of gradients

    def add(self, a: Array, b: Array) -> Array:
        if not (_are_activations(a, b) and a.shape == b.shape and a.ndim):
            return super().add(a, b)
        return self._dropout(b, NO_DROPOUT, onto=a)

    def add_into(self, total: Array, index: Any, values: Array) -> None:
        view = total[index]
        if not (_are_activations(view, values) and view.shape == values.shape and _has_rows(view) and _has_rows(values)):
            super().add_into(total, index, values)
        elif view.size:
            self._copy(values, view, add=1)

    # ---------------------------------------------------------------- layer norm

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        if not (_are_activations(x) and _fit_activations(x, weight, bias) and x.size):
            return super().layer_norm_forward(x, weight, bias, eps)
        x, weight = self.xp.ascontiguousarray(x), self.xp.ascontiguousarray(weight)
        bias = None if bias is None else self.xp.ascontiguousarray(bias)
        n, c = _rows_and_columns(x.shape)
        y, mean, rstd = self.xp.empty_like(x), *(self.xp.empty(n, dtype=weight.dtype) for _ in range(2))
        self._launch(
            "layer_norm_forward", x.dtype.name, _row_grid(n), THREADS, (x, weight, bias, y, mean, rstd, n, c, float(eps))
        )
        return y, CudaSaved((x, weight, mean, rstd))

    def layer_norm_backward(self, dy: Array, saved: Saved, onto: Onto = (None, None)) -> tuple[Array, Array, Array]:
        if not isinstance(saved, CudaSaved):
            return super().layer_norm_backward(dy, saved, onto)
        x, weight, mean, rstd = saved
        dy, dx, dtype = self.xp.ascontiguousarray(dy), self.xp.empty_like(x), x.dtype.name
        n, c = _rows_and_columns(x.shape)
        self._launch("layer_norm_backward", dtype, _row_grid(n), THREADS, (dy, x, weight, mean, rstd, dx, n, c))
        chunk, chunks = _chunks(n)
        partial = self.xp.empty((chunks, 2, c), dtype=weight.dtype)
        arguments = (dy, x, mean, rstd, partial, n, c, chunk)
        self._launch("layer_norm_backward_weight", dtype, (-(-c // THREADS), chunks), THREADS, arguments)
        return dx, *self._sum_of_rows(partial, *onto)

    def _sum_of_rows(self, x: Array, *onto: Array | None) -> list[Array]:
        """The sums over the rows of one matrix x (n, ...), or of those that lie side by side in x (n, number of onto, ...).

        They are added to the arrays of `onto`; where it has None, the sum is a new array.
        """
        shape = x.shape[-1:] if len(onto) > 1 else x.shape[1:]
        results = [self.xp.empty(shape, dtype=x.dtype) if total is None else total for total in onto]
        n, c = len(x), prod(shape)
        for i, (y, total) in enumerate(zip(results, onto, strict=True)):
            arguments = (x, y, n, c, len(onto) * c, i * c, int(total is not None))
            self._launch("sum_of_rows", x.dtype.name, (-(-c // WARP), 1), THREADS, arguments)
        return results

    # ---------------------------------------------------------------- GELU

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        if not (_are_activations(x) and x.size):
            return super().gelu_forward(x)
        y, x = self.xp.empty(x.shape, dtype=x.dtype), self.xp.ascontiguousarray(x)
        self._launch("gelu_forward", x.dtype.name, _elementwise_grid(_groups(x.size)), THREADS, (x, y, x.size))
        return y, CudaSaved((x,))

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, CudaSaved):
            return super().gelu_backward(dy, saved)
        (x,) = saved
        dx = self.xp.empty(dy.shape, dtype=x.dtype)
        arguments = (self.xp.ascontiguousarray(dy), x, dx, x.size)
        self._launch("gelu_backward", x.dtype.name, _elementwise_grid(_groups(x.size)), THREADS, arguments)
        return dx

    # ---------------------------------------------------------------- rotary positions

    def rotary_forward(self, x: Array, rotation: Array) -> tuple[Array, Saved]:
        along = [axis for axis in range(1, rotation.ndim) if rotation.shape[-1 - axis] > 1]  # axes from the right
        if not (_are_activations(x) and _fit_activations(x, rotation) and x.size and len(along) <= 1):
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
        arguments = (x, rotation, y, n, half, inner, positions, direction)
        self._launch("rotary", x.dtype.name, _elementwise_grid(n * half), THREADS, arguments)
        return y

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved, onto: Array | None = None) -> Array:
        """Add up the rows of each chunk into a table of its own, then add up the tables. In a large table, go from id to id.

        This needs no atomic additions, so the sum has the same bits every time.
        """
        (v, c), ids = saved
        n = ids.size
        if not (_are_activations(dy) and n and c):
            return super().embedding_backward(dy, saved, onto)
        dy, ids = self.xp.ascontiguousarray(dy), self.xp.ascontiguousarray(ids, dtype=np.int64)
        if v > MOST_IN_CHUNKS:
            table = self.xp.empty((v, c), dtype=_parameter_dtype(dy)) if onto is None else onto
            arguments = (dy, ids, table, n, c, v, int(onto is not None))
            self._launch("embedding_backward_by_id", dy.dtype.name, _row_grid(v), THREADS, arguments)
            return table
        chunk = max(MIN_CHUNK, -(-n * v * c // MAX_PARTIAL), -(-n // MAX_CHUNKS))
        partial = self.xp.empty((-(-n // chunk), v, c), dtype=_parameter_dtype(dy))
        grid = (-(-c // THREADS), len(partial))
        self._launch("embedding_backward", dy.dtype.name, grid, THREADS, (dy, ids, partial, n, c, v, chunk))
        return self._sum_of_rows(partial, onto)[0]

    # ---------------------------------------------------------------- cross-entropy

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Saved]:
        if not (_are_activations(logits) and logits.size):
            return super().cross_entropy_forward(logits, targets)
        xp = self.xp
        losses, largest, log_total = (xp.empty(targets.shape, dtype=_parameter_dtype(logits)) for _ in range(3))
        logits, targets = xp.ascontiguousarray(logits), xp.ascontiguousarray(targets, dtype=np.int64)
        n, v = _rows_and_columns(logits.shape)
        arguments = (logits, targets, losses, largest, log_total, n, v)
        self._launch("cross_entropy_forward", logits.dtype.name, _row_grid(n), THREADS, arguments)
        return losses, CudaSaved((logits, targets, largest, log_total))

    def cross_entropy_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, CudaSaved):
            return super().cross_entropy_backward(dy, saved)
        logits, targets, largest, log_total = saved
        dlogits = self.xp.empty_like(logits)
        n, v = _rows_and_columns(logits.shape)
        arguments = (self.xp.ascontiguousarray(dy), logits, targets, largest, log_total, dlogits, n, v)
        self._launch("cross_entropy_backward", logits.dtype.name, _row_grid(n), THREADS, arguments)
        return dlogits

    # ---------------------------------------------------------------- clipping, AdamW
    #
    # The GPU decides whether a step may change the weights. If the host decided, it would have to wait for the loss.

    def clip_factor(self, gradient: Array, loss: Array, max_norm: float, scale: Array) -> Array:
        if not (_are_parameters(gradient, loss, scale) and gradient.size and gradient.flags.c_contiguous):
            return super().clip_factor(gradient, loss, max_norm, scale)
        dtype, blocks = gradient.dtype, min(MAX_SUM_BLOCKS, -(-gradient.size // THREADS))
        partial, seen = self.xp.empty(blocks * (THREADS // WARP), dtype=dtype), self.xp.empty(2, dtype=dtype)
        self._launch("sum_of_squares", dtype.name, (blocks, 1), THREADS, (gradient, partial, gradient.size))
        arguments = (partial, partial.size, loss, float(max_norm), scale, seen)
        self._launch("clip_factor", dtype.name, (1, 1), WARP, arguments)
        return seen

    def adamw(self, parameter: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, numbers: AdamWStep) -> None:
        arrays = (parameter, gradient, exp_avg, exp_avg_sq)
        if not (_are_parameters(*arrays) and parameter.size and all(a.flags.c_contiguous for a in arrays)):
            super().adamw(*arrays, numbers)
            return
        step, lr, (beta1, beta2), eps, weight_decay, n_decay, scale = numbers
        rates = (lr, beta1, beta2, 1 - beta1**step, 1 - beta2**step, eps, weight_decay)
        sizes = (parameter.size, parameter.size if n_decay is None else n_decay)
        arguments = (*arrays, scale, *sizes, *map(float, rates))
        self._launch("adamw", parameter.dtype.name, _elementwise_grid(parameter.size), THREADS, arguments)


def _are_activations(*arrays: Array) -> bool:
    """Whether the arrays share one dtype and the kernels support it."""
    return all(a.dtype.name in ELEMENTS and a.dtype == arrays[0].dtype for a in arrays)


def _are_parameters(*arrays: Array) -> bool:
    """Whether the arrays share one dtype and the kernels support it for parameters."""
    return _are_activations(*arrays) and arrays[0].dtype == _parameter_dtype(arrays[0])


def _fit_activations(x: Array, *parameters: Array | None) -> bool:
    """Whether the parameters have the dtype that goes with activations like x."""
    return all(p is None or p.dtype == _parameter_dtype(x) for p in parameters)


def _parameter_dtype(x: Array) -> np.dtype:
    return ELEMENTS[x.dtype.name][2]


def _chunks(n: int) -> tuple[int, int]:
    """(rows in a chunk, number of chunks) for a sum over n rows. Both are near the square root of n."""
    chunk = max(MIN_CHUNK, isqrt(n), -(-n // MAX_CHUNKS))
    return chunk, -(-n // chunk)


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of an array that is seen as rows along its last axis."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def _attention_sizes(q: Array, k: Array) -> tuple[int, int, int]:
    """(rows of scores, queries, keys)."""
    return prod(q.shape[:-1]), q.shape[-2], k.shape[-2]


def _has_rows(x: Array) -> bool:
    """Whether x is a view of four axes whose last one is contiguous."""
    return x.ndim == 4 and x.strides[-1] == x.itemsize and min(x.strides) >= 0


def _groups(n: int) -> int:
    """How many groups n neighbouring elements make; see Group in common.cu."""
    return -(-n // GROUP)


def _row_grid(n: int) -> tuple[int, int]:
    """The grid for n rows, one warp for each."""
    return -(-n // (THREADS // WARP)), 1


def _elementwise_grid(n: int) -> tuple[int, int]:
    """The grid for n elements, one thread for each up to MAX_BLOCKS blocks."""
    return min(MAX_BLOCKS, -(-n // THREADS)), 1
