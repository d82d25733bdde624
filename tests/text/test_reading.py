"""Reading a text from a file: line ends, encodings, wrong files."""

import tracemalloc

import numpy as np
import pytest

from npgpt import CharTokenizer, RequestError, read_text
from npgpt.text import reading
from npgpt.text.reading import read_ids


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
    path.unlink()
    with pytest.raises(RequestError, match="holds no text file"):
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


def test_one_wide_character_does_not_widen_the_text(tmp_path, monkeypatch):
    """Memory is that of the text as UTF-8 and of the ids, whatever characters are in it."""
    monkeypatch.setattr(reading, "BYTES_PER_PIECE", 1 << 22)
    size = 24 << 20
    plain = b"the bell rang over the water. " * (size // 30)
    peaks = []
    for name, content in (("plain.txt", plain), ("wide.txt", plain + "𝄞".encode())):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        _, ids = read_ids(tmp_path / name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(ids) == len(content.decode())
    assert max(peaks) < 2.5 * size + (16 << 20), peaks
    assert peaks[1] < 1.2 * peaks[0], peaks


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_pieces_may_end_inside_a_character(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(reading, "DECODED_AT_ONCE", at_once)
    monkeypatch.setattr(reading, "BYTES_PER_PIECE", 7)
    text = "aé€𝄞\nb𝄞€éa" * 3
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tokenizer, ids = read_ids(path)
    assert tokenizer.decode(ids) == text == read_text(path)
