"""Tokenizer, reading files, split and batches."""

import numpy as np
import pytest

from npgpt import CharTokenizer, Dataset, RequestError, read_text
from npgpt.text import characters, reading
from npgpt.text.dataset import window_starts, windows_at
from npgpt.text.reading import read_ids


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


@pytest.mark.parametrize("piece", [1, 3, 1 << 26])
def test_read_text(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "BYTES_PER_PIECE", piece)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(path) == "one\ntwo\nthree\n"
    for content, words in [
        (b"", "empty"),
        (b"ab\0c", "NUL byte at offset 2"),
        (b"ab\xffc", "byte 0xff at offset 2"),
        (b"\xef\xbb\xbfab\xe2\x82c", "byte 0xe2 at offset 5"),
        (b"abcd\xe2\x82", "byte 0xe2 at offset 4"),
        (b"\xef\xbb\xbf", "empty"),
        *([("ab".encode("utf-16"), "UTF-16")] if piece > 1 else []),
    ]:
        path.write_bytes(content)
        with pytest.raises(RequestError, match=words):
            read_text(path)
    with pytest.raises(RequestError, match="no such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(RequestError, match="folder"):
        read_text(tmp_path)


@pytest.mark.parametrize("piece", [1, 5, 1 << 26])
def test_read_ids(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "BYTES_PER_PIECE", piece)
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo €𝄞\r".encode())
    watched = []

    def track(iterable, total, desc, unit, unit_scale):
        items = list(iterable)
        watched.append((desc, len(items) == total))
        return items

    tokenizer, ids = read_ids(path, track=track)
    assert tokenizer == CharTokenizer.build_vocab(read_text(path))
    assert (ids.dtype, tokenizer.decode(ids)) == (np.uint8, "one\ntwo €𝄞\n")
    assert watched == [("Reading", True), ("Encoding", True)]
    assert read_ids(path, CharTokenizer("\n €𝄞enotwx"))[1].tolist() == [6, 5, 4, 0, 7, 8, 6, 1, 2, 3, 0]
    with pytest.raises(RequestError, match=r"'w' .* at position 5"):
        read_ids(path, CharTokenizer("\n €𝄞enot"))


def test_split_is_ninety_ten_in_order():
    data = Dataset(np.arange(1005), block_size=8, batch_size=2)
    assert len(data.val) == 100
    np.testing.assert_array_equal(np.concatenate([data.train, data.val]), np.arange(1005))
    assert len(Dataset(np.arange(100), 8, 2, val_fraction=0).val) == 0
    assert data.ids.dtype == np.uint16


def test_a_fingerprint_tells_texts_apart_and_not_dtypes():
    ids = np.arange(100)
    same = [Dataset(ids.astype(dtype), 8, 1).fingerprint() for dtype in (np.uint8, np.int64, ">u4")]
    assert len(set(same)) == 1
    assert Dataset(ids[::-1], 8, 1).fingerprint() != same[0]


def test_batches_are_shifted_windows_of_their_split():
    data = Dataset(np.arange(1000), block_size=8, batch_size=64)
    for split, low, high in (("train", 0, 900), ("val", 900, 1000)):
        x, y = data.get_batch(split)
        assert x.shape == y.shape == (64, 8)
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(x), 1)
        assert x.min() >= low
        assert y.max() < high


def test_every_window_can_be_drawn_and_no_other():
    data = Dataset(np.arange(12), block_size=8, batch_size=500, val_fraction=0)
    x, _ = data.get_batch("train")
    assert set(x[:, 0]) == {0, 1, 2, 3}


def test_batch_k_is_a_function_of_seed_and_k():
    a, b = (Dataset(np.arange(500), 8, 4, seed=5) for _ in range(2))
    drawn = [a.get_batch("train")[0] for _ in range(4)]
    b.get_batch("val")
    for k in (3, 0, 2):
        np.testing.assert_array_equal(b.get_batch("train", k)[0], drawn[k])
    np.testing.assert_array_equal(b.get_batch("train")[0], drawn[0])
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(Dataset(np.arange(500), 8, 4, seed=6).get_batch("train")[0], drawn[0])


def test_windows_lie_side_by_side():
    for n in (1, 2, 8, 9, 10, 17, 50):
        starts = window_starts(n, block_size=8)
        x, y = windows_at(np.arange(n), starts, 8)
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(y.ravel(), np.arange(1, 8 * len(starts) + 1))
        assert n - 1 - y.size < 8  # less than a window is left over


def test_some_windows_are_spread_evenly():
    assert window_starts(1001, 10, max_tokens=40).tolist() == [0, 250, 500, 750]
    assert window_starts(1001, 10, max_tokens=3).tolist() == [0]
    np.testing.assert_array_equal(window_starts(1001, 10, max_tokens=5000), window_starts(1001, 10))


def test_bad_datasets():
    with pytest.raises(RequestError, match=r"too short.*8 tokens.*needs 9"):
        Dataset(np.arange(8), block_size=8, batch_size=1, val_fraction=0)
    with pytest.raises(RequestError, match="val part has 2"):
        Dataset(np.arange(20), block_size=8, batch_size=1).get_batch("val")
    with pytest.raises(RequestError, match="integers"):
        Dataset([0.5] * 20, 8, 1)
    with pytest.raises(RequestError, match="integers"):
        Dataset([-1] * 20, 8, 1)
    with pytest.raises(RequestError, match="val_fraction"):
        Dataset(np.arange(20), 8, 1, val_fraction=1.0)
    with pytest.raises(ValueError, match="split"):
        Dataset(np.arange(20), 8, 1).get_batch("test")
