"""The layers of a model: linear, embedding, rotary positions, layer norm, activations, dropout, residual. No attention, no GPT.

A layer that generation needs has two forward passes side by side:

    layer(x)            x is a Tensor; the graph is recorded. For training and evaluation.
    layer.decode(x)     x is a NumPy array with one row for each sequence; no graph. For one more token of each sequence.

To decode a token, the model multiplies vectors with matrices, so the time is the time to read the weights. Tensors, checks
and kernels for thousands of rows would take more than half of that time. So `decode` uses none of them. A test compares
the two forward passes at every position.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from npgpt.engine import ops
from npgpt.engine.backend import CPU, CPU_KERNELS, Backend
from npgpt.engine.tensor import Tensor
from npgpt.kernels.reference import Array
from npgpt.model.module import Module


def _parameter(backend: Backend, shape: tuple[int, ...], dtype: Any, fill: float = 0.0) -> Tensor:
    return Tensor(backend.xp.full(shape, fill, dtype=dtype), requires_grad=True)


def _data(parameter: Tensor | None) -> Array | None:
    return None if parameter is None else parameter.data


class Linear(Module):
    """y = x @ weight + bias, with weight (in, out) and bias (out,). Both start as zeros. The model then draws the weight."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (n_in, n_out), dtype)
        self.bias = _parameter(backend, (n_out,), dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return ops.linear(x, self.weight, self.bias)

    def decode(self, x: Array, onto: Array | None = None) -> Array:
        """x (B, in) -> (B, out), added to `onto` if it is given."""
        return CPU_KERNELS.linear_decode(x, self.weight.data, _data(self.bias), onto)


class Embedding(Module):
    """A table of `n` vectors of size `dim`, looked up by id. It starts as zeros. The model then draws it."""

    def __init__(self, n: int, dim: int, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (n, dim), dtype)

    def __call__(self, ids: Any) -> Tensor:
        """ids (...) -> (..., dim)."""
        return ops.embedding(self.weight, ids)

    def decode(self, ids: Any) -> Array:
        """ids (B,) -> (B, dim), or one id -> (dim,)."""
        return self.weight.data[ids]


class Rotary(Module):
    """Rotary positions (Su et al., 2021): queries and keys are turned by angles that grow with their position.

    The rotations of the first n positions are computed once, for all blocks, but of at most `most_kept`.
    """

    base = 10_000.0
    most_kept = 1 << 14  # a checkpoint may claim any block_size, and no array in it shows whether that is true

    def __init__(self, n: int, head_dim: int, backend: Backend = CPU, dtype: Any = np.float32):
        self._n, self._head_dim, self._backend, self._dtype = min(n, self.most_kept), head_dim, backend, np.dtype(dtype)
        self._table = self._rotations(0, self._n)
        self._beyond = functools.lru_cache(maxsize=1)(self._rotations)  # each block of a model asks for the same one

    def _rotations(self, first: int, n: int) -> Array:
        """(n, head_dim): cos and sin in turns, for the positions from `first` on."""
        frequencies = self.base ** (-np.arange(0, self._head_dim, 2) / self._head_dim)
        angles = np.arange(first, first + n)[:, None] * frequencies  # float64, so that far positions are exact enough
        table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(n, self._head_dim)
        return self._backend.asarray(table, dtype=self._dtype)

    def _at(self, first: int, n: int) -> Array:
        return self._table[first : first + n] if first + n <= self._n else self._beyond(first, n)

    def __call__(self, x: Tensor, first: int) -> Tensor:
        """x (B, T, ..., head_dim), at the positions from `first` on -> the same shape."""
        rotations = self._at(first, x.shape[1])
        return ops.rotary(x, rotations.reshape(x.shape[1], *[1] * (x.ndim - 3), self._head_dim))

    def decode(self, x: Array, position: int | Array) -> Array:
        """x (B, ..., head_dim), at one position or each sequence at its own, (B,) -> the same shape."""
        if isinstance(position, int):
            return CPU.kernels.rotary_forward(x, self._at(position, 1))[0]
        rotations = self.rotations(position)
        return CPU.kernels.rotary_forward(x, rotations.reshape(len(x), *[1] * (x.ndim - 2), self._head_dim))[0]

    def rotations(self, positions: Array) -> Array:
        """(B,) -> (B, head_dim)."""
        rotations = [self._at(position, 1) for position in positions.tolist()]
        return np.concatenate(rotations) if rotations else self._at(0, 0)


class LayerNorm(Module):
    """Layer normalisation over the last axis, of size `dim`. The weight starts at 1, the bias at 0."""

    eps = 1e-5

    def __init__(self, dim: int, bias: bool = True, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (dim,), dtype, fill=1.0)
        self.bias = _parameter(backend, (dim,), dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def decode(self, x: Array) -> Array:
        """x (B, dim) -> (B, dim)."""
        return CPU_KERNELS.layer_norm_decode(x, self.weight.data, _data(self.bias), self.eps)


class GELU(Module):
    """GELU in the tanh form of GPT-2, elementwise."""

    def __call__(self, x: Tensor) -> Tensor:
        return ops.gelu(x)

    def decode(self, x: Array) -> Array:
        return CPU_KERNELS.gelu_decode(x)


class ReLU(Module):
    """max(x, 0), elementwise."""

    def __call__(self, x: Tensor) -> Tensor:
        return ops.relu(x)

    def decode(self, x: Array) -> Array:
        return np.maximum(x, 0)


ACTIVATIONS: dict[str, type[GELU] | type[ReLU]] = {"gelu": GELU, "relu": ReLU}


class Dropout(Module):
    """Dropout with probability p.

    It acts only in a call that gets a random generator. So there is no training mode that could be left on or off.
    """

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, rng: Any) -> Tensor:
        return ops.dropout(x, self.p, rng)


class Residual(Module):
    """The residual connection x + dropout(branch), with dropout probability p. See Dropout."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, branch: Tensor, rng: Any) -> Tensor:
        return ops.residual(x, branch, self.p, rng)
