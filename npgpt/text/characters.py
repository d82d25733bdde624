"""The character tokenizer: one id for each character. Files are read in reading.py."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.text.tokenizer import Tokenizer, UnknownCharacterError


@dataclass(frozen=True)
class MoreCharacters:
    """Asks for a tokenizer that also knows the characters of a text: the ids of `base`, and then new ones."""

    base: CharTokenizer


CHARACTERS_AT_ONCE = 1 << 16  # few, so that encoding a large text needs little more memory than its ids


class CharTokenizer(Tokenizer):
    """A tokenizer with one token for each character (Unicode code point).

    `stoi` maps a character to its id, and `itos` maps an id to its character. The ids are 0 .. vocab_size - 1.
    """

    is_characters = True
    end_id: int | None = None

    def __init__(self, characters: Sequence[str]) -> None:
        """characters: single characters, in the order of their ids.

        Raises RequestError if there are none, if one occurs twice, or if one is not a single character.
        """
        if not characters:
            raise RequestError("a vocabulary needs at least one character, got none")
        wrong = [c for c in characters if not isinstance(c, str) or len(c) != 1]
        if wrong or len(set(characters)) != len(characters):
            raise RequestError(f"a vocabulary is made of different single characters, got {list(characters)[:20]!r}")
        self.itos: dict[int, str] = dict(enumerate(characters))
        self.stoi: dict[str, int] = {c: i for i, c in self.itos.items()}
        # _table[code point] is the id, or -1 for a character outside the vocabulary. The last entry is for all code points
        # above the largest in the vocabulary.
        self._table = np.full(max(map(ord, characters)) + 2, -1, dtype=np.int32)
        self._table[[ord(c) for c in characters]] = np.arange(len(characters))

    @classmethod
    def build_vocab(cls, text: str | Iterable[str]) -> CharTokenizer:
        """The tokenizer whose vocabulary is the characters of `text`, sorted. `text` may also be pieces of a text."""
        seen = np.zeros(0x110000, dtype=bool)  # Unicode ends at U+10FFFF
        for piece in [text] if isinstance(text, str) else text:
            for codes in _code_points(piece):
                seen[codes] = True
        if not seen.any():
            raise RequestError("cannot build a vocabulary from an empty text")
        return cls([chr(code) for code in np.flatnonzero(seen)])

    def with_characters_of(self, pieces: Iterable[str]) -> CharTokenizer:
        """The tokenizer that also knows the characters of a text. The new ones have the highest ids, sorted."""
        new = [c for c in CharTokenizer.build_vocab(pieces).stoi if c not in self.stoi]
        return CharTokenizer([*self.stoi, *new])

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    @property
    def start_ids(self) -> list[int]:
        """A line break, or the first character if the vocabulary has no line break."""
        return [self.stoi.get("\n", 0)]

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,): the number of bytes of each character in UTF-8."""
        return np.array([len(c.encode(errors="surrogatepass")) for c in self.stoi])

    @property
    def character_lengths(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int64)

    @property
    def characters(self) -> str:
        """The vocabulary, in the order of the ids."""
        return "".join(self.itos.values())

    def encode_array(self, text: str, position: int = 0) -> np.ndarray:
        """Like `encode`, but returns an array (len(text),) of `id_dtype`, for whole corpora.

        position: where this text starts in a longer text, for the message about an unknown character.
        """
        ids = np.empty(len(text), dtype=self.id_dtype)
        done = 0
        for codes in _code_points(text):
            found = self._table[np.minimum(codes, len(self._table) - 1)]
            if found.min() < 0:
                raise self._unknown_error(text[done : done + len(codes)], position + done)
            ids[done : done + len(codes)] = found
            done += len(codes)
        return ids

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a text that comes in pieces, piece by piece."""
        done = 0
        for piece in pieces:
            yield self.encode_array(piece, position=done)
            done += len(piece)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text. Raises RequestError, naming the id, if an id is not in the vocabulary."""
        try:
            return "".join([self.itos[int(i)] for i in ids])
        except KeyError as error:
            raise RequestError(f"id {error.args[0]} is not in the vocabulary, whose ids are 0..{self.vocab_size - 1}") from None

    def token_bytes(self, i: int) -> bytes:
        """The character with this id, as UTF-8."""
        return self.decode([i]).encode(errors="surrogatepass")

    def stream(self) -> _CharacterStream:
        """A stream that turns ids into characters, one at a time."""
        return _CharacterStream(self.itos)

    def unknown(self, text: str) -> dict[str, int]:
        """The characters of `text` outside the vocabulary, each with the position of its first occurrence."""
        return {c: text.index(c) for c in dict.fromkeys(text) if c not in self.stoi}

    def without_unknown(self, text: str, replace: bool) -> str:
        """`text` without its unknown characters.

        replace: whether an unknown character becomes the closest known one; without a close one it is left out.
        """
        closest = {c: (self._closest(c) if replace else None) or "" for c in self.unknown(text)}
        return "".join(closest.get(c, c) for c in text)

    def _unknown_error(self, text: str, position: int) -> UnknownCharacterError:
        unknown = self.unknown(text)
        shown = []
        for character, at in list(unknown.items())[:5]:
            close = self._closest(character)
            name = unicodedata.name(character, f"U+{ord(character):04X}")
            shown.append(f"{character!r} ({name}) at position {position + at}" + (f", closest {close!r}" if close else ""))
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        plural = "s" if len(unknown) > 1 else ""
        return UnknownCharacterError(
            f"unknown character{plural} {'; '.join(shown)}{more}: not in the text the model was trained on"
        )

    def _closest(self, character: str) -> str | None:
        """The closest known character, or None.

        It is the other case of the letter, else its plain form without accent or ligature (Unicode NFKD), else the other
        case of the plain form."""
        plain = unicodedata.normalize("NFKD", character)[:1]
        candidates = (character.swapcase(), plain, plain.swapcase())
        return next((c for c in candidates if c in self.stoi), None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.itos == other.itos

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CharTokenizer({self.characters!r})"


class _CharacterStream:
    """Every id is a whole character, so nothing is held back."""

    def __init__(self, itos: dict[int, str]) -> None:
        self._itos = itos

    def add(self, i: int) -> str:
        return self._itos[i]

    def end(self) -> str:
        return ""


def _code_points(text: str) -> Iterator[np.ndarray]:
    """The code points of a text, in several arrays, because one array would take four times the memory of most texts."""
    for start in range(0, len(text), CHARACTERS_AT_ONCE):
        part = text[start : start + CHARACTERS_AT_ONCE]
        yield np.frombuffer(part.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
