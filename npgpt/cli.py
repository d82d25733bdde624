"""`npgpt NAME ...`: which command it is, and what becomes of its errors. The commands are in commands/.

Generated text and asked-for reports go to stdout, progress and messages to stderr. Exit status: 0 done,
1 the work failed, 2 the request was wrong, 129, 130 and 143 interrupted. A wrong request is answered in one
line. Nothing here is needed by a user of the library.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import npgpt
from npgpt.commands.evaluate import compare_command, compare_parser, evaluate_command, evaluate_parser
from npgpt.commands.generate import generate, generate_parser
from npgpt.commands.gradcheck import gradcheck, gradcheck_parser, inspect, inspect_parser, replay, replay_parser
from npgpt.commands.train import train, train_parser
from npgpt.config.fields import RequestError
from npgpt.console.terminal import Unread, failed, say, silence
from npgpt.engine.backend import DeviceError
from npgpt.engine.gradcheck import GradientError
from npgpt.parallel.machine import available_cores, describe_blas

COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int], str]] = {
    "train": (train_parser, train, "train a GPT on a text file"),
    "generate": (generate_parser, generate, "write text with a trained model"),
    "evaluate": (evaluate_parser, evaluate_command, "the exact loss of a model on a text"),
    "compare": (compare_parser, compare_command, "what differs between runs, and whether it matters"),
    "gradcheck": (gradcheck_parser, gradcheck, "check the hand-written gradients"),
    "replay": (replay_parser, replay, "repeat the step at which a run went wrong"),
    "inspect": (inspect_parser, inspect, "what a checkpoint holds"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started this
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where something else has taken the stream's place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    with contextlib.redirect_stderr(Unread(sys.stderr)), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            status = COMMANDS[name][1](COMMANDS[name][0]().parse_args(argv[1:])) if name else _no_command(argv)
            sys.stdout.flush()
        except (RequestError, DeviceError) as error:
            say(f"npgpt {name}: {error}")
            return 2
        except (GradientError, FloatingPointError) as error:
            return failed(name, str(error))
        except MemoryError:
            return failed(name, "out of memory")
        except BrokenPipeError:  # `npgpt generate | head`: the reader has what it wanted
            silence(sys.stdout)
            return 0
        except OSError as error:
            silence(sys.stdout)  # it may be what failed, and be tried again at the end
            return failed(name, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        except KeyboardInterrupt:
            return 130
        return status


def _no_command(argv: list[str]) -> int:
    if not argv:
        say(f"npgpt: expected a command, one of {', '.join(COMMANDS)} (see npgpt --help)")
        return 2
    if argv[0] in ("-h", "--help"):
        print("usage: npgpt NAME ...\n")
        print("\n".join(f"  npgpt {name:10} {about}" for name, (_, _, about) in COMMANDS.items()))
        print("\nnpgpt NAME --help says more; bin/NAME is the same as npgpt NAME.")
        return 0
    if argv[0] == "--version":
        print(f"npgpt {npgpt.__version__}, NumPy {np.__version__}, {describe_blas()}, {available_cores()} cores")
        return 0
    close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    say(f"npgpt: unknown command {argv[0]!r}; {hint}")
    return 2
