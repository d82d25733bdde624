"""`npgpt inspect`: print what a checkpoint holds."""

from __future__ import annotations

import argparse

import numpy as np

from npgpt.console.terminal import command_parser
from npgpt.storage.checkpoint import load
from npgpt.text.characters import CharTokenizer

ABOUT = "what a checkpoint holds"


def parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", "Print what a checkpoint holds.", ["model.npz", "--arrays model.npz"])
    parser.add_argument("ckpt", metavar="FILE", help="a checkpoint written by train")
    parser.add_argument("--arrays", action="store_true", help="also list every array")
    return parser


def run(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt, with_optimizer=True)
    progress = checkpoint.progress
    print(f"{args.ckpt}: {checkpoint.model.num_parameters():,} parameters, step {checkpoint.step}")
    verified = "the SHA-256 of every array verified" if checkpoint.format > 1 else "which has no hashes to verify"
    print(f"file        format {checkpoint.format}, {verified}")
    if checkpoint.crash is not None:
        print(f"crash       {checkpoint.crash} (npgpt replay repeats the step)")
    print("model       " + ", ".join(f"{k} {v}" for k, v in vars(checkpoint.config).items()))
    if checkpoint.train_config:
        print("training    " + ", ".join(f"{k} {v}" for k, v in vars(checkpoint.train_config).items()))
    tokenizer = checkpoint.tokenizer
    described = (
        repr(tokenizer.characters) if isinstance(tokenizer, CharTokenizer) else f"{tokenizer.vocab_size:,} tokens of a BPE"
    )
    print(f"vocabulary  {described}")
    for name, text in (("text", checkpoint.text), ("held out", checkpoint.val_text)):
        if text:
            length = "" if text.n_characters is None else f"{text.n_characters:,} characters, "
            of_ids = " of the ids" if tokenizer.is_characters else ""
            print(f"{name:10}  {f'{text}: ' if text.sources else ''}{length}SHA-256{of_ids} {text.sha256}")
    if checkpoint.machine:
        print("machine     " + ", ".join(f"{k} {v}" for k, v in checkpoint.machine.items()))
    for step, train_loss, val_loss, _ in progress.history:
        best = " (best)" if step == progress.best_step else ""
        val = "" if val_loss is None else f", val loss {val_loss:.4f}{best}"
        print(f"step {step:6}  train loss {train_loss:.4f}{val}")
    if args.arrays:
        for name, array in checkpoint.model.state_dict().items():
            with np.errstate(over="ignore", invalid="ignore"):  # a crash file may hold numbers that are not finite
                numbers = f"mean {array.mean():+.4f}  std {array.std():.4f}"
            print(f"{name:28} {array.shape!s:14} {array.dtype}  {numbers}")
    return 0
