"""Modules, and the flat arrays that hold all parameters of a model. No layers and no GPT.

A `Module` finds its parameters (Tensors that require a gradient) in its attributes, in the modules among them, and in
lists, tuples and dictionaries of these. It ignores other attributes. The name of a parameter is its attribute path, such as
`blocks.0.attn.qkv.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from npgpt.engine.backend import to_numpy
from npgpt.engine.tensor import Tensor
from npgpt.kernels.reference import Array

CACHE_LINE = 64  # bytes


class Parameters(list[Tensor]):
    """A list of parameters that are views into one flat array; their gradients are views into another.

    `data` and `grad` are the flat arrays, both of shape (n,). Parameters of two or more dimensions come first. They fill
    `data[:n_decay]`, the slice that weight decay acts on. So one pass over one vector updates a whole model, and the norm
    of its gradient needs no loop over parameters.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Move the tensors' values and gradients into new flat arrays.

        Raises ValueError if there are no tensors, if one occurs twice, or if their dtypes or devices differ.
        """
        found = list(tensors)
        if not found:
            raise ValueError("there are no parameters")
        if len({id(t) for t in found}) != len(found):
            raise ValueError("a parameter occurs twice in the list of parameters")
        if len({(t.backend, t.dtype) for t in found}) != 1:
            raise ValueError("parameters in one flat array must share one dtype and one device")
        super().__init__(sorted(found, key=lambda t: t.ndim < 2))  # stable: matrices first, else in order
        xp, n = self[0].backend.xp, sum(t.size for t in self)
        self.n_decay: int = sum(t.size for t in self if t.ndim >= 2)
        # On a CPU, gradients take no memory before they are written to. So a model that only generates needs half as much.
        data, grad = _aligned(xp, n, self[0].dtype), xp.zeros(n, dtype=self[0].dtype)
        start = 0
        for t in self:
            view = slice(start, start + t.size)
            data[view] = t.data.reshape(-1)
            t.data = data[view].reshape(t.shape)  # the memory of the tensor's own array can go
            if t.grad is not None:
                grad[view] = t.grad.reshape(-1)
            start += t.size
        self.bind(data, grad)

    def bind(self, data: Array, grad: Array) -> None:
        """Make the parameters views into these two arrays. The parameters take the arrays' values.

        Raises ValueError if an array has another shape or dtype.
        """
        expected = (sum(t.size for t in self),), self[0].dtype
        for array in (data, grad):
            if (array.shape, array.dtype) != expected:
                raise ValueError(f"expected an array of shape and dtype {expected}, got {(array.shape, array.dtype)}")
        self.data: Array = data
        self.grad: Array = grad
        start = 0
        for t in self:
            view = slice(start, start + t.size)
            t.data, t.grad = data[view].reshape(t.shape), grad[view].reshape(t.shape)
            start += t.size
        self._views = [(t.data, t.grad) for t in self]

    def move_to(self, data: Array, grad: Array) -> None:
        """Copy values and gradients into these two arrays, and bind the parameters to them."""
        data[...], grad[...] = self.data, self.grad
        self.bind(data, grad)

    def __reduce__(self) -> tuple[Any, ...]:
        """A deep copy, or an unpickled list, has flat arrays of its own."""
        return Parameters, (list(self),)

    def __copy__(self) -> list[Tensor]:
        """A shallow copy has the same tensors, and they stay views into these arrays. So it is a plain list."""
        return list(self)

    def check(self) -> None:
        """Raise RuntimeError if a parameter is no longer a view into the flat arrays."""
        for t, (data, grad) in zip(self, self._views, strict=True):
            if t.data is not data or t.grad is not grad:
                raise RuntimeError(
                    "a parameter's .data or .grad was replaced, so it is no longer part of the model's flat array; "
                    "write into them in place (p.data[...] = values) and clear gradients with zero_grad()"
                )

    def share_data(self, other: Parameters) -> None:
        """Use the values of `other`, a list of parameters of the same shapes. The gradients stay separate."""
        self.bind(other.data, self.grad)


def _aligned(xp: Any, n: int, dtype: Any) -> Array:
    """An array (n,) that begins with a cache line. Reading weights a vector at a time then reads each line once."""
    if xp is not np:
        return xp.empty(n, dtype=dtype)
    memory = np.empty(n * dtype.itemsize + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + n * dtype.itemsize].view(dtype)


class Module:
    """Base class of everything that has parameters."""

    flat: Parameters  # all parameters; set by `flatten_parameters`

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(dotted name, parameter) for every parameter, in the order in which the attributes were set."""
        for name, value in vars(self).items():
            yield from _parameters_in(value, prefix + name)

    def parameters(self) -> list[Tensor]:
        """All parameters: a `Parameters` after `flatten_parameters`, else a plain list."""
        return getattr(self, "flat", None) or [p for _, p in self.named_parameters()]

    def flatten_parameters(self) -> None:
        """Move all parameters into one flat array. The root module calls this once, when it is complete."""
        self.flat = Parameters(p for _, p in self.named_parameters())

    def share_weights(self, other: Module) -> None:
        """Use the weights of `other`, a module of the same shape. The gradients stay separate.

        Changes of the weights are seen on both sides, until the parameters of `other` move to other arrays.
        """
        self.flat.share_data(other.flat)

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters."""
        zero_grad(self.parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters in host memory, by name."""
        return {name: to_numpy(p.data).copy() for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all parameters by name.

        Raises ValueError, and changes nothing, if a name is missing or unknown, or if a shape differs.
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


def _parameters_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, parameter) for the parameters in an attribute: a Tensor, a Module, or a container of these."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield name, value
    elif isinstance(value, Module):
        yield from value.named_parameters(f"{name}.")
    elif isinstance(value, list | tuple | dict) and not isinstance(value, Parameters):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parameters_in(item, f"{name}.{key}")


def zero_grad(parameters: list[Tensor]) -> None:
    """Clear the gradients: zeros in a flat array, None elsewhere."""
    if isinstance(parameters, Parameters):
        parameters.grad[...] = 0
        return
    for p in parameters:
        if p.grad is not None and getattr(p.grad, "base", None) is not None:  # a view into a flat array must stay one
            p.grad[...] = 0
        else:
            p.grad = None
