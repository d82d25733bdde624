"""`npgpt NAME ...`: finds the command, runs it, and turns errors into one line and an exit status.

The commands are in commands/. Generated text and requested reports go to stdout; progress and messages go to stderr. Exit
status: 0 done, 1 the work failed, 2 the request was wrong, 129, 130 and 143 interrupted. Users of the library need
nothing of this.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np

import npgpt
from npgpt.commands import (
    compare,
    evaluate,
    export_model,
    generate,
    gradcheck,
    import_model,
    inside,
    inspect,
    replay,
    report,
    serve,
    train,
)
from npgpt.config.fields import RequestError
from npgpt.console.terminal import BreakableStream, failed, say, silence
from npgpt.engine.backend import DeviceError
from npgpt.engine.gradcheck import GradientError
from npgpt.parallel.limits import available_cores
from npgpt.parallel.machine import describe_blas, describe_kernels
from npgpt.parallel.ranks import OtherRankError, RankError

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "inside": inside,
    "serve": serve,
    "import": import_model,
    "export": export_model,
    "gradcheck": gradcheck,
    "replay": replay,
    "inspect": inspect,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None or sys.stderr is None:  # the parent process has closed them
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that replaces the original may not have it
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    with contextlib.redirect_stderr(BreakableStream(sys.stderr)), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            status = COMMANDS[name].run(COMMANDS[name].parser().parse_intermixed_args(argv[1:])) if name else _no_command(argv)
            sys.stdout.flush()
        except (RequestError, DeviceError) as error:
            say(f"npgpt {name}: {error}")
            return 2
        except (GradientError, FloatingPointError) as error:
            return failed(name, str(error))
        except MemoryError:
            return failed(name, "out of memory")
        except RankError as error:
            return failed(name, str(error))
        except OtherRankError:  # that rank says why, and its status is that of the run
            return 0
        except BrokenPipeError:  # as in `npgpt generate | head`: the reader has what it wanted
            silence(sys.stdout)
            return 0
        except OSError as error:
            silence(sys.stdout)  # stdout may be what failed, and Python would flush it again at exit
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
        print("\n".join(f"  npgpt {name:10} {command.ABOUT}" for name, command in COMMANDS.items()))
        print("\nnpgpt NAME --help says more. In a checkout, bin/npgpt NAME and bin/NAME are the same.")
        return 0
    if argv[0] == "--version":
        software = f"npgpt {npgpt.__version__}, NumPy {np.__version__}, {describe_kernels()} kernels"
        print(f"{software}, {describe_blas()}, {available_cores()} cores")
        return 0
    close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    say(f"npgpt: unknown command {argv[0]!r}; {hint}")
    return 2
