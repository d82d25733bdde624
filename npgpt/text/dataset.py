"""A text as training data: the file, its ids, the split, the batches and windows. The model is not known here."""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine.backend import CPU, Backend, backend_of
from npgpt.engine.streams import Stream, generator
from npgpt.kernels.reference import Array
from npgpt.text.characters import CharTokenizer

SPLITS = ("train", "val")
PIECE = 1 << 26  # bytes of a text file worked on at a time: blocks this large go back to the system when freed


def _unwatched(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; line ends become `\\n` and a byte-order mark is dropped.

    Raises RequestError when there is no such file, it cannot be read, is empty, or is not UTF-8 text.
    """
    return "".join(_pieces(path))


def read_ids(
    path: str | Path, tokenizer: CharTokenizer | None = None, track: Callable[..., Iterable[Any]] | None = None
) -> tuple[CharTokenizer, np.ndarray]:
    """The text of a file, as `read_text` reads it, as ids in the smallest unsigned dtype that holds them; and
    the tokenizer, built from the text unless one is given.

    For texts of any size: time grows in proportion, and memory never holds more than the text, a byte a
    character for most, or the ids. `track(iterable, total=..., desc=...)` may watch the progress, as `tqdm`
    does, counting pieces of PIECE bytes. Raises RequestError like `read_text`, and for a character the
    given tokenizer does not know.
    """
    track = track or _unwatched
    pieces = deque(_pieces(path, track))
    tokenizer = tokenizer or CharTokenizer.build_vocab(pieces)
    ids = np.empty(sum(map(len, pieces)), dtype=tokenizer.id_dtype)
    done = 0
    for _ in track(range(len(pieces)), total=len(pieces), desc="Encoding"):
        piece = pieces.popleft()  # its memory goes as the ids come
        ids[done : done + len(piece)] = tokenizer.encode_array(piece, position=done)
        done += len(piece)
    return tokenizer, ids


def _pieces(path: str | Path, track: Callable[..., Iterable[Any]] = _unwatched) -> Iterator[str]:
    """The text of a file, checked and decoded piece by piece."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            total = -(-os.fstat(file.fileno()).st_size // PIECE)  # 0 for a pipe
            raw = track(iter(functools.partial(file.read, PIECE), b""), total=total or None, desc="Reading")
            yield from decoded(raw, str(path))
    except FileNotFoundError:
        raise RequestError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise RequestError(f"expected a text file, got a folder: {path}") from None
    except OSError as error:
        kind = "a folder" if path.is_dir() else error.strerror  # Windows says PermissionError for a folder
        raise RequestError(f"cannot read {path}: {kind}") from None


def decoded(pieces: Iterable[bytes], name: str) -> Iterator[str]:
    """The text of the bytes of `name`, in the same pieces. Raises RequestError as `read_text` does."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    done, empty = 0, True
    try:
        for raw in pieces:
            if done == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise RequestError(f"{name} is UTF-16, expected UTF-8; save it as UTF-8 and try again")
            if (nul := raw.find(b"\0")) >= 0:
                raise RequestError(f"{name} is not a text file: it has a NUL byte at offset {done + nul}")
            done += len(raw)
            piece = decoder.decode(raw)
            empty = empty and not piece
            yield piece
        if piece := decoder.decode(b"", final=True):
            empty = False
            yield piece
    except UnicodeDecodeError as error:
        offset = done - len(error.object) + error.start  # the decoder may have kept bytes of earlier pieces
        byte = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        raise RequestError(f"{name} is not UTF-8 text: {byte}; save it as UTF-8 and try again") from None
    if empty:
        raise RequestError(f"{name} is empty, expected a text")


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
        self._on_device: dict[tuple[str, str], Array] = {}  # the ids of a split, by the names of it and of the device

    def ids_of(self, name: str) -> np.ndarray:
        """The ids of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {name!r}")
        return self.train if name == "train" else self.val

    def get_batch(self, split: str, k: int | None = None, backend: Backend = CPU) -> tuple[Array, Array]:
        """x and y, integers of shape (batch_size, block_size): x is tokens t .. t + block_size - 1 at a random
        t for each row, y the tokens one further.

        k: the number of the batch. None: the next one of this split, counting from 0. backend: where the batch is wanted;
        the ids are then kept there too, and it is gathered there.
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
        there = (split, backend.name)
        if there not in self._on_device:
            self._on_device[there] = backend.asarray(ids)
        return windows_at(self._on_device[there], starts, self.block_size)

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


def window_starts(n_ids: int, block_size: int, max_tokens: int | None = None) -> np.ndarray:
    """Where windows of block_size tokens start that lie side by side from the first token; at most so many
    that they have `max_tokens` targets, evenly spread. Each has a token after it; what is left over at the end
    is shorter than a window."""
    n = (n_ids - 1) // block_size
    kept = n if max_tokens is None else max(1, min(n, max_tokens // block_size))
    return np.arange(min(n, kept), dtype=np.int64) * n // kept * block_size


def windows_at(ids: Array, starts: np.ndarray, block_size: int) -> tuple[Array, Array]:
    """x and y of shape (len(starts), block_size), where ids are: the tokens from each start on, and those one further."""
    backend = backend_of(ids)
    rows = ids[backend.asarray(starts)[:, None] + backend.xp.arange(block_size + 1)].astype(np.int64)
    return rows[:, :-1], rows[:, 1:]
