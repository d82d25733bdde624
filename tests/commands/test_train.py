"""`npgpt train` as a user runs it: its messages, resuming, signals, a full disk, closed streams, a lack of memory."""

import errno
import gzip
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.commands import QUICK, ROOT, npgpt_command

import npgpt
import npgpt.cli
from npgpt.storage.run import RunFiles


def test_train_shows_what_happens(workshop):
    shown = (workshop / "train.stderr").read_text(encoding="utf-8")
    assert re.search(r"6,000 characters, \d+ different; 5,400 to train on, 600 held out", shown)
    assert re.search(
        r"step 3: train loss \d\.\d{4}, val loss \d\.\d{4} ± \d\.\d{4} \(best\), [\d,]+ tokens/s, \d+ s left", shown
    )
    assert "\n    | " in shown  # a sample
    assert "write with: python -m npgpt generate --ckpt model.npz" in shown
    assert "\r" not in shown  # no progress bar, because stderr is not a terminal
    assert {"model.npz", "model.last.npz", "model.jsonl"} <= {p.name for p in workshop.iterdir()}


def test_a_run_that_would_be_overwritten_is_not_resumed(workshop, tmp_path, capsys, monkeypatch):
    """The files of the run at --out would take the place of the state that is to be resumed."""
    for path in workshop.iterdir():
        shutil.copy(path, tmp_path) if path.is_file() else None
    monkeypatch.chdir(tmp_path)
    shutil.copy("model.last.npz", "model.previous.last.npz")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert npgpt.cli.main(["train", "text.txt", "--resume", "model.previous.last.npz", "--steps", "9"]) == 2
    assert "model.previous.last.npz would be replaced by the files of the run at model.npz" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_continues(workshop, tmp_path):
    for name in ("model.npz", "model.last.npz", "text.txt", "model.jsonl"):
        shutil.copy(workshop / name, tmp_path)
    result = npgpt_command("train", "text.txt", "--resume", "--steps", "9", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 6" in result.stderr
    assert npgpt.load(tmp_path / "model.last.npz").step == 9
    assert "from step 7 on: steps 9 (was 6)\n" in result.stderr


def test_resume_takes_what_its_own_advice_says(workshop, tmp_path, capsys, monkeypatch):
    """Such as a smaller micro-batch after a lack of memory. DATA may be left out, and more text may follow the old one."""
    for name in ("model.npz", "model.last.npz", "text.txt", "model.jsonl"):
        shutil.copy(workshop / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--micro-batch", "1", "--batch-size", "3", "--lr", "1e-4", "--dropout", "0.2", "--eval-tokens", "100"]
    with Path("text.txt").open("a", encoding="utf-8") as file:
        file.write("The bell rang.\n" * 100)
    assert npgpt.cli.main(["train", "--resume", "--steps", "8", *flags]) == 0
    said = capsys.readouterr().err
    assert (
        "from step 7 on: dropout 0.2 (was 0.1), steps 8 (was 6), batch_size 3 (was 4), lr 0.0001 (was 0.001), "
        "min_lr 1e-05 (was 0.0001), eval_tokens 100 (was 131072), micro_batch 1 (was automatic), "
        "text 7,500 characters (was 6,000 characters); the search for the lowest validation loss begins again\n"
    ) in said
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 0
    assert "the held-out part of text.txt" in capsys.readouterr().out
    with Path("text.txt").open("a", encoding="utf-8") as file:
        file.write("It rang again.\n")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 0
    assert "the held-out part of the first 7,500 characters of text.txt" in capsys.readouterr().out
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz", "text.txt"]) == 0  # a text that the user names is judged whole
    assert "the held-out part of text.txt and the 15 characters that were added to text.txt: 764 " in capsys.readouterr().out
    with Path("text.txt").open("a", encoding="utf-8") as file:
        file.write("é")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 0


def test_several_files_a_folder_and_a_held_out_text(workshop, tmp_path, capsys, monkeypatch):
    text = npgpt.read_text(workshop / "text.txt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books" / "sub").mkdir(parents=True)
    Path("books/b.txt").write_text(text[4000:5000], encoding="utf-8")
    Path("books/sub/a.txt").write_text(text[5000:], encoding="utf-8")
    Path("books/cat.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("first.txt.gz").write_bytes(gzip.compress(text[:4000].encode()))
    quick = [*QUICK, "--steps", "3", "--out", "books/model.npz"]
    assert npgpt.cli.main(["train", "first.txt.gz", "books", *quick]) == 0
    said = capsys.readouterr().err
    assert "first.txt.gz, books: 6,000 characters" in said
    books = Path("books")
    assert f"66.7%  first.txt.gz, 4,000 characters\n         16.7%  {books / 'b.txt'}, 1,000 characters" in said
    assert f"16.7%  {books / 'sub' / 'a.txt'}, 1,000 characters" in said
    assert f"warning: {books / 'cat.png'} is left out: not a text" in said
    assert npgpt.load("books/model.npz").text.n_characters == 6000
    # The files that the run has written into the folder are not read again. So the text is the same.
    assert npgpt.cli.main(["train", "first.txt.gz", "books", *quick, "--resume", "--steps", "6"]) == 0
    assert npgpt.cli.main(["evaluate", "--ckpt", "books/model.npz", "--json"]) == 0
    assert "the held-out part of first.txt.gz, books" in capsys.readouterr().out

    # A file that is held out is not trained on, also if it is in a folder that is.
    assert npgpt.cli.main(["train", "first.txt.gz", "--out", "m.npz", "books", "--val-text", "books/b.txt", *QUICK]) == 0
    assert "5,000 to train on, 1,000 held out: books/b.txt" in capsys.readouterr().err
    assert npgpt.cli.main(["train", "books/b.txt", "--val-text", "books/b.txt", *QUICK]) == 2
    assert "books/b.txt is to be trained on and to be held out" in capsys.readouterr().err
    assert npgpt.cli.main(["train", "first.txt.gz", "--val-text", "books/b.txt", *QUICK]) == 0
    assert "4,000 to train on, 1,000 held out: books/b.txt" in capsys.readouterr().err
    checkpoint = npgpt.load("model.npz")
    assert (checkpoint.text.n_characters, checkpoint.val_text.n_characters) == (4000, 1000)
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 0
    said = capsys.readouterr().out
    assert "all of books/b.txt, which was held out: 999 characters predicted" in said
    val_ids = checkpoint.tokenizer.encode_array(text[4000:5000])
    assert f"loss {npgpt.evaluate(checkpoint.model, val_ids).loss:.4f}" in said
    assert npgpt.cli.main(["train", "--resume", "--steps", "9"]) == 0  # the held-out text stays
    assert npgpt.load("model.last.npz").val_text.n_characters == 1000
    assert npgpt.cli.main(["train", "--resume", "--steps", "12", "--val-fraction", "0.2"]) == 2
    assert "the run has a held-out text of its own, books/b.txt, so --val-fraction must be 0" in capsys.readouterr().err
    assert npgpt.cli.main(["train", "--resume", "--steps", "12", "--val-text", "books/sub/a.txt"]) == 2
    assert "cannot resume: books/sub/a.txt has unknown character 'j'" in capsys.readouterr().err
    with gzip.open("first.txt.gz", "at", encoding="utf-8") as file:
        file.write("I ring.")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz", "first.txt.gz"]) == 0
    assert capsys.readouterr().out.startswith("the 7 characters that were added to first.txt.gz: 6 characters predicted")
    Path("first.txt.gz").write_bytes(gzip.compress(text[:4000].encode()))
    Path("other.txt").write_text(text[:500], encoding="utf-8")
    assert npgpt.cli.main(["train", "--resume", "--steps", "12", "--val-text", "other.txt"]) == 0
    assert (
        "held-out text other.txt of 500 characters (was books/b.txt of 1,000 characters); the search for the lowest"
        in capsys.readouterr().err
    )


def test_standard_input_is_a_text(workshop, tmp_path):
    text = (workshop / "text.txt").read_bytes()
    for packed, out in ((text, "a.npz"), (gzip.compress(text), "b.npz")):
        (tmp_path / "piped").write_bytes(packed)
        with (tmp_path / "piped").open("rb") as file:
            result = npgpt_command("train", "-", *QUICK, "--out", out, cwd=tmp_path, stdin=file)
        assert result.returncode == 0, result.stderr
        assert "standard input: 6,000 characters" in result.stderr
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    result = npgpt_command("train", "--resume", "--steps", "9", "--out", "a.npz", cwd=tmp_path)
    assert result.returncode == 2
    assert "the run before read DATA from standard input; give it again" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(("signal_name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupting_saves_and_resumes(workshop, tmp_path, signal_name, status):
    import signal
    import time

    shutil.copy(workshop / "text.txt", tmp_path)
    arguments = [*QUICK, "--steps", "100000", "--eval-interval", "100000", "--log-interval", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "npgpt", "train", "text.txt", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    log = tmp_path / "model.jsonl"
    while not (log.exists() and '"step"' in log.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, signal_name))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "continue with: python -m npgpt train text.txt --resume" in errors
    assert "Traceback" not in errors
    done = npgpt.load(tmp_path / "model.last.npz").step
    assert done >= 1
    assert f"stopped after step {done}" in errors


def test_a_full_disk_is_one_line_and_loses_nothing(workshop, tmp_path, capsys, monkeypatch):
    for path in workshop.iterdir():
        shutil.copy(path, tmp_path) if path.is_file() else None
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    assert npgpt.cli.main(["train", "text.txt", "--resume", "--steps", "20"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "npgpt train: cannot write: No space left on device: model.last.npz; model.last.npz is complete, continue"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_state_names_the_best_checkpoint(workshop, tmp_path, capsys, monkeypatch):
    for path in workshop.iterdir():
        shutil.copy(path, tmp_path) if path.is_file() else None
    monkeypatch.chdir(tmp_path)
    Path("model.last.npz").write_bytes(Path("model.last.npz").read_bytes()[:-100])
    assert npgpt.cli.main(["train", "text.txt", "--resume", "--steps", "20"]) == 2
    assert "--resume model.npz continues from the best state instead" in capsys.readouterr().err
    assert npgpt.cli.main(["train", "text.txt", "--resume", "model.npz", "--steps", "8"]) == 0


def test_a_checkpoint_in_use_is_refused(workshop, capsys, monkeypatch):
    monkeypatch.chdir(workshop)
    before = {path.name: path.stat().st_mtime_ns for path in workshop.iterdir()}
    with RunFiles(Path("model.npz")).locked():
        assert npgpt.cli.main(["train", "text.txt", "--steps", "5", "--batch-size", "2"]) == 2
    assert f"model.npz is in use by another run (process {os.getpid()})" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in workshop.iterdir()} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux enforces a limit on the address space")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n-embd", "4096"], "lower --n-embd"),
        (["--batch-size", "200", "--micro-batch", "200", "--threads", "1"], "lower --micro-batch first"),
    ],
)
def test_out_of_memory_says_what_to_lower(workshop, flags, words):
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
        "from npgpt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, "train", "text.txt", *flags, "--out", "big.npz"],
        cwd=workshop,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert result.returncode == 2  # before the first step
    said = rf"`ulimit -v` allows this process 1\.0 GiB of memory, but this run needs roughly [\d.]+ GiB; {words}"
    assert re.search(said, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_memory_that_runs_out_all_the_same_says_what_to_lower(workshop, capsys, monkeypatch):
    """The estimate may be too low."""

    def run(self, stop_requested):
        raise MemoryError

    monkeypatch.chdir(workshop)
    monkeypatch.setattr(npgpt.Trainer, "run", run)
    assert npgpt.cli.main(["train", "text.txt", *QUICK]) == 1
    assert re.search(r"out of memory: this run needs roughly [\d.]+ GiB; lower --", capsys.readouterr().err)


@pytest.mark.skipif(os.name != "posix", reason="other systems report closed pipes differently")
def test_training_continues_when_stderr_is_closed(workshop, tmp_path):
    shutil.copy(workshop / "text.txt", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "npgpt", "train", "text.txt", *QUICK, "--eval-interval", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(60) == 0
    assert npgpt.load(tmp_path / "model.last.npz").step == 6


def test_copied_held_out_text_is_said_before_training(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (workshop / "text.txt").read_text(encoding="utf-8")
    Path("twice.txt").write_text(text * 2, encoding="utf-8")
    assert npgpt.cli.main(["train", "twice.txt", *QUICK]) == 0
    said = capsys.readouterr().err
    assert said.index("warning: 100% of the held-out text also occurs in the training text") < said.index("step 3:")
    assert "100% of the held-out text also occurs in the training text, so the validation loss says little" in said


def test_the_cores_of_a_cgroup_are_said(workshop, tmp_path, capsys, monkeypatch):
    shutil.copy(workshop / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert npgpt.cli.main(["train", "text.txt", *QUICK]) == 0
    assert "1 worker (limited by OMP_NUM_THREADS=1)" in capsys.readouterr().err


def test_the_run_that_a_new_one_replaces_is_named(workshop, tmp_path, capsys, monkeypatch):
    shutil.copy(workshop / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    for said in [None, "model.npz is kept as model.previous.npz\n", "model.previous.npz, in place of the run there\n"]:
        assert npgpt.cli.main(["train", "text.txt", *QUICK]) == 0
        shown = capsys.readouterr().err
        assert said in shown if said else "previous" not in shown
    assert npgpt.cli.main(["train", "text.txt", *QUICK, "--resume", "--steps", "8"]) == 0
    assert "previous" not in capsys.readouterr().err


def test_a_command_works_outside_the_main_thread(workshop, tmp_path):
    status = []
    arguments = ["train", str(workshop / "text.txt"), *QUICK, "--out", str(tmp_path / "model.npz")]
    thread = threading.Thread(target=lambda: status.append(npgpt.cli.main(arguments)))
    thread.start()
    thread.join()
    assert status == [0]
