"""`npgpt evaluate` and `npgpt compare`: what was learned, and what made a difference."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.console.terminal import command_parser, duration, failed, progress_bar, say
from npgpt.evaluation.likeness import LARGEST_TEXT, NGRAM, Likeness, likeness
from npgpt.evaluation.loss import compare, evaluate
from npgpt.generation.generate import generate_texts
from npgpt.parallel.workers import Workers
from npgpt.storage.checkpoint import Checkpoint, load
from npgpt.text.dataset import fingerprint, read_ids, split
from npgpt.training.trainer import log_path, read_log

# ---------------------------------------------------------------- evaluate


def evaluate_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "evaluate",
        "The exact loss of a model on a text; and, on the text it was trained on, how like that text what it writes is:\n"
        "rates of characters, share of words that occur in it, longest span copied from it, share of new 8-grams.",
        ["bin/evaluate --ckpt model.npz", "bin/evaluate --ckpt model.npz another.txt --json"],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    parser.add_argument(
        "text",
        nargs="?",
        metavar="TEXT",
        help="a text file (default: the one the model was trained on, of which only the held-out part counts)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines for people")
    parser.add_argument(
        "--sample-tokens",
        type=_at_least_0,
        default=2000,
        metavar="N",
        help="characters to sample for comparing with the training text; 0: none (default: 2000)",
    )
    return parser


def _at_least_0(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"sample_tokens must be a whole number at least 0, got {text!r}")
    return int(text)


def evaluate_command(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt)
    path, ids, held_out = _text_of(checkpoint, args.text, "name one after the flags")
    if held_out is None:
        what, scored = f"all of {path}", ids
    elif len(held_out):
        what, scored = f"the held-out part of {path}", held_out
    else:
        what, scored = f"all of {path}, every character of which the model was trained on", ids
    result = evaluate(checkpoint.model, scored)
    if not np.isfinite(result.loss):
        return failed("evaluate", f"the loss is {result.loss}: the model's weights or what it computes are not finite numbers")
    like = None
    if held_out is not None and args.sample_tokens:
        trained_on = checkpoint.tokenizer.decode(ids[: min(len(ids) - len(held_out), LARGEST_TEXT)])
        like = likeness(_samples_of(checkpoint, args.sample_tokens), trained_on)
    numbers = {"what": what, "characters": result.n_targets, "loss": result.loss, "stderr": result.stderr}
    numbers |= {"perplexity": result.perplexity, "bits_per_character": result.bits_per_token}
    if args.json:
        print(json.dumps(numbers | {"likeness": like and dataclasses.asdict(like)}, ensure_ascii=False))
        return 0
    plus_minus = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    print(f"{what}: {result.n_targets:,} characters predicted")
    print(f"loss {result.loss:.4f}{plus_minus} nats per character")
    print(f"perplexity {result.perplexity:.3f}, {result.bits_per_token:.4f} bits per character")
    if like:
        _print_likeness(like)
    return 0


def _text_of(checkpoint: Checkpoint, asked: str | None, hint: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(where it is, the ids of the text to judge a model on, the held-out ones of them when it was trained on it)."""
    path, trained = asked or checkpoint.source, checkpoint.train_config
    if path is None or (asked is None and trained is None):
        raise RequestError(f"this checkpoint does not say what text it was trained on; {hint}")
    if asked is None and not Path(path).is_file():
        raise RequestError(f"the text it was trained on, {path}, is not here; {hint}")
    _, ids = read_ids(path, checkpoint.tokenizer, progress_bar)
    held_out = None
    if trained is not None and fingerprint(ids) == checkpoint.fingerprint:
        held_out = split(ids, trained.val_fraction)[1]
    if asked is None and held_out is None:
        raise RequestError(f"{path} is no longer the text this model was trained on; {hint} to judge it on another")
    return path, ids, held_out


def _samples_of(checkpoint: Checkpoint, tokens: int) -> list[str]:
    """Texts from the model, sixteen side by side, at temperature 0.8, the same every time."""
    n = min(16, tokens)
    settings = GenerateConfig(max_new_tokens=tokens // n, seed=0, num_samples=n, window="half")
    texts = dict.fromkeys(range(n), "")
    for piece in generate_texts(checkpoint.model, checkpoint.tokenizer, "", settings):
        texts[piece.sample] += piece.text
    return list(texts.values())


def _print_likeness(like: Likeness) -> None:
    print(f"{like.characters:,} sampled characters (temperature 0.8) against the {like.of:,} of the training text:")
    for kind, (ours, theirs) in like.rates.items():
        print(f"  {kind:13} {100 * ours:5.1f} %, there {100 * theirs:5.1f} %")
    if like.known_words is not None:
        print(f"  {100 * like.known_words:.0f} % of the words occur there")
    if like.new_ngrams is not None:
        print(f"  {100 * like.new_ngrams:.0f} % of the spans of {NGRAM} characters do not")
    print(f"  the longest span copied has {len(like.longest_copy)} characters: {like.longest_copy[:60]!r}")


# ---------------------------------------------------------------- compare


def compare_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compare",
        "What differs between runs, and whether it matters: settings, parameters, time, and the difference of their\n"
        "losses on the same held-out text. For changing one thing at a time. The standard error says how much another\n"
        "text of this kind could change the difference; another seed can change it more, so repeat what is close.",
        ["bin/compare a.npz b.npz", "bin/compare small.npz large.npz --text another.txt"],
    )
    parser.add_argument(
        "ckpt", nargs="+", metavar="FILE", help="checkpoints written by train; the first is what others are held against"
    )
    parser.add_argument("--text", metavar="TEXT", help="the text to judge on (default: the held-out part of the first one's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a checkpoint")
    return parser


def compare_command(args: argparse.Namespace) -> int:
    if len(args.ckpt) < 2:
        raise RequestError(f"expected two checkpoints or more to compare, got {len(args.ckpt)}")
    runs = {name: load(name) for name in args.ckpt}
    if len(runs) < len(args.ckpt):
        raise RequestError("a checkpoint is named twice")
    first = runs[args.ckpt[0]]
    try:
        path, ids, held_out = _text_of(first, args.text, "name one with --text")
    except RequestError as error:
        raise RequestError(f"{args.ckpt[0]}: {error}") from None
    judged = ids if held_out is None or not len(held_out) else held_out
    text = first.tokenizer.decode(judged)
    settings = {
        name: vars(run.config) | (vars(run.train_config) if run.train_config else {}) | {"text": run.source}
        for name, run in runs.items()
    }
    differing = [
        key for key in settings[args.ckpt[0]] if key != "processes" and len({repr(s.get(key)) for s in settings.values()}) > 1
    ]
    judged_by = [(run.model, _ids_of(name, run, text)) for name, run in runs.items()]
    with Workers() as workers:
        results = compare(judged_by, workers)
    for name, (loss, _) in zip(runs, results, strict=True):
        if not np.isfinite(loss.loss):
            return failed(
                "compare", f"the loss of {name} is {loss.loss}: its weights, or what it computes, are not finite numbers"
            )
    rows = []
    for (name, run), (loss, against) in zip(runs.items(), results, strict=True):
        row = {"checkpoint": name, "step": run.step, "parameters": run.config.num_parameters()}
        row |= {"seconds": _seconds_of(Path(name)), "loss": loss.loss, "stderr": loss.stderr}
        row |= {"difference": against and against.difference, "difference_stderr": against and against.stderr}
        rows.append(row | {"settings": {key: settings[name].get(key) for key in differing}})
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    for name, run in runs.items():
        if run.fingerprint != first.fingerprint:
            say(f"warning: {name} was trained on another text than {args.ckpt[0]}")
        elif held_out is not None and run.train_config and run.train_config.val_fraction < _held_out_fraction(first):
            say(f"warning: {name} was trained on a part of what is held out here; put it first")
    part = "the held-out part" if held_out is not None and len(held_out) else "all"
    print(f"on {part} of {path}, {len(judged) - 1:,} characters predicted")
    width = max(map(len, args.ckpt))
    for row in rows:
        seconds = "" if row["seconds"] is None else f", {duration(row['seconds'])}"
        print(f"{row['checkpoint']:{width}}  loss {row['loss']:.4f}{_verdict(row)}")
        print(f"{'':{width}}  step {row['step']}, {row['parameters']:,} parameters{seconds}")
        if differing:
            print(f"{'':{width}}  " + ", ".join(f"{key} {value}" for key, value in row["settings"].items()))
    return 0


def _ids_of(name: str, run: Checkpoint, text: str) -> np.ndarray:
    try:
        return run.tokenizer.encode_array(text)
    except RequestError as error:
        raise RequestError(f"{name} cannot be judged on this text: {error}") from None


def _held_out_fraction(run: Checkpoint) -> float:
    return run.train_config.val_fraction if run.train_config else 0.0


def _verdict(row: dict[str, Any]) -> str:
    """How a loss differs from the first one's."""
    difference, stderr = row["difference"], row["difference_stderr"]
    if difference is None:
        return ""
    if stderr is None:
        return f", {difference:+.4f}"
    clear = "no clear difference" if abs(difference) <= 2 * stderr else "better" if difference < 0 else "worse"
    return f", {difference:+.4f} ± {stderr:.4f}: {clear}"


def _seconds_of(path: Path) -> float | None:
    """How long a run has taken, from its log; None when that is not there or does not say."""
    parts = [0.0]
    for event in read_log(log_path(path)):
        if event["event"] in ("start", "resume"):
            parts.append(0.0)
        parts[-1] = event.get("elapsed", parts[-1])
    return sum(parts) or None
