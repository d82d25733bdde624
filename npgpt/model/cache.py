"""The KV cache: keys and values of the tokens that a model has seen. How they are computed is in gpt.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npgpt.config.settings import GPTConfig
from npgpt.engine.backend import Backend
from npgpt.kernels.reference import Array


class KVCache:
    """Keys and values of the tokens so far, for `batch` sequences. With them, the model computes only one position for a new
    token.

    Each sequence has room for block_size tokens. When the room is full, one more token takes the place of the oldest one. With
    learned positions that would be wrong, because every other token would get a new position, so the model does not do it. No
    gradient flows through the cache.

    The sequences may differ in length. Then they have different positions, and the shorter ones have no key yet where the
    longer ones have one: `absent` says where.
    """

    def __init__(
        self, config: GPTConfig, batch: int, backend: Backend, dtype: np.dtype, most_tokens: int | None = None
    ) -> None:
        """most_tokens: room for this many tokens of each sequence, if there will not be more; by default block_size."""
        head_dim = config.n_embd // config.n_head
        self._room, self._xp, self._dtype = most_tokens or config.block_size, backend.xp, dtype
        # For each block: keys and values, each (batch, n_head, block_size, head_dim). Only len(lengths) rows are used.
        # It starts as zeros, because what is `absent` must still be finite.
        self._memory: Array = backend.xp.zeros((config.n_layer, 2, batch, config.n_head, self._room, head_dim), dtype=dtype)
        self._set_lengths(np.zeros(batch, dtype=np.int64))
        # The weights of the model that uses this cache, and their addresses for the kernels in C; see GPT.decode.
        self.weights: list[Array | None] = []
        self.addresses: Array | None = None

    @property
    def length(self) -> int:
        """The number of tokens so far, if all sequences have the same. Raises ValueError if they differ."""
        if not isinstance(self.positions, int):
            raise ValueError(f"the sequences in the cache differ in length: {self.lengths.tolist()}")
        return self.positions

    def _set_lengths(self, lengths: np.ndarray) -> None:
        """Set `lengths` (B,), and what follows from them for the next token.

        positions: of the next token, an int if it is the same for all sequences, else (B,).
        absent: to be added to the scores of the next token; None, or (B, 1, S, 1) with -inf where a sequence has no key.
        """
        self.lengths = lengths
        self.absent: Array | None = None
        first = int(lengths[0]) if len(lengths) else 0
        if (lengths == first).all():
            self.positions: int | np.ndarray = first
            return
        self.positions = lengths
        present = np.minimum(lengths + 1, self._room)
        if present.min() < present.max():
            is_absent = np.arange(present.max()) >= present[:, None]
            self.absent = np.where(is_absent, -np.inf, 0.0).astype(self._dtype)[:, None, :, None]

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Keep the keys and values of the T tokens that follow the first ones, for one block.

        k and v (B, n_head, T, head_dim) -> the keys and values of all tokens that are kept, each (B, n_head, S, head_dim) with
        S = min(length + T, block_size) of the longest sequence. Once the room is full, they are not in the order of the text,
        because a new token is stored where the oldest one was. If the lengths differ, T must be 1. The caller calls `advance`
        when all blocks are done.
        """
        n, memory = k.shape[2], self.memory(layer)
        if isinstance(self.positions, int):
            start = self.positions % self._room if n == 1 else self.positions
            kept = memory[:, :, :, : min(self.positions + n, self._room)]
            kept[0, :, :, start : start + n], kept[1, :, :, start : start + n] = k, v
            return kept[0], kept[1]
        rows, at = np.arange(len(self.lengths)), self.positions % self._room
        memory[0][rows, :, at], memory[1][rows, :, at] = k[:, :, 0], v[:, :, 0]
        kept = memory[:, :, :, : min(int(self.positions.max()) + 1, self._room)]
        return kept[0], kept[1]

    def memory(self, layer: int) -> Array:
        """The keys and values of one block, (2, B, n_head, room, head_dim). Position p is at p % room."""
        return self._memory[layer, :, : len(self.lengths)]

    @property
    def all_memory(self) -> Array:
        """The memory of all blocks, (n_layer, 2, most, n_head, room, head_dim), with room for `most` sequences."""
        return self._memory

    def advance(self, n: int) -> None:
        """Count n more tokens of each sequence, whose keys and values `extend` has kept in every block."""
        self.lengths = self.lengths + n
        if isinstance(self.positions, int):
            self.positions += n
        else:
            self._set_lengths(self.lengths)

    def append(self, other: KVCache, rows: Sequence[int]) -> None:
        """Add sequences of another cache of the same model after the own ones. A row of the other may occur more than once."""
        n, m = len(self.lengths), len(rows)
        if n + m > self._memory.shape[2]:  # as a list grows: by at least its own size, so that a sequence is rarely copied
            grown = self._xp.zeros((*self._memory.shape[:2], max(2 * n, n + m), *self._memory.shape[3:]), dtype=self._dtype)
            grown[:, :, :n] = self._memory[:, :, :n]
            self._memory = grown
        longest = min(int(other.lengths.max(initial=0)), self._room)
        self._memory[:, :, n : n + m, :, :longest] = other._memory[:, :, rows, :, :longest]
        self._set_lengths(np.append(self.lengths, other.lengths[list(rows)]))

    def remove(self, row: int) -> None:
        """Remove one sequence. The last one takes its place."""
        last = len(self.lengths) - 1
        lengths = self.lengths.copy()
        if row != last:
            longest = min(int(lengths[last]), self._room)
            self._memory[:, :, row, :, :longest] = self._memory[:, :, last, :, :longest]
            lengths[row] = lengths[last]
        self._set_lengths(lengths[:last])
