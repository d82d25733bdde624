"""What the commands share: durations as text, streams that break, the parser's answers to wrong flags."""

import io
import os
import sys

import pytest

from npgpt.console.terminal import BreakableStream, command, command_parser, duration, failed, progress_bar, say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (7384, "2 h 3 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_messages_go_to_stderr(capsys):
    say("one")
    say("two", end="")
    assert failed("train", "no text") == 1
    assert failed("", "no command") == 1
    assert capsys.readouterr() == ("", "one\ntwonpgpt train: no text\nnpgpt: no command\n")


def test_no_bar_where_stderr_is_no_terminal(capsys):
    assert list(progress_bar(range(3), desc="Reading")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


class Broken(io.StringIO):
    """A stream that is not a file and whose reader has closed it."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_a_breakable_stream_passes_text_on():
    inner = io.StringIO()
    stream = BreakableStream(inner)
    assert stream.write("hello") == 5
    stream.flush()
    assert stream.getvalue() == "hello"
    print("more", file=stream)
    assert inner.getvalue() == "hellomore\n"


def test_a_breakable_stream_survives_a_broken_one():
    stream = BreakableStream(Broken())
    for _ in range(2):
        assert stream.write("lost") == 4
        stream.flush()


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_stream_whose_reader_has_gone_is_silenced():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        stream = BreakableStream(pipe)
        os.close(reader)
        stream.write("lost")
        stream.flush()  # only now does the system refuse the text
        pipe.write("discarded")
        pipe.flush()  # the pipe itself no longer fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], None),
        (["--promt", "a"], "unknown argument --promt; did you mean --prompt?"),
        (["--promt=a"], "unknown argument --promt=a; did you mean --prompt?"),
        (["--prom", "a"], "unknown argument --prom; did you mean --prompt?"),  # no abbreviations
        (["--xyz"], "unknown argument --xyz"),
        (["extra"], "unknown argument extra"),
        (["--prompt"], "argument --prompt: expected one argument; a value that begins with - is written --prompt=VALUE"),
    ],
)
def test_a_misspelt_flag_is_answered_with_a_suggestion(arguments, message, capsys):
    parser = command_parser("write", "Write a text.", ["--prompt a"])
    parser.add_argument("--prompt")
    if message is None:
        assert parser.parse_args(arguments).prompt == "a"
        return
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"npgpt write: {message} (see npgpt write --help)\n")


def test_the_help_begins_with_examples(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["npgpt"])
    shown = command_parser("write", "Write a text.", ["--prompt a"]).format_help()
    assert shown.index("examples:\n  npgpt write --prompt a\n") < shown.index("Write a text.") < shown.index("--help")


def test_commands_are_named_in_the_way_the_program_was_started(monkeypatch, tmp_path):
    folder = tmp_path / "a space" / "bin"
    folder.mkdir(parents=True)
    (folder / "train").touch()  # replay has no script of its own
    for program, here, train, replay in [
        (folder / "launch.py", folder.parent, "bin/train", "bin/npgpt replay"),
        (folder / "launch.py", tmp_path, f"'{folder}'/train", f"'{folder}'/npgpt replay"),
        (tmp_path / "__main__.py", tmp_path, "python -m npgpt train", "python -m npgpt replay"),
        (tmp_path / "npgpt", tmp_path, "npgpt train", "npgpt replay"),
    ]:
        monkeypatch.setattr(sys, "argv", [str(program)])
        monkeypatch.chdir(here)
        assert (command("train"), command("replay")) == (train, replay)
