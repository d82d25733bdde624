"""`npgpt report`: write a page about one run or several. What is on it is in report/."""

from __future__ import annotations

import argparse
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.console.flags import file_to_write
from npgpt.console.terminal import command_parser, progress_bar, say
from npgpt.evaluation.judged_text import judged_text
from npgpt.evaluation.likeness import LARGEST_TEXT, copied_spans, likeness
from npgpt.report.curves import import_matplotlib
from npgpt.report.run_page import Copies, report_page
from npgpt.report.runs import Run, short_names
from npgpt.storage.checkpoint import load
from npgpt.storage.files import atomic_write
from npgpt.storage.run import log_path, read_log

ABOUT = "a page with the curves, samples and settings of runs"
SAMPLES = 5  # the newest samples of a run, which are compared with its training text
SHORTEST_COPY = 16  # characters; shorter spans are common phrases


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "report",
        "Write a page about a run, or about several side by side: losses over steps and over time, learning rate, gradient\n"
        "norm, speed, samples as they grew, settings and what differs, advice, and what is copied from the training text. The\n"
        "page is one HTML file, which needs no network. The curves need the extra [plot].",
        ["model.npz", "model.npz another.npz --out both.html"],
    )
    parser.add_argument("ckpt", nargs="+", metavar="FILE", help="checkpoints written by train; their logs are beside them")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page to write (default: report.html)")
    return parser


def run(args: argparse.Namespace) -> int:
    import_matplotlib()
    out = file_to_write(args.out, ".html")
    paths = [Path(name) for name in args.ckpt]
    if len(set(paths)) < len(paths):
        raise RequestError("a checkpoint is named twice")
    runs = [Run(name, load(path), read_log(log_path(path))) for name, path in zip(short_names(paths), paths, strict=True)]
    page = report_page(runs, [copies_of(run) for run in runs])
    with atomic_write(out, lambda _: None) as file:
        file.write(page.encode())
    say(f"{out}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
    return 0


def copies_of(run: Run) -> Copies | str:
    """How the newest samples of a run resemble its training text, or why that is not known."""
    evaluations = run.evaluations
    at = [i for i, sample in enumerate(evaluations.samples) if sample][-SAMPLES:]
    if not at:
        return "The log has no samples to compare with the training text."
    record = run.checkpoint.text
    if record and record.n_characters and record.n_characters > LARGEST_TEXT:
        return (
            f"The training text has more than {LARGEST_TEXT:,} characters; `evaluate` compares new samples with its beginning."
        )
    try:
        text = judged_text(run.checkpoint, [], "`evaluate` can judge the model on another text", progress_bar)
    except RequestError as error:
        return f"Nothing is known of this: {error}."
    if text.trained_on is None:
        return "The run's training text is not known."
    training = run.checkpoint.tokenizer.decode(text.trained_on)
    samples = [evaluations.samples[i] for i in at]
    spans = [copied_spans(sample, training, SHORTEST_COPY) for sample in samples]
    steps = [float(evaluations.step[i]) for i in at]
    return Copies(likeness(samples, training), list(zip(steps, samples, strict=True)), spans, SHORTEST_COPY)
