"""The operations for one more token of each sequence, on a CPU, in NumPy.

They are operations of reference.py for a few rows, without anything for a backward pass. To decode a token, a model multiplies
vectors with matrices, so the time is the time to read the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from npgpt.kernels.reference import GELU_CUBIC, GELU_SCALE, Array, Kernels

# For few_rows_product.
FEW_ROWS = 32  # the largest number of rows that are multiplied in pieces
FEW_ROWS_WITH_BLAS_THREADS = 8  # the same if the BLAS has several threads: it computes a small product on one
COLUMNS = 128  # columns of a piece
SMALL_PRODUCT = 1_000_000  # multiplications; OpenBLAS copies the operands of larger products


def few_rows_product(x: Array, weight: Array, one_thread: bool = True) -> Array:
    """x (B, n) @ weight (n, m), for a few rows.

    It is faster than `@` for 2 to 32 rows with one BLAS thread, or 2 to 8 rows with several, if m is a multiple of 128. It
    uses `@` for all other products. one_thread: whether the BLAS has one thread.

    OpenBLAS copies the weights of a large product into another order before it multiplies. For a few rows, that copy
    takes longer than the product itself. With its AVX-512 kernels, OpenBLAS reads the weights of a small product where
    they are. So this function cuts the product into small ones.
    """
    (rows, n), m = x.shape, weight.shape[1]
    if not 1 < rows <= (FEW_ROWS if one_thread else FEW_ROWS_WITH_BLAS_THREADS) or m % COLUMNS:
        return x @ weight

    def pieces(a: Array) -> Array:
        """(k, m) -> (m / COLUMNS, k, COLUMNS)."""
        return a.reshape(len(a), m // COLUMNS, COLUMNS).swapaxes(0, 1)

    y = np.zeros((rows, m), dtype=x.dtype)
    out, parts = pieces(y), -(-rows * n * COLUMNS // SMALL_PRODUCT)
    for i in range(parts):
        at = slice(n * i // parts, n * (i + 1) // parts)
        out += x[:, at] @ pieces(weight[at])
    return y


class DecodeKernels(Kernels):
    """The reference kernels, with those for one more token."""

    def __init__(self) -> None:
        super().__init__(np)
        self.threads = 0  # those that a block of `blas_threads` (parallel/machine.py) has asked for; 0 outside of one

    @property
    def one_thread(self) -> bool:
        return self.threads == 1

    def decodes_blocks(self, x: Array) -> bool:
        """Whether there is a `blocks_decode` for x (B, C), and it is faster than one operation after the other."""
        return False  # NumPy has nothing that is

    def block_addresses(self, weights: Sequence[Array | None], c: int, d_ff: int) -> Array | None:
        """Where the weights of all blocks are, for `blocks_decode`; None if it cannot use them.

        weights: of each block, the weight and the bias of: the first layer norm, qkv, out, the second layer norm, fc, proj.
        c, d_ff: the widths of the model.
        """
        raise NotImplementedError

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
        """All blocks of a transformer, in place: x (B, C).

        addresses: from `block_addresses`. memory, lengths: of the cache; this writes to it. rotations: (B, head_dim), for
        rotary positions.
        """
        raise NotImplementedError

    def linear_decode(self, x: Array, weight: Array, bias: Array | None, onto: Array | None = None) -> Array:
        """x (B, in) -> x @ weight + bias (B, out). With `onto` (B, out), this is added to it in place, and it is returned."""
        y = few_rows_product(x, weight, self.one_thread)
        if bias is not None:
            y += bias
        if onto is None:
            return y
        onto += y
        return onto

    def layer_norm_decode(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """x (B, C) -> (B, C)."""
        averaging = np.full(x.shape[1], 1 / x.shape[1], dtype=x.dtype)  # x @ averaging is the mean of each row, from the BLAS
        y = x - (x @ averaging)[:, None]
        variance = (y * y) @ averaging
        y *= (1 / np.sqrt(variance + x.dtype.type(eps)))[:, None]
        y *= weight
        if bias is not None:
            y += bias
        return y

    def gelu_decode(self, x: Array) -> Array:
        """Elementwise."""
        g = x * x
        g *= GELU_SCALE * GELU_CUBIC
        g += GELU_SCALE
        g *= x
        np.tanh(g, out=g)
        g += 1
        g *= x
        g *= 0.5
        return g

    def attention_decode(self, q: Array, k: Array, v: Array, absent: Array | None) -> Array:
        """q (B, H, 1, head_dim), k and v (B, H, S, head_dim) -> (B, H, head_dim).

        absent: None, or (B, 1, S, 1) with -inf where a sequence has no key; see KVCache.
        """
        e = k @ (q * q.dtype.type(1 / sqrt(q.shape[-1]))).swapaxes(2, 3)  # the scores, (B, H, S, 1)
        if absent is not None:
            e += absent
        e -= e.max(axis=2, keepdims=True)
        np.exp(e, out=e)
        total = e.sum(axis=2)
        y = (e.swapaxes(2, 3) @ v)[:, :, 0]
        y /= total
        return y
