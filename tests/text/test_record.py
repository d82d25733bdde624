"""The record of a text: recognising it, alone or as the beginning of a longer one, whatever the tokenizer."""

import numpy as np
import pytest

from npgpt import BPETokenizer, CharTokenizer
from npgpt.text import record
from npgpt.text.record import TextRecord, fingerprint


def test_a_fingerprint_tells_texts_apart_and_not_dtypes():
    tokenizer, ids = CharTokenizer("".join(map(chr, range(100)))), np.arange(100)
    same = [fingerprint(ids.astype(dtype), tokenizer) for dtype in (np.uint8, np.int64, ">u4")]
    assert len(set(same)) == 1
    assert fingerprint(ids[::-1], tokenizer) != same[0]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("at_once", [1, 3, 1 << 16])
def test_the_beginning_of_a_text(kind, at_once, monkeypatch):
    monkeypatch.setattr(record, "IDS_AT_ONCE", at_once)
    text = "The bell 中文 rang é😀 over the water. " * 5
    if kind == "bpe":
        pytest.importorskip("tokenizers")
        tokenizer = BPETokenizer.train([text], 300)
    else:
        tokenizer = CharTokenizer.build_vocab(text)
    for n in (0, 1, 12, 19, 20, 40, len(text)):
        found = TextRecord.of(tokenizer.encode_array(text[:n]), tokenizer, "a.txt")
        assert (found.n_characters, found.sources) == (n, ("a.txt",))
        assert found.is_beginning_of(tokenizer.encode_array(text), tokenizer)
        assert found.is_beginning_of(tokenizer.encode_array(text[:n]), tokenizer)
        if n:
            assert not found.is_beginning_of(tokenizer.encode_array(text[: n - 1]), tokenizer)
            assert not found.is_beginning_of(tokenizer.encode_array(text[1:] + text[:1]), tokenizer)
    old = TextRecord((), fingerprint(tokenizer.encode_array(text), tokenizer), None)
    assert old.is_beginning_of(tokenizer.encode_array(text), tokenizer)
    assert not old.is_beginning_of(tokenizer.encode_array(text + "a"), tokenizer)
