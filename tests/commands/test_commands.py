"""The commands as a user runs them: real processes, their output and exit status."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import npgpt
import npgpt.cli
from npgpt.engine.backend import CPU
from npgpt.storage.run import RunFiles

ROOT = Path(__file__).parent.parent.parent
SMALL_MODEL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
QUICK = [*SMALL_MODEL, "--batch-size", "4", "--steps", "6", "--eval-interval", "3", "--sample-tokens", "20"]


def npgpt_command(*arguments, cwd, timeout=60, stdin=None):
    """Run `python -m npgpt ...`; returns the finished process with its output as text."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-m", "npgpt", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        check=False,
    )


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


def test_train_shows_what_happens(workshop):
    shown = (workshop / "train.stderr").read_text(encoding="utf-8")
    assert re.search(r"6,000 characters, \d+ different; 5,400 to train on, 600 held out", shown)
    assert re.search(
        r"step 3: train loss \d\.\d{4}, val loss \d\.\d{4} ± \d\.\d{4} \(best\), [\d,]+ tokens/s, \d+ s left", shown
    )
    assert "\n    | " in shown  # a sample
    assert "write with: bin/generate --ckpt model.npz" in shown
    assert "\r" not in shown  # no bar: stderr is no terminal
    assert {"model.npz", "model.last.npz", "model.jsonl"} <= {p.name for p in workshop.iterdir()}


def test_generate(workshop):
    arguments = ["generate", "--ckpt", "model.npz", "--prompt", "HOB:", "--max-new-tokens", "50", "--seed", "4"]
    first = npgpt_command(*arguments, cwd=workshop)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.startswith("HOB:")
    assert len(first.stdout) == 4 + 50 + 1
    assert npgpt_command(*arguments, cwd=workshop).stdout == first.stdout
    checkpoint = npgpt.load(workshop / "model.npz")
    ids = npgpt.generate(checkpoint.model, checkpoint.tokenizer.encode("HOB:"), 50, temperature=0.8, seed=4)
    assert checkpoint.tokenizer.decode(ids) + "\n" == first.stdout


def test_generate_options(workshop):
    greedy = ["generate", "--ckpt", "model.npz", "--temperature", "0", "--max-new-tokens", "20"]
    one = npgpt_command(*greedy, cwd=workshop)
    assert npgpt_command(*greedy, "--top-k", "100000", cwd=workshop).stdout == one.stdout
    two = npgpt_command(*greedy, "--num-samples", "2", cwd=workshop)
    assert two.stdout == 2 * one.stdout
    stop = one.stdout[3]
    stopped = npgpt_command(*greedy, "--stop", stop, cwd=workshop)
    assert stopped.stdout == one.stdout[: one.stdout.index(stop)] + "\n"


@pytest.mark.skipif(os.name != "posix", reason="closed pipes are told differently elsewhere")
def test_a_closed_pipe_is_quiet(workshop):
    command = [sys.executable, "-m", "npgpt", "generate", "--ckpt", "model.npz", "--max-new-tokens", "5000"]
    process = subprocess.Popen(
        command, cwd=workshop, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(5)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert errors == b""


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


def test_resume_continues(workshop, tmp_path):
    for name in ("model.npz", "model.last.npz", "text.txt", "model.jsonl"):
        shutil.copy(workshop / name, tmp_path)
    result = npgpt_command("train", "text.txt", "--resume", "--steps", "9", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 6" in result.stderr
    assert npgpt.load(tmp_path / "model.last.npz").step == 9
    result = npgpt_command("train", "text.txt", "--resume", "model.npz", "--steps", "9", "--lr", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert "lr was 0.001 and is now 1.0" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals to a process are POSIX")
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
    assert "bin/train text.txt --resume" in errors
    assert "Traceback" not in errors
    done = npgpt.load(tmp_path / "model.last.npz").step
    assert done >= 1
    assert f"stopped after step {done}" in errors


def test_gradcheck(tmp_path):
    result = npgpt_command("gradcheck", "--n-layer", "1", "--n-embd", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "all gradients agree" in result.stdout
    assert len(result.stdout.splitlines()) == 2 + 17  # a row for each parameter of one block


def test_gradcheck_of_a_checkpoint(workshop):
    result = npgpt_command("gradcheck", "--ckpt", "model.npz", cwd=workshop)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "all gradients agree with finite differences to 1e-7"
    assert result.stderr == ""


def test_gradcheck_names_what_is_wrong(capsys, monkeypatch):
    kernels = type(CPU.kernels)
    real = kernels.gelu_backward
    monkeypatch.setattr(kernels, "gelu_backward", lambda self, dy, saved: real(self, dy, saved) * 1.001)
    assert npgpt.cli.main(["gradcheck", "--n-layer", "1"]) == 1
    out, err = capsys.readouterr()
    assert "all gradients agree" not in out
    assert re.match(r"npgpt gradcheck: GPT: gradient of \S+ .*the first wrong operation on the way back: gelu\n", err)


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "gradcheck", "inspect"])
def test_help(name, tmp_path):
    result = npgpt_command(name, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"bin/{name}" in result.stdout


def test_help_and_version_of_all(tmp_path):
    assert "npgpt train" in npgpt_command("--help", cwd=tmp_path).stdout
    version = npgpt_command("--version", cwd=tmp_path).stdout
    assert npgpt.__version__ in version
    assert "BLAS" in version or "kernels" in version
    nothing = npgpt_command(cwd=tmp_path)
    assert (nothing.returncode, nothing.stdout, len(nothing.stderr.splitlines())) == (2, "", 1)


# ---------------------------------------------------------------- wrong requests

FILES = {
    "empty.txt": b"",
    "one.txt": b"a",
    "other.txt": b"the bell rang over the water. " * 100,
    "short.txt": b"too short for a window",
    "binary.txt": bytes(range(256)) * 20,
    "latin1.txt": "déjà vu, ".encode("latin-1") * 100,
    "utf16.txt": "the bell ".encode("utf-16") * 100,
    "not-a-checkpoint.npz": b"PK not really",
}

WRONG = {
    "train": [
        ("none.txt", "no such file"),
        (". ", "expected a text file, got a folder"),
        ("empty.txt", "is empty"),
        ("one.txt", "too short"),
        ("short.txt --block-size 64", "too short.*smaller block_size"),
        ("binary.txt", "NUL byte"),
        ("latin1.txt", "not UTF-8 text: byte 0xe9 at offset 1"),
        ("utf16.txt", "UTF-16"),
        ("model.npz --out other.npz", "not a text file"),
        ("text.txt --n-embd 10 --n-head 4", "multiple of n_head"),
        ("text.txt --n-embd 0", "n_embd must be a whole number at least 1, got 0"),
        ("text.txt --steps 0", "steps must be"),
        ("text.txt --steps many", "got 'many'"),
        ("text.txt --lr -1", "lr must be a number above 0"),
        ("text.txt --minutes 0", "minutes must be a number above 0 and at most 100000, got '0'"),
        ("text.txt --minutes soon", "got 'soon'"),
        ("text.txt --minutes nan", "got 'nan'"),
        ("text.txt --minutes 1 --steps 5", "give --minutes or --steps, not both"),
        ("text.txt --minutes 1 --preset nano", "give --minutes or --preset, not both"),
        ("text.txt --minutes 1 --resume", "give --minutes or --resume, not both"),
        ("text.txt --minutes 0.0001", "no time for a step.*more --minutes"),
        ("text.txt --n-embd 65536 --n-layer 90", "this machine has .* GiB of memory, this run needs roughly"),
        ("short.txt --minutes 0.1", "too short"),
        ("text.txt --lr nan", "lr must be"),
        ("text.txt --min-lr 1", "min_lr must not be above lr"),
        ("text.txt --dropout 1", "below 1"),
        ("text.txt --val-fraction 1", "val_fraction must be"),
        ("text.txt --activation swish", "gelu"),
        ("text.txt --device tpu", "auto"),
        ("text.txt --stpes 5", "did you mean --steps"),
        ("text.txt --step 5", "did you mean --steps"),
        ("text.txt extra", "unknown argument extra"),
        ("", "required: DATA"),
        ("text.txt --out nowhere/m.npz", "no folder nowhere"),
        ("text.txt --out text.txt", "must end in .npz"),
        ("text.txt --out z.last.npz", "must not end in .last"),
        ("model.jsonl", "one of the files this run would write"),
        ("text.txt --out folder.npz", "got a folder"),
        ("text.txt --resume none.npz", "nothing to resume: there is no none.npz"),
        ("text.txt --resume not-a-checkpoint.npz", "not a checkpoint"),
        ("short.txt --resume model.npz --block-size 4", "cannot resume: the text is not the one"),
        ("text.txt --resume model.npz", "nothing to do"),
        ("text.txt --resume model.npz --steps 9 --n-embd 32", "n_embd was 16 and is now 32"),
        ("text.txt --resume model.npz --steps 9 --dropout 0.3", "dropout was 0.1 and is now 0.3"),
        ("text.txt --resume model.npz --steps 9 --lr 0.5", "lr was 0.001 and is now 0.5"),
        ("text.txt --resume model.npz --steps 9 --seed 5", "seed was 1337 and is now 5"),
        ("other.txt --resume model.npz --steps 9", "cannot resume: the text is not the one"),
        ("text.txt --resume text.txt", "not a checkpoint"),
        ("text.txt --resume folder.npz", "folder|cannot read"),
        ("text.txt --out none.npz --resume", "nothing to resume: there is no none.last.npz"),
        ("text.txt --preset fast", "invalid choice: 'fast'|quick"),
        ("text.txt --preset char --n-head 5", "multiple of n_head"),
        ("text.txt --batch-size 0", "batch_size must be a whole number at least 1 and at most 100000, got 0"),
        ("text.txt --batch-size 1.5", "batch_size must be a whole number at least 1 and at most 100000, got '1.5'"),
        ("text.txt --batch-size", "expected one argument"),
        ("text.txt --block-size -3", "block_size must be"),
        ("text.txt --n-layer 0", "n_layer must be"),
        ("text.txt --n-head 0", "n_head must be"),
        ("text.txt --d-ff 0", "d_ff must be"),
        ("text.txt --lr 0", "lr must be a number above 0"),
        ("text.txt --lr inf", "lr must be"),
        ("text.txt --lr fast", "lr must be a number above 0, got 'fast'"),
        ("text.txt --beta1 1", "beta1 must be"),
        ("text.txt --beta2 -0.1", "beta2 must be"),
        ("text.txt --weight-decay -1", "weight_decay must be"),
        ("text.txt --grad-clip -1", "grad_clip must be"),
        ("text.txt --eval-interval 0", "eval_interval must be"),
        ("text.txt --eval-tokens -1", "eval_tokens must be"),
        ("text.txt --patience -1", "patience must be"),
        ("text.txt --log-interval 0", "log_interval must be"),
        ("text.txt --sample-tokens -1", "sample_tokens must be"),
        ("text.txt --warmup-steps -1", "warmup_steps must be"),
        ("text.txt --val-fraction -0.1", "val_fraction must be"),
        ("text.txt --schedule linear", "cosine"),
        ("text.txt --seed -1", "seed must be"),
        ("text.txt --seed 1e3", "seed must be"),
        ("text.txt --threads 0", "threads must be"),
        ("text.txt --micro-batch 0", "micro_batch must be"),
        ("text.txt --no-biass", "did you mean --no-bias"),
        ("one.txt --block-size 1", "too short"),
    ],
    "generate": [
        ("", "required: --ckpt"),
        ("--ckpt none.npz", "no such checkpoint"),
        ("--ckpt text.txt", "not a checkpoint"),
        ("--ckpt not-a-checkpoint.npz", "not a checkpoint"),
        ("--ckpt folder.npz", "folder|cannot read"),
        ("--ckpt model.npz --prompt 5€", "unknown characters?.*'€' "),
        ("--ckpt model.npz --temperature -1", "temperature must be a number at least 0, got -1.0"),
        ("--ckpt model.npz --temperature warm", "temperature must be a number"),
        ("--ckpt model.npz --top-k 0", "top_k must be a whole number at least 1, got 0"),
        ("--ckpt model.npz --top-k 2.5", "top_k"),
        ("--ckpt model.npz --top-p 0", "top_p"),
        ("--ckpt model.npz --top-p 1.1", "top_p"),
        ("--ckpt model.npz --max-new-tokens -1", "max_new_tokens"),
        ("--ckpt model.npz --num-samples 0", "num_samples"),
        ("--ckpt model.npz --min-p 2", "min_p"),
        ("--ckpt model.npz --repetition-penalty 0", "repetition_penalty must be a number at least 0.01 and at most 100"),
        ("--ckpt model.npz --window wide", "exact"),
        ("--ckpt model.npz --unknown guess", "error"),
        ("--ckpt model.npz --prompt-file none.txt", "no such file"),
        ("--ckpt model.npz --threads 0", "threads must be a whole number at least 1"),
        ("--ckpt model.npz --device tpu", "auto"),
        ("--ckpt model.npz --prompt a --prompt-file text.txt", "not allowed with"),
        ("--ckpt model.npz --prompt 5€ --unknown error", "--unknown skip"),
        ("--ckpt model.npz --seed -1", "seed"),
        ("--ckpt model.npz --stop=", "--stop must be a text"),
        ("--ckpt model.npz --stop a€", "can never occur: the model does not know '€'"),
        ("--ckpt model.npz --promt HOB", "did you mean --prompt"),
    ],
    "evaluate": [
        ("", "required: --ckpt"),
        ("--ckpt model.npz empty.txt", "empty"),
        ("--ckpt model.npz one.txt", "at least 2 tokens"),
        ("--ckpt none.npz text.txt", "no such checkpoint"),
        ("--ckpt model.npz --sample-tokens -1", "sample_tokens must be"),
        ("--ckpt model.npz --sample-tokens few", "sample_tokens must be"),
    ],
    "gradcheck": [
        ("--n-embd 5", "multiple of n_head"),
        ("--steps 5", "unknown argument"),
        ("--ckpt none.npz", "no such checkpoint"),
        ("--ckpt model.npz --n-layer 2", "leave out --ckpt or --n-layer"),
    ],
    "compare": [
        ("model.npz", "two checkpoints or more"),
        ("model.npz model.npz", "named twice"),
        ("model.npz none.npz", "no such checkpoint"),
        ("model.npz model.last.npz --text none.txt", "model.npz: no such file"),
        ("", "required: FILE"),
    ],
    "replay": [
        ("none.npz", "no such checkpoint"),
        ("model.npz", "is not a crash file"),
        ("text.txt", "not a checkpoint"),
        ("", "required: FILE"),
    ],
    "inspect": [("none.npz", "no such checkpoint"), ("text.txt", "not a checkpoint"), ("", "required: FILE")],
    "trian": [("", "did you mean train")],
}


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


def test_prompts_from_elsewhere(workshop):
    def text_of(*flags, stdin=None):
        result = npgpt_command(
            "generate", "--ckpt", "model.npz", "--seed", "4", "--max-new-tokens", "5", *flags, cwd=workshop, stdin=stdin
        )
        assert (result.returncode, result.stderr.strip("-\n")) == (0, "")
        return result.stdout

    expected = text_of("--prompt", "HOB:")
    (workshop / "prompt.txt").write_text("HOB:", encoding="utf-8")
    with (workshop / "prompt.txt").open(encoding="utf-8") as file:
        assert text_of("--prompt", "-", stdin=file) == expected
    (workshop / "marked.txt").write_bytes(b"\xef\xbb\xbfHOB:\r\n")
    with (workshop / "marked.txt").open("rb") as file:
        assert text_of("--prompt", "-", stdin=file) == text_of("--prompt", "HOB:\n")
    assert text_of("--prompt-file", "prompt.txt") == expected
    assert text_of("--prompt", "H€OB:", "--unknown", "skip") == expected
    assert text_of("--prompt", "HÖB:", "--unknown", "replace") == expected
    assert text_of("--prompt", "HOB:", "--num-samples", "3").startswith(expected) is True


def test_samples_as_json(workshop):
    flags = ["--prompt", "HOB:", "--seed", "4", "--max-new-tokens", "5", "--num-samples", "2", "--json"]
    result = npgpt_command("generate", "--ckpt", "model.npz", *flags, cwd=workshop)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["prompt"], row["seed"]) == ("HOB:", 4)
        assert "".join(row["tokens"]) == row["text"]
        assert len(row["ids"]) == len(row["logprobs"]) == 5
        assert row["finish_reason"] == "length"
        assert all(p < 0 for p in row["logprobs"])
    stop = rows[1]["text"][2]
    result = npgpt_command("generate", "--ckpt", "model.npz", *flags, "--stop", stop, cwd=workshop)
    ended = json.loads(result.stdout.splitlines()[1])
    assert ended["finish_reason"] == "stop"
    assert ended["text"] == rows[1]["text"].split(stop)[0]
    plain = npgpt_command("generate", "--ckpt", "model.npz", *flags[:-3], cwd=workshop).stdout
    assert plain == "HOB:" + rows[0]["text"] + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_conversation(workshop):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "npgpt", "generate", "--ckpt", "model.npz", "--max-new-tokens", "5", "--seed", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    process = subprocess.Popen(command, cwd=workshop, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""

    def until(words):
        nonlocal said
        while words not in said:
            said += os.read(ours, 1000)
        before, said = said.split(words, 1)
        return before

    until(b"> ")
    os.write(ours, b"HOB:\n")
    assert b"HOB:" in until(b"a second")
    until(b"> ")
    os.write(ours, "€\n".encode())
    assert b"unknown character" in until(b"--unknown replace")
    until(b"> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(ours)


def test_evaluate_as_json_and_with_samples(workshop):
    plain = npgpt_command("evaluate", "--ckpt", "model.npz", "--sample-tokens", "100", cwd=workshop)
    assert plain.returncode == 0, plain.stderr
    assert "96 sampled characters (temperature 0.8) against the" in plain.stdout
    assert re.search(r"line breaks +\d+\.\d %, there +\d+\.\d %", plain.stdout)
    as_json = ["evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens"]
    row = json.loads(npgpt_command(*as_json, "100", cwd=workshop).stdout)
    assert f"loss {row['loss']:.4f} ± {row['stderr']:.4f} nats" in plain.stdout
    assert set(row["likeness"]["rates"]) == {"line breaks", "spaces", "punctuation", "capitals"}
    without = json.loads(
        npgpt_command("evaluate", "--ckpt", "model.npz", "--json", "--sample-tokens", "0", cwd=workshop).stdout
    )
    assert without == row | {"likeness": None}


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
    warned = npgpt_command("compare", "more-held-out.npz", "model.npz", cwd=workshop)
    assert warned.stderr == "warning: model.npz was trained on a part of what is held out here; put it first\n"
    assert npgpt_command("train", "other.txt", *QUICK, "--out", "poorer.npz", cwd=workshop).returncode == 0
    refused = npgpt_command("compare", "model.npz", "poorer.npz", cwd=workshop)
    assert refused.returncode == 2
    assert refused.stderr.startswith("npgpt compare: poorer.npz cannot be judged on this text: ")
    assert rows[1]["difference"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"])
    assert all(row["seconds"] > 0 for row in rows)


def test_a_damaged_state_points_to_the_best(workshop, tmp_path, capsys, monkeypatch):
    for path in workshop.iterdir():
        shutil.copy(path, tmp_path) if path.is_file() else None
    monkeypatch.chdir(tmp_path)
    Path("model.last.npz").write_bytes(Path("model.last.npz").read_bytes()[:-100])
    assert npgpt.cli.main(["train", "text.txt", "--resume", "--steps", "20"]) == 2
    assert "--resume model.npz continues from the best state instead" in capsys.readouterr().err
    assert npgpt.cli.main(["train", "text.txt", "--resume", "model.npz", "--steps", "8"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX streams")
def test_streams_that_are_closed(workshop):
    def run(command):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PY": sys.executable}
        done = subprocess.run(
            command, shell=True, cwd=workshop, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done.returncode

    generate = '"$PY" -m npgpt generate --ckpt model.npz --max-new-tokens 3'
    assert run(f"{generate} >&-") == 0
    assert run(f"{generate} 2>&-") == 0
    train = f'"$PY" -m npgpt train text.txt --out closed.npz {" ".join(QUICK)}'
    assert run(f"{train} 2>&-") == 0
    if Path("/dev/full").exists():
        assert run(f"{generate} >/dev/full") == 1
        assert run('"$PY" -m npgpt --help >/dev/full') == 1
        assert run(f"{train} 2>/dev/full") == 0


def test_a_checkpoint_in_use_is_refused(workshop, capsys, monkeypatch):
    monkeypatch.chdir(workshop)
    before = {path.name: path.stat().st_mtime_ns for path in workshop.iterdir()}
    with RunFiles(Path("model.npz")).locked():
        assert npgpt.cli.main(["train", "text.txt", "--steps", "5", "--batch-size", "2"]) == 2
    assert f"model.npz is in use by another run (process {os.getpid()})" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in workshop.iterdir()} == before


@pytest.mark.parametrize(("name", "arguments", "words"), [(n, a, w) for n, rows in WRONG.items() for a, w in rows])
def test_a_wrong_request_is_one_line(name, arguments, words, workshop, capsys, monkeypatch):
    """In this process, for speed: what `npgpt` prints and returns."""
    monkeypatch.chdir(workshop)
    for file, content in FILES.items():
        Path(file).write_bytes(content)
    Path("folder.npz").mkdir(exist_ok=True)
    before = {p.name: p.stat().st_mtime_ns for p in workshop.iterdir()}
    try:
        status = npgpt.cli.main([name, *arguments.split()])
    except SystemExit as stopped:  # argparse's way
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert re.search(words, captured.err), captured.err
    assert {p.name: p.stat().st_mtime_ns for p in workshop.iterdir()} == before  # nothing written


def test_wrong_requests_as_processes(workshop):
    for arguments in (["train", "none.txt"], ["generate", "--ckpt", "none.npz"], ["train", "text.txt", "--stepz", "3"]):
        result = npgpt_command(*arguments, cwd=workshop)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are Linux's")
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
    assert result.returncode == 1
    assert re.search(rf"out of memory: this run needs roughly [\d.]+ GiB; {words}", result.stderr), result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- bin/


@pytest.mark.skipif(os.name != "posix", reason="bin/ holds POSIX shell scripts")
def test_bin_scripts(workshop, tmp_path):
    python = tmp_path / "python3"  # where there is no .venv, they take python3 from PATH
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("train", "generate", "evaluate", "gradcheck", "inspect"):
        script = ROOT / "bin" / name
        result = subprocess.run([script, "--help"], env=environment, capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, result.stderr
        assert f"bin/{name}" in result.stdout
    linked = tmp_path / "write"
    linked.symlink_to(ROOT / "bin" / "generate")
    result = subprocess.run(
        [linked, "--ckpt", "model.npz", "--prompt", "a  b", "--max-new-tokens", "0"],
        cwd=workshop,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.stdout == "a  b\n", result.stderr


@pytest.mark.skipif(os.name != "posix", reason="closed pipes are told differently elsewhere")
def test_training_goes_on_when_nobody_reads(workshop, tmp_path):
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


def test_device_cuda_without_a_gpu_is_one_line(workshop, capsys, monkeypatch):
    from npgpt.engine.backend import DeviceError, select

    try:
        select("cuda")
    except DeviceError:
        monkeypatch.chdir(workshop)
        assert npgpt.cli.main(["train", "text.txt", "--device", "cuda"]) == 2
        assert re.search("device 'cuda' cannot be used: .*(install|--device cpu)", capsys.readouterr().err)
    else:
        np.testing.assert_array_equal(select("cuda").xp.ones(2).get(), [1, 1])


def test_evaluate_without_its_text(workshop, tmp_path, capsys, monkeypatch):
    shutil.copy(workshop / "model.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 2
    assert "the text it was trained on, text.txt, is not here" in capsys.readouterr().err
    Path("text.txt").write_text("the bell " * 100, encoding="utf-8")
    assert npgpt.cli.main(["evaluate", "--ckpt", "model.npz"]) == 2
    assert "no longer the text" in capsys.readouterr().err
