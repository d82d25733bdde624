"""`npgpt generate`: read prompts, write samples. How text is generated is in generation/."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
import select as select_module
import stat
import sys
import time
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.prompts import add_prompt_flags, from_stdin, given_prompt, known, typed
from npgpt.console.terminal import command_parser, say, visible
from npgpt.engine.backend import select
from npgpt.generation.decode import window_for
from npgpt.generation.generate import generate_texts
from npgpt.generation.side_by_side import Token
from npgpt.storage.checkpoint import Checkpoint, load

ABOUT = "write text with a trained model"

SLOW = 5e10  # operations that take about a second on one core


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "generate",
        "Write text with a trained model. On a terminal and without a prompt, the command asks for one prompt after\n"
        "another, until end of file (Ctrl-D).",
        [
            '--ckpt model.npz --prompt "HOB:" --temperature 0.7 --top-k 20',
            "--ckpt model.npz --num-samples 3 --max-new-tokens 100 --stop HALE:",
        ],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    add_prompt_flags(parser, "the text to continue", "a line break, or the token that ends a text, if there is one")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sample before this text; may be given several times",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object for each sample: its text, why it ended (stop or length), and all its tokens, including "
        "those of a stop text, with ids and log-probabilities before temperature",
    )
    add_flags(parser, GenerateConfig)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = GenerateConfig(**settings_from(args, GenerateConfig))
    if settings.seed is None and args.json:  # the output names the seed, so that the same text can be generated again
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))
    stops = [typed(text, args.escape) for text in args.stop]
    if "" in stops:
        raise RequestError("--stop must be a text of at least one character, got an empty one")
    checkpoint = load(args.ckpt, select(settings.device))
    for stop in stops:
        if unknown := checkpoint.tokenizer.unknown(stop):
            raise RequestError(f"--stop {stop!r} can never occur: the model does not know {', '.join(map(repr, unknown))}")
    prompt = given_prompt(args)
    if prompt is None and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not args.json:
        return _converse(checkpoint, settings, args, stops)
    if prompt is None:
        prompt = _piped()
    _write_samples(checkpoint, known(checkpoint.tokenizer, prompt, args.unknown), settings, args, stops)
    return 0


def _piped() -> str:
    """The text that another program pipes in, or that a file is redirected from; else an empty one.

    A pipe without any text may stay open for ever, so it is not waited for: it may have nothing to do with this command.
    """
    if sys.stdin is None or sys.platform == "win32":  # where a pipe cannot be asked whether it has text
        return ""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except OSError:  # not a file of the system
        return ""
    if stat.S_ISREG(kind) or (stat.S_ISFIFO(kind) and select_module.select([sys.stdin], [], [], 0)[0]):
        return from_stdin()
    if stat.S_ISFIFO(kind):
        say("standard input has no text yet and is not waited for; --prompt - waits for it")
    return ""


def _write_samples(
    checkpoint: Checkpoint, prompt: str, settings: GenerateConfig, args: argparse.Namespace, stops: list[str]
) -> None:
    """Write the samples to stdout, in order. The first unfinished sample is written while it is generated.

    On a terminal, control characters are made visible. Files and pipes get the text as it is.
    """
    shown_as = visible if sys.stdout.isatty() else str
    _warn_if_slow(checkpoint, prompt, settings)
    started, shown = time.perf_counter(), 0
    tokens: list[Token] = []
    texts = dict.fromkeys(range(settings.num_samples), "")
    done: set[int] = set()
    stopped: set[int] = set()
    live = not args.json
    pieces = generate_texts(checkpoint.model, checkpoint.tokenizer, prompt, settings, stops, tokens=tokens)
    if live:
        sys.stdout.write(shown_as(prompt))
    for piece in pieces:
        texts[piece.sample] += piece.text
        done |= {piece.sample} if piece.done else set()
        stopped |= {piece.sample} if piece.stopped else set()
        if live and piece.sample == shown:
            sys.stdout.write(shown_as(piece.text))
        while live and shown in done:  # then the next sample is shown, and perhaps it is done already
            sys.stdout.write("\n")
            shown += 1
            if shown in texts:
                sys.stdout.flush()  # the two may go to one file
                say("----------------")
                sys.stdout.write(shown_as(prompt + texts[shown]))
        sys.stdout.flush()
    if args.json:
        tokens_of: dict[int, list[Token]] = {k: [] for k in texts}
        for token in tokens:
            tokens_of[token.sample].append(token)
        for sample, text in texts.items():
            own = tokens_of[sample]
            ids = [token.id for token in own]
            row: dict[str, Any] = {"sample": sample, "seed": settings.seed, "prompt": prompt, "text": text}
            row["finish_reason"] = "stop" if sample in stopped else "length"
            row["tokens"] = [checkpoint.tokenizer.decode([i]) for i in ids]
            row |= {"ids": ids, "logprobs": [round(token.logprob, 6) for token in own]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        say(f"{len(tokens):,} tokens, {len(tokens) / max(seconds, 1e-9):,.0f} a second")


def _warn_if_slow(checkpoint: Checkpoint, prompt: str, settings: GenerateConfig) -> None:
    """Past its context, a large model with learned positions takes seconds for a token."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    operations = 2 * config.num_parameters() * config.block_size  # of one token past the context
    if window_for(checkpoint.model, settings.window) != "exact" or operations < SLOW:
        return
    length = len(tokenizer.encode(prompt)) if prompt else len(tokenizer.start_ids)
    if length + settings.max_new_tokens > config.block_size:
        say(
            f"warning: past {config.block_size} tokens, each token needs the whole context again, which is slow; --window half "
            "is much faster"
        )


def _converse(checkpoint: Checkpoint, settings: GenerateConfig, args: argparse.Namespace, stops: list[str]) -> int:
    """Ask for prompts and continue them, until end of file. Ctrl-C ends an answer."""
    with contextlib.suppress(ModuleNotFoundError):  # gives input() line editing and history; Windows does not have it
        import readline  # noqa: F401
    say("Type a prompt and press Enter. Each prompt is continued on its own. Ctrl-C ends an answer, Ctrl-D the session.")
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
            prompt = known(checkpoint.tokenizer, typed(prompt, args.escape), args.unknown)
            _write_samples(checkpoint, prompt, settings, args, stops)
        except RequestError as error:
            say(str(error))
        except KeyboardInterrupt:
            say("")
