"""`npgpt generate` as a user runs it: its text, prompts, JSON, a conversation on a terminal, closed streams."""

import json
import os
import signal
import subprocess
import sys

import pytest
from studies import reliability
from support.commands import ROOT, npgpt_command

import npgpt
import npgpt.cli


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


@pytest.mark.skipif(os.name != "posix", reason="other systems report closed pipes differently")
def test_a_closed_pipe_ends_generation_quietly(workshop):
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


def test_prompts_from_stdin_and_files(workshop):
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_conversation_on_a_terminal(workshop):
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


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_closed_pipe_ends_a_long_text_quietly(tmp_path):
    list(reliability.trainer(tmp_path / "model.npz", steps=2).run())
    command = [sys.executable, "-m", "npgpt", "generate", "--ckpt", "model.npz", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={"PYTHONPATH": str(reliability.ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) in (0, -signal.SIGPIPE)
