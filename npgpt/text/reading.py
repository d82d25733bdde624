"""Reading files as text or as ids, piece by piece. Which files is in sources.py, batches are in dataset.py."""

from __future__ import annotations

import codecs
import functools
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.text.characters import CharTokenizer, UnknownCharacterError
from npgpt.text.sources import STDIN, UTF_16, Sources, opened

BYTES_PER_PIECE = 1 << 26  # malloc returns freed blocks of this size to the system
DECODED_AT_ONCE = 1 << 20  # bytes: one wide character makes Python hold a whole string in four bytes a character

BYTE_ORDER_MARK = "\ufeff"  # joined files may have it inside the text, too

Track = Callable[..., Iterable[Any]]  # track(iterable, total=..., desc=..., unit=..., unit_scale=...), as tqdm


def _untracked(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


def read_text(paths: str | Path | Sequence[str | Path] | Sources) -> str:
    """The text of UTF-8 files. Line ends become `\\n`, and byte-order marks are dropped, also inside the text.

    paths: one file or several, folders, or `-` for standard input; see `Sources`. Compressed files are unpacked.

    Raises RequestError if a file does not exist, cannot be read, is empty, or is not UTF-8 text.
    """
    return "".join(_pieces_of(_as_sources(paths)))


def _as_sources(paths: str | Path | Sequence[str | Path] | Sources) -> Sources:
    return paths if isinstance(paths, Sources) else Sources(paths)


def read_ids(
    paths: str | Path | Sequence[str | Path] | Sources,
    tokenizer: CharTokenizer | None = None,
    track: Track | None = None,
    limit: int | None = None,
) -> tuple[CharTokenizer, np.ndarray]:
    """The tokenizer and the ids of a text: (tokenizer, ids (n,) in the smallest unsigned dtype).

    paths: as in `read_text`. tokenizer: None builds one from the text. track: shows the progress, as `tqdm` does.
    limit: encode only the first `limit` characters.

    The text may have any size. The time grows in proportion to it. Memory holds the text as UTF-8, or the ids, never both as
    a whole. Raises RequestError as `read_text` does, and for a character that the given tokenizer does not know.
    """
    tokenizer, (ids,) = read_ids_of([_as_sources(paths)], tokenizer, track, limit)
    return tokenizer, ids


def read_ids_of(
    texts: Sequence[Sources],
    tokenizer: CharTokenizer | None = None,
    track: Track | None = None,
    limit: int | None = None,
) -> tuple[CharTokenizer, list[np.ndarray]]:
    """The tokenizer of several texts, and the ids of each; see `read_ids`. A new tokenizer has the characters of all texts."""
    track = track or _untracked
    stored = [_StoredText() for _ in texts]
    pieces = (piece for text, sources in zip(stored, texts, strict=True) for piece in text.storing(_pieces_of(sources, track)))
    if tokenizer is None:
        tokenizer = CharTokenizer.build_vocab(pieces)
    else:
        deque(pieces, maxlen=0)  # only stores them
    return tokenizer, [_encoded(text, sources, tokenizer, track, limit) for text, sources in zip(stored, texts, strict=True)]


def _encoded(text: _StoredText, sources: Sources, tokenizer: CharTokenizer, track: Track, limit: int | None) -> np.ndarray:
    ids, done = np.empty(text.length if limit is None else min(limit, text.length), dtype=tokenizer.id_dtype), 0
    for piece in text.taken(track):
        piece = piece[: len(ids) - done]
        try:
            ids[done : done + len(piece)] = tokenizer.encode_array(piece, position=done)
        except UnknownCharacterError as error:
            raise UnknownCharacterError(f"{sources} has {error}") from None
        done += len(piece)
    return ids


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


def _pieces_of(sources: Sources, track: Track = _untracked) -> Iterator[str]:
    """The text of the sources in pieces, checked and decoded. The number of characters of each file is noted."""
    several = len(sources.names) > 1
    sources.characters.clear()
    names = track(sources.names, total=len(sources.names), desc="Reading", unit="file") if several else sources.names
    for name in names:
        count = 0
        with opened(name) as (file, size):
            total = size and -(-size // BYTES_PER_PIECE)
            raw: Iterable[bytes] = iter(functools.partial(file.read, BYTES_PER_PIECE), b"")
            if not several:
                raw = track(raw, total=total, desc="Reading", **_MIB_PER_PIECE)
            for piece in decoded(raw, "standard input" if name == STDIN else name):
                count += len(piece)
                yield piece
        sources.characters[name] = sources.characters.get(name, 0) + count


def decoded(pieces: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode pieces of bytes to pieces of text, of DECODED_AT_ONCE bytes at most. name: the source, for messages.

    Raises RequestError as `read_text` does.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    done, empty = 0, True
    try:
        for raw in pieces:
            if done == 0 and raw.startswith(UTF_16):
                raise RequestError(f"{name} is UTF-16, expected UTF-8; save it as UTF-8 and try again")
            if (nul := raw.find(b"\0")) >= 0:
                raise RequestError(f"{name} is not a text file: it has a NUL byte at offset {done + nul}")
            for start in range(0, len(raw), DECODED_AT_ONCE):
                part = raw[start : start + DECODED_AT_ONCE]
                done += len(part)
                piece = decoder.decode(part).replace(BYTE_ORDER_MARK, "")
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
