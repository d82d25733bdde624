"""`npgpt evaluate`: the exact loss of a model on a text, and how similar its samples are to the training text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

from npgpt.config.settings import GenerateConfig
from npgpt.console.flags import add_unknown_flag
from npgpt.console.terminal import command_parser, failed, progress_bar
from npgpt.evaluation.judged_text import judged_text
from npgpt.evaluation.likeness import LARGEST_TEXT, NGRAM, Likeness, likeness
from npgpt.evaluation.loss import evaluate
from npgpt.generation.generate import generate_texts
from npgpt.storage.checkpoint import Checkpoint, load

ABOUT = "the exact loss of a model on a text"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "evaluate",
        "Print the exact loss of a model on a text. On the text it was trained on, also compare samples with that text:\n"
        "rates of characters, share of words that occur in it, longest copied span, share of new 8-grams.",
        ["--ckpt model.npz", "--ckpt model.npz another.txt --json"],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    parser.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="text files or folders, as for train (default: the held-out part of the text the model was trained on)",
    )
    add_unknown_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--sample-tokens",
        type=_at_least_0,
        default=2000,
        metavar="N",
        help="tokens to generate and compare with the training text; 0: none (default: 2000)",
    )
    return parser


def _at_least_0(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"sample_tokens must be a whole number at least 0, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt)
    text = judged_text(checkpoint, args.text, "name one after the flags", progress_bar, args.unknown)
    result = evaluate(checkpoint.model, text.ids, tokenizer=checkpoint.tokenizer)
    if not np.isfinite(result.loss):
        return failed("evaluate", f"the loss is {result.loss}: the model's weights or its results are not finite")
    like = None
    if text.trained_on is not None and args.sample_tokens:
        trained_on = checkpoint.tokenizer.decode(text.trained_on[:LARGEST_TEXT])
        like = likeness(_samples_of(checkpoint, args.sample_tokens), trained_on)
    numbers: dict[str, Any] = {"what": text.what, "characters": result.n_characters, "bytes": result.n_bytes}
    numbers |= {"tokens": result.n_targets, "loss": result.loss, "stderr": result.stderr, "perplexity": result.perplexity}
    numbers |= {"bits_per_character": result.bits_per_character, "bits_per_byte": result.bits_per_byte}
    if args.json:
        print(json.dumps(numbers | {"likeness": like and dataclasses.asdict(like)}, ensure_ascii=False))
        return 0
    plus_minus = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    is_characters = checkpoint.tokenizer.is_characters
    token, tokens = ("character", "") if is_characters else ("token", f" in {result.n_targets:,} tokens")
    bits = "" if result.bits_per_character is None else f", {result.bits_per_character:.4f} bits per character"
    per_byte = "" if is_characters or result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    print(f"{text.what}: {result.n_characters:,} characters predicted{tokens}")
    print(f"loss {result.loss:.4f}{plus_minus} nats per {token}")
    print(f"perplexity {result.perplexity:.3f}{bits}{per_byte}")
    if like:
        _print_likeness(like)
    return 0


def _samples_of(checkpoint: Checkpoint, tokens: int) -> list[str]:
    """Sixteen samples at temperature 0.8, generated side by side. They are the same in every call."""
    n = min(16, tokens)
    window = None if checkpoint.config.position == "rotary" else "half"
    settings = GenerateConfig(max_new_tokens=tokens // n, seed=0, num_samples=n, window=window)
    texts = dict.fromkeys(range(n), "")
    for piece in generate_texts(checkpoint.model, checkpoint.tokenizer, "", settings):
        texts[piece.sample] += piece.text
    return list(texts.values())


def _print_likeness(like: Likeness) -> None:
    print(f"{like.characters:,} sampled characters (temperature 0.8) against the {like.of:,} of the training text:")
    for kind, (ours, theirs) in like.rates.items():
        print(f"  {kind:13} {100 * ours:5.1f} %, in the training text {100 * theirs:5.1f} %")
    if like.known_words is not None:
        print(f"  {100 * like.known_words:.0f} % of the words occur in the training text")
    if like.new_ngrams is not None:
        print(f"  {100 * like.new_ngrams:.0f} % of the spans of {NGRAM} characters do not occur in it")
    print(f"  the longest span copied has {len(like.longest_copy)} characters: {like.longest_copy[:60]!r}")
