"""What the commands share: parsers, messages, progress bars, streams that may be closed. It knows no particular command."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without tab and line feed, DEL, C1


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line. For a misspelt flag it suggests the closest one."""

    is_silent = False  # True: another process reports the same error

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(wrong.split("=")[0], flags, n=1)
            message = f"unknown argument {wrong}" + (f"; did you mean {close[0]}?" if close else "")
        elif message.endswith("expected one argument"):
            flag = message.removeprefix("argument ").split(":")[0].split("/")[-1]
            message += f"; a value that begins with - is written {flag}=VALUE"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n" if not self.is_silent else None)


def command_parser(name: str, about: str, examples: list[str]) -> Parser:
    """The parser of `npgpt NAME`. Its help begins with examples, each the arguments after the name."""
    description = "examples:\n" + "\n".join(f"  {command(name)} {e}" for e in examples) + f"\n\n{about}"
    return Parser(
        prog=f"npgpt {name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def say(message: str, end: str = "\n") -> None:
    """Print to stderr. On a terminal, control characters are made visible."""
    print(visible(message) if sys.stderr.isatty() else message, file=sys.stderr, end=end, flush=True)


def visible(text: str) -> str:
    """The text with escapes for control characters, which could change what a terminal does. Line breaks and tabs stay."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def command(name: str) -> str:
    """The command as the user can type it, in the way this program was started: `bin/train`, `npgpt train`, ..."""
    program = Path(sys.argv[0])
    if program.name == "launch.py":  # bin/npgpt starts it
        folder = program.parent
        shown = folder.name if folder.parent.resolve() == Path.cwd() else shlex.quote(str(folder))
        return f"{shown}/{name}" if (folder / name).exists() else f"{shown}/npgpt {name}"
    return f"python -m npgpt {name}" if program.name == "__main__.py" else f"npgpt {name}"


def failed(name: str, message: str) -> int:
    """Print why a command has failed; returns the exit status for a failure."""
    say(f"npgpt {name}".rstrip() + f": {message}")
    return 1


def duration(seconds: float) -> str:
    """A duration as text: 1 h 2 min, 2 min 3 s, or 3 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def file_size(n_bytes: int) -> str:
    """A size as text: 120 kB, or 2.7 MB."""
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def progress_bar(iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
    """tqdm(iterable, **options), shown only on a terminal, and only after the first second."""
    from tqdm import tqdm

    return tqdm(iterable, delay=1, disable=None, leave=False, **options)


class BreakableStream:
    """A stream whose reader may go away, such as a terminal that is closed while a run continues.

    Text that is written after that is lost, and nothing else happens.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            silence(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: Any) -> None:
    """Discard everything that is written to a stream from now on."""
    with contextlib.suppress(OSError):  # the stream is not a file
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
