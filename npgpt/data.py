"""A text as training data: the file, its ids, the split, the batches. The model is not known here."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.backend import Stream, generator
from npgpt.config import RequestError

SPLITS = ("train", "val")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; line ends become `\\n` and a byte-order mark is dropped.

    Raises RequestError when there is no such file, it cannot be read, is empty, or is not UTF-8 text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise RequestError(f"expected a text file, got a folder: {path}") from None
    except OSError as error:
        kind = "a folder" if path.is_dir() else error.strerror  # Windows says PermissionError for a folder
        raise RequestError(f"cannot read {path}: {kind}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{path} is UTF-16, expected UTF-8; save it as UTF-8 and try again")
    if (nul := raw.find(b"\0")) >= 0:
        raise RequestError(f"{path} is not a text file: it has a NUL byte at offset {nul}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}; save it as UTF-8 and try again"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise RequestError(f"{path} is empty; expected a text to learn from")
    return text


class Dataset:
    """Token ids split into a training part and a held-out part, and the batches drawn from them.

    The first 1 - val_fraction of the ids are for training, the rest is held out. Batch k of a split is a
    pure function of the seed and k: a resumed run sees the batches an uninterrupted one would have seen.
    """

    def __init__(self, ids: Any, block_size: int, batch_size: int, val_fraction: float = 0.1, seed: int = 1337) -> None:
        """ids: a sequence of integers, kept in the smallest unsigned dtype that holds them.

        Raises RequestError when the training part is too short for one window of `block_size` tokens and
        the token after it, or a setting is out of range.
        """
        ids = np.asarray(ids, dtype=np.uint8 if len(ids) == 0 else None)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and ids.min() < 0):
            raise RequestError(f"ids must be a flat sequence of integers >= 0, got shape {ids.shape}, dtype {ids.dtype}")
        if block_size < 1 or batch_size < 1 or not 0 <= val_fraction < 1:
            raise RequestError(
                "a dataset needs block_size >= 1, batch_size >= 1 and 0 <= val_fraction < 1, got "
                f"{block_size}, {batch_size}, {val_fraction}"
            )
        self.ids = ids.astype(np.min_scalar_type(int(ids.max(initial=0))), copy=False)
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.train, self.val = split(self.ids, val_fraction)
        if len(self.train) < block_size + 1:
            raise RequestError(
                f"the text is too short: its training part has {len(self.train)} tokens, a window of block_size {block_size} "
                f"needs {block_size + 1}; use a longer text or a smaller block_size"
            )
        self._drawn = dict.fromkeys(SPLITS, 0)

    def ids_of(self, name: str) -> np.ndarray:
        """The ids of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {name!r}")
        return self.train if name == "train" else self.val

    def get_batch(self, split: str, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """x and y, integers of shape (batch_size, block_size): x is tokens t .. t + block_size - 1 at a random
        t for each row, y the tokens one further.

        k: the number of the batch. None: the next one of this split, counting from 0.
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
        windows = ids[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def fingerprint(self) -> str:
        """See the function of this name."""
        return fingerprint(self.ids)


def split(ids: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The first part, to train on, and the last `val_fraction` of the ids, held out."""
    n_train = len(ids) - int(len(ids) * val_fraction)
    return ids[:n_train], ids[n_train:]


def fingerprint(ids: np.ndarray) -> str:
    """SHA-256 of the ids, to tell one text from another."""
    smallest = np.min_scalar_type(int(ids.max(initial=0))).newbyteorder("<")  # the same on every machine
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=smallest).data).hexdigest()


def windows(ids: np.ndarray, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every token once as a target: x and y of shape (<= batch_size, block_size), windows side by side from
    the first token, and at the end one of shape (1, the rest)."""
    n_targets = len(ids) - 1
    whole = n_targets // block_size
    for first in range(0, whole, batch_size):
        rows = min(batch_size, whole - first)
        start, stop = first * block_size, (first + rows) * block_size
        x, y = ids[start:stop], ids[start + 1 : stop + 1]
        yield x.reshape(rows, block_size).astype(np.int64), y.reshape(rows, block_size).astype(np.int64)
    rest = whole * block_size
    if rest < n_targets:
        yield ids[rest:-1].astype(np.int64)[None], ids[rest + 1 :].astype(np.int64)[None]
