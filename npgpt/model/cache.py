"""The KV cache: keys and values of the tokens that a model has seen. How they are computed is in gpt.py."""

from __future__ import annotations

from collections.abc import Sequence

from npgpt.config.settings import GPTConfig
from npgpt.engine.backend import Backend
from npgpt.kernels.reference import Array


class KVCache:
    """Keys and values of the tokens so far, for `batch` sequences. With them, the model computes only one position for a new
    token.

    There is room for block_size tokens; `length` is the number of tokens so far. When the room is full, one more token takes
    the place of the oldest one. With learned positions that would be wrong, because every other token would get a new position,
    so the model does not do it. No gradient flows through the cache.
    """

    def __init__(self, config: GPTConfig, batch: int, backend: Backend, dtype: object) -> None:
        head_dim = config.n_embd // config.n_head
        # For each block: keys and values, each (B, n_head, block_size, head_dim).
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, head_dim)
        self._kept: Array = backend.xp.empty(shape, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Keep the keys and values of the T tokens that follow the first `length`, for one block.

        k and v (B, n_head, T, head_dim) -> the keys and values of all tokens that are kept, each (B, n_head, S, head_dim) with
        S = min(length + T, block_size). Once the room is full, they are not in the order of the text, because a new token is
        stored where the oldest one was. The caller adds T to `length` when all blocks are done.
        """
        room, n = self._kept.shape[4], k.shape[2]
        start = self.length % room if n == 1 else self.length
        kept = self._kept[layer, :, :, :, : min(self.length + n, room)]
        kept[0, :, :, start : start + n], kept[1, :, :, start : start + n] = k, v
        return kept[0], kept[1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order. A row may occur more than once."""
        self._kept = self._kept[:, :, rows]
