"""A prompt as a person gives it: on the command line with escapes, in a file, or on standard input. Nothing is generated."""

from __future__ import annotations

import argparse
import re
import sys

from npgpt.config.fields import RequestError
from npgpt.console.flags import add_unknown_flag
from npgpt.text.reading import decoded, read_text
from npgpt.text.tokenizer import Tokenizer, UnknownCharacterError, closest_known

ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([ntr\\\"']))")
MEANING = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


def add_prompt_flags(parser: argparse.ArgumentParser, what: str, default: str) -> None:
    """Add --prompt, --prompt-file, --escape and --unknown.

    what: the prompt, in the help text. default: what no prompt means.
    """
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help=f"{what}; - reads standard input (default: {default})")
    prompt.add_argument("--prompt-file", metavar="FILE", help=f"a file with {what}")
    parser.add_argument(
        "--escape",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=r"read \n, \t, \r, \\, \", \' and \xHH in texts on the command line as in a Python string (default: yes)",
    )
    add_unknown_flag(parser, " of the prompt")


def given_prompt(args: argparse.Namespace) -> str | None:
    """The prompt that the flags give; None if they give none."""
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    if args.prompt == "-":
        return from_stdin()
    return None if args.prompt is None else typed(args.prompt, args.escape)


def typed(text: str, escape: bool) -> str:
    """A text from the command line: with its escapes resolved, and with line ends as files have them after reading."""
    if escape:
        text = ESCAPES.sub(lambda match: chr(int(match[1], 16)) if match[1] else MEANING[match[2]], text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def from_stdin() -> str:
    """The text on standard input, decoded as a text file is. It may be empty."""
    if sys.stdin is None:
        raise RequestError("--prompt - reads standard input, which is closed")
    raw = sys.stdin.buffer.read()
    return "".join(decoded([raw], "the prompt on standard input")) if raw else ""


def known(tokenizer: Tokenizer, prompt: str, unknown: str) -> str:
    """The prompt with only known characters. unknown: "error", "skip" or "replace"; see --unknown.

    Raises RequestError for an unknown character if `unknown` is "error", and if no character of the prompt is known.
    """
    given, prompt = prompt, closest_known(tokenizer, prompt)
    if unknown != "error":
        prompt = tokenizer.without_unknown(prompt, replace=unknown == "replace")
        if given and not prompt:
            raise RequestError("the model knows no character of the prompt, so nothing is left of it")
        return prompt
    try:
        tokenizer.encode(prompt)
    except UnknownCharacterError as error:
        raise RequestError(f"{error}; --unknown skip leaves it out, --unknown replace takes the closest one") from None
    return prompt
