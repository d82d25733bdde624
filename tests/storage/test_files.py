"""Files that are written whole or not at all, and the lock file."""

import errno
import os

import pytest

from npgpt import (
    RequestError,
)
from npgpt.storage import files
from npgpt.storage.files import atomic_write, lock


def test_a_lock_is_held_once_and_released(tmp_path):
    path = tmp_path / "lock"
    with lock(path, "model.npz"):
        with (
            pytest.raises(RequestError, match=f"model.npz is in use by another run \\(process {os.getpid()}\\)"),
            lock(path, "model.npz"),
        ):
            pass
        assert path.exists()
    assert not path.exists()
    path.write_text("99999\n", encoding="ascii")  # a killed process left it
    with lock(path, "model.npz"):
        assert path.read_text(encoding="ascii") == f"{os.getpid()}\n"
    assert not path.exists()


# ---------------------------------------------------------------- whole files


def nothing(path):
    """A check that accepts every file."""


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be removed elsewhere")
def test_a_lock_of_another_run_is_not_removed(tmp_path):
    """Somebody removes the lock file by hand, and another run takes a new lock."""
    path = tmp_path / "lock"
    with lock(path, "model.npz"):
        path.unlink()
        other = lock(path, "model.npz")
        other.__enter__()
    assert path.exists()
    other.__exit__(None, None, None)
    assert not path.exists()


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path, nothing) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [b"old", None])
def test_an_error_in_the_block_leaves_the_old_file(tmp_path, existing):
    path = tmp_path / "a"
    if existing is not None:
        path.write_bytes(existing)

    def write_half():
        with atomic_write(path, nothing) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert (path.read_bytes() if path.exists() else None) == existing
    assert len(list(tmp_path.iterdir())) == (existing is not None)


def test_a_file_that_fails_its_check_is_not_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    seen = []

    def refuse(written):
        seen.append(written.read_bytes())
        raise OSError(errno.EIO, "refused")

    with pytest.raises(OSError, match="refused") as caught, atomic_write(path, refuse) as file:
        file.write(b"new")
    assert caught.value.filename == str(path)
    assert seen == [b"new"]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "COPY_BYTES", 7)
    source, path = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)))
    files.atomic_copy(source, path)
    assert path.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        files.atomic_copy(tmp_path / "none", path)
    assert path.read_bytes() == source.read_bytes()
    assert sorted(tmp_path.iterdir()) == [source, path]


def test_leftovers_of_one_path_are_removed(tmp_path):
    for name in (".a[1].npz.5.tmp", ".a[1].npz.77.tmp", ".a1.npz.5.tmp", "a[1].npz", ".a[1].npz.lock"):
        (tmp_path / name).write_bytes(b"")
    files.remove_leftovers(tmp_path / "a[1].npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a1.npz.5.tmp", ".a[1].npz.lock", "a[1].npz"]
