"""The files that make up a text: folders, their order, compressed files, files that are no texts."""

import bz2
import gzip
import io
import lzma
import os
import sys
from pathlib import Path

import pytest

from npgpt import RequestError, read_text
from npgpt.text.reading import read_ids
from npgpt.text.sources import SNIFFED, Sources, opened

ZSTD = "zstandard" if sys.version_info < (3, 14) else "compression.zstd"


def zstd_compressed(data):
    return pytest.importorskip(ZSTD).compress(data)


def test_files_are_joined_in_their_order_with_nothing_in_between(tmp_path):
    for name, content in (("b.txt", b"one"), ("a.txt", b" two\r\n")):
        (tmp_path / name).write_bytes(content)
    assert read_text([tmp_path / "b.txt", tmp_path / "a.txt"]) == "one two\n"
    sources = Sources([tmp_path / "b.txt", tmp_path / "a.txt"])
    _, ids = read_ids(sources)
    assert (len(ids), list(sources.characters.values())) == (8, [3, 5])


def test_byte_order_marks_are_dropped_everywhere(tmp_path):
    """Joining files puts the mark at the beginning of each into the middle of the text."""
    path = tmp_path / "joined.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n" * 2 + b"tw\xef\xbb\xbfo\n")
    assert read_text(path) == "one\none\ntwo\n"
    assert "\ufeff" not in read_ids(path)[0].stoi


def test_the_order_of_a_folder_is_that_of_its_paths(tmp_path):
    for name in ("b/z.txt", "b.txt", "a10.txt", "a9.txt", "B.txt", "b/a/c.txt", ".hidden", ".git/config", "été.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    found = [os.path.relpath(name, tmp_path).replace(os.sep, "/") for name in Sources(tmp_path).names]
    order = ["a10.txt", "a9.txt", "b/a/c.txt", "b/z.txt", "b.txt", "été.txt"]
    assert [name for name in found if name != "B.txt"] == order
    assert read_text(tmp_path) == "".join(found)


def test_files_of_a_folder_that_are_no_texts_are_left_out(tmp_path):
    cut = "é".encode() * SNIFFED  # the beginning that is looked at ends inside a character
    for name, content in {
        "text.txt": b"the bell",
        "long.txt": b"x" + cut,
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        "latin1.txt": b"caf\xe9",
        "utf16.txt": "bell".encode("utf-16"),
        "nothing.txt": b"",
        "mark.txt": b"\xef\xbb\xbf",
        "book.epub": b"PK\x03\x04 and so on",
        "book.pdf": b"%PDF-1.7 and so on",
        "packed.gz": gzip.compress(b"\0"),
        "out.jsonl": b"{}",
        "plain.gz": b"the bell",
        "run.jsonl": b'{"event": "start", "step": 0}\n',
        "run.npz": b"PK\x03\x04",
        "other.jsonl": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
    sources = Sources(tmp_path, never=[tmp_path / "out.jsonl"])
    assert [Path(name).name for name in sources.names] == ["long.txt", "other.jsonl", "text.txt"]
    reasons = {Path(name).name: reason for name, reason in sources.left_out.items()}
    assert reasons == {
        "picture.png": "not a text",
        "latin1.txt": "not UTF-8 text",
        "utf16.txt": "UTF-16 text; save it as UTF-8",
        "nothing.txt": "empty",
        "mark.txt": "empty",
        "book.epub": "a zip archive, as .docx, .epub and .npz are; unpack it",
        "book.pdf": "a PDF; save its text as a file",
        "packed.gz": "not a text",
        "run.jsonl": "the log of a run",
        "run.npz": "a checkpoint or another NumPy archive",
        "plain.gz": "not a gzip file, though its name ends in .gz",
    }


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_links_and_pipes_in_a_folder(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"the bell")
    (tmp_path / "again").symlink_to(tmp_path)  # a loop, which is not followed
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    sources = Sources(tmp_path)
    assert [Path(name).name for name in sources.names] == ["text.txt"]
    reasons = {Path(name).name: reason for name, reason in sources.left_out.items()}
    linked = "a link to a folder; name that folder itself"
    assert reasons == {"again": linked, "broken": "not a regular file", "pipe": "not a regular file"}


def test_wrong_names(tmp_path):
    for wrong, words in [("", "the name of a text file is empty"), (["a"] * 1001, "at most 1000 files, got 1001")]:
        with pytest.raises(RequestError, match=words):
            Sources(wrong)
    (tmp_path / "a.txt").write_bytes(b"bell")
    with pytest.raises(RequestError, match="no such file"):  # before anything is read
        Sources([tmp_path / "a.txt", tmp_path / "none.txt"])


def test_a_folder_without_a_text_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds no text file$"):
        Sources(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\0")
    with pytest.raises(RequestError, match=r"holds no text file; .*a\.png is not a text$"):
        Sources(tmp_path)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd_compressed}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_unpacked(tmp_path, suffix):
    text = "the bell rang é\n" * 100_000
    packed = PACK[suffix](text.encode())
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(packed)
    assert read_text(path) == text
    (tmp_path / "no-suffix").write_bytes(packed)
    assert read_text(tmp_path / "no-suffix") == text
    path.write_bytes(packed + PACK[suffix](b"more"))  # two compressed files, joined
    assert read_text(path) == text + "more"
    path.write_bytes(b"plain text")
    with pytest.raises(RequestError, match=f"though its name ends in \\{suffix}"):
        read_text(path)
    damaged = bytearray(packed)
    damaged[len(damaged) // 2 :] = b"\x55" * 20
    for wrong in (damaged, packed[: len(packed) // 2], packed[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(RequestError, match="is damaged, or not complete"):
            read_text(path)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    path = tmp_path / "text.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 20)
    for name in (ZSTD, "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"pip install 'npgpt\[zstd\]'"):
        read_text(path)


def test_standard_input(monkeypatch):
    for content in (b"\xef\xbb\xbfthe bell\r\n", gzip.compress(b"the bell\n")):
        stdin = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_text("-") == "the bell\n"
        assert not stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="there is no standard input"):
        read_text("-")


def test_the_size_of_a_file_is_known_and_that_of_a_packed_file_is_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bell")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"bell"))
    with opened(str(tmp_path / "a.txt")) as (_, size):
        assert size == 4
    with opened(str(tmp_path / "a.gz")) as (file, size):
        assert (size, file.read()) == (None, b"bell")
