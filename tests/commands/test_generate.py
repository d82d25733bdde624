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


def text_for(workshop, *flags, stdin=None):
    """What generate writes, without its last line break; and what it says on stderr."""
    flags = ["generate", "--ckpt", "model.npz", "--seed", "4", "--max-new-tokens", "5", *flags]
    result = npgpt_command(*flags, cwd=workshop, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe cannot be asked there whether it has text")
def test_piped_text_is_the_prompt(workshop):
    expected = text_for(workshop, "--prompt", "HOB:")
    reading, writing = os.pipe()
    os.write(writing, b"HOB:")
    os.close(writing)
    assert text_for(workshop, stdin=reading) == expected
    os.close(reading)
    (workshop / "piped.txt").write_text("HOB:", encoding="utf-8")
    with (workshop / "piped.txt").open(encoding="utf-8") as file:
        assert text_for(workshop, stdin=file) == expected
    with (workshop / "piped.txt").open(encoding="utf-8") as file:  # --prompt has priority
        assert text_for(workshop, "--prompt", "HALE:", stdin=file) == text_for(workshop, "--prompt", "HALE:")


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe cannot be asked there whether it has text")
def test_a_pipe_without_text_is_not_waited_for(workshop):
    expected, _ = text_for(workshop)
    reading, writing = os.pipe()
    text, said = text_for(workshop, stdin=reading)  # the pipe stays open
    assert text == expected
    assert said == "standard input has no text yet and is not waited for; --prompt - waits for it\n"
    os.close(writing)
    assert text_for(workshop, stdin=reading) == (expected, "")  # closed and empty
    os.close(reading)


def test_escapes_in_prompts_and_stop_texts(workshop):
    expected = text_for(workshop, "--prompt", "HOB:\nA")
    assert text_for(workshop, "--prompt", r"HOB:\nA") == expected
    assert text_for(workshop, "--prompt", "HOB:\r\nA") == expected  # line ends as in files
    assert text_for(workshop, "--prompt", r"\x48OB:\x0aA") == expected
    assert npgpt_command("generate", "--ckpt", "model.npz", "--prompt", r"A\nB", "--no-escape", cwd=workshop).stderr.startswith(
        "npgpt generate: unknown character '\\\\'"
    )
    greedy = ["--temperature", "0", "--max-new-tokens", "100"]
    whole, _ = text_for(workshop, "--prompt", "H", *greedy)
    stopped, _ = text_for(workshop, "--prompt", "H", *greedy, "--stop", r"\n")
    assert stopped == whole.split("\n")[0] + "\n"


def test_a_letter_and_its_accent_are_one_character(tmp_path, capsys):
    tokenizer = npgpt.CharTokenizer("\nabcé")
    npgpt.save(tmp_path / "m.npz", npgpt.GPT(npgpt.GPTConfig(5, block_size=8, n_layer=1, n_head=1, n_embd=8)), tokenizer)
    flags = ["--ckpt", str(tmp_path / "m.npz"), "--seed", "1", "--max-new-tokens", "0", "--prompt"]
    assert npgpt.cli.main(["generate", *flags, "cae\u0301"]) == 0
    assert capsys.readouterr().out == "caé\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_control_characters_reach_no_terminal(tmp_path):
    """A pipe gets the bytes; a terminal gets escapes."""
    import pty

    tokenizer = npgpt.CharTokenizer("\nab\x07\x1b\x9b")
    npgpt.save(tmp_path / "m.npz", npgpt.GPT(npgpt.GPTConfig(6, block_size=8, n_layer=1, n_head=1, n_embd=8)), tokenizer)
    flags = ["generate", "--ckpt", "m.npz", "--seed", "1", "--max-new-tokens", "0", "--prompt", r"a\x1b[31mb\x07\x9b"]
    flags[-1] = flags[-1].replace("[31m", "")
    assert npgpt_command(*flags, cwd=tmp_path).stdout == "a\x1bb\x07\x9b\n"
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "npgpt", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=theirs,
        check=True,
    )
    os.close(theirs)
    assert os.read(ours, 1000) == b"a\\x1bb\\x07\\x9b\r\n"
    os.close(ours)


def test_a_slow_window_is_announced(workshop, capsys, monkeypatch):
    monkeypatch.chdir(workshop)
    long = ["generate", "--ckpt", "model.npz", "--prompt", "the bell", "--max-new-tokens", "9"]  # the context has 16 tokens
    for flags, slow, expected in (([], 0, True), ([], 1e12, False), (["--window", "half"], 0, False)):
        monkeypatch.setattr("npgpt.commands.generate.SLOW", slow)
        assert npgpt.cli.main([*long, *flags]) == 0
        assert ("warning: past 16 tokens, each token needs the whole context again" in capsys.readouterr().err) == expected
    monkeypatch.setattr("npgpt.commands.generate.SLOW", 0)
    assert npgpt.cli.main([*long[:-1], "8"]) == 0
    assert "warning" not in capsys.readouterr().err
