"""`npgpt evaluate`, `inspect` and `compare` as a user runs them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.commands import QUICK, npgpt_command

import npgpt
import npgpt.cli


def test_evaluate_and_inspect(workshop):
    last_loss = npgpt.load(workshop / "model.npz").progress.best_loss
    result = npgpt_command("evaluate", "--ckpt", "model.npz", "text.txt", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "the held-out part of text.txt: 599 characters predicted" in result.stdout
    assert f"loss {last_loss:.4f}" in result.stdout
    assert npgpt_command("evaluate", "--ckpt", "model.npz", cwd=workshop).stdout == result.stdout
    (workshop / "other.txt").write_text("the bell, the bell, ", encoding="utf-8")
    other = npgpt_command("evaluate", "--ckpt", "model.npz", "other.txt", cwd=workshop)
    assert "all of other.txt: 19 characters predicted" in other.stdout
    shown = npgpt_command("inspect", "--arrays", "model.npz", cwd=workshop)
    assert shown.returncode == 0
    for words in ("n_embd 16", "step      6", "blocks.0.attn.qkv.weight", "(16, 48)"):
        assert words in shown.stdout


def test_evaluate_as_json_and_with_samples(workshop):
    plain = npgpt_command("evaluate", "--ckpt", "model.npz", "--sample-tokens", "100", cwd=workshop)
    assert plain.returncode == 0, plain.stderr
    assert "96 sampled characters (temperature 0.8) against the" in plain.stdout
    assert re.search(r"line breaks +\d+\.\d %, in the training text +\d+\.\d %", plain.stdout)
    as_json = ["evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens"]
    row = json.loads(npgpt_command(*as_json, "100", cwd=workshop).stdout)
    assert f"loss {row['loss']:.4f} ± {row['stderr']:.4f} nats" in plain.stdout
    assert set(row["likeness"]["rates"]) == {"line breaks", "spaces", "punctuation", "capitals"}
    without = json.loads(
        npgpt_command("evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens", "0", cwd=workshop).stdout
    )
    assert without == row | {"likeness": None}


def test_evaluate_without_its_text(workshop, tmp_path, capsys, monkeypatch):
    shutil.copy(workshop / "model.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 2
    assert "the text it was trained on, text.txt, is not here" in capsys.readouterr().err
    Path("text.txt").write_text("the bell " * 100, encoding="utf-8")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 2
    assert "no longer the text" in capsys.readouterr().err


def test_compare(workshop, tmp_path):
    assert npgpt_command("train", "text.txt", *QUICK, "--lr", "0.01", "--out", "faster.npz", cwd=workshop).returncode == 0
    result = npgpt_command("compare", "model.npz", "faster.npz", cwd=workshop)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("on the held-out part of text.txt")
    assert re.search(r"^faster.npz  loss \d\.\d{4}, [+-]\d\.\d{4} ± \d\.\d{4}: (better|worse|no clear difference)$", lines[4])
    assert re.search(r"lr 0\.001\b", lines[3])
    assert re.search(r"lr 0\.01\b", lines[6])
    rows = [
        json.loads(line)
        for line in npgpt_command("compare", "model.npz", "faster.npz", "--json", cwd=workshop).stdout.splitlines()
    ]
    assert rows[0]["difference"] is None
    shutil.copy(workshop / "model.npz", workshop / "copy.npz")
    same = npgpt_command("compare", "model.npz", "copy.npz", cwd=workshop)
    assert ", +0.0000 ± 0.0000: no clear difference" in same.stdout
    assert same.stderr == ""
    flags = [*QUICK, "--val-fraction", "0.3", "--out", "more-held-out.npz"]
    assert npgpt_command("train", "text.txt", *flags, cwd=workshop).returncode == 0
    named = npgpt_command("compare", "more-held-out.npz", "model.npz", "--text", "text.txt", cwd=workshop)
    warned = npgpt_command("compare", "more-held-out.npz", "model.npz", cwd=workshop)
    said = "warning: model.npz was trained on a part of this held-out text; name it first, and its own held-out part is used\n"
    assert warned.stderr == named.stderr == said
    (workshop / "other.txt").write_text("the bell, the bell, ", encoding="utf-8")
    assert npgpt_command("train", "other.txt", *QUICK, "--out", "poorer.npz", cwd=workshop).returncode == 0
    refused = npgpt_command("compare", "model.npz", "poorer.npz", cwd=workshop)
    assert refused.returncode == 2
    assert refused.stderr.startswith("npgpt compare: poorer.npz cannot be judged on this text: ")
    assert rows[1]["difference"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"])
    assert all(row["seconds"] > 0 for row in rows)


def test_evaluate_with_unknown_characters(workshop, capsys, monkeypatch):
    monkeypatch.chdir(workshop)
    Path("accents.txt").write_text("the béll rang € over the water, " * 20, encoding="utf-8")
    Path("plain.txt").write_text("the bell rang  over the water, " * 20, encoding="utf-8")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz", "accents.txt"]) == 2
    assert "unknown characters" in capsys.readouterr().err
    found = []
    for flags in (["accents.txt", "--unknown", "replace"], ["plain.txt"]):
        assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz", *flags]) == 0
        found.append(capsys.readouterr().out.splitlines()[1])
    assert found[0] == found[1]


def test_a_text_whose_name_has_unusual_spaces_is_found_again(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "my\u00a0text \u2003.txt"
    shutil.copy(workshop / "text.txt", name)
    assert npgpt.cli.main(["train", name, *QUICK]) == 0
    assert npgpt.load("model.npz").text.sources == (name,)
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz", "--sample-tokens", "0"]) == 0
    assert f"the held-out part of {name}" in capsys.readouterr().out
