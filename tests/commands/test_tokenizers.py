"""Training on tokens of a BPE, and fine-tuning, as a user runs them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.commands import QUICK

import npgpt
import npgpt.cli

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path, text, monkeypatch):
    """The current folder, with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text[:6000] + "é中😀", encoding="utf-8")
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    """Runs a command: its exit status, and what it writes."""

    def run(*args):
        status = npgpt.cli.main(list(args))
        out, err = capsys.readouterr()
        return status, out, err

    return run


BPE = ["--tokenizer", "bpe", "--vocab-size", "300"]


def test_a_run_with_a_bpe(command):
    status, _, err = command("train", "text.txt", *QUICK, *BPE)
    assert status == 0
    assert re.search(
        r"text.txt: 6,003 characters, [34],\d{3} tokens of a BPE with 300; [34],\d{3} to train on, \d{3} held out", err
    )
    assert re.search(r"val loss \d\.\d{4} ± \d\.\d{4} \(best\), \d\.\d{4} bits per character, \d\.\d{4} per byte, ", err)
    assert re.search(r"validation loss \d\.\d{4} nats per token, \d\.\d{4} bits per character; write with", err)
    checkpoint = npgpt.load("model.npz")
    assert checkpoint.tokenizer.vocab_size == checkpoint.config.vocab_size == 300
    assert checkpoint.text.n_characters == 6003
    evaluations = [e for e in map(json.loads, Path("model.jsonl").read_text().splitlines()) if e["event"] == "evaluation"]
    status, out, _ = command("evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens", "50")
    found = json.loads(out)
    assert status == 0
    assert found["what"] == "the held-out part of text.txt"
    assert found["loss"] == pytest.approx(evaluations[-1]["val_loss"], rel=1e-6)
    nats = found["loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_character"] == pytest.approx(nats / found["characters"]) == evaluations[-1]["bits_per_character"]
    assert found["bits_per_byte"] == pytest.approx(nats / found["bytes"]) == evaluations[-1]["bits_per_byte"]
    held_out = Path("text.txt").read_text(encoding="utf-8")[6003 - 600 :]
    first = checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(held_out)[:1])
    assert found["characters"] == len(held_out) - len(first)
    assert found["bytes"] == len(held_out.encode()) - len(first.encode())
    assert "nats per token" in command("evaluate", "--ckpt", "model.npz", "--sample-tokens", "0")[1]
    assert "300 tokens of a BPE" in command("inspect", "model.npz")[1]
    # Text that the tokenizer has never seen.
    status, out, _ = command("generate", "--ckpt", "model.npz", "--prompt", "☃ é", "--max-new-tokens", "9", "--json")
    row = json.loads(out)
    assert (status, len(row["ids"])) == (0, 9)
    assert row["text"] == checkpoint.tokenizer.decode(row["ids"])


def test_resuming_and_judging_with_more_text(command, folder):
    for name in ("model.npz", "b.npz"):
        assert command("train", "text.txt", *QUICK, *BPE, "--out", name)[0] == 0
    with Path("text.txt").open("a", encoding="utf-8") as file:
        file.write("The bell rang over the water. " * 30)
    status, _, err = command("train", "--resume", "--steps", "8")
    assert status == 0
    assert "text 6,903 characters (was 6,003 characters); the search for the lowest validation loss begins again" in err
    _, out, _ = command("evaluate", "--ckpt", "b.npz", "--sample-tokens", "0")
    assert out.startswith("the held-out part of the first 6,003 characters of text.txt: ")
    _, out, _ = command("evaluate", "--ckpt", "b.npz", "text.txt", "--sample-tokens", "0")
    assert out.startswith("the held-out part of text.txt and the 900 characters that were added to text.txt: 1,4")
    tokenizer, at = npgpt.load("b.npz").tokenizer, 6003 - 600  # where the text of the run was split
    texts = ["." * n + "the bell, the bell, " * 900 for n in range(9)]
    split = [len(tokenizer.encode(text[:at])) + len(tokenizer.encode(text[at:])) for text in texts]
    k = [n - len(tokenizer.encode(text)) for n, text in zip(split, texts, strict=True)].index(1)  # the split cuts a token
    Path("other.txt").write_text(texts[k], encoding="utf-8")
    _, out, _ = command("evaluate", "--ckpt", "b.npz", "other.txt", "--json")
    assert json.loads(out)["tokens"] == len(tokenizer.encode(texts[k])) - 1  # a text of its own is not split
    Path("text.txt").write_text("Another text. " * 900, encoding="utf-8")
    assert "the text is not the one it was trained on" in command("train", "--resume", "--steps", "9")[2]


def test_compare_aligns_different_tokenizers(command):
    for name, flags in (("a.npz", []), ("b.npz", BPE), ("c.npz", ["--tokenizer", "bpe", "--vocab-size", "270"])):
        assert command("train", "text.txt", *QUICK, *flags, "--out", name)[0] == 0
    status, out, err = command("compare", "a.npz", "b.npz", "c.npz", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, err, [row["per"] for row in rows]) == (0, "", ["byte"] * 3)
    for row in rows:
        alone = json.loads(command("evaluate", "--ckpt", row["checkpoint"], "--json", "--sample-tokens", "0")[1])
        assert row["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=0.02)  # the first tokens differ
        assert row["bits_per_character"] == pytest.approx(alone["bits_per_character"], rel=0.02)
    for row in rows[1:]:
        assert row["difference"] == pytest.approx(row["loss"] - rows[0]["loss"])
        assert 0 < row["difference_stderr"] < 0.2
    status, out, err = command("compare", "a.npz", "b.npz")
    assert re.search(r"b.npz  loss .* bits per byte, .* bits per character, [+-]", out)
    assert err == ""
    Path("text.txt").write_text(Path("text.txt").read_text(encoding="utf-8") + "a" * 9, encoding="utf-8")
    assert command("train", "text.txt", *QUICK, *BPE, "--out", "d.npz")[0] == 0
    assert "warning: d.npz was trained on another text than a.npz" in command("compare", "a.npz", "d.npz")[2]


def test_a_tokenizer_of_another_program(command, text):
    tokenizer = npgpt.BPETokenizer.train([text], 280)
    Path("tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    assert command("train", "text.txt", *QUICK, "--tokenizer", "tokenizer.json")[0] == 0
    assert npgpt.load("model.npz").tokenizer == tokenizer
    assert command("train", "text.txt", *QUICK, "--tokenizer", "char")[0] == 0
    assert npgpt.load("model.npz").tokenizer.is_characters


def test_a_held_out_text_of_its_own_is_not_split(command, text):
    """It may be longer than the training text."""
    Path("val.txt").write_text(text[6000:14000], encoding="utf-8")
    assert command("train", "text.txt", *QUICK, *BPE, "--val-text", "val.txt")[0] == 0
    found = json.loads(command("evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens", "0")[1])
    assert found["tokens"] == len(npgpt.load("model.npz").tokenizer.encode(text[6000:14000])) - 1
    logged = [e for e in map(json.loads, Path("model.jsonl").read_text().splitlines()) if e["event"] == "evaluation"]
    assert found["loss"] == pytest.approx(logged[-1]["val_loss"], rel=1e-6)


def test_a_judged_text_that_begins_no_character(command):
    """Its only predicted token is the second half of a character, so there are no bits per character."""
    assert command("train", "text.txt", *QUICK, "--tokenizer", "bpe", "--vocab-size", "256")[0] == 0
    Path("short.txt").write_text("\u00e9", encoding="utf-8")
    status, out, _ = command("evaluate", "--ckpt", "model.npz", "short.txt")
    assert (status, "bits per character" in out, "1.0000 bits" in out) == (0, False, False)
    Path("val.txt").write_text("\u00e9", encoding="utf-8")
    assert command("train", "text.txt", *QUICK, "--tokenizer", "bpe", "--vocab-size", "256", "--val-text", "val.txt")[0] == 0


# ---------------------------------------------------------------- fine-tuning


def test_fine_tuning(command):
    assert command("train", "text.txt", *QUICK, "--out", "base.npz")[0] == 0
    base = npgpt.load("base.npz")
    Path("other.txt").write_text("The bell rang ☃ over the water. Nobody heard. " * 20, encoding="utf-8")
    status, _, err = command("train", "other.txt", *QUICK, "--from", "base.npz")
    assert status == 2
    assert "cannot use --from: other.txt has unknown character '☃' (SNOWMAN) at position 14" in err
    assert "or use --add-characters" in err
    assert not Path("model.npz").exists()
    status, _, err = command("train", "other.txt", *QUICK, "--from", "base.npz", "--add-characters", "--dropout", "0")
    assert status == 0
    assert "it starts with the weights of base.npz" in err
    assert re.search(r"characters, \d+ known to the model;", err)
    assert re.search(r"step 0: val loss \d\.\d{4} ± \d\.\d{4} \(best\): the model it starts from\n", err)
    tuned = npgpt.load("model.npz")
    assert tuned.tokenizer.characters == base.tokenizer.characters + "☃"
    assert (tuned.config.dropout, tuned.train_config.lr) == (0.0, 1e-4)
    assert tuned.config.block_size == base.config.block_size
    assert tuned.progress.best_loss < json.loads(Path("model.jsonl").read_text().splitlines()[1])["val_loss"]


def test_what_is_kept_if_nothing_improved(command):
    assert command("train", "text.txt", *QUICK, "--out", "base.npz")[0] == 0
    flags = ["--from", "base.npz", "--lr", "1", "--warmup-steps", "0", "--grad-clip", "0"]
    status, _, err = command("train", "text.txt", *QUICK, *flags)
    assert status == 0
    assert (
        "No evaluation was better than the model that this run started from. So model.npz is that model, validation loss" in err
    )
    kept, base, last = (npgpt.load(name).model.flat.data for name in ("model.npz", "base.npz", "model.last.npz"))
    np.testing.assert_array_equal(kept, base)
    assert not np.array_equal(last, base)
    status, _, err = command("train", "--resume", "--steps", "9", "--lr", "1e-9", "--min-lr", "0")
    assert (status, "No evaluation was better" in err) == (0, True)
    np.testing.assert_array_equal(npgpt.load("model.npz").model.flat.data, base)


def test_fine_tuning_in_minutes(command):
    assert command("train", "text.txt", *QUICK, "--out", "base.npz")[0] == 0
    status, _, err = command("train", "text.txt", "--from", "base.npz", "--minutes", "0.03", "--block-size", "8")
    assert (status, "step 0: " in err) == (0, True)
    before, after = (npgpt.load(name).config for name in ("base.npz", "model.npz"))
    assert (after.n_embd, after.n_layer, after.block_size) == (before.n_embd, before.n_layer, 8)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from", "base.npz", "--resume"], "give --from or --resume, not both"),
        (["--from", "base.npz", "--preset", "quick"], "give --from or --preset, not both"),
        (["--from", "base.npz", "--tokenizer", "bpe"], "give --from or --tokenizer, not both"),
        (["--from", "base.npz", "--vocab-size", "300"], "give --from or --vocab-size, not both"),
        (["--from", "base.npz", "--n-layer", "3"], "a trained model keeps its shape: n_layer was 1 and is now 3"),
        (["--from", "base.npz", "--block-size", "99"], "use at most 16"),
        (["--from", "none.npz"], "no such checkpoint"),
        (["--add-characters"], "--add-characters is for --from"),
        (["--vocab-size", "300"], "--vocab-size is for --tokenizer bpe"),
        (["--tokenizer", "words"], "must be char, bpe, or the file or folder of a tokenizer; there is no words"),
        (["--tokenizer", "bpe", "--vocab-size", "9"], "a vocab_size of at least 256, got 9"),
        (["--tokenizer", "bpe", "--resume"], "a resumed run keeps its tokenizer"),
    ],
)
def test_requests_that_contradict(command, flags, words):
    base = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16", "--steps", "1", "--sample-tokens", "0"]
    assert command("train", "text.txt", *base, "--out", "base.npz")[0] == 0
    status, _, err = command("train", "text.txt", *flags)
    assert (status, words in err, "Traceback" in err) == (2, True, False), err
    assert not Path("model.npz").exists()
