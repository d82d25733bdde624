"""Reading files as text or as ids, piece by piece. Which files is in sources.py, batches are in dataset.py."""

from __future__ import annotations

import codecs
import functools
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.text.bpe import BPETokenizer, NewBPE
from npgpt.text.characters import CharTokenizer, MoreCharacters
from npgpt.text.sources import STDIN, UTF_16, Sources, opened
from npgpt.text.tokenizer import Tokenizer, UnknownCharacterError

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


@dataclass(frozen=True)
class EncodedText:
    """A text as ids. The first n_train of them are to be trained on."""

    ids: np.ndarray
    n_train: int


def read_ids(
    paths: str | Path | Sequence[str | Path] | Sources,
    tokenizer: Tokenizer | None = None,
    track: Track | None = None,
    limit: int | None = None,
) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the ids of a text: (tokenizer, ids (n,) in the smallest unsigned dtype).

    paths: as in `read_text`. tokenizer: None builds one of characters from the text. track: shows the progress, as `tqdm`
    does. limit: encode only the first `limit` characters.

    The text may have any size. The time grows in proportion to it. Memory holds the text as UTF-8, or the ids, never both as
    a whole. Raises RequestError as `read_text` does, and for a character that the given tokenizer does not know.
    """
    tokenizer, (text,) = read_texts([_as_sources(paths)], tokenizer, track, limit)
    return tokenizer, text.ids


def read_texts(
    texts: Sequence[Sources],
    tokenizer: Tokenizer | NewBPE | MoreCharacters | None = None,
    track: Track | None = None,
    limit: int | None = None,
    train_on: Callable[[int], int] = int,
    clean: Callable[[str], str] = str,
) -> tuple[Tokenizer, list[EncodedText]]:
    """The tokenizer of several texts, and the ids of each; see `read_ids`.

    A new tokenizer of characters has those of all texts. A new BPE is trained on what the first text is trained on.

    train_on: how many of n characters are trained on; the default is all. A text is split there before it is encoded, so that
    no token reaches from one part into the other, and every tokenizer is judged on the same characters.
    clean: applied to each piece of a text.
    """
    track = track or _untracked
    stored = [_StoredText() for _ in texts]
    pieces = (
        piece
        for text, sources in zip(stored, texts, strict=True)
        for piece in text.storing(map(clean, _pieces_of(sources, track)))
    )
    use: Tokenizer
    if tokenizer is None:
        use = CharTokenizer.build_vocab(pieces)
    elif isinstance(tokenizer, MoreCharacters):
        use = tokenizer.base.with_characters_of(pieces)
    else:
        deque(pieces, maxlen=0)  # only stores them
        if isinstance(tokenizer, NewBPE):
            to_learn = _Reader(stored[0].pieces(track, "Training the tokenizer")).take(train_on(_length_of(stored[0], limit)))
            use = BPETokenizer.train(to_learn, tokenizer.vocab_size)
        else:
            use = tokenizer
    return use, [_encoded(text, sources, use, track, limit, train_on) for text, sources in zip(stored, texts, strict=True)]


def _length_of(text: _StoredText, limit: int | None) -> int:
    return text.length if limit is None else min(limit, text.length)


def _encoded(
    text: _StoredText,
    sources: Sources,
    tokenizer: Tokenizer,
    track: Track,
    limit: int | None,
    train_on: Callable[[int], int],
) -> EncodedText:
    length = _length_of(text, limit)
    n_train = train_on(length)
    reader = _Reader(text.pieces(track, "Encoding", keep=False))
    try:
        if tokenizer.is_characters:
            ids, done = np.empty(length, dtype=tokenizer.id_dtype), 0
            for part in tokenizer.encode_pieces(reader.take(length)):
                ids[done : done + len(part)] = part
                done += len(part)
            return EncodedText(ids, n_train)
        parts = list(tokenizer.encode_pieces(reader.take(n_train)))
        n_ids = sum(map(len, parts))
        parts += tokenizer.encode_pieces(reader.take(length - n_train))
    except UnknownCharacterError as error:
        raise UnknownCharacterError(f"{sources} has {error}") from None
    return EncodedText(np.concatenate([np.empty(0, dtype=tokenizer.id_dtype), *parts]), n_ids)


class _Reader:
    """Takes a text from its pieces, a number of characters at a time."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._rest = pieces, ""

    def take(self, n: int) -> Iterator[str]:
        """The next n characters, or what is left, in pieces."""
        while n > 0 and (piece := self._rest or next(self._pieces, "")):
            taken, self._rest = piece[:n], piece[n:]
            n -= len(taken)
            yield taken


class _StoredText:
    """A text that is stored once, as UTF-8, and read again piece by piece."""

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

    def pieces(self, track: Track, desc: str, keep: bool = True) -> Iterator[str]:
        """The text in pieces. With keep=False, its memory is freed piece by piece."""
        for i in track(range(len(self._parts)), total=len(self._parts), desc=desc, **_MIB_PER_PIECE):
            decoder = codecs.getincrementaldecoder("utf-8")()
            part = self._parts[i] if keep else self._parts.popleft()
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
