"""`npgpt compare`: what differs between runs, and whether it matters."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.console.terminal import command_parser, duration, failed, progress_bar, say
from npgpt.evaluation.comparison import compare
from npgpt.evaluation.judged_text import judged_text
from npgpt.parallel.workers import Workers
from npgpt.storage.checkpoint import Checkpoint, load
from npgpt.storage.run import log_path, read_log, seconds_of

ABOUT = "what differs between runs, and whether it matters"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compare",
        "Print what differs between runs, and whether it matters: settings, parameters, time, and the difference of their\n"
        "losses on the same held-out text. Use it to change one thing at a time. The standard error says how much another\n"
        "text of this kind could change the difference. Another seed can change it more, so repeat runs that are close.",
        ["a.npz b.npz", "small.npz large.npz --text another.txt"],
    )
    parser.add_argument(
        "ckpt", nargs="+", metavar="FILE", help="checkpoints written by train; the others are compared with the first"
    )
    parser.add_argument(
        "--text", metavar="TEXT", help="the text to judge on (default: the held-out part of the first checkpoint's text)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    if len(args.ckpt) < 2:
        raise RequestError(f"expected two checkpoints or more to compare, got {len(args.ckpt)}")
    runs = {name: load(name) for name in args.ckpt}
    if len(runs) < len(args.ckpt):
        raise RequestError("a checkpoint is named twice")
    first = runs[args.ckpt[0]]
    try:
        judged = judged_text(first, [args.text] if args.text else [], "name one with --text", progress_bar)
    except RequestError as error:
        raise RequestError(f"{args.ckpt[0]}: {error}") from None
    text = first.tokenizer.decode(judged.ids)
    with Workers() as workers:
        tokenizers = [run.tokenizer for run in runs.values()]
        per_character = all(tokenizer.is_characters for tokenizer in tokenizers)
        encoded = [(run.model, _ids_of(name, run, text)) for name, run in runs.items()]
        results = compare(encoded, workers, None if per_character else tokenizers)
    differing = _differing_settings(runs)
    rows = []
    for (name, run), (loss, difference) in zip(runs.items(), results, strict=True):
        if not np.isfinite(loss.loss):
            return failed("compare", f"the loss of {name} is {loss.loss}: its weights or its results are not finite")
        row = {"checkpoint": name, "step": run.step, "parameters": run.config.num_parameters()}
        row |= {"seconds": _seconds_of(Path(name)), "per": "character" if per_character else "byte"}
        row |= {"loss": loss.loss, "stderr": loss.stderr}
        row |= {"difference": difference and difference.difference, "difference_stderr": difference and difference.stderr}
        bits, bytes_per_character = loss.loss / math.log(2), len(text.encode()) / len(text)
        row |= {"bits_per_character": bits if per_character else bits * bytes_per_character}
        row |= {"bits_per_byte": bits / bytes_per_character if per_character else bits}
        rows.append(row | {"settings": differing[name]})
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    _warn_about_texts(runs, first, args.ckpt[0], judged.is_held_out)
    print(f"on {judged.what}, {results[0][0].n_targets:,} {'characters' if per_character else 'bytes'} predicted")
    _print_rows(rows)
    return 0


def _differing_settings(runs: dict[str, Checkpoint]) -> dict[str, dict[str, Any]]:
    """For each run, the settings in which the runs differ."""
    settings = {
        name: vars(run.config) | (vars(run.train_config) if run.train_config else {}) | _texts_of(run)
        for name, run in runs.items()
    }
    all_keys = dict.fromkeys(key for own in settings.values() for key in own if key != "processes")
    # An imported model has no settings of a run.
    differing = [key for key in all_keys if len({repr(own[key]) for own in settings.values() if key in own}) > 1]
    return {name: {key: own[key] for key in differing if key in own} for name, own in settings.items()}


def _texts_of(run: Checkpoint) -> dict[str, str | None]:
    of_run = {"text": str(run.text)} if run.text else {}
    return of_run | {"held-out text": str(run.val_text) if run.val_text else None}


def _warn_about_texts(runs: dict[str, Checkpoint], first: Checkpoint, first_name: str, on_held_out: bool) -> None:
    def held_out_fraction(run: Checkpoint) -> float:
        return run.train_config.val_fraction if run.train_config else 0.0

    for name, run in runs.items():
        if run.text is None:
            say(f"warning: it is not known which text {name} was trained on")
        elif not _same_text(run, first):
            say(f"warning: {name} was trained on another text than {first_name}")
        elif on_held_out and run.train_config and held_out_fraction(run) < held_out_fraction(first):
            say(
                f"warning: {name} was trained on a part of this held-out text; name it first, and its own held-out part is used"
            )


def _same_text(run: Checkpoint, other: Checkpoint) -> bool:
    """Whether two runs had the same text. The fingerprints of different kinds of tokenizers cannot be compared."""
    if run.text is None or other.text is None:
        return run.text is other.text
    if run.tokenizer.is_characters == other.tokenizer.is_characters:
        return run.text.sha256 == other.text.sha256
    return (run.text.sources, run.text.n_characters) == (other.text.sources, other.text.n_characters)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["checkpoint"]) for row in rows)
    for row in rows:
        seconds = "" if row["seconds"] is None else f", {duration(row['seconds'])}"
        bits = f" per byte, {row['bits_per_byte']:.4f} bits per byte, {row['bits_per_character']:.4f} bits per character"
        print(f"{row['checkpoint']:{width}}  loss {row['loss']:.4f}{bits if row['per'] == 'byte' else ''}{_verdict(row)}")
        print(f"{'':{width}}  step {row['step']}, {row['parameters']:,} parameters{seconds}")
        if row["settings"]:
            print(f"{'':{width}}  " + ", ".join(f"{key} {value}" for key, value in row["settings"].items()))


def _ids_of(name: str, run: Checkpoint, text: str) -> np.ndarray:
    try:
        return run.tokenizer.encode_array(text)
    except RequestError as error:
        raise RequestError(f"{name} cannot be judged on this text: {error}") from None


def _verdict(row: dict[str, Any]) -> str:
    """How the loss of a run differs from that of the first run."""
    difference, stderr = row["difference"], row["difference_stderr"]
    if difference is None:
        return ""
    if stderr is None:
        return f", {difference:+.4f}"
    clear = "no clear difference" if abs(difference) <= 2 * stderr else "better" if difference < 0 else "worse"
    return f", {difference:+.4f} ± {stderr:.4f}: {clear}"


def _seconds_of(path: Path) -> float | None:
    """How long a run has taken, from its log; None if there is no log, or the log does not say."""
    return max(seconds_of(read_log(log_path(path))), default=0.0) or None
