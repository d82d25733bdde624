"""`npgpt report`: write a page about one run or several. What is on it is in report/."""

from __future__ import annotations

import argparse
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.console.extras import check_installed
from npgpt.console.flags import file_to_write
from npgpt.console.terminal import command_parser, file_size, progress_bar, say
from npgpt.report.copies import copies_of
from npgpt.report.page import save_page
from npgpt.report.run_page import report_page
from npgpt.report.runs import Run, short_names
from npgpt.storage.checkpoint import load
from npgpt.storage.run import log_path, read_log

ABOUT = "a page with the curves, samples and settings of runs"


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
    check_installed("matplotlib")
    out = file_to_write(args.out, ".html")
    paths = [Path(name) for name in args.ckpt]
    if len(set(paths)) < len(paths):
        raise RequestError("a checkpoint is named twice")
    names = short_names(paths)
    runs = [Run(name, load(path), read_log(log_path(path)), str(path)) for name, path in zip(names, paths, strict=True)]
    page = report_page(runs, [copies_of(run, progress_bar) for run in runs])
    say(f"{out}: {file_size(save_page(out, page))}; open it in a browser")
    return 0
