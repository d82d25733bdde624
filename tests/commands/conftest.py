"""The fixture that the tests of the commands share: a folder with a text and a trained model."""

import pytest
from support.commands import QUICK, ROOT, npgpt_command

import npgpt
import npgpt.cli


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a text and a model trained on it."""
    folder = tmp_path_factory.mktemp("workshop")
    text = npgpt.read_text(ROOT / "data" / "tiny.txt")[:6000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    result = npgpt_command("train", "text.txt", *QUICK, cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "train.stderr").write_text(result.stderr, encoding="utf-8")
    assert result.stdout == ""
    return folder
