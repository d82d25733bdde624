"""The files of tokenizers that other programs read and write: `tokenizer.json`, or a vocabulary and its merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.text.bpe import END_OF_TEXT, BPETokenizer, NewBPE
from npgpt.text.characters import CharTokenizer
from npgpt.text.tokenizer import Tokenizer

MAX_BYTES = 32 << 20  # of a file; GPT-2's tokenizer.json has 1.4 MB, those of large models 10 MB
DEFAULT_VOCAB_SIZE = 512
DESCRIPTION = "tokenizer.json"
VOCABULARIES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}  # the second pair are OpenAI's names


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, in a `vocab.json` beside its `merges.txt`, or in the folder of these files.

    Raises RequestError, naming the file, if there is none, or if it is neither a byte-level BPE nor one of characters.
    """
    path = Path(path)
    if path.is_dir():
        return read_tokenizer(_file_in(path))
    try:
        parsed = read_json(path)
        if isinstance(parsed, dict) and not isinstance(parsed.get("model"), dict):  # a vocabulary; "model" may be a token
            parsed = _gpt2_description(parsed, _read_merges(path))
        characters = _characters_in(parsed)
        return BPETokenizer(json.dumps(parsed, ensure_ascii=False)) if characters is None else CharTokenizer(characters)
    except RequestError as error:
        raise RequestError(f"cannot use the tokenizer {path}: {error}") from None


def tokenizer_named(choice: str | None, vocab_size: int | None) -> Tokenizer | NewBPE | None:
    """What the flags --tokenizer and --vocab-size ask for. None: a tokenizer of the text's characters.

    Raises RequestError if they contradict each other, or if the tokenizer cannot be read.
    """
    if choice == "bpe":
        return NewBPE(DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    if vocab_size is not None:
        raise RequestError("--vocab-size is for --tokenizer bpe; every other tokenizer has its own vocabulary")
    if choice in (None, "char"):
        return None
    if not Path(choice).exists():
        raise RequestError(f"--tokenizer must be char, bpe, or the file or folder of a tokenizer; there is no {choice}")
    return read_tokenizer(choice)


def has_tokenizer(folder: Path) -> bool:
    """Whether one of the files that `read_tokenizer` reads is in the folder."""
    return any((folder / name).is_file() for name in (DESCRIPTION, *VOCABULARIES))


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The contents of a `tokenizer.json` for the tokenizers library.

    A tokenizer of characters is a vocabulary of words, and every character is a word. An unknown character is an error.
    """
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.json
    assert isinstance(tokenizer, CharTokenizer)
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    words = {"type": "WordLevel", "vocab": tokenizer.stoi, "unk_token": "<unk>"}
    parts: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    parts |= {"pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"}, "model": words}
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def _characters_in(description: Any) -> list[str] | None:
    """The characters, if this is a tokenizer of characters as `tokenizer_json` describes it; else None."""
    model = description.get("model") if isinstance(description, dict) else None
    if not isinstance(model, dict) or model.get("type") != "WordLevel" or not isinstance(model.get("vocab"), dict):
        return None
    vocab, split = model["vocab"], description.get("pre_tokenizer")
    if not isinstance(split, dict) or split.get("pattern") != {"Regex": "[\\s\\S]"} or any(len(word) != 1 for word in vocab):
        return None
    if description.get("normalizer") or description.get("added_tokens") or list(vocab.values()) != list(range(len(vocab))):
        return None
    return list(vocab)


def _file_in(folder: Path) -> Path:
    for name in (DESCRIPTION, *VOCABULARIES):
        if (folder / name).is_file():
            return folder / name
    raise RequestError(f"the folder {folder} has no tokenizer: expected {DESCRIPTION}, or vocab.json and merges.txt")


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RequestError(f"there is no {path.name}") from None
    except OSError as error:
        raise RequestError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise RequestError(f"{path.name} has more than {MAX_BYTES:,} bytes")
    return data


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path.name} is not UTF-8 text") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path.name} is not JSON: {error}") from None


def _read_merges(vocabulary: Path) -> list[list[str]]:
    name = VOCABULARIES.get(vocabulary.name, "merges.txt")
    lines = _read_text(vocabulary.with_name(name)).split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [line.rstrip("\r").split(" ") for line in lines if line.strip()]


def _gpt2_description(vocab: dict[str, Any], merges: list[list[str]]) -> dict[str, Any]:
    """The description of GPT-2's kind of tokenizer, from a vocabulary and its merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = {"".join(pair) for pair in merges}
    n_made = sum(token in made for token in vocab if len(token) > 1)
    if n_made < 0.9 * sum(len(token) > 1 for token in vocab):  # the others may be special tokens
        raise RequestError(f"its merges make only {n_made:,} of its {len(vocab):,} tokens, so they are not complete")
    added = []
    if END_OF_TEXT in vocab:
        end = {"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, "special": True}
        added = [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model | {"vocab": {token: i for token, i in vocab.items() if token != END_OF_TEXT}, "merges": merges},
    }
