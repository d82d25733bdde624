"""The bytes of a checkpoint: a zip file with JSON texts and NumPy arrays. This file does not know what they mean.

The zip file is an `.npz` that `numpy.load` can read. Its members are stored without compression, because weights hardly
shrink, and without dates, so the same contents give the same bytes.

Reading trusts nothing. Every size is compared with the size of the file before memory is taken. Nothing is evaluated or
unpickled. Anything missing or left over is an error. So an archive is exactly what was written, or CheckpointError says
what is wrong with it.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.files import atomic_write

HEADER = "checkpoint.json"  # the name of the JSON text that every archive has
TOKENIZER = "tokenizer.json"  # the name of the JSON text that an archive may have
MAX_HEADER_BYTES = 2 << 20  # enough for a vocabulary of all characters in use and ten thousand evaluations
MAX_TEXT_BYTES = {HEADER: MAX_HEADER_BYTES, TOKENIZER: 32 << 20}
READ_BYTES = 1 << 20  # bytes read at a time
ZIP_END_BYTES = 22  # a zip file without a comment ends with a record of this size, which begins with PK\5\6

NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(
    rb"\{'descr': '(<\w\d)', 'fortran_order': False, 'shape': \(((?:\d{1,18}, ?){0,4}(?:\d{1,18})?)\), \} *\n"
)
DTYPES = ("<i8", "<f4", "<f8")  # the dtypes an archive may hold

EncodedArray = tuple[bytes, memoryview]  # the header of NumPy's file format, and the data


class CheckpointError(RequestError):
    """A file is not a checkpoint that this version can use. The message says what is wrong with it."""


class UnusableError(CheckpointError):
    """The file is not damaged, but this version cannot use it.

    The message starts with a verb: the file's name is put before it.
    """


# ---------------------------------------------------------------- writing


def encode_array(array: np.ndarray) -> EncodedArray:
    """An array in version 1.0 of NumPy's file format."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    text += " " * (-(len(NPY_MAGIC) + 2 + len(text) + 1) % 64) + "\n"
    return NPY_MAGIC + struct.pack("<H", len(text)) + text.encode(), array.reshape(-1).view(np.uint8).data


def sha256(encoded: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of a member that comes in parts, such as an encoded array, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in encoded:
        digest.update(part)
    return digest.hexdigest()


def write_archive(
    path: Path, header: bytes, members: Mapping[str, Sequence[bytes | memoryview]], hashes: Mapping[str, str], keep: bool = True
) -> None:
    """Write an archive. What was at `path` stays there until the new file is complete, on disk and read back.

    members: encoded arrays, and perhaps TOKENIZER, each by its name and in parts. hashes: their SHA-256.
    keep: with False, the new file is then removed, and `path` stays as it is.

    Raises OSError if the file cannot be written or does not read back as it should.
    """

    def verify(written: Path) -> None:
        try:
            with open_archive(written) as found:
                if found.header != header:
                    raise CheckpointError(f"its {HEADER} differs")
                for name, digest in hashes.items():
                    found.check_hash(name, digest)
        except CheckpointError as error:
            raise OSError(errno.EIO, f"what was written reads back differently ({error})") from None

    with atomic_write(path, verify, keep) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # zipfile.ZipInfo has a fixed date, so the same contents give the same bytes.
        archive.writestr(zipfile.ZipInfo(HEADER), header)
        for name, parts in members.items():
            with archive.open(zipfile.ZipInfo(_member_name(name)), "w", force_zip64=True) as member:
                for part in parts:
                    member.write(part)


# ---------------------------------------------------------------- reading


class Archive:
    """An open archive. Its directory has been checked. Its arrays have not been read."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int) -> None:
        """file_bytes: the size of the file."""
        self._zip = archive
        self._members = _checked_members(archive, file_bytes)
        self.header = archive.read(self._members[HEADER])
        self.names = [name.removesuffix(".npy") for name in self._members if name not in MAX_TEXT_BYTES]  # of the arrays
        self.total_bytes = sum(info.file_size for info in self._members.values())

    def text(self, name: str, digest: str | None) -> bytes | None:
        """A JSON text, or None if the archive does not have it. digest: the expected SHA-256, or None."""
        if name not in self._members:
            return None
        data = self._zip.read(self._members[name])
        _compare_hash(name, sha256([data]), digest)
        return data

    def dtype_and_shape(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """The dtype and shape of an array, without its data."""
        info = self._members[name + ".npy"]
        with self._zip.open(info) as member:
            dtype, shape, _ = _read_npy_header(name, member, info.file_size)
        return dtype, shape

    def array(self, name: str, digest: str | None, dtype: Any = None, finite: bool = True) -> np.ndarray:
        """Read an array as `dtype`. digest: the expected SHA-256, or None. finite: whether to refuse infinities and NaN."""
        info = self._members[name + ".npy"]
        with self._zip.open(info) as member:
            stored, shape, header = _read_npy_header(name, member, info.file_size)
            array = np.empty(shape, dtype=stored)
            data = array.reshape(-1).view(np.uint8).data
            found = hashlib.sha256(header)
            for start in range(0, len(data), READ_BYTES):
                part = member.read(min(READ_BYTES, len(data) - start))
                data[start : start + len(part)] = part
                found.update(part)
            if member.read(1):
                raise CheckpointError(f"array {name} is longer than its shape")
        _compare_hash(name, found.hexdigest(), digest)
        with np.errstate(over="ignore", invalid="ignore"):  # the check below finds what became infinite
            array = array.astype(dtype or stored.newbyteorder("="), copy=False)
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CheckpointError(f"array {name} has a number that is not finite")
        return array

    def check_hash(self, name: str, digest: str) -> None:
        """Read a member and compare its SHA-256, without keeping it."""
        found = hashlib.sha256()
        with self._zip.open(self._members[_member_name(name)]) as member:
            while part := member.read(READ_BYTES):
                found.update(part)
        _compare_hash(name, found.hexdigest(), digest)


def _member_name(name: str) -> str:
    """The name in the zip file of an array or of a JSON text."""
    return name if name in MAX_TEXT_BYTES else name + ".npy"


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """An open archive whose directory has been checked.

    Any error of reading, here or inside `with`, becomes a CheckpointError that names the file.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, for example, which might never end
            raise CheckpointError("it is not a regular file")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            file.seek(max(0, file_bytes - ZIP_END_BYTES))
            complete = file.read(4) == b"PK\5\6"
            with zipfile.ZipFile(file) as archive:
                found = Archive(archive, file_bytes)
                if not complete:
                    raise CheckpointError("the file continues after the end of the archive")
                yield found
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}; the train command writes one") from None
    except IsADirectoryError:
        raise CheckpointError(f"expected a checkpoint, got a folder: {path}") from None
    except UnusableError as error:
        raise CheckpointError(f"{path} {error}") from None
    except RequestError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    # zipfile raises these for damaged directories and for compressed, encrypted or unsupported members.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _checked_members(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name. No name occurs twice, none is compressed, and together they fit into the file."""
    members: dict[str, zipfile.ZipInfo] = {}
    others, total = [], 0
    for info in archive.infolist():
        name = info.filename
        if name in members:
            raise CheckpointError(f"it has two members named {shortened(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(f"its member {shortened(name)} is compressed or encrypted, expected a stored one")
        if name not in MAX_TEXT_BYTES and not name.endswith(".npy"):
            others.append(name)
        total += info.file_size
        members[name] = info
    if HEADER not in members:
        shown = ", ".join(map(shortened, list(members)[:3])) + (", ..." if len(members) > 3 else "")
        raise UnusableError(f"is not an npgpt checkpoint: it has no {HEADER}, but {shown or 'nothing'}")
    if min(info.header_offset for info in members.values()) != 0:
        raise CheckpointError("the file has bytes before the first member")
    if others:
        raise CheckpointError(f"its member {shortened(others[0])} is not an array")
    if total > file_bytes:
        raise CheckpointError(f"its members claim {total:,} bytes, the file has {file_bytes:,}")
    for name, most in MAX_TEXT_BYTES.items():
        if name in members and members[name].file_size > most:
            raise CheckpointError(f"its {name} has {members[name].file_size:,} bytes, expected at most {most:,}")
    return members


def _read_npy_header(name: str, member: Any, member_bytes: int) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """(dtype, shape, the bytes of the header). The shape accounts for every byte of the member."""
    start = member.read(len(NPY_MAGIC) + 2)
    if len(start) != len(NPY_MAGIC) + 2 or not start.startswith(NPY_MAGIC):
        raise CheckpointError(f"array {name} is not in version 1.0 of NumPy's file format")
    text = member.read(struct.unpack("<H", start[-2:])[0])
    match = NPY_HEADER.fullmatch(text)
    if not match or match[1].decode() not in DTYPES:
        raise CheckpointError(f"array {name} does not hold numbers of a known dtype")
    dtype, shape = np.dtype(match[1].decode()), tuple(int(n) for n in re.findall(rb"\d+", match[2]))
    expected = len(start) + len(text) + math.prod(shape) * dtype.itemsize
    if expected != member_bytes:
        raise CheckpointError(f"array {name} of shape {shape} would take {expected:,} bytes, it has {member_bytes:,}")
    return dtype, shape, start + text


def _compare_hash(name: str, found: str, digest: str | None) -> None:
    if digest is not None and found != digest:
        what = name if name in MAX_TEXT_BYTES else f"array {name}"
        raise CheckpointError(f"{what} is not what was written (its SHA-256 differs)")


# ---------------------------------------------------------------- messages


def shortened(value: Any) -> str:
    """repr(value), at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_few(problems: Sequence[str]) -> str:
    """The first five problems, and the number of the others."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
