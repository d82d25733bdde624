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
from npgpt.text.tokenizer import UnknownCharacterError

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 256  # a token for each byte
CHARACTERS_IN_PIECE, PIECES_AT_ONCE = 1 << 16, 16  # more would take more memory and hardly less time
# A text may be cut here without a change of its ids: in front of a space, and behind a letter or digit in front of white space
# or punctuation. The expressions that split a text into words begin a new word at these places.
CUT = re.compile(r"(?<=\S)(?= )|(?<=[^\W_])(?=[\s,.;:?!\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


def _byte_characters() -> dict[str, int]:
    """The character that GPT-2 writes for each byte in its vocabulary: a printable one for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


@dataclass(frozen=True)
class NewBPE:
    """Asks for a tokenizer that is trained on a text."""

    vocab_size: int


class BPETokenizer:
    """A byte-level BPE. `json` describes it in the format of the `tokenizers` library, as a `tokenizer.json` does."""

    is_characters = False

    def __init__(self, description: str) -> None:
        """description: the contents of a `tokenizer.json`.

        Raises RequestError if it is not a byte-level BPE, or does something with texts that cannot be undone.
        """
        parsed = _parsed(description)
        self.json = json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))
        self._bytes = _bytes_of_tokens(parsed)
        self._missing = set(range(256)) - {token[0] for token in self._bytes if len(token) == 1}
        special = {added["content"]: added["id"] for added in parsed["added_tokens"] if added["special"]}
        self.special_ids = list(special.values())
        self.end_id: int | None = special.get(END_OF_TEXT)

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
        """The tokenizer with at most vocab_size tokens for a text: the 256 bytes, and the most frequent pairs of tokens.

        pieces: the text, in pieces. A short text gives fewer tokens. Raises RequestError for a vocab_size below 256.
        """
        if vocab_size < SMALLEST:
            raise RequestError(f"a byte-level BPE needs a vocab_size of at least {SMALLEST}, got {vocab_size}")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_cut(pieces), trainer)
        return cls(tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

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

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Needs the `tokenizers` library. Raises UnknownCharacterError for a byte without a token."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, but returns an array (n,) of `id_dtype`."""
        return np.concatenate([np.empty(0, self.id_dtype), *self.encode_pieces([text])])

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a long text that comes in pieces, in arrays. Memory is that of a million characters."""
        waiting: list[str] = []
        for piece in _cut(pieces):
            if unknown := self.unknown(piece):
                raise UnknownCharacterError(f"{', '.join(map(repr, list(unknown)[:5]))}, which the tokenizer has no tokens for")
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
        """The characters of `text` with a byte that has no token, each with the position of its first occurrence."""
        if not self._missing:
            return {}
        characters = dict.fromkeys(text)
        return {c: text.index(c) for c in characters if self._missing & set(c.encode(errors="surrogatepass"))}

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


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """The text in pieces of at least CHARACTERS_IN_PIECE characters, cut where a word begins. The last may be shorter."""
    held = ""
    for piece in pieces:
        held += piece
        while len(held) >= CHARACTERS_IN_PIECE and (at := _cut_near(held, CHARACTERS_IN_PIECE)):
            yield held[:at]
            held = held[at:]
    if held:
        yield held


def _cut_near(text: str, position: int) -> int:
    """The last place for a cut up to `position`, else the first one after it, else 0."""
    for start in (max(0, position - 256), 0):
        found = [match.start() for match in CUT.finditer(text, start, position + 1) if 0 < match.start() <= position]
        if found:
            return found[-1]
    later = CUT.search(text, position)
    # What follows a cut must be known: the next piece may go on with a letter.
    return later.start() if later else 0


# ---------------------------------------------------------------- the description


def _parsed(description: str) -> dict[str, Any]:
    """The description, checked. Cutting off and filling up texts is removed from it."""
    try:
        parsed = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not JSON: {error}") from None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise RequestError("it describes no tokenizer of the tokenizers library")
    model = parsed["model"]
    if (
        model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise RequestError(f"expected a byte-level BPE, got a tokenizer of type {str(model.get('type'))[:40]}")
    if not _is_byte_level(parsed.get("pre_tokenizer")) or not _is_byte_level(parsed.get("decoder")):
        raise RequestError("expected a byte-level BPE; its pre-tokenizer or decoder is not ByteLevel")
    for name, value in [("normalizer", parsed.get("normalizer")), *((n, model.get(n)) for n in LOSSY)]:
        if value:
            raise RequestError(f"its {name} changes texts in a way that cannot be undone; it must be empty")
    if _adds_prefix_space(parsed["pre_tokenizer"]):
        raise RequestError("its pre-tokenizer adds a space in front of every text; add_prefix_space must be false")
    added = parsed.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise RequestError("its added_tokens cannot be used")
    for token in added:
        if not token["special"] and (token.get("lstrip") or token.get("rstrip") or CUT.search(token["content"])):
            raise RequestError(f"its added token {token['content'][:40]!r} swallows or contains spaces between words")
    return parsed | {"truncation": None, "padding": None}


LOSSY = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def _steps(part: Any) -> list[Any]:
    """The steps of a pre-tokenizer or decoder, which may be a sequence of steps."""
    if not isinstance(part, dict):
        return []
    inner = part.get("pretokenizers") or part.get("decoders")
    return inner if isinstance(inner, list) else [part]


def _is_byte_level(part: Any) -> bool:
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in _steps(part))


def _adds_prefix_space(part: Any) -> bool:
    return any(isinstance(step, dict) and step.get("add_prefix_space", False) for step in _steps(part))


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("special"), bool)
        and type(token.get("id")) is int
    )


def _bytes_of_tokens(parsed: dict[str, Any]) -> list[bytes]:
    """The bytes of each token, in the order of the ids. Raises RequestError if they do not fit together."""
    vocab, merges = parsed["model"]["vocab"], parsed["model"]["merges"]
    added = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    ids = vocab | added
    if any(type(i) is not int for i in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise RequestError("its ids must be 0, 1, 2 and so on, each once")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RequestError(f"its merge {str(merge)[:40]!r} is not a pair of tokens")
        if not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
            raise RequestError(f"its merge {str(merge)[:40]!r} is of tokens that are not in the vocabulary")
    table = [b""] * len(ids)
    try:
        for token, i in vocab.items():
            table[i] = bytes([BYTE_OF[c] for c in token])
    except KeyError as error:
        raise RequestError(f"its token {token[:40]!r} is not byte-level: {error.args[0]!r} stands for no byte") from None
    for content, i in added.items():
        table[i] = content.encode(errors="surrogatepass")
    return table
