"""Reading text files as text or as ids, piece by piece. Batches are in dataset.py."""

from __future__ import annotations

import codecs
import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.text.characters import CharTokenizer

BYTES_PER_PIECE = 1 << 26  # malloc returns freed blocks of this size to the system
DECODED_AT_ONCE = 1 << 20  # bytes: one wide character makes Python hold a whole string in four bytes a character

Track = Callable[..., Iterable[Any]]  # track(iterable, total=..., desc=..., unit=..., unit_scale=...), as tqdm


def _untracked(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Line ends become `\\n`, and a byte-order mark is dropped.

    Raises RequestError if the file does not exist, cannot be read, is empty, or is not UTF-8 text.
    """
    return "".join(_pieces_of(path))


def read_ids(
    path: str | Path, tokenizer: CharTokenizer | None = None, track: Track | None = None
) -> tuple[CharTokenizer, np.ndarray]:
    """The tokenizer and the ids of a text file: (tokenizer, ids (n,) in the smallest unsigned dtype).

    tokenizer: None builds one from the text. track: shows the progress, as `tqdm` does.

    The text may have any size. The time grows in proportion to it. Memory holds the text as UTF-8, or the ids, never both as
    a whole. Raises RequestError as `read_text` does, and for a character that the given tokenizer does not know.
    """
    track = track or _untracked
    text = _StoredText()
    pieces = text.storing(_pieces_of(path, track))
    if tokenizer is None:
        tokenizer = CharTokenizer.build_vocab(pieces)
    else:
        deque(pieces, maxlen=0)  # only stores them
    ids, done = np.empty(text.length, dtype=tokenizer.id_dtype), 0
    for piece in text.taken(track):
        ids[done : done + len(piece)] = tokenizer.encode_array(piece, position=done)
        done += len(piece)
    return tokenizer, ids


class _StoredText:
    """A text that is stored once, as UTF-8, and taken back piece by piece. Its memory is freed as it is taken."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self.length = 0  # in characters

    def storing(self, pieces: Iterable[str]) -> Iterator[str]:
        """Store pieces of a text, and pass them on."""
        part = bytearray()
        for piece in pieces:
            part += piece.encode()
            self.length += len(piece)
            if len(part) >= BYTES_PER_PIECE:
                self._parts.append(bytes(part))
                part = bytearray()
            yield piece
        self._parts.append(bytes(part))

    def taken(self, track: Track) -> Iterator[str]:
        """Take the text back, in pieces."""
        for _ in track(range(len(self._parts)), total=len(self._parts), desc="Encoding", **_MIB_PER_PIECE):
            decoder = codecs.getincrementaldecoder("utf-8")()
            part = self._parts.popleft()
            for start in range(0, len(part), DECODED_AT_ONCE):
                if piece := decoder.decode(part[start : start + DECODED_AT_ONCE]):
                    yield piece


_MIB_PER_PIECE = {"unit": "MiB", "unit_scale": BYTES_PER_PIECE >> 20}


def _pieces_of(path: str | Path, track: Track = _untracked) -> Iterator[str]:
    """The text of a file in pieces, checked and decoded."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            total = -(-os.fstat(file.fileno()).st_size // BYTES_PER_PIECE) or None  # unknown for a pipe
            raw = track(iter(functools.partial(file.read, BYTES_PER_PIECE), b""), total=total, desc="Reading", **_MIB_PER_PIECE)
            yield from decoded(raw, str(path))
    except FileNotFoundError:
        raise RequestError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise RequestError(f"expected a text file, got a folder: {path}") from None
    except OSError as error:
        kind = "a folder" if path.is_dir() else error.strerror  # Windows raises PermissionError for a folder
        raise RequestError(f"cannot read {path}: {kind}") from None


def decoded(pieces: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode pieces of bytes to pieces of text, of DECODED_AT_ONCE bytes at most. name: the source, for messages.

    Raises RequestError as `read_text` does.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    done, empty = 0, True
    try:
        for raw in pieces:
            if done == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise RequestError(f"{name} is UTF-16, expected UTF-8; save it as UTF-8 and try again")
            if (nul := raw.find(b"\0")) >= 0:
                raise RequestError(f"{name} is not a text file: it has a NUL byte at offset {done + nul}")
            for start in range(0, len(raw), DECODED_AT_ONCE):
                part = raw[start : start + DECODED_AT_ONCE]
                done += len(part)
                piece = decoder.decode(part)
                empty = empty and not piece
                yield piece
        if piece := decoder.decode(b"", final=True):
            empty = False
            yield piece
    except UnicodeDecodeError as error:
        offset = done - len(error.object) + error.start  # the decoder may hold bytes of earlier pieces
        byte = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        raise RequestError(f"{name} is not UTF-8 text: {byte}; save it as UTF-8 and try again") from None
    if empty:
        raise RequestError(f"{name} is empty, expected a text")
