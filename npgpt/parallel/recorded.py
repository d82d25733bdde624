"""A training step on a GPU, recorded once and then replayed. No formulas; step.py decides what is computed.

The host needs longer to launch the kernels of a step than the GPU to run them. A replay is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npgpt.engine.backend import random_key
from npgpt.engine.streams import Stream
from npgpt.kernels.cuda.random import Key
from npgpt.kernels.cuda.recording import Recording
from npgpt.kernels.reference import Array
from npgpt.model.gpt import GPT

# compute(x, y, generators): a forward and backward pass. generators(i) makes the random generator of micro-batch i.
Compute = Callable[[Array, Array, Callable[[int], Any]], Any]


class RecordedStep:
    """Steps of one shape: the first is computed, the second is recorded, and all from the second on are replayed.

    A replay reads the batch and the keys of the dropout masks from the same arrays as the recorded step, so a step first
    writes them there.
    """

    def __init__(self, model: GPT, compute: Compute, shape: tuple[int, ...], n_micro_batches: int) -> None:
        """shape: of the batch (B, T)."""
        xp = model.backend.xp
        self._model, self._forward_backward = model, compute
        self._weights, self._gradient = model.flat.data, model.flat.grad
        self._x, self._y = xp.zeros(shape, dtype=np.int64), xp.zeros(shape, dtype=np.int64)
        self._keys = xp.zeros(n_micro_batches, dtype=np.uint64)
        self._recording: Recording | None = None
        self._is_warm = False  # whether the kernels are compiled

    def fits(self, x: Array, n_micro_batches: int) -> bool:
        """Whether this object can compute a step of the batch x. A recording knows only the arrays it was made with."""
        flat = self._model.flat
        is_same = flat.data is self._weights and flat.grad is self._gradient
        return is_same and (x.shape, n_micro_batches) == (self._x.shape, len(self._keys))

    def __call__(self, x: Array, y: Array, seed: int, number: int) -> Array:
        """The mean loss of the batch, an array of shape (). The gradient is then in the model's parameters."""
        backend = self._model.backend
        assert backend.record
        keys = [random_key(seed, Stream.DROPOUT, number, i) for i in range(len(self._keys))]
        self._x[...], self._y[...] = backend.asarray(x), backend.asarray(y)
        self._keys[...] = backend.asarray(np.concatenate(keys))
        if self._is_warm and not self._recording:
            self._recording = backend.record(self._compute)
        self._is_warm = True
        loss = self._recording() if self._recording else self._compute()
        return loss.copy()  # the next replay overwrites the recording's own

    def _compute(self) -> Array:
        return self._forward_backward(self._x, self._y, lambda i: Key(self._keys[i : i + 1]))
