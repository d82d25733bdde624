"""The operations of a CPU that have a kernel in C: which kernel runs, with which arrays.

The kernels are in the `.c` files beside this file, one family a file. They compute what reference.py and updates.py define, in
float32. An operation without a kernel, or with another dtype, falls back to NumPy (cpu.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.native.library import PROCESSORS, Library, address_of
from npgpt.kernels.native.team import Team
from npgpt.kernels.reference import Array, Onto, Saved, added
from npgpt.kernels.updates import AdamWStep


class NativeSaved(tuple[Any, ...]):
    """The saved values of a forward pass of this file. Any other value was saved by CpuKernels."""


# With fewer rows, OpenBLAS multiplies as fast, because it need not copy a matrix first.
LEAST_ROWS = 32
MOST_ROWS = 64  # rows for which decode.c is faster than a product that copies the weights
LEAST_COLUMNS = 64  # of the narrowest product, that a thread computes while it decodes
# On processors with AVX-512, product.c is faster than OpenBLAS. On others, OpenBLAS is as fast.
FASTER_PRODUCTS = ("avx512", "avx512bf16")


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
        self._team = Team()
        self._has_faster_products = library.processor in FASTER_PRODUCTS

    def decodes_blocks(self, x: Array) -> bool:
        is_fast = (
            self.threads > 0 and 0 < len(x) <= MOST_ROWS
        )  # for more rows, a product that copies the weights first is faster
        return is_fast and _are_float32(x) and x.flags.c_contiguous

    @property
    def bfloat16_products(self) -> bool:
        return self.rounding > 0

    # ---------------------------------------------------------------- linear

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        product = self._product_for(len(rows))
        if product is None or not _are_float32(x, weight, bias):
            return super().linear_forward(x, weight, bias)
        y = self._product(product, rows, weight, None if bias is None else _contiguous(bias))
        return y.reshape(*x.shape[:-1], weight.shape[-1]), (rows, weight, x.shape)

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True), onto: Onto = (None, None)
    ) -> tuple[Array | None, Array | None, Array | None]:
        rows, weight, x_shape = saved
        if not _are_float32(dy, rows, weight, *onto):
            return super().linear_backward(dy, saved, needs, onto)
        dy = np.ascontiguousarray(dy.reshape(len(rows), weight.shape[-1]))
        product = self._product_for(len(rows))
        dx = self._product(product, dy, weight.T).reshape(x_shape) if needs[0] else None
        dweight = self._product(product, rows.T, dy, onto=onto[0]) if needs[1] else None
        dbias = None
        if needs[2]:
            dbias = np.zeros(dy.shape[-1], dtype=dy.dtype) if onto[1] is None else onto[1]
            self._run("add_column_sums", dy, dbias, *dy.shape)
        return dx, dweight, dbias

    def _product_for(self, rows: int) -> str | None:
        """The kernel for the products of a linear layer; None for the BLAS, which may use more threads than one."""
        if self.bfloat16_products:
            return "bfloat16_product"
        return "product" if self.one_thread and self._has_faster_products and rows >= LEAST_ROWS else None

    def _product(self, kernel: str | None, a: Array, b: Array, bias: Array | None = None, onto: Array | None = None) -> Array:
        """a (m, k) @ b (k, n), plus bias (n,), or added to onto (m, n). kernel: see `_product_for`."""
        if kernel is None:
            return added(a @ b if bias is None else a @ b + bias, onto)
        a, b = (x if x.itemsize in x.strides and min(x.strides) >= 0 else _contiguous(x) for x in (a, b))
        (m, k), n = a.shape, b.shape[1]
        y = np.empty((m, n), dtype=np.float32) if onto is None else onto
        strides = [stride // 4 for x in (a, b) for stride in x.strides]
        self._run(kernel, a, b, bias, y, self._run.scratch("product_scratch", n), m, n, k, *strides, onto is not None)
        return y

    # ---------------------------------------------------------------- one more token of each sequence

    def block_addresses(self, weights: Sequence[Array | None], c: int, d_ff: int) -> Array | None:
        norm, attention = [(c,), (c,)], [(c, 3 * c), (3 * c,), (c, c), (c,)]
        shapes = cycle([*norm, *attention, *norm, (c, d_ff), (d_ff,), (d_ff, c), (c,)])
        pairs = zip(weights, shapes, strict=False)
        if not (_are_float32(*weights) and all(a is None or (a.shape == s and a.flags.c_contiguous) for a, s in pairs)):
            return None
        return np.array([0 if a is None else address_of(a) for a in weights], dtype=np.uintp)

    def blocks_decode(
        self,
        x: Array,
        addresses: Array,
        memory: Array,
        lengths: Array,
        rotations: Array | None,
        d_ff: int,
        activation: str,
        eps: float,
    ) -> None:
        (b, c), (layers, _, most, heads, room, _) = x.shape, memory.shape
        shared = np.empty(b * (4 * c + d_ff), dtype=np.float32)
        sizes = (layers, b, c, heads, d_ff, room, most, activation == "gelu")

        def call(member: int, members: int, meeting: Array) -> None:
            own = np.empty(b * (c + 2) + room, dtype=np.float32)
            arrays = (x, addresses, memory, lengths, rotations, shared, own, meeting)
            self._run("decode_blocks", *arrays, *sizes, eps, member, members)

        self._team.run(call, max(1, min(self.threads, c // LEAST_COLUMNS)))

    def linear_decode(self, x: Array, weight: Array, bias: Array | None, onto: Array | None = None) -> Array:
        arrays = (x, weight, bias, onto)
        is_fast = self.one_thread and len(x) <= MOST_ROWS  # with more threads, the BLAS is faster: it uses them all
        if not (is_fast and _are_float32(*arrays) and all(a is None or a.flags.c_contiguous for a in arrays)):
            return super().linear_decode(x, weight, bias, onto)
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

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        b, h, n_query, head_dim = q.shape
        n_key = k.shape[2]
        if not (_are_float32(q, k, v) and q.size and k.size and head_dim <= self._run.size("longest_head")):
            return super().causal_attention_forward(q, k, v, dropout, rng)
        draws, threshold = None, 0
        if dropout > 0 and rng is not None:
            draws, threshold = self.dropout_draws((b, h, n_query, n_key), dropout, rng)
        keep = 1 - dropout if draws is not None else 1.0
        q, k, v = _rows_apart(q), _rows_apart(k), _rows_apart(v)
        if k.strides != v.strides:
            k, v = np.ascontiguousarray(k), np.ascontiguousarray(v)
        # In this memory layout, joining the heads afterwards needs no copy.
        out = np.empty((b, n_query, h, head_dim), dtype=q.dtype)
        e = np.empty(b * h * self._run.size("attention_exponentials", n_query, n_key), dtype=q.dtype)
        factor = np.empty((b, h, n_query), dtype=q.dtype)
        sizes = (b, h, n_query, n_key, head_dim, *_strides(q), *_strides(k))
        scale, scratch = 1 / sqrt(head_dim), self._run.scratch("attention_scratch", n_key, head_dim)
        self._run("attention_forward", q, k, v, draws, e, factor, out, scratch, *sizes, threshold, scale, keep)
        return out.transpose(0, 2, 1, 3), NativeSaved((q, k, v, out, factor, e, sizes, scale, keep))

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if not isinstance(saved, NativeSaved):
            return super().causal_attention_backward(dy, saved)
        dq, dk, dv = (np.empty(a.shape, dtype=a.dtype) for a in saved[:3])
        self._attention_backward(dy, saved, dq, dk, dv)
        return dq, dk, dv

    def self_attention_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, NativeSaved):
            return super().self_attention_backward(dy, saved)
        b, h, t, head_dim = saved[0].shape
        dqkv = np.empty((b, t, 3, h, head_dim), dtype=np.float32)
        self._attention_backward(dy.swapaxes(1, 2), saved, *self.split_heads(dqkv))
        return dqkv

    def _attention_backward(self, dy: Array, saved: NativeSaved, dq: Array, dk: Array, dv: Array) -> None:
        """Writes to dq, dk and dv. They may be views; dk and dv have the same strides."""
        q, k, v, out, factor, e, sizes, scale, keep = saved
        dy = _contiguous(dy.transpose(0, 2, 1, 3))
        strides = (*_strides(dq), *_strides(dk))
        scratch = self._run.scratch("attention_scratch", k.shape[2], q.shape[3])
        self._run("attention_backward", dy, q, k, v, out, factor, e, dq, dk, dv, scratch, *sizes, *strides, scale, keep)

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

    def layer_norm_backward(self, dy: Array, saved: Saved, onto: Onto = (None, None)) -> tuple[Array, Array, Array]:
        if not isinstance(saved, NativeSaved):
            return super().layer_norm_backward(dy, saved, onto)
        x, weight, mean, rstd = saved
        dx, (dweight, dbias) = np.empty_like(x), (np.zeros_like(weight) if sums is None else sums for sums in onto)
        self._run("layer_norm_backward", _contiguous(dy), x, weight, mean, rstd, dx, dweight, dbias, *_rows_and_columns(x))
        return dx, dweight, dbias

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved, onto: Array | None = None) -> Array:
        shape, ids = saved
        if not (_are_float32(dy, onto) and len(shape) == 2):
            return super().embedding_backward(dy, saved, onto)
        ids = _ids(ids, shape[0])
        dweight = np.zeros(shape, dtype=dy.dtype) if onto is None else onto
        self._run("embedding_backward", _contiguous(dy), ids, dweight, ids.size, shape[1])
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


def _rows_apart(x: Array) -> Array:
    """x (B, H, T, head_dim), copied if neighbours along head_dim are not neighbours in memory."""
    return x if x.strides[3] == x.itemsize and min(x.strides) >= 0 else np.ascontiguousarray(x)


def _strides(x: Array) -> tuple[int, ...]:
    """The strides of all dimensions but the last one, in elements."""
    return tuple(stride // x.itemsize for stride in x.strides[:-1])


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
