"""The graph of recorded operations, and the walk back through it. Tensors and operations are in tensor.py and ops.py.

An operation is a `Node`. It holds the nodes of its inputs and a backward function. That function maps the gradient of the
output to the gradients of the inputs. `walk_back` calls the backward functions from the last operation to the first.

Backward functions hold arrays, never Tensors, and the graph points only from an output to its inputs. So there are no
reference cycles: memory is freed as soon as the last reference to it goes, without the garbage collector.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from npgpt.engine.backend import backend_of
from npgpt.kernels.reference import Array

Backward = Callable[[Array], Sequence["Array | SliceGradient | None"]]

# A context variable has a value of its own in each thread. So no_grad in one worker leaves the others' graphs alone.
_recording: ContextVar[bool] = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside `with no_grad():`, or in a function decorated with `@no_grad()`, no graph is recorded."""
    before = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(before)


def is_recording() -> bool:
    """Whether operations are recorded, in this thread."""
    return _recording.get()


class Leaf(Protocol):
    """A Tensor that was not computed from others. Its gradient is kept in `grad`."""

    data: Array
    grad: Array | None

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


class Node:
    """One recorded operation.

    A node keeps the shape and the dtype of its output, but not the output itself. An array lives only as long as a caller
    or a backward function needs it.
    """

    __slots__ = ("backward", "depth", "dtype", "inputs", "shape")

    def __init__(self, output: Array, inputs: tuple[Node | Leaf | None, ...], backward: Backward) -> None:
        self.shape = output.shape
        self.dtype = output.dtype
        self.inputs = inputs  # None for an input that needs no gradient
        self.backward = backward
        # One more than the depth of the deepest input. So the order from deep to shallow is a topological order.
        self.depth: int = 1 + max((n.depth for n in inputs if isinstance(n, Node)), default=0)


class SliceGradient:
    """The gradient of an input of which only a slice was used: `values` at `index`, zero elsewhere.

    The gradients of several slices are written into one array. Without this class, each of them would be filled up with
    zeros first, and the results added.
    """

    __slots__ = ("index", "values")

    def __init__(self, index: Any, values: Array) -> None:
        self.index, self.values = index, values

    def expanded(self, source: Node | Leaf) -> Array:
        """The gradient as an array of the shape and dtype of `source`."""
        array = backend_of(self.values).xp.zeros(source.shape, dtype=source.dtype)
        self.add_into(array)
        return array

    def add_into(self, total: Array) -> None:
        """Add the values to their slice of `total`."""
        backend_of(total).kernels.add_into(total, self.index, self.values)


# ---------------------------------------------------------------- watching


class Watch:
    """Observes operations and the walk back, inside `with watched(watch):`. watch.py has the subclasses."""

    def result(self, backward: Backward, data: Array, inputs: tuple[Any, ...]) -> Array:
        """An operation has computed `data` from the Tensors `inputs`. The array returned here takes its place."""
        return data

    def recorded(self, node: Node) -> None:
        """The graph has a new node, for the last result."""

    def output_gradient(self, node: Node, dy: Array) -> None:
        """On the walk back, the gradient of a node's output is complete."""

    def input_gradient(
        self, node: Node, backward: Backward, dx: Array | SliceGradient, inputs: Sequence[Node | Leaf | None]
    ) -> None:
        """A node's backward function has returned the gradient of one of its inputs."""


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside `with`, `watch` observes the operations of this thread."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


def current_watch() -> Watch | None:
    """The Watch that observes this thread, if any."""
    return _watch.get()


# ---------------------------------------------------------------- the walk back


def walk_back(root: Node, gradient: Array) -> None:
    """Call the backward functions from `root` to the leaves, without recursion.

    gradient: the gradient of the root's output. A node drops its backward function after the call. This frees the arrays
    that the function holds.
    """
    pending = _PendingGradients()
    pending.add(root, gradient)
    watch = current_watch()
    while pending:
        node, dy = pending.pop()
        if watch:
            watch.output_gradient(node, dy)
        inputs, backward = node.inputs, node.backward
        node.inputs, node.backward = (), _used_up
        for source, dx in zip(inputs, backward(dy), strict=True):
            if source is None or dx is None:
                continue
            if watch:
                watch.input_gradient(node, backward, dx, inputs)
            if isinstance(source, Node):
                pending.add(source, dx)
            else:
                add_to_leaf(source, dx)


def _used_up(dy: Array) -> Sequence[Array | None]:
    raise RuntimeError(
        "backward() has already gone through this graph and freed it; run the forward pass again. "
        "(Gradients of gradients are not supported.)"
    )


class _PendingGradients:
    """The nodes that the walk back has reached, with the sums of their gradients so far.

    `pop` takes the deepest node first. Every operation that used a node's output is deeper than the node. So the node's
    gradient is complete when its turn comes.
    """

    def __init__(self) -> None:
        self._gradients: dict[Node, Array] = {}
        self._owned: set[Node] = set()  # nodes whose gradient is an array made here, so it may be written to
        self._queue: list[tuple[int, int, Node]] = []
        self._found = 0  # nodes of equal depth are taken in the order they were found: the same order on every run

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, node: Node, dx: Array | SliceGradient) -> None:
        if node not in self._gradients:
            heapq.heappush(self._queue, (-node.depth, self._found, node))
            self._found += 1
            if isinstance(dx, SliceGradient):
                self._gradients[node] = dx.expanded(node)
                self._owned.add(node)
            else:
                self._gradients[node] = _unbroadcast(dx, node)  # not owned: it may be another node's array, or read-only
        elif isinstance(dx, SliceGradient):
            if node not in self._owned:
                self._gradients[node] = backend_of(dx.values).xp.array(self._gradients[node])
                self._owned.add(node)
            dx.add_into(self._gradients[node])
        elif node in self._owned:
            self._gradients[node] += _unbroadcast(dx, node)
        else:
            before, dx = self._gradients[node], _unbroadcast(dx, node)
            total = backend_of(dx).kernels.add(before, dx) if node.shape else before + dx
            self._gradients[node] = np.asarray(total) if isinstance(total, np.generic) else total  # of shape ()
            self._owned.add(node)

    def pop(self) -> tuple[Node, Array]:
        _, _, node = heapq.heappop(self._queue)
        self._owned.discard(node)
        return node, self._gradients.pop(node)


def add_to_leaf(leaf: Leaf, gradient: Array | SliceGradient) -> None:
    """Add a gradient to `leaf.grad`."""
    gradient = gradient.expanded(leaf) if isinstance(gradient, SliceGradient) else _unbroadcast(gradient, leaf)
    if leaf.grad is None:
        leaf.grad = backend_of(leaf.data).xp.array(gradient)  # a copy: the leaf owns its gradient
    else:
        leaf.grad += gradient  # in place: the gradients of parameters are views into one flat array


def _unbroadcast(gradient: Array, source: Node | Leaf) -> Array:
    """The gradient in the shape and dtype of its source.

    Broadcasting copied the source along some axes. The gradient of the source is the sum over its copies.
    """
    shape = source.shape
    if gradient.shape != shape:
        extra = gradient.ndim - len(shape)
        gradient = gradient.sum(axis=tuple(range(extra))) if extra > 0 else gradient
        stretched = tuple(i for i, n in enumerate(shape[: gradient.ndim]) if n == 1 and gradient.shape[i] != 1)
        gradient = gradient.sum(axis=stretched, keepdims=True) if stretched else gradient
    if gradient.shape != shape:
        raise RuntimeError(f"a backward function returned a gradient of shape {gradient.shape} for an input of shape {shape}")
    return gradient if gradient.dtype == source.dtype else gradient.astype(source.dtype)
