"""The operations of a CPU that have a kernel in C: which kernel runs, with which arrays.

The kernels are in the `.c` files beside this file, one family a file. They compute what reference.py defines, in float32.
Products stay with NumPy's BLAS, except those of bfloat16 and of a few rows. An operation without a kernel, or with another
dtype, falls back to NumPy (cpu.py).
"""

from __future__ import annotations

import threading
from math import prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.native.library import PROCESSORS, Library
from npgpt.kernels.reference import AdamWStep, Array, Saved


class NativeSaved(tuple[Any, ...]):
    """The saved values of a forward pass of this file. Any other value was saved by CpuKernels."""


class NativeKernels(CpuKernels):
    """The kernels of cpu.py, with overrides in C for float32.

    While `rounding` is above 0, linear layers round the operands of their products to bfloat16 and add up in float32. It counts
    the open blocks of `backend.bfloat16_products`. It needs `has_bfloat16`.
    """

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._run = library
        self.has_bfloat16, self.description = library.has_bfloat16, f"native {PROCESSORS[library.processor]}"
        self.rounding = 0
        self._of_thread = threading.local()  # scratch memory for products

    @property
    def bfloat16_products(self) -> bool:
        return self.rounding > 0

    # ---------------------------------------------------------------- linear

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        if not (self.bfloat16_products and _are_float32(x, weight, bias)):
            return super().linear_forward(x, weight, bias)
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        y = self._product(rows, weight, None if bias is None else _contiguous(bias))
        return y.reshape(*x.shape[:-1], weight.shape[-1]), (rows, weight, x.shape)

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> tuple[Array | None, Array | None, Array | None]:
        rows, weight, x_shape = saved
        if not _are_float32(dy, rows, weight):
            return super().linear_backward(dy, saved, needs)
        dy = np.ascontiguousarray(dy.reshape(len(rows), weight.shape[-1]))
        product = self._product if self.bfloat16_products else np.matmul
        dx = product(dy, weight.T).reshape(x_shape) if needs[0] else None
        dweight = product(rows.T, dy) if needs[1] else None
        dbias = np.empty(dy.shape[-1], dtype=dy.dtype) if needs[2] else None
        if dbias is not None:
            self._run("column_sums", dy, dbias, *dy.shape)
        return dx, dweight, dbias

    def _product(self, a: Array, b: Array, bias: Array | None = None) -> Array:
        """a (m, k) @ b (k, n) + bias (n,), with operands rounded to bfloat16."""
        a, b = (x if x.itemsize in x.strides and min(x.strides) >= 0 else _contiguous(x) for x in (a, b))
        (m, k), n = a.shape, b.shape[1]
        y = np.empty((m, n), dtype=np.float32)
        strides = [stride // 4 for x in (a, b) for stride in x.strides]
        self._run("product", a, b, bias, y, self._scratch(n), m, n, k, *strides, 0)
        return y

    def _scratch(self, n: int) -> Array:
        """Memory for a product with n columns. Each thread has its own, and keeps it."""
        needed = self._run.scratch_bytes(n)
        scratch: Array | None = getattr(self._of_thread, "scratch", None)
        if scratch is None or scratch.nbytes < needed:
            scratch = self._of_thread.scratch = np.empty(needed, dtype=np.uint8)
        return scratch

    # ---------------------------------------------------------------- one more token of each sequence

    def linear_decode(
        self, x: Array, weight: Array, bias: Array | None, onto: Array | None = None, blas_threads: int = 1
    ) -> Array:
        arrays = (x, weight, bias, onto)
        # With more threads, the BLAS is faster: it spreads a product over them.
        if blas_threads > 1 or not (_are_float32(*arrays) and all(a is None or a.flags.c_contiguous for a in arrays)):
            return super().linear_decode(x, weight, bias, onto, blas_threads)
        (rows, n), m = x.shape, weight.shape[1]
        y = np.empty((rows, m), dtype=x.dtype) if onto is None else onto
        self._run("few_rows_product", x, weight, bias, y, rows, n, m, onto is not None)
        return y

    def layer_norm_decode(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        if not _are_float32(x, weight, bias):
            return super().layer_norm_decode(x, weight, bias, eps)
        return self.layer_norm_forward(x, weight, bias, eps)[0]

    def gelu_decode(self, x: Array) -> Array:
        return self.gelu_forward(x)[0] if _are_float32(x) else super().gelu_decode(x)

    def attention_decode(self, q: Array, k: Array, v: Array, absent: Array | None) -> Array:
        # Both caches are views of one array, and the heads of a query follow each other.
        b, h, tokens, head_dim = k.shape
        if not (_are_float32(q, k, v) and k.strides == v.strides and k.strides[2:] == (4 * head_dim, 4)):
            return super().attention_decode(q, k, v, absent)
        q = q if q.strides[1] == 4 * head_dim and q.strides[3] == 4 else np.ascontiguousarray(q)
        y, scores = np.empty((b, h, head_dim), dtype=q.dtype), np.empty(tokens, dtype=q.dtype)
        strides = (q.strides[0] // 4, k.strides[0] // 4, k.strides[1] // 4)
        self._run("decode_attention", q, k, v, absent, y, scores, b, h, tokens, head_dim, *strides, 1 / sqrt(head_dim))
        return y

    # ---------------------------------------------------------------- GELU

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        if not _are_float32(x):
            return super().gelu_forward(x)
        x = _contiguous(x)
        y = np.empty_like(x)
        self._run("gelu_forward", x, y, x.size)
        return y, NativeSaved((x,))

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, NativeSaved):
            return super().gelu_backward(dy, saved)
        (x,) = saved
        dx = np.empty_like(x)
        self._run("gelu_backward", _contiguous(dy), x, dx, x.size)
        return dx

    # ---------------------------------------------------------------- dropout
    #
    # The masks are those of NumPy's generator, so a seed gives the same masks with and without these kernels.

    def dropout_forward(self, x: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _are_float32(x):
            return super().dropout_forward(x, p, rng)
        saved = self._draw(x.shape, p, rng)
        return self._dropout(x, None, saved), saved

    def dropout_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, NativeSaved):
            return super().dropout_backward(dy, saved)
        return self._dropout(dy, None, saved)

    def residual_forward(self, x: Array, branch: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _are_float32(x, branch):
            return super().residual_forward(x, branch, p, rng)
        saved = self._draw(x.shape, p, rng)
        return self._dropout(branch, _contiguous(x), saved), saved

    def _draw(self, shape: tuple[int, ...], p: float, rng: Any) -> NativeSaved:
        return NativeSaved((*self.dropout_draws(shape, p, rng), 1 / (1 - p) if p < 1 else 0.0))

    def _dropout(self, x: Array, onto: Array | None, saved: tuple[Any, ...]) -> Array:
        draws, threshold, scale = saved
        x = _contiguous(x)
        y = np.empty_like(x)
        self._run("dropout", x, onto, draws, y, x.size, threshold, scale)
        return y

    # ---------------------------------------------------------------- causal attention
    #
    # Blocks and products are those of cpu.py. A kernel turns scores into exponentials. One array holds them and, as their sign,
    # the dropout mask.

    def _exponentials(
        self, e: Array, factor: Array, draws: Array | None, threshold: int, keep: float, rows: slice
    ) -> tuple[Array, Any]:
        if not _are_float32(e):
            return super()._exponentials(e, factor, draws, threshold, keep, rows)
        kept = e if draws is None else np.empty_like(e)
        n_key = 0 if draws is None else draws.shape[3]
        sizes = (prod(e.shape[:2]), *e.shape[2:], rows.start, factor.shape[2], n_key)
        self._run("attention_forward", e, kept, factor, draws, *sizes, threshold, keep)
        return kept, NativeSaved((e, draws is not None))

    def _kept(self, block: Any) -> Array:
        if not isinstance(block, NativeSaved):
            return super()._kept(block)
        e, dropped = block
        if not dropped:
            return e
        kept = np.empty_like(e)
        self._run("attention_kept", e, kept, e.size)
        return kept

    def _gradient_of_scores(self, ds: Array, block: Any, row_term: Array, rows: slice) -> None:
        if not isinstance(block, NativeSaved):
            super()._gradient_of_scores(ds, block, row_term, rows)
            return
        e, _ = block
        sizes = (prod(e.shape[:2]), *e.shape[2:], rows.start, row_term.shape[2])
        self._run("attention_backward", ds, e, _contiguous(row_term), *sizes)

    # ---------------------------------------------------------------- layer norm

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        if not _are_float32(x, weight, bias):
            return super().layer_norm_forward(x, weight, bias, eps)
        x, weight = _contiguous(x), _contiguous(weight)
        bias = None if bias is None else _contiguous(bias)
        n, c = _rows_and_columns(x)
        y, mean, rstd = np.empty_like(x), np.empty(n, dtype=x.dtype), np.empty(n, dtype=x.dtype)
        self._run("layer_norm_forward", x, weight, bias, y, mean, rstd, n, c, eps)
        return y, NativeSaved((x, weight, mean, rstd))

    def layer_norm_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if not isinstance(saved, NativeSaved):
            return super().layer_norm_backward(dy, saved)
        x, weight, mean, rstd = saved
        dx, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(weight)
        self._run("layer_norm_backward", _contiguous(dy), x, weight, mean, rstd, dx, dweight, dbias, *_rows_and_columns(x))
        return dx, dweight, dbias

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved) -> Array:
        shape, ids = saved
        if not (_are_float32(dy) and len(shape) == 2):
            return super().embedding_backward(dy, saved)
        ids = _ids(ids, shape[0])
        dweight = np.empty(shape, dtype=dy.dtype)
        self._run("embedding_backward", _contiguous(dy), ids, dweight, ids.size, shape[1], shape[0])
        return dweight

    # ---------------------------------------------------------------- cross-entropy

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Saved]:
        if not (_are_float32(logits) and logits.size):
            return super().cross_entropy_forward(logits, targets)
        logits, targets = _contiguous(logits), _ids(targets, logits.shape[-1])
        losses, p = np.empty(targets.shape, dtype=logits.dtype), np.empty_like(logits)
        self._run("cross_entropy_forward", logits, targets, losses, p, *_rows_and_columns(logits))
        return losses, NativeSaved((p, targets))

    def cross_entropy_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, NativeSaved):
            return super().cross_entropy_backward(dy, saved)
        p, targets = saved
        targets, dlogits = _ids(targets, p.shape[-1]), np.empty_like(p)  # the caller may have changed them
        self._run("cross_entropy_backward", _contiguous(dy), p, targets, dlogits, *_rows_and_columns(p))
        return dlogits

    # ---------------------------------------------------------------- AdamW

    def adamw(self, parameter: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, numbers: AdamWStep) -> None:
        arrays = (parameter, gradient, exp_avg, exp_avg_sq)
        step, lr, (beta1, beta2), eps, weight_decay, n_decay, scale = numbers
        if scale is not None or not _are_float32(*arrays) or not all(a.flags.c_contiguous for a in arrays):
            super().adamw(*arrays, numbers)
            return
        sizes = (parameter.size, parameter.size if n_decay is None else min(n_decay, parameter.size))
        self._run("adamw", *arrays, *sizes, lr, beta1, beta2, 1 - beta1**step, 1 - beta2**step, eps, weight_decay)


def _are_float32(*arrays: Array | None) -> bool:
    return all(a is None or a.dtype == np.float32 for a in arrays)


def _contiguous(x: Array) -> Array:
    """x as C reads it: float32, row after row. An array without dimensions stays one."""
    return np.asarray(x, dtype=np.float32, order="C")


def _ids(ids: Array, n: int) -> Array:
    """Ids as C reads them. Raises IndexError for one outside [0, n): there C would read or write outside of an array."""
    ids = np.asarray(ids, dtype=np.int64, order="C")
    if ids.size and not (ids.min() >= 0 and ids.max() < n):
        wrong = ids[(ids < 0) | (ids >= n)].reshape(-1)[0]
        raise IndexError(f"expected ids from 0 to {n - 1}, got one of {wrong}")
    return ids


def _rows_and_columns(x: Array) -> tuple[int, int]:
    """The sizes of an array that is seen as rows along its last axis."""
    return prod(x.shape[:-1]), x.shape[-1]
