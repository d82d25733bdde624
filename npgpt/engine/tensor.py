"""Tensor and reverse-mode automatic differentiation: the engine under every model.

A Tensor is an array with a gradient. An operation computes its output array and, through `record`,
remembers one function: given the gradient of the output, return the gradients of the inputs.
`Tensor.backward` calls these functions from the last operation to the first. Arithmetic, products,
reductions and changes of shape are here, each with its derivative beside it; neural operations are in
ops.py, and their arithmetic in kernels/.

The backward functions close over arrays, never over Tensors, and the graph points only backwards (from
an output to its inputs). So there are no reference cycles, and memory is freed the moment the last
reference goes, without waiting for the garbage collector.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from npgpt.engine.backend import Backend, backend_of, is_float, to_numpy
from npgpt.kernels.reference import Array

Scalar = int | float
Backward = Callable[[Array], Sequence["Array | Part | None"]]

# Per thread and per task, so that a worker evaluating under no_grad does not switch off another's graph.
_recording: ContextVar[bool] = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within `with no_grad():` (or a function decorated `@no_grad()`) no graph is recorded."""
    before = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(before)


class Watch:
    """Looks on as a graph is made and walked back, inside `with watched(watch):`. See watch.py for the uses."""

    def result(self, backward: Backward, data: Array, inputs: tuple[Tensor, ...]) -> Array:
        """An operation has computed `data`; what is returned takes its place."""
        return data

    def recorded(self, node: Node) -> None:
        """The operation just seen is in the graph."""

    def arrived(self, node: Node, dy: Array) -> None:
        """On the way back, the gradient of a node's output is complete."""

    def gradient(self, node: Node, backward: Backward, dx: Array | Part, inputs: Sequence[Node | Tensor | None]) -> None:
        """A node's backward function has given the gradient of one of its inputs."""


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let `watch` look on, in this thread."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


class Node:
    """One recorded operation: where its inputs came from and how to go back through it.

    It keeps the shape and dtype of its output but not the output itself: an array lives only as long
    as a caller or a backward function that needs it.
    """

    __slots__ = ("backward", "depth", "dtype", "inputs", "shape")

    def __init__(self, output: Array, inputs: tuple[Node | Tensor | None, ...], backward: Backward) -> None:
        self.shape = output.shape
        self.dtype = output.dtype
        self.inputs = inputs  # a Node, a leaf Tensor, or None where no gradient is wanted
        self.backward = backward
        # One more than the deepest input: going from deep to shallow is a topological order.
        self.depth: int = 1 + max((n.depth for n in inputs if isinstance(n, Node)), default=0)


class Part:
    """The gradient of an input of which only the slice at `index` was used: `values` there, zero elsewhere.

    Gradients of several slices of one array are written into one array, instead of being filled up with
    zeros and added.
    """

    __slots__ = ("index", "values")

    def __init__(self, index: Any, values: Array) -> None:
        self.index, self.values = index, values

    def whole(self, source: Node | Tensor) -> Array:
        """As an array of the input's shape."""
        array = backend_of(self.values).xp.zeros(source.shape, dtype=source.dtype)
        array[self.index] = self.values
        return array


def record(data: Array, inputs: tuple[Tensor, ...], backward: Backward) -> Tensor:
    """Wrap an operation's output array and remember how to go back through it.

    `backward(dy)` gets dL/d(output), of the output's shape, which it must not write to. It returns one
    gradient per input, in order; None where there is none. A gradient may have the shape the input was
    broadcast to, it is summed back; or be a Part. Nothing is remembered under `no_grad` or when no input requires a
    gradient; `backward` is then dropped with all it holds.
    """
    watch = _watch.get()
    if watch:
        data = watch.result(backward, data, inputs)
    output = Tensor(data)
    if _recording.get() and any(t.requires_grad for t in inputs):
        edges = tuple((t._node or t) if t.requires_grad else None for t in inputs)
        output.requires_grad = True
        output._node = Node(output.data, edges, backward)
        if watch:
            watch.recorded(output._node)
    return output


class Tensor:
    """An array that can take part in differentiation.

    `data` is an array (kept, not copied), or numbers in nested lists, which become float32. With
    `requires_grad=True` it is a leaf: after `loss.backward()`, `.grad` holds dloss/dtensor as an array
    of the same shape and dtype, added to what was there before. Results of operations get no `.grad`.
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # array * tensor is Tensor.__rmul__, not an array of Tensors

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            data = data.data
        elif not hasattr(data, "dtype"):
            data = np.asarray(data)
            if data.dtype == np.float64:
                data = data.astype(np.float32)
        elif isinstance(data, np.generic):
            data = np.asarray(data)
        if requires_grad and not is_float(data.dtype):
            raise TypeError(f"only a float tensor can require a gradient, got dtype {data.dtype}")
        self.data: Array = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: Node | None = None

    # ---------------------------------------------------------------- facts

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def backend(self) -> Backend:
        return backend_of(self.data)

    def numpy(self) -> np.ndarray:
        """The values in host memory; on the CPU this is the tensor's own array, not a copy."""
        return to_numpy(self.data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same array without its history: gradients stop here."""
        return Tensor(self.data)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=20, prefix="Tensor(")
        return f"Tensor({values}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self) -> bool:
        return bool(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        if self.ndim == 0:
            raise TypeError("a tensor of no dimensions cannot be iterated over")
        return (self[i] for i in range(self.shape[0]))

    # ---------------------------------------------------------------- going back

    def backward(self, gradient: Array | None = None) -> None:
        """Add dself/dleaf to `.grad` of every leaf that this tensor was computed from.

        `gradient` is dL/dself; it may be left out when self has one element, and is then 1. The graph
        is used up on the way, each operation's saved arrays freed as soon as it is passed: a second
        call needs a second forward pass. There are no gradients of gradients.

        Raises RuntimeError when there is nothing to differentiate or the graph was used before.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() needs a tensor computed from one with requires_grad=True (outside no_grad)")
        xp = self.backend.xp
        if gradient is None:
            if self.size != 1:
                raise RuntimeError(
                    f"backward() without a gradient needs a tensor of one element, this one has shape {self.shape}; "
                    "sum() it first or pass the gradient"
                )
            gradient = xp.ones(self.shape, dtype=self.dtype)
        elif isinstance(gradient, Tensor):
            gradient = gradient.data
        gradient = xp.asarray(gradient, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"the gradient must have the tensor's shape {self.shape}, got {gradient.shape}")
        if self._node is None:
            _add_to_leaf(self, gradient)
        else:
            _walk_back(self._node, gradient)

    # ---------------------------------------------------------------- arithmetic
    #
    # `other` may be a number, an array or a Tensor. A number stays a Python number, so that it never
    # widens the dtype. Shapes broadcast as in NumPy; the engine sums gradients back.

    def __add__(self, other: Any) -> Tensor:
        b, b_data = _operand(self, other)
        return _binary(self.data + b_data, self, b, lambda dy: dy, lambda dy: dy)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        b, b_data = _operand(self, other)
        return _binary(self.data - b_data, self, b, lambda dy: dy, lambda dy: -dy)

    def __rsub__(self, other: Any) -> Tensor:
        return -self + other

    def __mul__(self, other: Any) -> Tensor:
        a_data = self.data
        b, b_data = _operand(self, other)
        return _binary(a_data * b_data, self, b, lambda dy: dy * b_data, lambda dy: dy * a_data)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        a_data = self.data
        b, b_data = _operand(self, other)
        y = a_data / b_data
        return _binary(y, self, b, lambda dy: dy / b_data, lambda dy: -dy * y / b_data)

    def __rtruediv__(self, other: Any) -> Tensor:
        b, b_data = _operand(self, other)
        if b is not None:
            return b / self
        a_data = self.data
        y = b_data / a_data
        return record(y, (self,), lambda dy: (-dy * y / a_data,))

    def __pow__(self, exponent: Any) -> Tensor:
        xp, a_data = self.backend.xp, self.data
        b, b_data = _operand(self, exponent)
        y = a_data**b_data

        def da(dy: Array) -> Array:  # where b = 0 the power is constant, also at a = 0
            return dy * xp.where(b_data == 0, 0, b_data * a_data ** xp.where(b_data == 0, 1, b_data - 1))

        def db(dy: Array) -> Array:  # where a = 0 and b > 0 the power is constant in b
            return dy * y * xp.log(xp.where(a_data == 0, 1, a_data))

        if b is None:  # the common case, a fixed number
            return record(y, (self,), lambda dy: (dy * (b_data * a_data ** (b_data - 1) if b_data != 0 else 0.0),))
        return _binary(y, self, b, da, db)

    def __rpow__(self, base: Scalar) -> Tensor:
        y = base**self.data
        return record(y, (self,), lambda dy: (dy * y * math.log(base),))

    def __neg__(self) -> Tensor:
        return record(-self.data, (self,), lambda dy: (-dy,))

    def __matmul__(self, other: Any) -> Tensor:
        """The matrix product of the last two axes, the others broadcast: (..., n, k) @ (..., k, m)."""
        a_data = self.data
        b, b_data = _operand(self, other)
        if b is None or self.ndim == 0 or b.ndim == 0:
            raise ValueError(f"@ needs two matrices (or vectors), got shapes {self.shape} and {np.shape(b_data)}")
        if self.ndim == 1:
            return (self.reshape(1, -1) @ b)[..., 0, :] if b.ndim > 1 else (self.reshape(1, -1) @ b)[0]
        if b.ndim == 1:
            return (self @ b.reshape(-1, 1))[..., 0]
        y = a_data @ b_data
        return _binary(y, self, b, lambda dy: dy @ b_data.swapaxes(-1, -2), lambda dy: a_data.swapaxes(-1, -2) @ dy)

    def __rmatmul__(self, other: Any) -> Tensor:
        return Tensor(other) @ self

    # ---------------------------------------------------------------- elementwise functions

    def exp(self) -> Tensor:
        y = self.backend.xp.exp(self.data)
        return record(y, (self,), lambda dy: (dy * y,))

    def log(self) -> Tensor:
        x = self.data
        return record(self.backend.xp.log(x), (self,), lambda dy: (dy / x,))

    def tanh(self) -> Tensor:
        y = self.backend.xp.tanh(self.data)
        return record(y, (self,), lambda dy: (dy * (1 - y * y),))

    def sqrt(self) -> Tensor:
        y = self.backend.xp.sqrt(self.data)
        return record(y, (self,), lambda dy: (dy * 0.5 / y,))

    # ---------------------------------------------------------------- reductions

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        xp, shape = self.backend.xp, self.shape
        axes = range(self.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        summed = {a % max(1, self.ndim) for a in axes}
        kept = tuple(1 if i in summed else n for i, n in enumerate(shape))
        y = xp.asarray(self.data.sum(axis=axis, keepdims=keepdims))
        return record(y, (self,), lambda dy: (xp.broadcast_to(dy.reshape(kept), shape),))

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        total = self.sum(axis=axis, keepdims=keepdims)
        return total / (self.size // max(total.size, 1))

    # ---------------------------------------------------------------- shape

    def astype(self, dtype: Any) -> Tensor:
        """The values rounded to another float dtype; the gradient comes back in this one."""
        if self.dtype == dtype:
            return self
        if not is_float(np.dtype(dtype)):
            raise TypeError(f"astype: expected a float dtype, got {np.dtype(dtype)}")
        before = self.dtype
        return record(self.data.astype(dtype), (self,), lambda dy: (dy.astype(before),))

    def reshape(self, *shape: Any) -> Tensor:
        before = self.shape
        return record(self.data.reshape(*shape), (self,), lambda dy: (dy.reshape(before),))

    def transpose(self, *axes: Any) -> Tensor:
        """Axes in a new order, as `numpy.transpose`: all of them, or none for the reverse order."""
        y = self.data.transpose(*axes)
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        back = tuple(np.argsort([axis % self.ndim for axis in order]).tolist()) if order else None
        return record(y, (self,), lambda dy: (dy.transpose(back),))

    def swapaxes(self, axis1: int, axis2: int) -> Tensor:
        return record(self.data.swapaxes(axis1, axis2), (self,), lambda dy: (dy.swapaxes(axis1, axis2),))

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def __getitem__(self, index: Any) -> Tensor:
        """NumPy's indexing, with slices, integers and arrays; an element picked twice collects both gradients."""
        index = _raw_index(index, self.backend)
        xp, shape, dtype = self.backend.xp, self.shape, self.dtype

        def backward(dy: Array) -> tuple[Array | Part]:
            if _is_basic(index):
                return (Part(index, xp.asarray(dy)),)  # each element picked once
            dx = xp.zeros(shape, dtype=dtype)
            xp.add.at(dx, index, dy)
            return (dx,)

        return record(xp.asarray(self.data[index]), (self,), backward)


# ---------------------------------------------------------------- the walk back


def _used_up(dy: Array) -> Sequence[Array | None]:
    raise RuntimeError(
        "backward() has already gone through this graph and freed it; run the forward pass again. "
        "(Gradients of gradients are not supported.)"
    )


def _walk_back(root: Node, gradient: Array) -> None:
    """Run backward functions from `root` to the leaves, without recursion."""
    pending = _Pending()
    pending.add(root, gradient)
    watch = _watch.get()
    while pending:
        node, dy = pending.pop()
        if watch:
            watch.arrived(node, dy)
        inputs, backward = node.inputs, node.backward
        node.inputs, node.backward = (), _used_up
        for source, dx in zip(inputs, backward(dy), strict=True):
            if source is None or dx is None:
                continue
            if watch:
                watch.gradient(node, backward, dx, inputs)
            if isinstance(source, Tensor):
                _add_to_leaf(source, dx)
            else:
                pending.add(source, dx)


class _Pending:
    """The nodes on the way back whose gradients are being collected.

    They are taken deepest first: everything that used a node's output is deeper than the node, so its
    gradient is complete when its turn comes.
    """

    def __init__(self) -> None:
        self._gradients: dict[Node, Array] = {}
        self._own: set[Node] = set()  # nodes whose gradient is an array made here, free to be added to
        self._queue: list[tuple[int, int, Node]] = []
        self._found = 0  # breaks ties between equal depths in order of discovery: the same order on every run

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, node: Node, dx: Array | Part) -> None:
        if node not in self._gradients:
            heapq.heappush(self._queue, (-node.depth, self._found, node))
            self._found += 1
            if isinstance(dx, Part):
                self._gradients[node] = dx.whole(node)
                self._own.add(node)
            else:
                self._gradients[node] = _fit(dx, node)  # borrowed: another node's array, or a read-only view
        elif isinstance(dx, Part):
            if node not in self._own:
                self._gradients[node] = backend_of(dx.values).xp.array(self._gradients[node])
                self._own.add(node)
            self._gradients[node][dx.index] += dx.values
        elif node in self._own:
            self._gradients[node] += _fit(dx, node)
        else:
            total = self._gradients[node] + _fit(dx, node)
            self._gradients[node] = np.asarray(total) if isinstance(total, np.generic) else total  # of no dimensions
            self._own.add(node)

    def pop(self) -> tuple[Node, Array]:
        _, _, node = heapq.heappop(self._queue)
        self._own.discard(node)
        return node, self._gradients.pop(node)


def _add_to_leaf(leaf: Tensor, gradient: Array | Part) -> None:
    gradient = gradient.whole(leaf) if isinstance(gradient, Part) else _fit(gradient, leaf)
    if leaf.grad is None:
        leaf.grad = leaf.backend.xp.array(gradient)  # a copy: the leaf owns its gradient
    else:
        leaf.grad += gradient  # in place: parameters' gradients are views into one flat array


def _fit(gradient: Array, source: Node | Tensor) -> Array:
    """The gradient in the shape and dtype of what it is the gradient of: broadcasting copied the input
    along some axes, so the copies' gradients are added up."""
    shape = source.shape
    if gradient.shape != shape:
        extra = gradient.ndim - len(shape)
        gradient = gradient.sum(axis=tuple(range(extra))) if extra > 0 else gradient
        stretched = tuple(i for i, n in enumerate(shape[: gradient.ndim]) if n == 1 and gradient.shape[i] != 1)
        gradient = gradient.sum(axis=stretched, keepdims=True) if stretched else gradient
    if gradient.shape != shape:
        raise RuntimeError(f"a backward function returned a gradient of shape {gradient.shape} for an input of shape {shape}")
    return gradient if gradient.dtype == source.dtype else gradient.astype(source.dtype)


# ---------------------------------------------------------------- helpers of the operations


def _operand(like: Tensor, other: Any) -> tuple[Tensor | None, Any]:
    """The other side of a binary operation: its Tensor (None for a number) and its raw value."""
    if isinstance(other, int | float | np.generic):
        return None, other.item() if isinstance(other, np.generic) else other
    if not isinstance(other, Tensor):
        other = Tensor(other)
    backend_of(like.data, other.data)
    return other, other.data


def _binary(data: Array, a: Tensor, b: Tensor | None, da: Callable[[Array], Array], db: Callable[[Array], Array]) -> Tensor:
    """Record an operation of two inputs, keeping only the derivatives that will be asked for, so that an
    input without gradient costs neither time nor the arrays its derivative would hold."""
    if b is None or not b.requires_grad:
        return record(data, (a,), lambda dy: (da(dy),))
    if not a.requires_grad:
        return record(data, (b,), lambda dy: (db(dy),))
    return record(data, (a, b), lambda dy: (da(dy), db(dy)))


def _raw_index(index: Any, backend: Backend) -> Any:
    """An index of arrays of the device, and of numbers and slices."""
    if isinstance(index, tuple):
        return tuple(_raw_index(i, backend) for i in index)
    index = index.data if isinstance(index, Tensor) else index
    return backend.asarray(index) if isinstance(index, np.ndarray | list) and backend.xp is not np else index


def _is_basic(index: Any) -> bool:
    """Whether an index is of slices and integers alone, and so picks no element twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, int | np.integer | slice) for p in parts)
