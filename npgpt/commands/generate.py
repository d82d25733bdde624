"""`npgpt generate`: prompts from wherever they come, samples to wherever they go."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import secrets
import sys
import time
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.terminal import command_parser, say
from npgpt.engine.backend import select
from npgpt.generation.generate import Token, generate_texts
from npgpt.storage.checkpoint import Checkpoint, load
from npgpt.text.dataset import decoded, read_text


def generate_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "generate",
        "Write text with a trained model. On a terminal, without a prompt, it asks for one, and for another after each\n"
        "answer, until end of file (Ctrl-D).",
        [
            'bin/generate --ckpt model.npz --prompt "HOB:" --temperature 0.7 --top-k 20',
            "bin/generate --ckpt model.npz --num-samples 3 --max-new-tokens 100 --stop HALE:",
        ],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue, - for standard input (default: a new line)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    parser.add_argument(
        "--unknown",
        choices=("error", "skip", "replace"),
        default="error",
        help="what to do with characters of the prompt the model has never seen; replace takes the closest one it has, "
        "the other case or the letter without its accent, or skips (default: error)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text when it is written; may be given several times",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a sample: its text, why it ended (stop or length), and all tokens drawn, those of a stop text "
        "too, with ids and the log-probabilities the model gave them, before temperature",
    )
    add_flags(parser, GenerateConfig)
    return parser


def generate(args: argparse.Namespace) -> int:
    settings = GenerateConfig(**settings_from(args, GenerateConfig))
    if settings.seed is None and args.json:  # so that what is written can be drawn again
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))
    if "" in args.stop:
        raise RequestError("--stop must be a text of at least one character, got an empty one")
    checkpoint = load(args.ckpt, select(settings.device))
    for stop in args.stop:
        if unknown := checkpoint.tokenizer.unknown(stop):
            raise RequestError(f"--stop {stop!r} could never come: the model does not know {', '.join(map(repr, unknown))}")
    if args.prompt_file is not None:
        prompt = read_text(args.prompt_file)
    elif args.prompt == "-":
        prompt = _from_stdin()
    elif args.prompt is None and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return _ask(checkpoint, settings, args)
    else:
        prompt = args.prompt or ""
    _write_samples(checkpoint, _known(checkpoint, prompt, args.unknown), settings, args)
    return 0


def _from_stdin() -> str:
    """Standard input, read as a text file is; it may be empty."""
    if sys.stdin is None:
        raise RequestError("--prompt - reads standard input, which is closed")
    raw = sys.stdin.buffer.read()
    return "".join(decoded([raw], "the prompt on standard input")) if raw else ""


def _known(checkpoint: Checkpoint, prompt: str, unknown: str) -> str:
    """The prompt as the model can take it. Raises RequestError for characters it does not know, unless told otherwise."""
    if unknown != "error":
        return checkpoint.tokenizer.without_unknown(prompt, replace=unknown == "replace")
    try:
        checkpoint.tokenizer.encode(prompt)
    except RequestError as error:
        raise RequestError(f"{error}; --unknown skip leaves such out, --unknown replace takes the closest") from None
    return prompt


def _write_samples(checkpoint: Checkpoint, prompt: str, settings: GenerateConfig, args: argparse.Namespace) -> None:
    """Write the samples to stdout, the first as it is drawn, the others after it; the speed to a terminal's stderr."""
    started, shown = time.perf_counter(), 0
    tokens: list[Token] = []
    texts = dict.fromkeys(range(settings.num_samples), "")
    done: set[int] = set()
    stopped: set[int] = set()
    live = not args.json
    if live:
        sys.stdout.write(prompt)
    for piece in generate_texts(checkpoint.model, checkpoint.tokenizer, prompt, settings, args.stop, tokens=tokens):
        texts[piece.sample] += piece.text
        done |= {piece.sample} if piece.done else set()
        stopped |= {piece.sample} if piece.stopped else set()
        if live and piece.sample == shown:
            sys.stdout.write(piece.text)
        while live and shown in done:  # it, and what has waited for it
            sys.stdout.write("\n")
            shown += 1
            if shown in texts:
                say("----------------")
                sys.stdout.write(prompt + texts[shown])
        sys.stdout.flush()
    if args.json:
        drawn: dict[int, list[Token]] = {k: [] for k in texts}
        for token in tokens:
            drawn[token.sample].append(token)
        for sample, text in texts.items():
            own = drawn[sample]
            ids = [token.id for token in own]
            row: dict[str, Any] = {"sample": sample, "seed": settings.seed, "prompt": prompt, "text": text}
            row["finish_reason"] = "stop" if sample in stopped else "length"
            row["tokens"] = [checkpoint.tokenizer.itos[i] for i in ids]
            row |= {"ids": ids, "logprobs": [round(token.logprob, 6) for token in own]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        say(f"{len(tokens):,} tokens, {len(tokens) / max(seconds, 1e-9):,.0f} a second")


def _ask(checkpoint: Checkpoint, settings: GenerateConfig, args: argparse.Namespace) -> int:
    """Ask for prompts and continue them, until end of file. Ctrl-C ends an answer."""
    with contextlib.suppress(ModuleNotFoundError):  # line editing and history, where Python has it (not on Windows)
        import readline  # noqa: F401
    say("a prompt, Enter; each is continued on its own; Ctrl-C ends an answer, Ctrl-D the session")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            say("")
            return 0
        except KeyboardInterrupt:
            say("")
            continue
        try:
            _write_samples(checkpoint, _known(checkpoint, prompt, args.unknown), settings, args)
        except RequestError as error:
            say(str(error))
        except KeyboardInterrupt:
            say("")
