"""Tensor: an array that knows its gradient.

An operation computes its output array and calls `record`, with a backward function from the gradient of the output to the
gradients of the inputs. `Tensor.backward` walks back through all recorded operations (graph.py). This file has
arithmetic, matrix products, reductions and changes of shape, each with its derivative beside it. The neural operations
are in ops.py, and their arithmetic is in kernels/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npgpt.engine.backend import Backend, backend_of, is_float, to_numpy
from npgpt.engine.graph import Backward, Node, SliceGradient, add_to_leaf, current_watch, is_recording, walk_back
from npgpt.kernels.reference import Array


def record(data: Array, inputs: tuple[Tensor, ...], backward: Backward) -> Tensor:
    """Make a Tensor of an operation's output array `data`, and record how to go back through the operation.

    `backward(dy)` gets dL/d(output), in the shape of the output. It must not write to dy. It returns a sequence with one
    gradient for each input, in order; None stands for no gradient. A gradient may have the shape that its input was
    broadcast to: it is then summed back. It may also be a SliceGradient.

    Under `no_grad`, or when no input requires a gradient, nothing is recorded and `backward` is dropped.
    """
    watch = current_watch()
    if watch:
        data = watch.result(backward, data, inputs)
    output = Tensor(data)
    if is_recording() and any(t.requires_grad for t in inputs):
        edges = tuple((t._node or t) if t.requires_grad else None for t in inputs)
        output.requires_grad = True
        output._node = Node(output.data, edges, backward)
        if watch:
            watch.recorded(output._node)
    return output


def _comparison(function: np.ufunc) -> Callable[[Tensor, Any], Any]:
    """The method of Tensor that compares its elements with those of `other`."""

    def compare(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        xp = self.backend.xp
        return Tensor(xp.asarray(getattr(xp, function.__name__)(self.data, _operand(self, other)[1])))

    return compare


class Tensor:
    """An array that can take part in differentiation.

    `data` is an array, a number or nested lists of numbers. An array is kept as it is, without a copy. Python floats become
    float32. A Tensor made with `requires_grad=True` is a leaf: `loss.backward()` adds dloss/dtensor to its `.grad`, an
    array of the same shape and dtype. Results of operations get no `.grad`. Raises TypeError if `requires_grad` is true for
    data that is not float.
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # array * tensor is Tensor.__rmul__, not an array of Tensors

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            data = data.data
        elif not hasattr(data, "dtype"):
            data = np.asarray(data)
            data = data.astype(np.float32) if data.dtype == np.float64 else data
        elif isinstance(data, np.generic):
            data = np.asarray(data)
        if requires_grad and not is_float(data.dtype):
            raise TypeError(f"only a float tensor can require a gradient, got dtype {data.dtype}")
        self.data: Array = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: Node | None = None

    # ---------------------------------------------------------------- properties and conversions

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
        """The values in host memory. On the CPU this is the tensor's own array, not a copy."""
        return to_numpy(self.data)

    def item(self) -> float:
        """The value of a tensor with one element, as a Python number."""
        return self.data.item()

    def detach(self) -> Tensor:
        """A Tensor of the same array without its graph: no gradient flows back from it."""
        return Tensor(self.data)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For `np.asarray(tensor)`: the values in host memory, without the graph."""
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __format__(self, spec: str) -> str:
        """The format of the number, for a tensor with one element. Other tensors have no format but the empty one."""
        return format(self.item(), spec) if spec and self.size == 1 else object.__format__(self, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves can be copied and pickled. Raises RuntimeError for a result, because its copy would have no graph."""
        if self._node is not None:
            raise RuntimeError("a copy of a result would not be part of its graph; copy tensor.detach(), or the leaves")
        return _leaf, (self.data, self.grad, self.requires_grad)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=20, prefix="Tensor(")
        return f"Tensor({values}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self) -> bool:
        return bool(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        if self.ndim == 0:
            raise TypeError("a tensor of no dimensions cannot be iterated over")
        return (self[i] for i in range(self.shape[0]))

    # ---------------------------------------------------------------- backward

    def backward(self, gradient: Array | None = None) -> None:
        """Add dL/dleaf to `.grad` of every leaf that this tensor was computed from.

        `gradient` is dL/dself, in the shape of self. If self has one element, `gradient` may be left out; it is then 1, so L is
        self.
        The walk back frees the graph and the arrays it saved, so a second call needs a second forward pass. There are no
        gradients of gradients.

        Raises RuntimeError if self does not require a gradient, if the graph was used before, or if `gradient` is left out and
        self has more than one element. Raises ValueError if `gradient` has another shape.
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
        else:  # a copy, because it may be the gradient of a leaf
            gradient = xp.array(gradient.data if isinstance(gradient, Tensor) else gradient, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"the gradient must have the tensor's shape {self.shape}, got {gradient.shape}")
        if self._node is None:
            add_to_leaf(self, gradient)
        else:
            walk_back(self._node, gradient)

    # ---------------------------------------------------------------- comparisons

    # The result is a boolean Tensor, element by element, for masks. No gradient flows through it.

    __eq__ = _comparison(np.equal)
    __ne__ = _comparison(np.not_equal)
    __lt__ = _comparison(np.less)
    __le__ = _comparison(np.less_equal)
    __gt__ = _comparison(np.greater)
    __ge__ = _comparison(np.greater_equal)
    __hash__ = object.__hash__  # by identity, so that Tensors can be keys

    # ---------------------------------------------------------------- arithmetic
    #
    # `other` may be a number, an array or a Tensor. A number stays a Python number, so it does not
    # widen the dtype of a float tensor. Shapes broadcast as in NumPy, and the walk back sums gradients over the copies.

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

        def da(dy: Array) -> Array:  # where b = 0 the power is constant in a, also at a = 0
            return dy * xp.where(b_data == 0, 0, b_data * a_data ** xp.where(b_data == 0, 1, b_data - 1))

        def db(dy: Array) -> Array:  # where a = 0 and b > 0 the power is constant in b
            return dy * y * xp.log(xp.where(a_data == 0, 1, a_data))

        if b is None:  # the common case: the exponent is a number
            return record(y, (self,), lambda dy: (dy * (b_data * a_data ** (b_data - 1) if b_data != 0 else 0.0),))
        return _binary(y, self, b, da, db)

    def __rpow__(self, base: Any) -> Tensor:
        """base ** self. Where the base is 0 the gradient is 0; where it is negative the derivative does not exist: NaN."""
        b, b_data = _operand(self, base)
        if b is not None:
            return b**self
        y = b_data**self.data
        log = math.log(b_data) if b_data > 0 else 0.0 if b_data == 0 else math.nan
        return record(y, (self,), lambda dy: (dy * y * log,))

    def __neg__(self) -> Tensor:
        return record(-self.data, (self,), lambda dy: (-dy,))

    def __matmul__(self, other: Any) -> Tensor:
        """The matrix product over the last two axes; the other axes broadcast: (..., n, k) @ (..., k, m) -> (..., n, m)."""
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
        """The values in another float dtype. The gradient comes back in this tensor's dtype."""
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
        """The axes in the given order, as in `numpy.transpose`. Without arguments the order is reversed."""
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
        """Indexing as in NumPy, with slices, integers and arrays. An element that is picked twice gets both gradients."""
        index = _raw_index(index, self.backend)
        xp, shape, dtype = self.backend.xp, self.shape, self.dtype

        def backward(dy: Array) -> tuple[Array | SliceGradient]:
            if _is_basic(index):
                return (SliceGradient(index, xp.asarray(dy)),)  # no element is picked twice
            dx = xp.zeros(shape, dtype=dtype)
            xp.add.at(dx, index, dy)
            return (dx,)

        return record(xp.asarray(self.data[index]), (self,), backward)


# ---------------------------------------------------------------- helpers of the operations


def _operand(like: Tensor, other: Any) -> tuple[Tensor | None, Any]:
    """The other operand of a binary operation: (tensor, array), or (None, number) for a number."""
    if isinstance(other, int | float | np.generic):
        return None, other.item() if isinstance(other, np.generic) else other
    if isinstance(other, list | tuple):  # beside a float tensor it has that dtype, so that no digit is lost or added
        other = np.asarray(other, dtype=like.dtype if is_float(like.dtype) else None)
    if not isinstance(other, Tensor):
        other = Tensor(other)
    backend_of(like.data, other.data)
    if is_float(like.dtype) and other.dtype.kind in "iub":  # integers do not widen a float tensor, as numbers do not
        other = Tensor(other.data.astype(like.dtype))
    return other, other.data


def _leaf(data: Array, grad: Array | None, requires_grad: bool) -> Tensor:
    leaf = Tensor(data, requires_grad)
    leaf.grad = grad
    return leaf


def _binary(data: Array, a: Tensor, b: Tensor | None, da: Callable[[Array], Array], db: Callable[[Array], Array]) -> Tensor:
    """Record an operation of two inputs, with their derivatives da and db.

    Only the derivatives that will be needed are kept. So an input that requires no gradient costs no time, and the arrays
    that its derivative would hold are freed.
    """
    if b is None or not b.requires_grad:
        return record(data, (a,), lambda dy: (da(dy),))
    if not a.requires_grad:
        return record(data, (b,), lambda dy: (db(dy),))
    return record(data, (a, b), lambda dy: (da(dy), db(dy)))


def _raw_index(index: Any, backend: Backend) -> Any:
    """The index with its Tensors, and on a GPU its lists and NumPy arrays, turned into arrays of the device."""
    if isinstance(index, tuple):
        return tuple(_raw_index(i, backend) for i in index)
    index = index.data if isinstance(index, Tensor) else index
    return backend.asarray(index) if isinstance(index, np.ndarray | list) and backend.xp is not np else index


def _is_basic(index: Any) -> bool:
    """Whether an index consists of slices and integers only. Such an index picks no element twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, int | np.integer | slice) for p in parts)
