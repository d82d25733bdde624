"""What a checkpoint remembers of a text: where it came from, and enough to recognise it. No files are read here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npgpt.text.sources import shown_paths
from npgpt.text.tokenizer import Tokenizer, text_size

IDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class TextRecord:
    """Where a text came from, how long it was, and its fingerprint."""

    sources: tuple[str, ...]  # files, folders, or - for standard input
    sha256: str | None  # see `fingerprint`
    n_characters: int | None  # None in the formats 1 and 2

    @classmethod
    def of(cls, ids: np.ndarray, tokenizer: Tokenizer, sources: str | Sequence[str] = ()) -> TextRecord:
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        return cls(sources, fingerprint(ids, tokenizer), text_size(tokenizer, ids)[0])

    def is_beginning_of(self, ids: np.ndarray, tokenizer: Tokenizer) -> bool:
        """Whether the text that `ids` stand for begins with this text. Without n_characters: whether it is this text."""
        n = self.n_characters
        if n is not None and n > text_size(tokenizer, ids)[0]:
            return False
        return fingerprint(ids, tokenizer, n) == self.sha256

    def __str__(self) -> str:
        return shown_paths(self.sources)


def fingerprint(ids: np.ndarray, tokenizer: Tokenizer, n_characters: int | None = None) -> str:
    """A SHA-256 that tells one text from another: of the first n_characters of a text, or of all of it.

    If tokens are characters, it is the SHA-256 of the ids, else that of the text as UTF-8.
    """
    digest = hashlib.sha256()
    if tokenizer.is_characters:
        ids = ids[:n_characters]
        smallest = np.min_scalar_type(int(ids.max(initial=0))).newbyteorder("<")  # the same bytes on every machine
        digest.update(np.ascontiguousarray(ids, dtype=smallest).data)
    else:
        for part in _utf8(ids, tokenizer, n_characters):
            digest.update(part)
    return digest.hexdigest()


def _utf8(ids: np.ndarray, tokenizer: Tokenizer, n_characters: int | None) -> Iterator[bytes]:
    """The first n_characters of a text, or all of it, as UTF-8 in pieces."""
    left = n_characters
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = b"".join(map(tokenizer.token_bytes, ids[start : start + IDS_AT_ONCE].tolist()))
        if left is not None:
            begins = np.flatnonzero(np.frombuffer(part, dtype=np.uint8) & 0xC0 != 0x80)  # 10xxxxxx continues a character
            if len(begins) > left:
                yield part[: begins[left]]
                return
            left -= len(begins)
        yield part
