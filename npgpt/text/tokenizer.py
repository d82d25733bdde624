"""What a tokenizer is: the interface that every tokenizer has. The tokenizers themselves are in characters.py and bpe.py."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from npgpt.config.fields import RequestError

COUNTED_AT_ONCE = 1 << 20


class UnknownCharacterError(RequestError):
    """A text has a character that a tokenizer does not know."""


class TextStream(Protocol):
    """Turns ids into text, one id at a time. It never emits half a character."""

    def add(self, i: int) -> str:
        """The text that is complete with this id. It may be empty."""
        ...

    def end(self) -> str:
        """The rest of the text. An incomplete character becomes U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. The ids are 0 .. vocab_size - 1. The tokenizers inherit from this class."""

    is_characters: bool  # whether every id is one character
    end_id: int | None  # the id that ends a text; None if there is none

    @property
    def vocab_size(self) -> int: ...

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def start_ids(self) -> list[int]:
        """The context that stands for an empty prompt."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,): the number of bytes of each token in UTF-8."""
        ...

    @property
    def character_lengths(self) -> np.ndarray:
        """(vocab_size,): the number of characters that begin in each token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Raises UnknownCharacterError, naming the characters that it does not know."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, but returns an array of `id_dtype`."""
        ...

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a long text that comes in pieces. Joined, they are the ids of the joined text."""
        ...

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token in UTF-8; a token may end inside a character. Raises RequestError for an unknown id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text. Raises RequestError, naming the id, if an id is not in the vocabulary."""
        ...

    def stream(self) -> TextStream:
        """A new stream. Its pieces, joined, are what `decode` returns."""
        ...

    def unknown(self, text: str) -> dict[str, int]:
        """The characters of `text` that it does not know, each with the position of its first occurrence."""
        ...

    def without_unknown(self, text: str, replace: bool) -> str:
        """`text` without unknown characters. replace: whether a close known character takes the place of an unknown one."""
        ...


def closest_known(tokenizer: Tokenizer, text: str) -> str:
    """The text, or if the tokenizer does not know all of it, the same with \\n as line ends and with composed characters.

    A letter and its accent as two characters may be known as one (Unicode's normal form C).
    """
    if tokenizer.unknown(text):
        text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text


def text_size(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[int, int]:
    """(the number of characters, the number of bytes in UTF-8) of the text that `ids` stand for."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(ids), COUNTED_AT_ONCE):  # bincount makes a copy with eight bytes an id
        counts += np.bincount(ids[start : start + COUNTED_AT_ONCE], minlength=tokenizer.vocab_size)
    return int(counts @ tokenizer.character_lengths), int(counts @ tokenizer.byte_lengths)
