"""Looking on as a graph is made and walked back, to find where a wrong number comes from.

`detect_anomaly` stops at the first operation that gives a number that is not finite; `Trace` notes every
operation with its gradient, and can shift one operation's result, which is what gradcheck.py needs to find
the first wrong gradient. Slow, and never on in ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from npgpt.engine.backend import backend_of, to_numpy
from npgpt.engine.tensor import Backward, Node, Part, Tensor, Watch, watched
from npgpt.kernels.reference import Array


class NonFiniteError(FloatingPointError):
    """Under `detect_anomaly`: an operation gave numbers that are not finite, though it got only finite ones.

    `op` is its name. `leaf` is a leaf among its inputs, or the one used last before it; None when there was none.
    """

    def __init__(self, op: str, direction: str, array: Array, leaf: Tensor | None) -> None:
        bad = array.size - int(np.isfinite(to_numpy(array)).sum())
        super().__init__(f"the {direction} pass of {op} gave {bad:,} of {array.size:,} numbers that are not finite")
        self.op, self.leaf = op, leaf


def detect_anomaly() -> AbstractContextManager[None]:
    """`with detect_anomaly():` the first operation whose result or gradient is not finite raises NonFiniteError."""
    return watched(_Finite())


class _Finite(Watch):
    def __init__(self) -> None:
        self._leaf: Tensor | None = None  # the last one an operation used

    def result(self, backward: Backward, data: Array, inputs: tuple[Tensor, ...]) -> Array:
        self._see("forward", backward, data, [t for t in inputs if t._node is None and t.requires_grad])
        return data

    def gradient(self, node: Node, backward: Backward, dx: Array | Part, inputs: Sequence[Node | Tensor | None]) -> None:
        values = dx.values if isinstance(dx, Part) else dx
        self._see("backward", backward, values, [t for t in inputs if isinstance(t, Tensor)])

    def _see(self, direction: str, backward: Backward, array: Array, leaves: list[Tensor]) -> None:
        self._leaf = leaves[0] if leaves else self._leaf
        array = np.asarray(array) if isinstance(array, np.generic) else array  # what operators make of one element
        if not backend_of(array).xp.isfinite(array).all():
            raise NonFiniteError(name_of(backward), direction, array, self._leaf)


class Trace(Watch):
    """The recorded operations in order: `nodes`, their `names`, their `inputs`, and, once backward() has gone through
    them, the `gradients` of their outputs. With `shift`, (the number of an operation, an array), that array is added
    to the operation's result."""

    def __init__(self, shift: tuple[int, np.ndarray] | None = None) -> None:
        self.names: list[str] = []
        self.inputs: list[tuple[Node | Tensor | None, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.gradients: dict[int, Array] = {}
        self._numbers: dict[Node, int] = {}
        self._shift = shift
        self._last: Backward | None = None

    def number(self, node: Node) -> int:
        """The place of a node in the order."""
        return self._numbers[node]

    def result(self, backward: Backward, data: Array, inputs: tuple[Tensor, ...]) -> Array:
        self._last = backward
        if self._shift and self._shift[0] == len(self.names) and any(t.requires_grad for t in inputs):
            return data + self._shift[1]
        return data

    def recorded(self, node: Node) -> None:
        assert self._last is not None  # result() comes first
        self._numbers[node] = len(self.names)
        self.names.append(name_of(self._last))
        self.inputs.append(node.inputs)
        self.shapes.append(node.shape)

    def arrived(self, node: Node, dy: Array) -> None:
        self.gradients[self._numbers[node]] = dy.copy()


def name_of(backward: Callable[..., Any]) -> str:
    """The operation that made a backward function: the name of the function it was written in."""
    name = backward.__qualname__.rpartition(".<locals>.")[0].rpartition(".<locals>.")[2]
    if name == "_binary":  # of tensor.py, which wraps the derivatives that an operator hands it
        inner = [cell.cell_contents for cell in backward.__closure__ or () if callable(cell.cell_contents)]
        return name_of(inner[0])
    return name
