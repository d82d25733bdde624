"""`npgpt inside`: write a page about how a model reads one text. What is on it is in report/."""

from __future__ import annotations

import argparse
from pathlib import Path

from npgpt.console.flags import file_to_write
from npgpt.console.prompts import add_prompt_flags, given_prompt, known
from npgpt.console.terminal import command_parser, file_size, say
from npgpt.report.inside_page import inside_page
from npgpt.report.page import save_page
from npgpt.storage.checkpoint import load

ABOUT = "a page with the inside of a model: surprisal, attention, what each block would have said"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "inside",
        "Write a page about how a model reads one text: how much each token surprised it, the likeliest next tokens, the\n"
        "attention of every head, and what each block would have said. The page is one HTML file, which needs no network. In\n"
        "Python, npgpt.inside(model, ids) returns the numbers.",
        ['model.npz --prompt "HOB:\\nThe bell rang"'],
    )
    parser.add_argument("ckpt", metavar="FILE", help="a checkpoint written by train")
    add_prompt_flags(parser, "the text to read", "a line break, or the token that ends a text, if there is one")
    parser.add_argument("--out", default="inside.html", metavar="FILE", help="the page to write (default: inside.html)")
    return parser


def run(args: argparse.Namespace) -> int:
    out = file_to_write(args.out, ".html")
    checkpoint = load(args.ckpt)
    prompt = known(checkpoint.tokenizer, given_prompt(args) or "", args.unknown)
    page = inside_page(Path(args.ckpt).name, checkpoint.model, checkpoint.tokenizer, prompt)
    say(f"{out}: {file_size(save_page(out, page))}; open it in a browser")
    return 0
