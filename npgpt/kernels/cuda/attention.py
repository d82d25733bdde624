"""Causal attention on a GPU, in two ways. Both compute what causal_attention in reference.py defines.

- Fused, on tensor cores: the kernels of attention.cu, in bfloat16 and float32 with a small head_dim. They write no scores to
  memory.
- Else with products of cuBLAS, and kernels of softmax.cu between them. The scores are in memory.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.cuda.base import CudaSaved, LaunchedKernels, are_activations, has_rows
from npgpt.kernels.cuda.launch import Variant
from npgpt.kernels.cuda.random import NO_DROPOUT, dropout_arguments
from npgpt.kernels.reference import Array, Saved

ROWS = 64  # queries or keys of a block, as in tiles.cu
FUSED_THREADS = 128  # of a block: a warp for 16 rows
UNDIVIDED = 64  # the largest head_dim for which one block computes all columns of a gradient; see PARTS in attention.cu
MOST_COLUMNS = {"bfloat16": 128, "float32": 64}  # the largest head_dim: more does not fit into a block's memory and registers
MOST_STRIDE = 2**31 // ROWS  # elements from one row to the next: the kernels count them in 32 bits


class FusedSaved(CudaSaved):
    """The saved values of a forward pass of attention.cu."""


class AttentionKernels(LaunchedKernels):
    """The reference kernels, with overrides for causal attention."""

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        fit = k.shape == v.shape and (q.shape[:2], q.shape[3]) == (k.shape[:2], k.shape[3])
        if not (are_activations(q, k, v) and q.size and fit):
            return super().causal_attention_forward(q, k, v, dropout, rng)
        drawn = dropout_arguments(dropout, rng) if dropout > 0 and rng is not None else NO_DROPOUT
        if self._launch.has_tensor_cores and q.shape[-1] <= MOST_COLUMNS.get(q.dtype.name, 0):
            return self._fused_forward(q, k, v, drawn)
        return self._forward_by_products(q, k, v, drawn)

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if isinstance(saved, FusedSaved):
            dq, dk, dv = map(self._new_rows_of_heads, saved[:3])
            self._fused_backward(dy, saved, dq, dk, dv)
            return dq, dk, dv
        if isinstance(saved, CudaSaved):
            return self._backward_by_products(dy, saved)
        return super().causal_attention_backward(dy, saved)

    def self_attention_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, FusedSaved):
            return super().self_attention_backward(dy, saved)
        q = saved[0]
        b, h, t, head_dim = q.shape
        dqkv = self.xp.empty((b, t, 3, h, head_dim), dtype=q.dtype)
        self._fused_backward(dy.swapaxes(1, 2), saved, *self.split_heads(dqkv))
        return dqkv

    # ---------------------------------------------------------------- fused
    #
    # The heads arrive as views into the output of the projection, and the kernels read them there. In memory, the result and
    # the gradients have the layout (B, T, H, head_dim), so the next projection reads whole rows.

    def _fused_forward(self, q: Array, k: Array, v: Array, drawn: tuple[Any, ...]) -> tuple[Array, Saved]:
        q, k, v = (x if _stride_of_heads(x) else self._in_rows_of_heads(x) for x in (q, k, v))
        b, h, n_query, head_dim = q.shape
        out = self._new_rows_of_heads(q)
        log_total = self.xp.empty((b * h, n_query), dtype=np.float32)
        rest = (1 / sqrt(head_dim), *drawn)
        sizes = (h, n_query, k.shape[2], *map(_stride_of_heads, (q, k, v)))
        variant = Variant(head_dim, is_exact=q.dtype != np.float32 or not self.gemm.tf32)
        self._for_tiles("attention_forward", q, 1, (q, k, v, out.swapaxes(1, 2), log_total, *sizes, *rest), variant)
        return out, FusedSaved((q, k, v, out, log_total, rest, variant))

    def _fused_backward(self, dy: Array, saved: Saved, dq: Array, dk: Array, dv: Array) -> None:
        """Write the gradients to dq, dk and dv, which are views like q, k and v."""
        q, k, v, out, log_total, rest, variant = saved
        dy = dy if dy.swapaxes(1, 2).flags.c_contiguous else self._in_rows_of_heads(dy)
        y, dy = out.swapaxes(1, 2), dy.swapaxes(1, 2)
        sizes = (q.shape[1], q.shape[2], k.shape[2])
        row_terms = self.xp.empty_like(log_total)
        parts = 2 if q.shape[-1] > UNDIVIDED else 1
        arguments = (q, k, v, y, dy, log_total, row_terms, dq, *sizes, *map(_stride_of_heads, (q, k, v, dq)), *rest)
        self._for_tiles("attention_backward_queries", q, parts, arguments, variant)
        arguments = (q, k, v, dy, log_total, row_terms, dk, dv, *sizes, *map(_stride_of_heads, (q, k, v, dk, dv)), *rest)
        self._for_tiles("attention_backward_keys", k, parts, arguments, variant)

    def _for_tiles(self, name: str, x: Array, parts: int, arguments: tuple[Any, ...], variant: Variant) -> None:
        """Launch a kernel of attention.cu whose result has the rows of x (B, H, n, head_dim)."""
        b, h, n, _ = x.shape
        self._launch(name, x.dtype.name, (b * h * -(-n // ROWS) * parts, 1), FUSED_THREADS, arguments, variant)

    def _new_rows_of_heads(self, x: Array) -> Array:
        """An array of the shape (B, H, n, head_dim) of x; in memory it is (B, n, H, head_dim)."""
        b, h, n, head_dim = x.shape
        return self.xp.empty((b, n, h, head_dim), dtype=x.dtype).swapaxes(1, 2)

    def _in_rows_of_heads(self, x: Array) -> Array:
        """A copy of x in such an array."""
        y = self._new_rows_of_heads(x)
        if has_rows(x):
            self._copy(x, y)
        else:
            y[...] = x
        return y

    # ---------------------------------------------------------------- with cuBLAS
    #
    # The heads are copied once, because cuBLAS needs matrices with one constant distance between them. The result is a view
    # again, so that the next projection reads whole rows.

    def _forward_by_products(self, q: Array, k: Array, v: Array, drawn: tuple[Any, ...]) -> tuple[Array, Saved]:
        q, k, v = map(self._contiguous, (q, k, v))
        p = self._product(q, k.swapaxes(-1, -2))  # the scores; the kernel replaces them by probabilities
        kept = None if drawn is NO_DROPOUT else self.xp.empty_like(p)
        sizes, scale = _sizes(q, k), 1 / sqrt(q.shape[-1])
        self._for_rows("causal_softmax_forward", p.dtype, sizes[0], (p, p, kept, *sizes, scale, *drawn))
        kept = p if kept is None else kept
        y = self._contiguous(self._product(kept, v).swapaxes(1, 2)).swapaxes(1, 2)
        return y, CudaSaved((q, k, v, p, kept, scale, drawn))

    def _backward_by_products(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        q, k, v, p, kept, scale, drawn = saved
        dy = self._contiguous(dy)
        dv = self._product(kept.swapaxes(-1, -2), dy)
        ds = self._product(dy, v.swapaxes(-1, -2))
        sizes = _sizes(q, k)
        self._for_rows("causal_softmax_backward", ds.dtype, sizes[0], (ds, p, ds, *sizes, scale, *drawn))
        return self._product(ds, k), self._product(ds.swapaxes(-1, -2), q), dv


def _sizes(q: Array, k: Array) -> tuple[int, int, int]:
    """(rows of scores, queries, keys)."""
    return prod(q.shape[:-1]), q.shape[-2], k.shape[-2]


def _stride_of_heads(x: Array) -> int:
    """The elements from one row of x (B, H, n, head_dim) to the next, for attention.cu; 0 if x has another layout."""
    b, h, n, head_dim = x.shape
    by_batch, by_head, by_row, by_column = (stride // x.itemsize for stride in x.strides)
    stride = by_row if n > 1 else by_batch if b > 1 else h * head_dim
    in_rows = (by_column == 1 or head_dim == 1) and (by_head == head_dim or h == 1) and stride >= h * head_dim
    return stride if in_rows and stride < MOST_STRIDE and (by_batch == n * stride or b == 1) else 0
