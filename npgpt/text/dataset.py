"""A text's ids as training data: the split, the batches, the windows. Files are in reading.py. This file knows no model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine.backend import CPU, Backend, backend_of
from npgpt.engine.streams import Stream, generator
from npgpt.kernels.reference import Array

SPLITS = ("train", "val")

# For repeated_share.
SPAN = 64  # tokens; a power of two
LONGEST_SEARCHED = 1 << 25  # tokens of the training text
HASHED_AT_ONCE = 1 << 20


class Dataset:
    """Token ids, split into a training part and a held-out part, and random batches of them.

    The last `val_fraction` of the ids is held out, or another text, `val_ids`. Batch k of a split is a pure function of the
    seed and k. So a resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(
        self,
        ids: Any,
        block_size: int,
        batch_size: int,
        val_fraction: float = 0.1,
        seed: int = 1337,
        val_ids: Any = None,
        n_train: int | None = None,
    ) -> None:
        """ids: a sequence of integers >= 0; it is kept in the smallest unsigned dtype. val_ids: a held-out text of its own;
        val_fraction must then be 0. n_train: how many of the ids to train on, for a text that was split before it was encoded;
        val_fraction then says which fraction of its characters is held out.

        Raises RequestError if the training part is too short for one window of `block_size` tokens and the token after it,
        or if a setting is out of range.
        """
        if block_size < 1 or batch_size < 1 or not 0 <= val_fraction < 1:
            raise RequestError(
                "a dataset needs block_size >= 1, batch_size >= 1 and 0 <= val_fraction < 1, got "
                f"{block_size}, {batch_size}, {val_fraction}"
            )
        if val_ids is not None and val_fraction:
            raise RequestError(f"with val_ids, all of ids is trained on; val_fraction must be 0, got {val_fraction}")
        self.ids = _flat_ids(ids)
        self.has_own_val = val_ids is not None
        self.block_size, self.batch_size, self.val_fraction, self.seed = block_size, batch_size, val_fraction, seed
        if n_train is None:
            n_train = length_to_train_on(len(self.ids), val_fraction)
        self.train, self.val = self.ids[:n_train], self.ids[n_train:]
        if val_ids is not None:
            self.val = _flat_ids(val_ids)
            if len(self.val) < 2:
                raise RequestError(f"the held-out text is too short: it has {len(self.val)} tokens, at least 2 are needed")
        if len(self.train) < block_size + 1:
            raise RequestError(
                f"the text is too short: its training part has {len(self.train)} tokens, a window of block_size {block_size} "
                f"needs {block_size + 1}; use a longer text or a smaller block_size"
            )
        self._drawn = dict.fromkeys(SPLITS, 0)
        self._on_device: dict[tuple[str, str], Array] = {}  # (split, backend name) -> the ids on that device

    def ids_of(self, name: str) -> np.ndarray:
        """The ids of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {name!r}")
        return self.train if name == "train" else self.val

    def get_batch(self, split: str, k: int | None = None, backend: Backend = CPU) -> tuple[Array, Array]:
        """A random batch: x and y, integers of shape (batch_size, block_size).

        Each row of x holds the tokens t .. t + block_size - 1 for a random t. The row of y holds the tokens
        t + 1 .. t + block_size.

        split: "train" or "val". k: the number of the batch; None: the next one of this split, counted from 0. backend: the
        device for the batch. The ids are copied to that device once, and batches are gathered there.

        Raises ValueError for another split, and RequestError if the part is shorter than one window.
        """
        ids = self.ids_of(split)
        if len(ids) < self.block_size + 1:
            raise RequestError(
                f"the {split} part has {len(ids)} tokens, a window of block_size {self.block_size} needs {self.block_size + 1}"
            )
        if k is None:
            k = self._drawn[split]
            self._drawn[split] += 1
        rng = generator(self.seed, Stream.BATCH, SPLITS.index(split), k)
        starts = rng.integers(0, len(ids) - self.block_size, size=self.batch_size)
        key = (split, backend.name)
        if key not in self._on_device:
            self._on_device[key] = backend.asarray(ids)
        return windows_at(self._on_device[key], starts, self.block_size)

    @functools.cached_property
    def repeated_share(self) -> float:
        """The share of the held-out text that also occurs in the training text; see the function of the same name."""
        return repeated_share(self.train, self.val)


def _flat_ids(ids: Any) -> np.ndarray:
    """Ids as an array of the smallest unsigned dtype. Raises RequestError for anything else than integers >= 0 in a row."""
    ids = np.asarray(ids)
    ids = ids.astype(np.uint8) if ids.size == 0 else ids
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and ids.min() < 0):
        raise RequestError(f"ids must be a flat sequence of integers >= 0, got shape {ids.shape}, dtype {ids.dtype}")
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))), copy=False)


def length_to_train_on(n: int, val_fraction: float) -> int:
    """How many of n tokens, or characters, are trained on. The rest, at the end, is held out."""
    return n - int(n * val_fraction)


def repeated_share(train: np.ndarray, held_out: np.ndarray) -> float:
    """The share of spans of 64 held-out tokens that also occur in the training text, from 0 to 1.

    In ordinary text hardly any span of this length occurs twice. A high share means that the held-out text is a copy, so a
    model that has memorised the training text has a low loss on it. At most 4096 spans, spread evenly, are looked for in the
    last 32 million training tokens.
    """
    starts = window_starts(len(held_out) + 1, SPAN, 4096 * SPAN)
    if not len(starts) or len(train) < SPAN:
        return 0.0
    train = train[-LONGEST_SEARCHED:]
    wanted = np.concatenate([_span_hashes(held_out[start : start + SPAN]) for start in starts])
    # A table of 16 bits of each hash finds almost every position without a match. The rest are compared with the hashes.
    table = np.zeros(1 << 16, dtype=bool)
    table[wanted & 0xFFFF] = True
    found: set[int] = set()
    for start in range(0, len(train) - SPAN + 1, HASHED_AT_ONCE):
        hashes = _span_hashes(train[start : start + HASHED_AT_ONCE + SPAN - 1])
        found.update(np.intersect1d(hashes[table[hashes & 0xFFFF]], wanted).tolist())
    return float(np.mean([h in found for h in wanted.tolist()]))


def _span_hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each span of SPAN ids: (n,) -> (n - SPAN + 1,).

    The hash of a span is made from those of its halves, so log2(SPAN) passes are enough.
    """
    hashes, length = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15), 1
    while length < SPAN:
        hashes = hashes[:-length] * np.uint64(0xBF58476D1CE4E5B9) + (hashes[length:] ^ (hashes[length:] >> np.uint64(29)))
        length *= 2
    return hashes


def window_starts(n_ids: int, block_size: int, max_tokens: int | None = None) -> np.ndarray:
    """The starts of windows of block_size tokens that lie side by side, from the first token on.

    A token follows each window. A rest shorter than a window is left out. With `max_tokens`, only about
    max_tokens / block_size windows are returned, at least one, evenly spread.
    """
    n = (n_ids - 1) // block_size
    kept = n if max_tokens is None else max(1, min(n, max_tokens // block_size))
    return np.arange(min(n, kept), dtype=np.int64) * n // kept * block_size


def windows_at(ids: Array, starts: np.ndarray, block_size: int) -> tuple[Array, Array]:
    """x and y of shape (len(starts), block_size): the tokens from each start on, and the tokens one position later.

    They are on the device of `ids`.
    """
    backend = backend_of(ids)
    rows = ids[backend.asarray(starts)[:, None] + backend.xp.arange(block_size + 1)].astype(np.int64)
    return rows[:, :-1], rows[:, 1:]
