"""`npgpt import` and `npgpt export` as a user runs them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import QUICK, ROOT

import npgpt
import npgpt.cli

GPT2 = ROOT / "tests" / "exchange" / "fixtures" / "gpt2"


@pytest.fixture
def command(tmp_path, text, capsys, monkeypatch):
    """Runs a command in a folder with a text: its exit status, and what it writes."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text[:6000], encoding="utf-8")

    def run(*args):
        status = npgpt.cli.main(list(args))
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("flags", [[], ["--position", "rotary"]])
def test_there_and_back(command, flags):
    assert command("train", "text.txt", *QUICK, *flags)[0] == 0
    status, out, err = command("export", "model.npz", "folder", "--format", "hf")
    assert (status, out) == (0, "")
    assert "folder: use it with: python -c 'from transformers import pipeline; print(pipeline(" in err
    assert """("text-generation", "folder")("The", max_new_tokens=8)""" in err
    asked = "npgpt export: is a.bin a folder or a file? say --format hf or --format gguf\n"
    assert command("export", "model.npz", "a.bin") == (2, "", asked)
    status, out, err = command("import", "folder", "--out", "back.npz")
    assert (status, out) == (0, "")
    assert "56 characters" in err
    assert "\nwrites  " in err
    assert "back.npz: write with: " in err
    one, other = npgpt.load("model.npz"), npgpt.load("back.npz")
    np.testing.assert_array_equal(one.model.flat.data, other.model.flat.data)
    assert (one.tokenizer, one.config) == (other.tokenizer, other.config)
    texts = [command("generate", "--ckpt", name, "--prompt", "The", "--seed", "1")[1] for name in ("model.npz", "back.npz")]
    assert texts[0] == texts[1]
    assert command("export", "back.npz", "again")[0] == 0
    for path in Path("folder").iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes()
    status, _, err = command("train", "text.txt", "--from", "back.npz", *QUICK[8:])
    assert (status, "step 0: " in err) == (0, True)


def test_a_model_of_transformers(command):
    """With a tokenizer of another place, and a shorter context."""
    tokenizer = npgpt.CharTokenizer("\n abcdefghij")
    checkpoint = npgpt.Checkpoint(npgpt.GPT(npgpt.GPTConfig(12, 6, 1, 1, 4), seed=0), tokenizer)
    npgpt.save("any.npz", checkpoint)
    assert command("export", "any.npz", "any")[0] == 0
    status, _, err = command("import", str(GPT2), "--tokenizer", "any", "--out", "short.npz", "--block-size", "4")
    assert status == 0
    assert "block_size was 6 and is now 4" in err
    assert "12 characters; 1 more ids are never drawn" in err
    assert npgpt.load("short.npz").config.block_size == 4
    assert command("generate", "--ckpt", "short.npz", "--prompt", "abc", "--max-new-tokens", "20")[0] == 0
    assert command("evaluate", "--ckpt", "short.npz", "text.txt", "--unknown", "skip")[0] == 0
    assert "no text" not in command("inspect", "short.npz")[1]


def test_gguf(command):
    pytest.importorskip("gguf")
    assert command("train", "text.txt", *QUICK)[0] == 0
    status, out, err = command("export", "model.npz", "model.gguf", "--dtype", "f16")
    assert (status, out) == (0, "")
    assert "so use -c 16, and no longer texts" in err
    assert "-n 8 -p" in err
    assert "model.gguf: use it with: llama-completion -m model.gguf -no-cnv -c 16" in err
    assert Path("model.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["import", str(GPT2), "--out", "a.bin"], "--out must end in .npz, got a.bin"),
        (["import", str(GPT2), "--out", "text.npz"], "text.npz exists already; choose another --out"),
        (["import", str(GPT2), "--out", "no/a.npz"], "there is no folder no; make it first"),
        (["import", str(GPT2), "--out", "a.npz"], "has no tokenizer that npgpt can read"),
        (["import", "none", "--out", "a.npz"], "no such file or folder: none"),
        (["import", "text.txt", "--out", "a.npz"], "cannot import text.txt: expected a folder or a .safetensors file"),
        (["import", ".", "--out", "a.npz"], "cannot import .: it has no model.safetensors"),
        (["export", "none.npz", "out"], "no such checkpoint"),
        (["export", "text.npz", "out"], "is not a checkpoint"),
        (["import", str(GPT2), "--out", "a.npz", "--tokenizer", "none"], "there is no none"),
    ],
)
def test_wrong_requests(command, args, words):
    shutil.copy("text.txt", "text.npz")
    before = sorted(path.name for path in Path().iterdir())
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_block_size_must_be_positive(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("import", str(GPT2), "--out", "a.npz", "--block-size", "0")
    assert stopped.value.code == 2
    assert "block_size must be a whole number at least 1, got '0'" in capsys.readouterr().err
