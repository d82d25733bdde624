"""The files that make up a text: finding them, opening them, unpacking them. Nothing is decoded here."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from npgpt.config.fields import RequestError

STDIN = "-"
MOST_PATHS = 1000
SNIFFED = 1 << 16  # the bytes at the beginning of a file that say whether it is a text
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# The first bytes of files that people may take for a text.
NOT_TEXTS = {
    re.compile(rb"PK\x03\x04"): "a zip archive, as .docx, .epub and .npz are; unpack it",
    re.compile(rb"%PDF-"): "a PDF; save its text as a file",
    re.compile(rb"(?s).{257}ustar"): "a tar archive; unpack it, and give the folder",
}
COMPRESSED = {  # the first bytes, and the suffix, of each compression
    "gzip": (re.compile(rb"\x1f\x8b\x08"), ".gz"),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), ".bz2"),
    "xz": (re.compile(rb"\xfd7zXZ\x00"), ".xz"),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd"), ".zst"),
}


class NotTextError(RequestError):
    """A file is of a kind that people may take for a text."""


class Sources:
    """The files that make up one text. The text is their contents, one after the other, with nothing in between.

    names: the files in the order in which they are read. `-` is standard input.
    given: what the caller has named: files, folders, or `-`.
    left_out: files of a folder that are not texts, each with the reason.
    characters: how many characters each file has given, once it was read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], never: Iterable[str | Path] = ()) -> None:
        """paths: files, folders, and `-` for standard input, in their order.

        A folder stands for the texts in it and in its subfolders, in the order of their paths. Left out are hidden files,
        empty files, files that are not UTF-8 text, logs of runs, links to folders, and the files in `never`.

        Raises RequestError for a path that does not exist or is empty, for a folder without a text, and for more than a
        thousand paths.
        """
        self.given = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self.names: list[str] = []
        self.left_out: dict[str, str] = {}
        self.characters: dict[str, int] = {}
        if len(self.given) > MOST_PATHS:  # a checkpoint stores them
            raise RequestError(
                f"expected at most {MOST_PATHS} files, got {len(self.given)}; put them into a folder, and name it"
            )
        ignored = {Path(path).resolve() for path in never}
        for path in self.given:
            if not path:
                raise RequestError("the name of a text file is empty")
            if path != STDIN and Path(path).is_dir():
                self._add_folder(Path(path), ignored)
            elif path == STDIN or Path(path).exists():
                self.names.append(path)
            else:
                raise RequestError(f"no such file: {path}")

    def _add_folder(self, folder: Path, never: set[Path]) -> None:
        found = []
        for path in _files_in(folder):
            if path.resolve() in never:
                continue
            reason = _reason_to_skip(path)
            if reason:
                self.left_out[str(path)] = reason
            else:
                found.append(str(path))
        if not found:
            skipped = "".join(f"; {path} is {reason}" for path, reason in list(self.left_out.items())[:3])
            raise RequestError(f"the folder {folder} holds no text file{skipped}")
        self.names += found

    def __str__(self) -> str:
        return shown_paths(self.given)


def shown_paths(paths: Sequence[str]) -> str:
    """Paths for a message: the first three, and how many more there are."""
    shown = ["standard input" if path == STDIN else path for path in paths[:3]]
    more = len(paths) - 3
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, in the order of their paths.

    Hidden files are left out. Links to folders are listed and not followed.
    """

    def refuse(error: OSError) -> NoReturn:
        raise RequestError(f"cannot read {error.filename}: {error.strerror}") from None

    found: list[Path] = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(where, name).is_symlink()]
        found += [Path(where, name) for name in [*files, *links] if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)


def _reason_to_skip(path: Path) -> str:
    """Why a file of a folder is left out; empty if it is a text, as far as its beginning says."""
    if path.is_dir():
        return "a link to a folder; name that folder itself"
    if not path.is_file():
        return "not a regular file"
    if path.suffix == ".npz":
        return "a checkpoint or another NumPy archive"
    try:
        with opened(str(path)) as (file, _):
            start = file.read(SNIFFED)
    except NotTextError as error:
        return str(error).removeprefix(f"{path} is ").removeprefix("not a text file but ")
    if not start.removeprefix(codecs.BOM_UTF8):
        return "empty"
    if start.startswith(UTF_16):
        return "UTF-16 text; save it as UTF-8"
    if b"\0" in start:
        return "not a text"
    if start.startswith(b'{"event": "start"'):
        return "the log of a run"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < SNIFFED)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return ""


@contextmanager
def opened(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file, or `-` for standard input, opened for reading: (file, its size in bytes or None if that is unknown).

    A file that gzip, bzip2, xz or zstd has compressed is unpacked while it is read. Raises RequestError if it cannot be read,
    also while it is read, and NotTextError for archives.
    """
    shown = "standard input" if name == STDIN else name
    try:
        with _standard_input() if name == STDIN else Path(name).open("rb") as raw:
            start = raw.peek(512)
            _refuse_archives(start, shown)
            for compression, (pattern, suffix) in COMPRESSED.items():
                if pattern.match(start):
                    with _decompressed(raw, compression, shown) as file:
                        yield file, None
                    return
                if start and name.endswith(suffix):
                    raise NotTextError(f"{shown} is not a {compression} file, though its name ends in {suffix}")
            yield raw, _size_of(raw)
    except FileNotFoundError:
        raise RequestError(f"no such file: {shown}") from None
    except OSError as error:
        kind = "it is a folder" if Path(name).is_dir() else error.strerror or str(error)
        raise RequestError(f"cannot read {shown}: {kind}") from None


def _refuse_archives(start: bytes, name: str) -> None:
    for pattern, kind in NOT_TEXTS.items():
        if pattern.match(start):
            raise NotTextError(f"{name} is not a text file but {kind}")


@contextmanager
def _standard_input() -> Iterator[io.BufferedReader[Any]]:
    if sys.stdin is None:
        raise RequestError("there is no standard input to read; name a file")
    reader: io.BufferedReader[Any] = io.BufferedReader(sys.stdin.buffer)
    try:
        yield reader
    finally:
        reader.detach()  # so that standard input stays open


def _size_of(file: BinaryIO) -> int | None:
    try:
        return os.fstat(file.fileno()).st_size or None  # a pipe has size 0
    except OSError:  # standard input may be something else than a file
        return None


@contextmanager
def _decompressed(raw: BinaryIO, compression: str, name: str) -> Iterator[BinaryIO]:
    """A compressed file as the bytes it holds. Raises RequestError if it is damaged."""
    damaged: tuple[type[Exception], ...] = (EOFError,)
    file: Any
    try:
        if compression == "gzip":
            import gzip
            import zlib

            file, damaged = gzip.GzipFile(fileobj=raw), (EOFError, zlib.error, gzip.BadGzipFile)
        elif compression == "bzip2":
            import bz2

            file, damaged = bz2.BZ2File(raw), (EOFError, OSError)
        elif compression == "xz":
            import lzma

            file = lzma.LZMAFile(raw)  # noqa: SIM115 (it is closed below)
            damaged = EOFError, lzma.LZMAError
        elif sys.version_info >= (3, 14):
            from compression import zstd

            file, damaged = zstd.ZstdFile(raw), (EOFError, zstd.ZstdError)
        else:
            import zstandard

            file, damaged = _ZstdFile(raw), (EOFError, zstandard.ZstdError)
    except ImportError:
        remedy = f"use a Python that has it, or unpack {name} first"
        if compression == "zstd":
            remedy = "python -m pip install 'npgpt[zstd]'"
        raise RequestError(f"{name} is compressed with {compression}, which this Python cannot read: {remedy}") from None
    try:
        with io.BufferedReader(file) as reader:
            _refuse_archives(reader.peek(512), name)
            yield reader
    except damaged as error:
        raise RequestError(f"{name} is damaged, or not complete: {error}") from None


class _ZstdFile(io.RawIOBase):
    """A zstd file as the bytes it holds. Unlike zstandard's own reader, it notices if the end of the file is missing."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._ready = self._new(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._raw.read(SNIFFED)
            if not data:
                if not self._frame.eof:
                    raise EOFError("the end is missing")
                return 0
            if self._frame.eof:  # another frame follows
                self._frame = self._new()
            self._ready = self._frame.decompress(data)
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n
