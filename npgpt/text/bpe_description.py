"""The description of a byte-level BPE in the format of the `tokenizers` library, a `tokenizer.json`.

This file says which descriptions are accepted, and which bytes their tokens stand for. It needs no library and encodes nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from npgpt.config.fields import RequestError

# A text may be cut here without a change of its ids: in front of a space, and behind a letter or digit in front of white space
# or punctuation. The expressions that split a text into words begin a new word at these places.
CUT = re.compile(r"(?<=\S)(?= )|(?<=[^\W_])(?=[\s,.;:?!\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


def _byte_characters() -> dict[str, int]:
    """The character that GPT-2 writes for each byte in its vocabulary: a printable one for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
LOSSY = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def parse(description: str) -> dict[str, Any]:
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
    words = _steps(parsed.get("pre_tokenizer"), "pretokenizers")
    decoders = _steps(parsed.get("decoder"), "decoders")
    if not words or words[-1].get("type") != "ByteLevel" or "ByteLevel" not in [step.get("type") for step in decoders]:
        raise RequestError("expected a byte-level BPE; its pre-tokenizer or decoder is not ByteLevel")
    for name, value in [("normalizer", parsed.get("normalizer")), *((n, model.get(n)) for n in LOSSY)]:
        if value:
            raise RequestError(f"its {name} changes texts in a way that cannot be undone; it must be empty")
    for step in words:
        if not _keeps_everything(step):
            raise RequestError(f"its pre-tokenizer {str(step.get('type'))[:40]!r}, with its settings, changes texts")
    added = parsed.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise RequestError("its added_tokens cannot be used")
    for token in added:
        if not token["special"] and (token.get("lstrip") or token.get("rstrip") or CUT.search(token["content"])):
            raise RequestError(f"its added token {token['content'][:40]!r} swallows or contains spaces between words")
    parsed |= {"truncation": None, "padding": None}
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("it has a lone surrogate, which no text can have") from None
    return parsed


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or decoder: itself, or the parts of a sequence. Empty if it is neither."""
    inner = part.get(name, [part]) if isinstance(part, dict) else []
    return inner if isinstance(inner, list) and all(isinstance(step, dict) for step in inner) else []


def _keeps_everything(step: dict[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer only splits a text, and neither adds nor removes anything."""
    if step.get("type") == "Split":
        return step.get("behavior") == "Isolated" and step.get("invert") is False
    return step.get("type") == "Digits" or (step.get("type") == "ByteLevel" and not step.get("add_prefix_space", False))


def splits_as_gpt2(parsed: dict[str, Any]) -> bool:
    """Whether a text is split into words by GPT-2's expression and nothing else."""
    steps = _steps(parsed["pre_tokenizer"], "pretokenizers")
    return len(steps) == 1 and steps[0].get("use_regex", True) is True


def may_be_cut(parsed: dict[str, Any]) -> bool:
    """Whether CUT finds the beginnings of words: for GPT-2's expression, and for those that end as it does."""
    for step in _steps(parsed["pre_tokenizer"], "pretokenizers"):
        pattern = step.get("pattern")
        if step.get("type") == "ByteLevel" and step.get("use_regex", True) is True:
            return True
        if isinstance(pattern, dict) and str(pattern.get("Regex", "")).endswith(r"\s+(?!\S)|\s+"):
            return True
    return False


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("special"), bool)
        and type(token.get("id")) is int
    )


def bytes_of_tokens(parsed: dict[str, Any]) -> list[bytes]:
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
        table[i] = content.encode()
    return table
