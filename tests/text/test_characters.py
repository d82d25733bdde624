"""The character tokenizer: its vocabulary, encoding, decoding, unknown characters."""

import numpy as np
import pytest

from npgpt import CharTokenizer, RequestError
from npgpt.text import characters


def test_vocabulary_and_round_trip():
    tokenizer = CharTokenizer.build_vocab("hello\nWorld €𝄞")
    assert tokenizer.vocab_size == len(set("hello\nWorld €𝄞"))
    assert [tokenizer.itos[i] for i in range(tokenizer.vocab_size)] == sorted(set("hello\nWorld €𝄞"))
    assert all(tokenizer.itos[i] == c for c, i in tokenizer.stoi.items())
    ids = tokenizer.encode("hold 𝄞€")
    assert isinstance(ids, list)
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == "hold 𝄞€"
    assert tokenizer.decode(np.array(ids)) == "hold 𝄞€"
    assert tokenizer.encode("") == []
    assert tokenizer == CharTokenizer(tokenizer.characters)


def test_whole_text_round_trip(text, tokenizer):
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text[:100]) == ids[:100].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("abXa", r"'X' \(LATIN CAPITAL LETTER X\) at position 2, closest 'x'"),
        ("é", r"'é'.*position 0, closest 'e'"),
        ("ab€", r"'€' \(EURO SIGN\) at position 2: not in"),
        ("aéXbé€", r"unknown characters 'é' .* at position 1, closest 'e'; 'X' .* position 2.*; '€' .* at position 5: not"),
        ("b\x07", r"U\+0007.*position 1"),
    ],
)
def test_unknown_character(text, words):
    with pytest.raises(RequestError, match=words):
        CharTokenizer.build_vocab("abcxe").encode(text)


def test_unknown_characters_can_be_skipped_or_replaced():
    tokenizer = CharTokenizer.build_vocab("abcxe")
    assert tokenizer.unknown("aéXbé€") == {"é": 1, "X": 2, "€": 5}
    assert tokenizer.without_unknown("aéXbé€", replace=False) == "ab"
    assert tokenizer.without_unknown("aéXbé€", replace=True) == "aexbe"
    with pytest.raises(RequestError, match=r"and 3 more: not in the text"):
        tokenizer.encode("12345678")


def test_long_texts_are_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(characters, "CHARACTERS_AT_ONCE", 3)
    tokenizer = CharTokenizer.build_vocab("abc€")
    for text in ("", "ab", "abc", "abc€", "cba€abc"):
        assert tokenizer.decode(tokenizer.encode_array(text)) == text
    with pytest.raises(RequestError, match=r"'x' .* at position 5"):
        tokenizer.encode("abcabx")


def test_bad_vocabularies_and_ids():
    with pytest.raises(RequestError, match="empty"):
        CharTokenizer.build_vocab("")
    for wrong in ("aa", ["ab"], [1], []):
        with pytest.raises(RequestError, match="vocabulary"):
            CharTokenizer(wrong)
    with pytest.raises(RequestError, match=r"id 3 .* 0\.\.1"):
        CharTokenizer("ab").decode([0, 3])
