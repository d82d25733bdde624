"""Modules with parameters, and the flat buffer all parameters of a model live in. Nothing here knows GPT.

A `Module` is any object whose attributes are parameters (Tensors that require a gradient), other
modules, or lists of modules. Names are the attribute path: `blocks.0.attn.qkv.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from npgpt.engine import ops
from npgpt.engine.backend import CPU, Backend, to_numpy
from npgpt.engine.tensor import Tensor
from npgpt.kernels.reference import Array


class Parameters(list[Tensor]):
    """Parameters as views into one flat array, their gradients as views into another.

    `data` and `grad` are those flat arrays, both of shape (n,). Parameters of two or more dimensions
    come first: they fill `data[:n_decay]`, the slice that weight decay acts on. So one pass over one
    vector updates a whole model, and one dot product is its gradient's norm.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Moves the tensors' values into the buffer. Raises ValueError when there are none, one occurs
        twice, or their dtypes or devices differ."""
        found = list(tensors)
        if not found:
            raise ValueError("there are no parameters")
        if len({id(t) for t in found}) != len(found):
            raise ValueError("a parameter occurs twice in the list of parameters")
        if len({(t.backend.name, t.dtype) for t in found}) != 1:
            raise ValueError("parameters in one buffer must share one dtype and one device")
        super().__init__(sorted(found, key=lambda t: t.ndim < 2))  # stable: matrices first, else in order
        xp = self[0].backend.xp
        self.n_decay: int = sum(t.size for t in self if t.ndim >= 2)
        data = xp.concatenate([t.data.reshape(-1) for t in self])
        self.look_at(data, xp.zeros_like(data))

    def look_at(self, data: Array, grad: Array) -> None:
        """Have the parameters look into these buffers, whatever they hold, and no longer into the old ones. Raises
        ValueError when they are not of the right size and dtype."""
        expected = (sum(t.size for t in self),), self[0].dtype
        for buffer in (data, grad):
            if (buffer.shape, buffer.dtype) != expected:
                raise ValueError(f"expected a buffer of shape and dtype {expected}, got {(buffer.shape, buffer.dtype)}")
        self.data: Array = data
        self.grad: Array = grad
        start = 0
        for t in self:
            view = slice(start, start + t.size)
            t.data, t.grad = data[view].reshape(t.shape), grad[view].reshape(t.shape)
            start += t.size
        self._views = [(t.data, t.grad) for t in self]

    def move_to(self, data: Array, grad: Array) -> None:
        """Copy values and gradients into other buffers, and look into those from now on."""
        data[...], grad[...] = self.data, self.grad
        self.look_at(data, grad)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or unpickled, parameters move into a buffer of their own."""
        return Parameters, (list(self),)

    def check(self) -> None:
        """Raises RuntimeError when a parameter no longer looks into the buffer."""
        for t, (data, grad) in zip(self, self._views, strict=True):
            if t.data is not data or t.grad is not grad:
                raise RuntimeError(
                    "a parameter's .data or .grad was replaced, so the model's flat buffer no longer sees it; "
                    "write into them in place (p.data[...] = values) and clear gradients with zero_grad()"
                )

    def share_data(self, other: Parameters) -> None:
        """Look at the values of `other`, whose parameters have the same shapes, and keep gradients of its own."""
        self.look_at(other.data, self.grad)


class Module:
    """Base of everything that has parameters."""

    flat: Parameters  # all of them in one buffer, once `flatten_parameters` was called

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(dotted name, parameter) in the order the attributes were set."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.requires_grad:
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_parameters(f"{prefix}{name}.")
            elif isinstance(value, list) and not isinstance(value, Parameters):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield from item.named_parameters(f"{prefix}{name}.{i}.")

    def parameters(self) -> list[Tensor]:
        """All parameters: a `Parameters` when they have been flattened into one buffer, else a list."""
        return getattr(self, "flat", None) or [p for _, p in self.named_parameters()]

    def flatten_parameters(self) -> None:
        """Move all parameters into one flat buffer. The root module does this once, when it is complete."""
        self.flat = Parameters(p for _, p in self.named_parameters())

    def share_weights(self, other: Module) -> None:
        """Use the weights of `other`, a module of the same shape: a change there is seen here, until its parameters move
        to another buffer. Gradients stay separate."""
        self.flat.share_data(other.flat)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        zero_grad(self.parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter by name, in host memory."""
        return {name: to_numpy(p.data).copy() for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every parameter by name.

        Raises ValueError, and changes nothing, when a name is missing or unknown or a shape differs.
        """
        own = dict(self.named_parameters())
        problems = [f"missing {name}" for name in own if name not in state]
        problems += [f"unknown {name}" for name in state if name not in own]
        problems += [
            f"{name} has shape {np.shape(state[name])}, expected {p.shape}"
            for name, p in own.items()
            if name in state and np.shape(state[name]) != p.shape
        ]
        if problems:
            raise ValueError("the weights do not fit the model: " + "; ".join(problems))
        for name, p in own.items():
            p.data[...] = p.backend.asarray(state[name], dtype=p.dtype)


def zero_grad(parameters: list[Tensor]) -> None:
    """Forget the gradients: zeros in a flat buffer, None elsewhere."""
    if isinstance(parameters, Parameters):
        parameters.grad[...] = 0
    else:
        for p in parameters:
            p.grad = None


def _parameter(backend: Backend, shape: tuple[int, ...], dtype: Any, fill: float = 0.0) -> Tensor:
    return Tensor(backend.xp.full(shape, fill, dtype=dtype), requires_grad=True)


class Linear(Module):
    """y = x @ weight + bias; weight (in, out), bias (out,). Zeros until the model draws its weights."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (n_in, n_out), dtype)
        self.bias = _parameter(backend, (n_out,), dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of `n` vectors of size `dim`, looked up by id. Zeros until the model draws its weights."""

    def __init__(self, n: int, dim: int, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (n, dim), dtype)

    def __call__(self, ids: Any) -> Tensor:
        return ops.embedding(self.weight, ids)


class LayerNorm(Module):
    """Layer normalisation over the last axis, of size `dim`; weight starts at 1, bias at 0."""

    def __init__(self, dim: int, bias: bool = True, backend: Backend = CPU, dtype: Any = np.float32):
        self.weight = _parameter(backend, (dim,), dtype, fill=1.0)
        self.bias = _parameter(backend, (dim,), dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class Dropout(Module):
    """Dropout with probability p. It acts when, and only when, it is given a generator: there is no
    training mode to forget to switch."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, rng: Any) -> Tensor:
        return ops.dropout(x, self.p, rng)


class Residual(Module):
    """x + dropout(branch) with probability p; see Dropout."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, branch: Tensor, rng: Any) -> Tensor:
        return ops.residual(x, branch, self.p, rng)
