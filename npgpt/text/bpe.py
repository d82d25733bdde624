"""Byte-level byte-pair encoding: one id for each frequent sequence of bytes ("Language Models are Unsupervised Multitask
Learners", Radford et al., 2019).

The `tokenizers` library trains and encodes. Decoding needs a table of bytes and no library. Files are read in
tokenizer_files.py.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.text.bpe_description import CUT, bytes_of_tokens, may_be_cut, parse, splits_as_gpt2
from npgpt.text.tokenizer import Tokenizer, UnknownCharacterError

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256  # the smallest vocabulary: a token for each byte
CHARACTERS_IN_PIECE, PIECES_AT_ONCE = 1 << 16, 16  # more would take more memory and hardly less time
LONGEST_WORD = 512  # characters that the training of a tokenizer takes for one word
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}")
NEAR = 256  # characters in which almost every text has a place for a cut


@dataclass(frozen=True)
class NewBPE:
    """Asks for a tokenizer that is trained on a text."""

    vocab_size: int


class BPETokenizer(Tokenizer):
    """A byte-level BPE. `json` describes it in the format of the `tokenizers` library, as a `tokenizer.json` does."""

    is_characters = False

    def __init__(self, description: str) -> None:
        """description: the contents of a `tokenizer.json`.

        Raises RequestError if it is not a byte-level BPE, or does something with texts that cannot be undone.
        """
        parsed = parse(description)
        self.json = json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))
        self._bytes = bytes_of_tokens(parsed)
        self.splits_as_gpt2 = splits_as_gpt2(parsed)  # whether it splits a text into words as GPT-2 does
        self._may_be_cut = may_be_cut(parsed)
        self._missing = set(range(256)) - {token[0] for token in self._bytes if len(token) == 1}
        special = {added["content"]: added["id"] for added in parsed["added_tokens"] if added["special"]}
        self.special_ids = list(special.values())
        self.added_ids = [added["id"] for added in parsed["added_tokens"] if not added["special"]]
        self.end_id: int | None = special.get(END_OF_TEXT)

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
        """The tokenizer with at most vocab_size tokens for a text: the 256 bytes, and the most frequent pairs of tokens.

        pieces: the text, in pieces. A short text gives fewer tokens. Raises RequestError for a vocab_size below 256.
        """
        if vocab_size < N_BYTES:
            raise RequestError(f"a byte-level BPE needs a vocab_size of at least {N_BYTES}, got {vocab_size}")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_with_short_words(_cut(pieces)), trainer)
        return cls(tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def start_ids(self) -> list[int]:
        """The end of the text before, or a line break, or the first token."""
        if self.end_id is not None:
            return [self.end_id]
        return [self._bytes.index(b"\n") if b"\n" in self._bytes else 0]

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,): the number of bytes of each token."""
        return np.array([len(token) for token in self._bytes])

    @functools.cached_property
    def character_lengths(self) -> np.ndarray:
        """(vocab_size,): the number of characters that begin in each token. A byte 10xxxxxx continues a character."""
        return np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in self._bytes])

    def encode_array(self, text: str) -> np.ndarray:
        """Text -> ids (n,). Needs the `tokenizers` library. Raises UnknownCharacterError for a byte without a token."""
        return np.concatenate([np.empty(0, self.id_dtype), *self.encode_pieces([text])])

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a long text that comes in pieces, in arrays.

        A million characters are encoded at a time, or more if the text has no place for a cut.
        """
        waiting: list[str] = []
        for piece in _cut(pieces) if self._may_be_cut else ["".join(pieces)]:
            if unknown := self.unknown(piece):
                raise UnknownCharacterError(f"{', '.join(map(repr, list(unknown)[:5]))}, and the tokenizer has no token for it")
            waiting.append(piece)
            if len(waiting) == PIECES_AT_ONCE:
                yield self._encode_batch(waiting)
                waiting = []
        if waiting:
            yield self._encode_batch(waiting)

    def _encode_batch(self, pieces: list[str]) -> np.ndarray:
        encoded = self._encoder.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.array(piece.ids, dtype=self.id_dtype) for piece in encoded])

    @functools.cached_property
    def _encoder(self) -> Any:
        library = _library()
        try:
            encoder = library.Tokenizer.from_str(self.json)
        except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
            raise RequestError(f"the tokenizers library cannot use this tokenizer: {error}") from None
        encoder.encode_special_tokens = True  # the text "<|endoftext|>" in a file is text
        return encoder

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text. Bytes that are not UTF-8 become U+FFFD. Raises RequestError, naming the id, for an unknown id."""
        return b"".join([self.token_bytes(int(i)) for i in ids]).decode(errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token. Raises RequestError if there is no such id."""
        if not 0 <= i < self.vocab_size:
            raise RequestError(f"id {i} is not in the vocabulary, whose ids are 0..{self.vocab_size - 1}")
        return self._bytes[i]

    def token_texts(self) -> list[str]:
        """Each token as the description writes it: one printable character for each byte. Special tokens are as they are."""
        parsed = json.loads(self.json)
        id_of = parsed["model"]["vocab"] | {added["content"]: added["id"] for added in parsed["added_tokens"]}
        return sorted(id_of, key=id_of.__getitem__)

    def merges(self) -> list[list[str]]:
        """The pairs of tokens that are joined, the first ones first, written as in `token_texts`."""
        found = json.loads(self.json)["model"]["merges"]
        return [pair.split(" ") if isinstance(pair, str) else pair for pair in found]

    def stream(self) -> _ByteStream:
        """A stream that turns ids into text, one at a time."""
        return _ByteStream(self)

    def unknown(self, text: str) -> dict[str, int]:
        """The characters of `text` with a byte that has no token, each with the position of its first occurrence.

        Lone surrogates are among them, because they are in no text in UTF-8.
        """
        return {c: text.index(c) for c in dict.fromkeys(text) if "\ud800" <= c <= "\udfff" or self._lacks_a_byte_of(c)}

    def _lacks_a_byte_of(self, character: str) -> bool:
        return bool(self._missing) and bool(self._missing & set(character.encode()))

    def without_unknown(self, text: str, replace: bool) -> str:
        """`text` without its unknown characters. There are no close ones to replace them by."""
        unknown = self.unknown(text)
        return "".join(c for c in text if c not in unknown) if unknown else text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.json == other.json

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BPETokenizer(<{self.vocab_size} tokens>)"


class _ByteStream:
    """Holds back the bytes of an incomplete character."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, i: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(i))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise RequestError(
            "training or encoding with a BPE needs the tokenizers library: python -m pip install 'npgpt[bpe]'"
        ) from None
    return tokenizers


def _with_short_words(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text to learn from. Very long words are cut, because the time for a word grows with its square."""
    for piece in pieces:
        if LONG_WORD.search(piece):
            yield from (piece[start : start + LONGEST_WORD] for start in range(0, len(piece), LONGEST_WORD))
        else:
            yield piece


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """The text in pieces of about CHARACTERS_IN_PIECE characters, cut where a word begins.

    The last piece may be shorter. Text without a place for a cut stays in one piece.
    """
    held, searched = "", 0
    for piece in pieces:
        held += piece
        start = 0
        while len(held) - start >= CHARACTERS_IN_PIECE:
            at = _cut_between(held, start, max(start + CHARACTERS_IN_PIECE, searched))
            if not at:
                searched = len(held)
                break
            yield held[start:at]
            start = at
        if start:
            held, searched = held[start:], max(0, searched - start)
    if held:
        yield held


def _cut_between(text: str, start: int, position: int) -> int:
    """The last place for a cut shortly before `position`, else the first one after it, else 0."""
    near = [match.start() for match in CUT.finditer(text, max(start + 1, position - NEAR), position + 1)]
    if near:
        return near[-1]
    later = CUT.search(text, position)
    return later.start() if later else 0
