"""Which flags of `npgpt train` go together, and which of them several ranks can have."""

from __future__ import annotations

import argparse
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.config.settings import TrainConfig
from npgpt.console.flags import settings_from
from npgpt.parallel.ranks import Ranks
from npgpt.text.sources import STDIN
from npgpt.training.checks import check_ranks


def check_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other. `--resume my.txt` becomes DATA."""
    flags = {"--resume": args.resume is not None, "--preset": args.preset is not None, "--steps": hasattr(args, "steps")}
    for flag, is_given in flags.items():
        if args.minutes and is_given:
            raise RequestError(f"--minutes chooses the run itself; give --minutes or {flag}, not both")
    if args.base is not None:
        for flag, is_given in {
            "--resume": args.resume is not None,
            "--preset": args.preset,
            "--tokenizer": args.tokenizer,
            "--vocab-size": args.bpe_size,
        }.items():
            if is_given:
                raise RequestError(f"--from brings a model and its tokenizer; give --from or {flag}, not both")
    elif args.add_characters:
        raise RequestError("--add-characters is for --from; a new model knows all characters of its text")
    if args.resume is not None and (args.tokenizer or args.bpe_size):
        raise RequestError("a resumed run keeps its tokenizer; leave out --tokenizer and --vocab-size, or start a new run")
    if args.resume and not args.text and Path(args.resume).suffix != ".npz":  # `--resume my.txt` means DATA
        args.text, args.resume = [args.resume], ""
    if not args.text and args.resume is None:
        raise RequestError("expected DATA, a text file to train on; data/tiny.txt is one")
    if args.val_text is not None and settings_from(args, TrainConfig).get("val_fraction"):
        raise RequestError("give --val-text or --val-fraction, not both")


def check_flags_of_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """Raise RequestError if the ranks have different flags, or flags that are for one rank. Paths of texts may differ."""
    equal = {name: value for name, value in vars(args).items() if name not in ("text", "val_text")}
    check_ranks(ranks, {f"--{name.replace('_', '-')}": value for name, value in equal.items()})
    if ranks.size == 1:
        return
    if args.minutes:
        raise RequestError("--minutes times one process alone; with several ranks, choose --steps")
    if STDIN in [*args.text, args.val_text] and not args.text_from_rank_0:
        raise RequestError("with several ranks, - needs --text-from-rank-0; a file is better: mpiexec may end at a long input")
