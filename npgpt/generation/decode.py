"""One more token for each sequence, on plain arrays: the forward pass of gpt.py without a graph, for drawing text.

A token of one sequence is a few dozen products of a vector with a matrix, so the time is what it takes to read the
weights, and whatever stands around the products shows: Tensors, checks and kernels made for thousands of rows would
take more than half of it. These are the same formulas on arrays of one row a sequence. A test holds them against
the model's at every position; nothing here is differentiated, and the keys and values are those of a KVCache.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from npgpt.kernels.reference import GELU_CUBIC, GELU_SCALE, Array
from npgpt.model.gpt import GPT, KVCache
from npgpt.model.module import LayerNorm, Linear

EPS = 1e-5  # of layer norms, as in ops.layer_norm
FEW_ROWS = 32  # up to here a product goes in pieces
FEW_ROWS_OF_THREADS = 8  # the same where the BLAS has threads, among which it divides no small product
PIECE = 128  # columns
SMALL_PRODUCT = 1_000_000  # multiplications, above which OpenBLAS copies its operands


class Decoder:
    """logits = decoder(ids): ids (B,), the token that follows what the cache has seen of each sequence -> (B, V)."""

    def __init__(self, model: GPT, cache: KVCache, threads: int = 1) -> None:
        """For a model on the CPU, whose weights may change in between. threads: the BLAS's, while this is called."""
        self._model, self._cache = model, cache
        self._few_rows = FEW_ROWS if threads == 1 else FEW_ROWS_OF_THREADS
        config = model.config
        self._mean = np.full(config.n_embd, 1 / config.n_embd, dtype=model.wte.weight.dtype)
        self._scale = model.wte.weight.dtype.type(1 / sqrt(config.n_embd // config.n_head))

    def __call__(self, ids: Array) -> Array:
        model, cache, config = self._model, self._cache, self._model.config
        b, c, heads = len(ids), config.n_embd, config.n_head
        at = cache.length
        x = model.wte.weight.data[ids] + model.wpe.weight.data[at]
        for layer, block in enumerate(model.blocks):
            qkv = self._linear(self._norm(x, block.ln_1), block.attn.qkv).reshape(b, 3, heads, c // heads)
            keys, values = cache.room[layer]
            keys[:, :, at], values[:, :, at] = qkv[:, 1], qkv[:, 2]
            q = (qkv[:, 0] * self._scale)[..., None]
            e = keys[:, :, : at + 1] @ q  # (B, n_head, at + 1, 1)
            e -= e.max(axis=2, keepdims=True)
            np.exp(e, out=e)
            total = e.sum(axis=2)
            y = (e.swapaxes(2, 3) @ values[:, :, : at + 1])[:, :, 0]
            y /= total
            x += self._linear(y.reshape(b, c), block.attn.out)
            hidden = self._linear(self._norm(x, block.ln_2), block.mlp.fc)
            hidden = _gelu(hidden) if config.activation == "gelu" else np.maximum(hidden, 0, out=hidden)
            x += self._linear(hidden, block.mlp.proj)
        cache.length += 1
        x = self._norm(x, model.ln_f)
        return x @ model.wte.weight.data.T if config.tie_weights else self._linear(x, model.lm_head)

    def _linear(self, x: Array, linear: Linear) -> Array:
        y = few_rows_product(x, linear.weight.data, self._few_rows)
        if linear.bias is not None:
            y += linear.bias.data
        return y

    def _norm(self, x: Array, norm: LayerNorm) -> Array:
        y = x - (x @ self._mean)[:, None]
        variance = (y * y) @ self._mean
        y *= (1 / np.sqrt(variance + x.dtype.type(EPS)))[:, None]
        y *= norm.weight.data
        if norm.bias is not None:
            y += norm.bias.data
        return y


def few_rows_product(x: Array, weight: Array, few_rows: int = FEW_ROWS) -> Array:
    """x (B, n) @ weight (n, m), for 2 to `few_rows` rows in pieces small enough that OpenBLAS, with its AVX-512 kernels,
    reads the weights where they are. Of a larger product it copies them into another order first, which takes longer
    than all the rest; so a token of each of four sequences takes hardly longer than that of one."""
    (rows, n), m = x.shape, weight.shape[1]
    if not 1 < rows <= few_rows or m % PIECE:
        return x @ weight

    def pieces(a: Array) -> Array:
        """(k, m) -> (m / PIECE, k, PIECE)."""
        return a.reshape(len(a), m // PIECE, PIECE).swapaxes(0, 1)

    y = np.zeros((rows, m), dtype=x.dtype)
    out, parts = pieces(y), -(-rows * n * PIECE // SMALL_PRODUCT)
    for i in range(parts):
        at = slice(n * i // parts, n * (i + 1) // parts)
        out += x[:, at] @ pieces(weight[at])
    return y


def _gelu(x: Array) -> Array:
    g = x * x
    g *= GELU_SCALE * GELU_CUBIC
    g += GELU_SCALE
    g *= x
    np.tanh(g, out=g)
    g += 1
    g *= x
    g *= 0.5
    return g
