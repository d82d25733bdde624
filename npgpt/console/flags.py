"""Command-line flags made from settings, settings read back from flags, and flags of a kind of their own."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError, SettingField, Settings, fields_of
from npgpt.parallel.ranks import DEFAULT_TIMEOUT


def add_flags(
    parser: argparse.ArgumentParser, cls: type[Settings], skip: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> None:
    """Add a `--flag` for every setting of `cls` that is not in `skip`.

    A flag that is not given leaves no attribute in the namespace. So `settings_from` returns only what the user asked
    for. `defaults` are shown in the help where a command has defaults of its own.
    """
    group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip(".") if cls.__doc__ else cls.__name__)
    for f in fields_of(cls):
        if f.name in skip:
            continue
        default = (defaults or {}).get(f.name, f.default)
        help = f.help if default in (None, dataclasses.MISSING) else f"{f.help} (default: {default})"
        flag = "--" + f.name.replace("_", "-")
        shared: dict[str, Any] = {"help": help, "dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        else:
            metavar = None if f.choices else {int: "N", float: "X", str: "NAME"}[f.type]
            group.add_argument(flag, choices=f.choices, metavar=metavar, type=_parser_of(f), **shared)


def add_unknown_flag(parser: argparse.ArgumentParser, where: str = "") -> None:
    """Add --unknown: what to do with characters that the model does not know. where: such as " of the prompt"."""
    parser.add_argument(
        "--unknown",
        choices=("error", "skip", "replace"),
        default="error",
        help=f"what to do with a character{where} that the model does not know; skip leaves it out; replace uses the other "
        "case of the letter or the letter without its accent, or leaves it out if neither is known (default: error)",
    )


def file_to_write(path: str, suffix: str) -> Path:
    """The path of `--out`. Raises RequestError if it does not end in `suffix`, or a file could not be written there."""
    out = Path(path)
    if out.suffix != suffix:
        raise RequestError(f"--out must end in {suffix}, got {path}")
    if out.is_dir():
        raise RequestError(f"--out must be a file, got a folder: {path}")
    if not out.parent.is_dir():
        raise RequestError(f"--out: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"--out: the folder {out.parent} cannot be written to")
    return out


def positive(name: str) -> Callable[[str], int]:
    """A function for argparse: it turns a flag's text into a whole number above 0. name: of the value, for messages."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{name} must be a whole number at least 1, got {text!r}")
        return int(text)

    return parse


def port(text: str) -> int:
    """The number of a port, for argparse; 0 stands for any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"port must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def settings_from(namespace: argparse.Namespace, cls: type[Settings]) -> dict[str, Any]:
    """The settings of `cls` that were given on the command line, by name."""
    return {f.name: getattr(namespace, f.name) for f in fields_of(cls) if hasattr(namespace, f.name)}


def _parser_of(f: SettingField) -> Callable[[str], Any]:
    """A function for argparse that turns a flag's text into the setting's value."""

    def parse(text: str) -> Any:
        try:
            value = f.type(text)
        except ValueError:
            value = text  # the check below refuses it, in its own words
        try:
            return f.check(value)
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def add_rank_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that several processes can work on together; see parallel/ranks.py."""
    parser.add_argument(
        "--ranks",
        choices=("auto", "none"),
        default="auto",
        help="auto: if a launcher such as mpiexec or srun has started several processes, they train together (see "
        "docs/scaling.md); none: each trains alone",
    )
    parser.add_argument(
        "--rank-timeout",
        type=positive("rank_timeout"),
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help=f"end the run if a process has not answered the others for this long (default: {DEFAULT_TIMEOUT})",
    )
    parser.add_argument(
        "--text-from-rank-0", action="store_true", help="the first process reads the text and sends it to the others"
    )
