"""Files that are written whole, and the lock."""

import os

import pytest

from npgpt import (
    RequestError,
)
from npgpt.storage.files import lock


def test_a_lock_is_held_once_and_let_go(tmp_path):
    path = tmp_path / "lock"
    with lock(path, "model.npz"):
        with (
            pytest.raises(RequestError, match=f"model.npz is in use by another run \\(process {os.getpid()}\\)"),
            lock(path, "model.npz"),
        ):
            pass
        assert path.exists()
    assert not path.exists()
    path.write_text("99999\n", encoding="ascii")  # left by a killed process
    with lock(path, "model.npz"):
        assert path.read_text(encoding="ascii") == f"{os.getpid()}\n"
    assert not path.exists()
