"""`npgpt train`: from a command line to a Trainer, and what it shows on the way."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import PRESETS, GPTConfig, TrainConfig
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.terminal import command_parser, duration, failed, progress_bar, say
from npgpt.engine.backend import select
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import available_cores, describe_blas
from npgpt.storage.checkpoint import Checkpoint, CheckpointError, load
from npgpt.storage.files import lock
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset, read_ids
from npgpt.training.memory import check_memory, memory_advice
from npgpt.training.plan import plan
from npgpt.training.trainer import (
    End,
    Evaluation,
    Outcome,
    Step,
    Trainer,
    crash_path,
    files_of,
    last_path,
    lock_path,
    log_path,
)


def train_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Train a GPT on the characters of a text file.",
        ["bin/train data/tiny.txt --steps 500", "bin/train mytext.txt --out mine.npz --n-embd 128 --dropout 0.2"],
    )
    parser.add_argument("text", metavar="DATA", help="a UTF-8 text file")
    parser.add_argument("--out", default="model.npz", metavar="FILE", help="the checkpoint to write (default: model.npz)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="continue a run: from its last state (the .last.npz beside --out), or from FILE",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="a whole configuration, which other flags change: quick (readable text in half a minute), nano and char "
        "(nanoGPT's for a CPU and for a GPU)",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="X",
        help="choose model, batch, learning rate and steps for a run of about X minutes in all (half a minute or more) that "
        "learns the most in them; settings given beside it are kept; not with --steps, --preset or --resume",
    )
    add_flags(parser, TrainConfig)
    add_flags(parser, GPTConfig, skip=("vocab_size",))
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 100_000:
        raise argparse.ArgumentTypeError(f"minutes must be a number above 0 and at most 100000, got {text!r}")
    return minutes


def train(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    out = _checkpoint_path(args.out)
    for flag, given_too in (
        ("--resume", args.resume is not None),
        ("--preset", args.preset),
        ("--steps", hasattr(args, "steps")),
    ):
        if args.minutes and given_too:
            raise RequestError(f"--minutes chooses what to train and how long, and {flag} says it; leave one of them out")
    if Path(args.text).resolve() in [path.resolve() for path in files_of(out)]:
        raise RequestError(f"{args.text} is one of the files this run would write; choose another --out")
    tokenizer, ids = read_ids(args.text, track=progress_bar)
    resumed_from = None if args.resume is None else Path(args.resume) if args.resume else last_path(out)
    for name, value in PRESETS.get(args.preset, {}).items():
        if not hasattr(args, name):
            setattr(args, name, value)
    asked_model, asked_training = settings_from(args, GPTConfig), settings_from(args, TrainConfig)
    if args.minutes:
        config, train_config = _planned(args, started + 60 * args.minutes, tokenizer, ids, asked_model | asked_training)
        last = None
    elif resumed_from is None:
        last = None
        config = GPTConfig(vocab_size=tokenizer.vocab_size, **asked_model)
        train_config = TrainConfig(**asked_training)
    else:
        if not resumed_from.exists():
            raise RequestError(f"nothing to resume: there is no {resumed_from}; a run with --out {out} writes {last_path(out)}")
        last = _load_state(resumed_from, out)
        before = {} if last.train_config is None else dict(vars(last.train_config))
        if "lr" in asked_training and before.get("min_lr") == before.get("lr", 0) / 10:
            del before["min_lr"]  # nobody had asked for it
        config = GPTConfig(**(vars(last.config) | {"vocab_size": tokenizer.vocab_size} | asked_model))
        train_config = TrainConfig(**(before | asked_training))
    backend = select(train_config.device)

    dataset = Dataset(ids, config.block_size, train_config.batch_size, train_config.val_fraction, train_config.seed)
    if backend.name == "cpu":
        check_memory(config, train_config)
    try:
        with _interruptible() as stop_requested:
            model = GPT(config, seed=train_config.seed, backend=backend)
            trainer = Trainer(model, tokenizer, dataset, train_config, out, source=args.text)
            different = []
            if last is not None and resumed_from is not None:
                different = trainer.resume(last, elsewhere=resumed_from.resolve() != last_path(out).resolve())
            _banner(trainer, args.text)
            if different:
                say(f"warning: {'; '.join(different)}: the numbers will not be quite those of an uninterrupted run")
            end = _show_run(trainer, stop_requested)
    except MemoryError:
        return failed("train", f"out of memory: {memory_advice(config, train_config)}")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        kept, before_it = last_path(out), out.with_name(f"{out.stem}.previous.npz")
        resume = f"; {kept} is whole, continue with: {_resume_command(args)}" if kept.is_file() else ""
        resume = resume or (f"; what the run before has left is now {before_it}" if before_it.exists() else "")
        return failed("train", f"cannot write: {error.strerror or error}{where}{resume}")
    if end.outcome is Outcome.INTERRUPTED:
        say(f"stopped after step {end.step}; continue with: {_resume_command(args)}")
        return 128 + stop_requested.signal_number
    if end.outcome is Outcome.EARLY_STOP:
        say(f"stopped early at step {end.step}: {train_config.patience} evaluations without a better one (see --patience)")
    if end.outcome is Outcome.DIVERGED:
        say(f"stopped before step {end.step + 1} changed a weight: {end.reason}")
        if last_path(out).exists():
            say(f"{last_path(out)} is the state at the evaluation or interruption before that")
        if crash_path(out).exists():
            say(f"repeat that step with: bin/npgpt replay {shlex.quote(str(crash_path(out)))}")
    if end.advice:
        say(end.advice)
    if end.outcome is Outcome.DIVERGED:
        return 1
    best = trainer.progress
    loss = "" if best.best_loss is None else f", validation loss {best.best_loss:.4f}"
    say(f"{out}: step {best.best_step}{loss}; write with: bin/generate --ckpt {shlex.quote(str(out))}")
    return 0


def _planned(
    args: argparse.Namespace, until: float, tokenizer: CharTokenizer, ids: np.ndarray, fixed: dict[str, Any]
) -> tuple[GPTConfig, TrainConfig]:
    """What to train in the time that was asked for; says why."""
    backend = select(getattr(args, "device", "auto"))
    if (out := _checkpoint_path(args.out)).exists():
        with lock(lock_path(out), str(out)):  # not to be found out after minutes
            pass
    if args.minutes > 1:  # else it is over in a second
        say(f"plan    timing what could be trained in {args.minutes:g} minutes")
    chosen = plan(until, ids, tokenizer, backend, fixed)
    say(f"plan    {chosen.reasons[0]}\n        {chosen.reasons[1]}")
    return chosen.model, chosen.training


def _load_state(path: Path, out: Path) -> Checkpoint:
    try:
        return load(path, with_optimizer=True)
    except CheckpointError as error:
        instead = (
            f"; --resume {shlex.quote(str(out))} goes on from the best state instead" if path != out and out.exists() else ""
        )
        raise RequestError(f"{error}{instead}") from None


def _banner(trainer: Trainer, source: str) -> None:
    dataset, config, model = trainer.dataset, trainer.config, trainer.model
    say(f"text    {source}: {len(dataset.ids):,} characters, {trainer.tokenizer.vocab_size} different;", end=" ")
    say(f"{len(dataset.train):,} to train on, {len(dataset.val):,} held out")
    c = model.config
    say(f"model   {model.num_parameters():,} parameters: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd},", end=" ")
    say(f"block_size {c.block_size}, dropout {c.dropout:g}, {c.activation}")
    say(f"run     {config.steps:,} steps of {config.batch_size} x {c.block_size} tokens on {model.backend.name},", end=" ")
    say(f"seed {config.seed}, log in {log_path(trainer.out)}" if trainer.out else f"seed {config.seed}")
    if model.backend.name == "cpu":
        threads = config.threads or available_cores()
        say(f"        {threads} worker{'' if threads == 1 else 's'}, {describe_blas()}")
    if trainer.progress.step:
        say(f"        resumed at step {trainer.progress.step}")


def _show_run(trainer: Trainer, stop_requested: Callable[[], bool]) -> End:
    """Run, with a progress bar on a terminal and a line per evaluation everywhere."""
    from tqdm import tqdm

    started = shown = time.perf_counter()
    tokens = 0
    # disable=None: no bar when stderr is not a terminal.
    bar = tqdm(
        total=trainer.config.steps, initial=trainer.progress.step, unit="step", disable=None, dynamic_ncols=True, leave=False
    )
    with bar:
        for event in trainer.run(stop_requested):
            if isinstance(event, Step):
                tokens += event.tokens
                bar.update(event.step - bar.n)
                if time.perf_counter() - shown > 0.5:
                    shown = time.perf_counter()
                    bar.set_postfix_str(f"loss {event.loss:.3f}, {event.tokens / event.seconds:,.0f} tokens/s", refresh=False)
            elif isinstance(event, Evaluation):
                elapsed = time.perf_counter() - started
                steps_left = trainer.config.steps - event.step
                left = elapsed * (steps_left * trainer.dataset.batch_size * trainer.dataset.block_size) / tokens
                with bar.external_write_mode(file=sys.stderr):
                    say(_evaluation_line(event, tokens / elapsed, left))
                    if event.sample:
                        say("\n".join("    | " + line for line in event.sample.strip("\n").split("\n")))
            else:
                return event
    raise AssertionError("a run ends with an End record")


def _evaluation_line(event: Evaluation, tokens_per_second: float, seconds_left: float) -> str:
    losses = f"train loss {event.train_loss:.4f}"
    if event.val_loss is not None:
        plus_minus = "" if event.val_stderr is None else f" ± {event.val_stderr:.4f}"
        losses += f", val loss {event.val_loss:.4f}{plus_minus}" + (" (best)" if event.best else "")
    left = f", {duration(seconds_left)} left" if seconds_left else ""
    return f"step {event.step}: {losses}, {tokens_per_second:,.0f} tokens/s{left}"


def _resume_command(args: argparse.Namespace) -> str:
    out = "" if args.out == "model.npz" else f" --out {shlex.quote(args.out)}"
    steps = f" --steps {args.steps}" if args.resume is not None and hasattr(args, "steps") else ""  # perhaps not saved yet
    return f"bin/train {shlex.quote(args.text)}{out} --resume{steps}"


def _checkpoint_path(text: str) -> Path:
    """The path of a checkpoint to be written. Raises RequestError when it could not be."""
    out = Path(text)
    if out.suffix != ".npz":
        raise RequestError(f"--out must end in .npz, got {text}")
    if out.is_symlink():  # the file it names is what is to be replaced
        out = out.resolve()
    if out.stem.endswith((".last", ".crash", ".previous")):
        raise RequestError(f"--out must not end in .last, .crash or .previous, which a run's other files do, got {text}")
    if out.is_dir():
        raise RequestError(f"--out must be a file, got a folder: {text}")
    if not out.parent.is_dir():
        raise RequestError(f"--out: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"--out: the folder {out.parent} cannot be written to")
    return out


class _StopRequest:
    """Becomes true when the process is asked to stop."""

    signal_number = 0

    def __call__(self) -> bool:
        return self.signal_number != 0


@contextlib.contextmanager
def _interruptible() -> Iterator[_StopRequest]:
    """Let the first SIGINT, SIGTERM or SIGHUP be seen at the end of a step; a second one ends the process at once."""
    request = _StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request():
            os._exit(128 + number)
        request.signal_number = number
        with contextlib.suppress(OSError):  # whoever read it may have got the signal as well
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    # A terminal that goes away sends SIGHUP, where there is one; `nohup` has it ignored, and so it stays.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield request
    finally:
        if not request():  # else the process is about to end, and a second signal still means at once
            for number, handler in before.items():
                signal.signal(number, handler)
