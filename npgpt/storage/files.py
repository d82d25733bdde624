"""Files that are whole or not there: writing that can be interrupted at any moment, and a lock for a run.

What is in the files is not known here.
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
from typing import BinaryIO

from npgpt.config.fields import RequestError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # by this file system
COPY_BYTES = 1 << 20  # at a time
PAUSES = (0.05, 0.2, 1.0) if sys.platform == "win32" else ()  # seconds: there a reader keeps a file from being replaced


@contextlib.contextmanager
def whole_file(path: Path, verify: Callable[[Path], None]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends without an error, `verify` finds it
    good, and it is on the disk. Until then, and after a loss of power at any moment, what was at `path` is there.

    Raises OSError when it cannot be written; what the block or `verify` raise passes through. Nothing is left
    behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        verify(temporary)
        _replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error that brought us here says more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not know its file's name
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file that is whole, as `whole_file` writes. Raises OSError like it."""

    def verify(written: Path) -> None:
        if not filecmp.cmp(source, written, shallow=False):
            raise OSError(errno.EIO, "what was written reads back differently")

    with whole_file(path, verify) as file, open(source, "rb") as whole:
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
    """Wait until the names in a folder are on the disk, where a folder can be asked for that."""
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
    if sys.platform == "darwin":  # where fsync leaves the data in the disk's own cache; not every volume can do more
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left of `whole_file(path)`. Only for the one that holds the path's lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system lets go of it when the process ends, however it
    ends. Raises RequestError, saying which process has it, when it is taken."""
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            taken = not _try_lock(file.fileno())
            if taken:
                file.seek(0)
                raise RequestError(f"{what} is in use by another run (process {file.read().strip() or 'unknown'})")
            if _is_at(file.fileno(), path):
                break  # else its holder has just removed it
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            file.close()
        with contextlib.suppress(OSError):  # another run has it already, or the folder is gone: then it may stay
            path.unlink()
        file.close()


def _try_lock(descriptor: int) -> bool:
    """Whether the file is locked for us now. True also on a file system that has no locks (some of networks)."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind its text, which others may read
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
    """Whether the open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
