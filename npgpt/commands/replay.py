"""`npgpt replay`: repeat the step at which a run diverged, and name the operation that went wrong."""

from __future__ import annotations

import argparse

from npgpt.config.fields import RequestError
from npgpt.console.terminal import command_parser
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.storage.checkpoint import load

ABOUT = "repeat the step at which a run diverged"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "replay",
        "Repeat the step at which a training run found a number that is not finite, and name the operation that gave it.",
        ["model.crash.npz"],
    )
    parser.add_argument("ckpt", metavar="FILE", help="the crash file that the run has written")
    return parser


def run(args: argparse.Namespace) -> int:
    crash = load(args.ckpt)
    if crash.crash is None or crash.batch is None or crash.train_config is None:
        raise RequestError(f"{args.ckpt} is not a crash file but an ordinary checkpoint; train writes a NAME.crash.npz")
    config = crash.train_config
    with Workers(1) as workers:
        step = ParallelStep(crash.model, workers, config.micro_batch)
        loss = step(*crash.batch, config.seed, crash.step)
        found = step.diagnose(*crash.batch, config.seed, crash.step)
    if config.bf16 or config.tf32:
        print("the run computed in lower precision (bf16 or tf32); this is the same step in float32")
    print(f"step {crash.step + 1}, loss {loss}: {found}")
    if found != crash.crash:
        print(f"the run itself had found: {crash.crash}")
    return 0
