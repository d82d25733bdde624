"""Watching operations and the walk back, to find where a wrong number comes from.

`detect_anomaly` stops at the first operation that gives a number that is not finite, or whose arrays were changed in place
before its backward pass. `Trace` lists every operation with
the gradient of its output, and can shift the result of one operation; gradcheck.py uses it to find the first wrong
gradient. Both are slow. Ordinary training uses neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from npgpt.engine.backend import backend_of, to_numpy
from npgpt.engine.graph import Backward, Leaf, Node, SliceGradient, Watch, watched
from npgpt.kernels.reference import Array


class NonFiniteError(FloatingPointError):
    """Under `detect_anomaly`: the first operation whose result or gradient is not finite. Values of leaves are not checked.

    `op` is the operation's name. `leaf` is a leaf among its inputs, or else the last leaf used before it, or None.
    """

    def __init__(self, op: str, direction: str, array: Array, leaf: Leaf | None) -> None:
        bad = array.size - int(np.isfinite(to_numpy(array)).sum())
        super().__init__(f"the {direction} pass of {op} gave {bad:,} of {array.size:,} numbers that are not finite")
        self.op, self.leaf = op, leaf


class InPlaceError(RuntimeError):
    """Under `detect_anomaly`: an array was changed in place between an operation's forward and its backward pass."""


def detect_anomaly() -> AbstractContextManager[None]:
    """Inside `with`, the first operation that goes wrong raises an error with its name.

    NonFiniteError: its result or its gradient is not finite. InPlaceError: one of its inputs, or its result, was changed in
    place before its backward pass, so its gradient would be wrong. For the second check every array is hashed twice and kept
    until the backward pass.
    """
    return watched(_AnomalyCheck())


class _AnomalyCheck(Watch):
    def __init__(self) -> None:
        self._leaf: Leaf | None = None  # the last leaf that an operation used
        self._arrays: list[Array] = []  # of the last operation: its result and its inputs
        self._hashes: dict[Node, tuple[str, list[tuple[Array, bytes]]]] = {}  # (operation, its arrays and their hashes)

    def result(self, backward: Backward, data: Array, inputs: tuple[Any, ...]) -> Array:
        self._check("forward", backward, data, [t for t in inputs if t._node is None and t.requires_grad])
        self._arrays = [data, *(t.data for t in inputs)]
        return data

    def recorded(self, node: Node) -> None:
        self._hashes[node] = name_of(node.backward), [(array, _hash(array)) for array in self._arrays]

    def output_gradient(self, node: Node, dy: Array) -> None:
        op, arrays = self._hashes.pop(node, ("", []))
        if any(_hash(array) != before for array, before in arrays):
            raise InPlaceError(
                f"an input or the result of {op} was changed in place after its forward pass, so its gradient would be wrong; "
                "write to a copy instead"
            )

    def input_gradient(
        self, node: Node, backward: Backward, dx: Array | SliceGradient, inputs: Sequence[Node | Leaf | None]
    ) -> None:
        values = dx.values if isinstance(dx, SliceGradient) else dx
        self._check("backward", backward, values, [t for t in inputs if t is not None and not isinstance(t, Node)])

    def _check(self, direction: str, backward: Backward, array: Array, leaves: list[Leaf]) -> None:
        self._leaf = leaves[0] if leaves else self._leaf
        array = np.asarray(array) if isinstance(array, np.generic) else array  # NumPy's result for one element
        if not backend_of(array).xp.isfinite(array).all():
            raise NonFiniteError(name_of(backward), direction, array, self._leaf)


def _hash(array: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(to_numpy(array)).tobytes(), digest_size=8).digest()


class Trace(Watch):
    """Lists the recorded operations, numbered in their order.

    `names`, `inputs` and `shapes` (of the outputs) are lists over the operations. After backward(), `gradients` maps an
    operation's number to the gradient of its output. `shift` is (the number of an operation, an array): the array is
    added to that operation's result.
    """

    def __init__(self, shift: tuple[int, np.ndarray] | None = None) -> None:
        self.names: list[str] = []
        self.inputs: list[tuple[Node | Leaf | None, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.gradients: dict[int, Array] = {}
        self._numbers: dict[Node, int] = {}
        self._shift = shift
        self._last: Backward | None = None

    def number(self, node: Node) -> int:
        """The number of a node's operation."""
        return self._numbers[node]

    def result(self, backward: Backward, data: Array, inputs: tuple[Any, ...]) -> Array:
        self._last = backward
        if self._shift and self._shift[0] == len(self.names) and any(t.requires_grad for t in inputs):
            return data + self._shift[1]
        return data

    def recorded(self, node: Node) -> None:
        assert self._last is not None  # result() is called first
        self._numbers[node] = len(self.names)
        self.names.append(name_of(self._last))
        self.inputs.append(node.inputs)
        self.shapes.append(node.shape)

    def output_gradient(self, node: Node, dy: Array) -> None:
        self.gradients[self._numbers[node]] = dy.copy()


def name_of(backward: Callable[..., Any]) -> str:
    """The operation's name: the name of the function that defines the backward function."""
    name = backward.__qualname__.rpartition(".<locals>.")[0].rpartition(".<locals>.")[2]
    if name == "_binary":  # of tensor.py, which wraps the derivatives of the operator that called it
        inner = [cell.cell_contents for cell in backward.__closure__ or () if callable(cell.cell_contents)]
        return name_of(inner[0])
    return name
