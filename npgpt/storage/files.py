"""Writing files that are always complete, even if the writing is interrupted, and a lock.

This file does not know what the files contain.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import glob
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from npgpt.config.fields import RequestError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NOT_SUPPORTED = (
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
)  # errors of a file system that has no locks or no fsync
COPY_BYTES = 1 << 20  # bytes copied at a time
# Seconds between attempts to replace a file. On Windows a file cannot be replaced while another process reads it.
PAUSES = (0.05, 0.2, 1.0) if sys.platform == "win32" else ()


@contextlib.contextmanager
def atomic_write(path: Path, verify: Callable[[Path], None], keep: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end of the `with` block.

    It replaces `path` only if the block ends without an error, the file is on disk, and `verify(its path)` raises nothing. At
    every moment, also after a loss of power, `path` is the complete old file or the complete new file.

    keep: with False, the file is removed instead of replacing `path`.

    Raises OSError if the file cannot be written, and passes on what the block or `verify` raises. No temporary file is left
    behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        verify(temporary)
        if keep:
            _replace(temporary, path)
        else:
            temporary.unlink()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error says more than this one
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # as after a failed write
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def atomic_copy(source: Path, path: Path) -> None:
    """Copy a file to `path`, with the guarantees of `atomic_write`. Raises OSError."""

    def verify(written: Path) -> None:
        if not filecmp.cmp(source, written, shallow=False):
            raise OSError(errno.EIO, "what was written reads back differently")

    with atomic_write(path, verify) as file, open(source, "rb") as whole:
        shutil.copyfileobj(whole, file, COPY_BYTES)


def _replace(temporary: Path, path: Path, pauses: tuple[float, ...] = PAUSES) -> None:
    try:
        os.replace(temporary, path)
    except PermissionError:
        if not pauses:
            raise
        time.sleep(pauses[0])
        _replace(temporary, path, pauses[1:])


def _sync_folder(folder: Path) -> None:
    """Wait until the file names of a folder are on disk. Windows cannot do that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    if sys.platform == "darwin":  # there, fsync leaves data in the disk's cache; some volumes cannot do more
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed processes left of `atomic_write(path)`. The caller must hold the lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` inside the `with` block. what: what the lock protects, for the message.

    The system releases the lock when the process ends, in whatever way. Raises RequestError, with the process ID of the
    other run, if the lock is taken.
    """
    with _open_locked(path, what) as file:
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
        finally:
            if sys.platform == "win32":  # there, an open file cannot be removed
                file.close()
            with contextlib.suppress(OSError):  # the folder may be gone
                if sys.platform == "win32" or _is_at(file.fileno(), path):  # if not, the lock there is another run's
                    path.unlink()


def _open_locked(path: Path, what: str) -> TextIO:
    """Open and lock the file `path`, which is made if it is not there."""
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            if not _try_lock(file.fileno()):
                file.seek(0)
                raise RequestError(f"{what} is in use by another run (process {file.read().strip() or 'unknown'})")
            if _is_at(file.fileno(), path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its last holder has just removed the file: try again


def _try_lock(descriptor: int) -> bool:
    """Lock the file if it is free; returns whether it succeeded. True also on network file systems without locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind the text, so that others can still read the text
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in NOT_SUPPORTED:
            return True
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the file that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
