"""`npgpt train`: choose what to train, run the trainer, report what happens. How training works is in training/."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import PRESETS, GPTConfig, TrainConfig
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.signals import StopRequest, interruptible
from npgpt.console.terminal import command, command_parser, duration, failed, progress_bar, say
from npgpt.engine.backend import select
from npgpt.model.gpt import GPT
from npgpt.parallel.limits import core_limit
from npgpt.parallel.machine import describe_blas
from npgpt.storage.archive import CheckpointError
from npgpt.storage.checkpoint import Checkpoint, load
from npgpt.storage.run import RunFiles
from npgpt.text.characters import UnknownCharacterError
from npgpt.text.corpus import Corpus
from npgpt.text.dataset import TextRecord
from npgpt.text.sources import STDIN, Sources
from npgpt.training.advice import MUCH_REPEATED
from npgpt.training.events import End, Evaluation, Outcome, Step
from npgpt.training.memory import check_memory, memory_advice
from npgpt.training.plan import plan
from npgpt.training.trainer import Trainer

ABOUT = "train a GPT on a text"
MOST_FILES = 20  # files of a text that are listed one by one


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Train a GPT on the characters of a text: of one file or of several.",
        ["data/tiny.txt --steps 500", "mytext.txt --out mine.npz --n-embd 128 --dropout 0.2", "books/ --val-text other.txt"],
    )
    parser.add_argument(
        "text",
        nargs="*",
        metavar="DATA",
        help="UTF-8 text files, which are read one after the other; a folder stands for the texts in it, in the order of their "
        "paths; - is standard input; files compressed with gzip, bzip2, xz or zstd are unpacked; --resume needs no DATA",
    )
    parser.add_argument(
        "--val-text", metavar="FILE", help="hold out this text, or the texts of this folder, instead of a part of DATA"
    )
    parser.add_argument("--out", default="model.npz", metavar="FILE", help="the checkpoint to write (default: model.npz)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="continue a run from its last state (the .last.npz beside --out), or from FILE",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="a complete configuration; other flags change it: quick (readable text in twenty seconds), nano and char "
        "(nanoGPT's for a CPU and for a GPU)",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="X",
        help="choose the model, batch, learning rate and steps that learn most in about X minutes in all (more than "
        "half a minute is best); other settings you give are kept; not with --steps, --preset or --resume",
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


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    files = _files_to_write(args.out)
    _check_flags(args)
    last = None if args.resume is None else _state_to_resume(args, files)
    corpus = _read(args, files, last)
    if args.minutes:
        choice = _plan(args, started + 60 * args.minutes, files, corpus)
    elif last:
        choice = _resumption(args, last, elsewhere=_resumed_path(args, files).resolve() != files.last.resolve())
    else:
        model = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **_asked(args, GPTConfig))
        choice = _Choice(model, TrainConfig(**_asked(args, TrainConfig)))
    try:
        with interruptible() as stop_requested:
            trainer, end = _train(choice, files, corpus, stop_requested)
    except MemoryError:
        if not select(choice.training.device).is_cpu:
            return failed("train", "out of GPU memory: lower --micro-batch or --batch-size, then --n-embd or --n-layer")
        return failed("train", f"out of memory: {memory_advice(choice.model, choice.training)}")
    except OSError as error:
        return failed("train", _write_error(error, args, files))
    return _report(trainer, end, args, files, stop_requested.signal_number)


# ---------------------------------------------------------------- choosing


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What to train. last: the state to continue from. elsewhere: `last` is not the state of --out."""

    model: GPTConfig
    training: TrainConfig
    last: Checkpoint | None = None
    elsewhere: bool = False


def _files_to_write(path: str) -> RunFiles:
    """The files of the run with `--out path`. Raises RequestError if they could not be written."""
    out = Path(path)
    if out.suffix != ".npz":
        raise RequestError(f"--out must end in .npz, got {path}")
    if out.is_symlink():  # replace the file that the link names, not the link
        out = out.resolve()
    if out.stem.endswith((".last", ".crash", ".previous")):
        raise RequestError(f"--out must not end in .last, .crash or .previous, because a run's other files do, got {path}")
    if out.is_dir():
        raise RequestError(f"--out must be a file, got a folder: {path}")
    if not out.parent.is_dir():
        raise RequestError(f"--out: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"--out: the folder {out.parent} cannot be written to")
    return RunFiles(out)


def _check_flags(args: argparse.Namespace) -> None:
    flags = {"--resume": args.resume is not None, "--preset": args.preset is not None, "--steps": hasattr(args, "steps")}
    for flag, is_given in flags.items():
        if args.minutes and is_given:
            raise RequestError(f"--minutes chooses the run itself; give --minutes or {flag}, not both")
    if args.resume and not args.text and Path(args.resume).suffix != ".npz":  # `--resume my.txt` means DATA
        args.text, args.resume = [args.resume], ""
    if not args.text and args.resume is None:
        raise RequestError("expected DATA, a text file to train on; data/tiny.txt is one")
    if args.val_text is not None and settings_from(args, TrainConfig).get("val_fraction"):
        raise RequestError("give --val-text or --val-fraction, not both")


def _read(args: argparse.Namespace, files: RunFiles, last: Checkpoint | None) -> Corpus:
    """Read the text that the flags name; in a resumed run, by default the text of the run before, with its vocabulary."""
    text, val_text, tokenizer = (last.text, last.val_text, last.tokenizer) if last else (None, None, None)
    paths = args.text or _recorded(text, "DATA")
    val_path = args.val_text
    if val_path is None and val_text is not None:
        (val_path,) = _recorded(val_text, "--val-text")
        if settings_from(args, TrainConfig).get("val_fraction"):
            raise RequestError(f"the run has a held-out text of its own, {val_path}, so --val-fraction must be 0 or left out")
    try:
        return Corpus.read(paths, val_path, tokenizer, [*files.paths(), *files.previous_paths()], progress_bar)
    except UnknownCharacterError as error:
        raise RequestError(f"cannot resume: {error}; remove what the model does not know, or start a new run") from None


def _recorded(text: TextRecord | None, flag: str) -> tuple[str, ...]:
    """Where a text of the run before came from. Raises RequestError if the user has to say it again."""
    if text is None or not text.sources:
        raise RequestError(f"the checkpoint does not say where its text came from; give {flag}")
    if STDIN in text.sources:
        raise RequestError(f"the run before read {flag} from standard input; give it again")
    missing = [path for path in text.sources if not Path(path).exists()]
    if missing:
        raise RequestError(f"the run before read {missing[0]}, which is not there, seen from this folder; give {flag}")
    return text.sources


def _asked(args: argparse.Namespace, cls: type[GPTConfig] | type[TrainConfig]) -> dict[str, Any]:
    """The settings of `cls` from the preset and the flags; a flag has priority."""
    names = {f.name for f in dataclasses.fields(cls)}
    preset = {name: value for name, value in PRESETS.get(args.preset, {}).items() if name in names}
    held_out = {"val_fraction": 0.0} if args.val_text is not None and cls is TrainConfig else {}
    return preset | settings_from(args, cls) | held_out


def _plan(args: argparse.Namespace, until: float, files: RunFiles, corpus: Corpus) -> _Choice:
    """Choose a run that ends when `time.perf_counter()` reaches `until`, and print the reasons."""
    backend = select(getattr(args, "device", "auto"))
    with files.locked():  # finds another run now, not after minutes of timing
        pass
    if args.minutes > 1:  # otherwise the timing takes a second
        say(f"plan    timing what could be trained in {args.minutes:g} minutes")
    chosen = plan(until, corpus, backend, _asked(args, GPTConfig) | _asked(args, TrainConfig))
    say(f"plan    {chosen.reasons[0]}\n        {chosen.reasons[1]}")
    return _Choice(chosen.model, chosen.training)


def _resumed_path(args: argparse.Namespace, files: RunFiles) -> Path:
    return Path(args.resume) if args.resume else files.last


def _state_to_resume(args: argparse.Namespace, files: RunFiles) -> Checkpoint:
    path = _resumed_path(args, files)
    if not path.exists():
        raise RequestError(f"nothing to resume: there is no {path}; a run with --out {files.best} writes {files.last}")
    if path.resolve() in [previous.resolve() for previous in files.previous_paths()]:
        raise RequestError(f"{path} would be replaced by the files of the run at {files.best}; copy it to another name first")
    try:
        return load(path, with_optimizer=True)
    except CheckpointError as error:
        best = shlex.quote(str(files.best))
        instead = (
            f"; --resume {best} continues from the best state instead" if path != files.best and files.best.exists() else ""
        )
        raise RequestError(f"{error}{instead}") from None


def _resumption(args: argparse.Namespace, last: Checkpoint, elsewhere: bool) -> _Choice:
    """The configuration of the run to resume, changed by the flags."""
    asked = _asked(args, TrainConfig)
    before = {} if last.train_config is None else dict(vars(last.train_config))
    if "lr" in asked and before.get("min_lr") == before.get("lr", 0.0) / 10:
        del before["min_lr"]  # it follows lr, as it did
    model = GPTConfig(**(vars(last.config) | _asked(args, GPTConfig)))
    return _Choice(model, TrainConfig(**(before | asked)), last, elsewhere)


# ---------------------------------------------------------------- running


def _train(choice: _Choice, files: RunFiles, corpus: Corpus, stop_requested: StopRequest) -> tuple[Trainer, End]:
    model, training = choice.model, choice.training
    backend = select(training.device)
    dataset = corpus.dataset(model.block_size, training)
    if backend.is_cpu:
        check_memory(model, training)
    gpt = GPT(model, seed=training.seed, backend=backend)
    sources, val_sources = (found.given if found else () for found in (corpus.sources, corpus.val_sources))
    trainer = Trainer(gpt, corpus.tokenizer, dataset, training, files.best, sources, val_sources)
    different = [] if choice.last is None else trainer.resume(choice.last, choice.elsewhere)
    _print_banner(trainer, corpus, files)
    if different:
        say(f"warning: {'; '.join(different)}: the numbers will differ slightly from those of an uninterrupted run")
    return trainer, _show_run(trainer, stop_requested)


def _show_run(trainer: Trainer, stop_requested: Callable[[], bool]) -> End:
    """Run the trainer. Show a progress bar on a terminal, and a line for each evaluation everywhere."""
    from tqdm import tqdm

    started = shown = time.perf_counter()
    tokens = 0
    # disable=None: no bar if stderr is not a terminal.
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


# ---------------------------------------------------------------- reporting


def _print_banner(trainer: Trainer, corpus: Corpus, files: RunFiles) -> None:
    dataset, config, model = trainer.dataset, trainer.config, trainer.model
    held_out = f"{len(dataset.val):,} held out" + (f": {corpus.val_sources}" if corpus.val_sources else "")
    say(f"text    {corpus.sources}: {len(dataset.ids):,} characters, {trainer.tokenizer.vocab_size} different;", end=" ")
    say(f"{len(dataset.train):,} to train on, {held_out}")
    for sources in (corpus.sources, corpus.val_sources):
        if sources:
            _print_files(sources)
    if dataset.repeated_share > MUCH_REPEATED:
        share = f"{dataset.repeated_share:.0%} of the held-out text also occurs in the training text"
        say(f"warning: {share}, so the validation loss will be too low; remove the copies, or hold out another text")
    c = model.config
    say(f"model   {model.num_parameters():,} parameters: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd},", end=" ")
    say(f"block_size {c.block_size}, dropout {c.dropout:g}, {c.activation}, {c.position} positions")
    say(f"run     {config.steps:,} steps of {config.batch_size} x {c.block_size} tokens on {model.backend.name},", end=" ")
    say(f"{config.optimizer}, seed {config.seed}, log in {files.log}")
    if model.backend.is_cpu:
        cores = core_limit()
        threads = config.threads or cores.value
        limited = "" if config.threads or cores.source == "cores" else f" (limited by {cores.source})"
        say(f"        {threads} worker{'' if threads == 1 else 's'}{limited}, {describe_blas()}")
    if trainer.files and trainer.files.are_of_earlier_run:
        previous = files.previous_paths()[0]
        replaced = ", in place of the run there" if previous.exists() else ""
        say(f"        the run that is now in {files.best} is kept as {previous}{replaced}")
    if trainer.progress.step:
        say(f"        resumed at step {trainer.progress.step}")
    if trainer.changes.settings:
        again = "" if trainer.changes.comparable else "; the search for the lowest validation loss begins again"
        say(f"        from step {trainer.progress.step + 1} on: {trainer.changes}{again}")


def _print_files(sources: Sources) -> None:
    """The share of each file of a text, if there are several, and the files of folders that are left out."""
    sizes = sources.characters
    total, shown = sum(sizes.values()), list(sizes)
    if len(shown) > MOST_FILES:
        shown = sorted(shown, key=lambda name: -sizes[name])[:MOST_FILES]
    for name in shown if len(sizes) > 1 else []:
        say(f"        {sizes[name] / total:6.1%}  {name}, {sizes[name]:,} characters")
    rest = total - sum(sizes[name] for name in shown)
    if rest:
        say(f"        {rest / total:6.1%}  {len(sizes) - len(shown):,} smaller files, {rest:,} characters")
    for path, reason in list(sources.left_out.items())[:MOST_FILES]:
        say(f"warning: {path} is left out: {reason}")
    more = len(sources.left_out) - MOST_FILES
    if more > 0:
        say(f"warning: {more:,} more files are left out")


def _evaluation_line(event: Evaluation, tokens_per_second: float, seconds_left: float) -> str:
    losses = f"train loss {event.train_loss:.4f}"
    if event.val_loss is not None:
        plus_minus = "" if event.val_stderr is None else f" ± {event.val_stderr:.4f}"
        losses += f", val loss {event.val_loss:.4f}{plus_minus}" + (" (best)" if event.best else "")
    left = f", {duration(seconds_left)} left" if seconds_left else ""
    return f"step {event.step}: {losses}, {tokens_per_second:,.0f} tokens/s{left}"


def _report(trainer: Trainer, end: End, args: argparse.Namespace, files: RunFiles, signal_number: int) -> int:
    """Print how the run ended and what to do next; returns the exit status."""
    if end.outcome is Outcome.INTERRUPTED:
        say(f"stopped after step {end.step}; continue with: {_resume_command(args)}")
        return 128 + signal_number
    if end.outcome is Outcome.EARLY_STOP:
        patience = trainer.config.patience
        say(f"stopped early at step {end.step}: no lower validation loss in {patience} evaluations (see --patience)")
    if end.outcome is Outcome.DIVERGED:
        say(f"stopped before step {end.step + 1} changed a weight: {end.reason}")
        if files.last.exists():
            say(f"{files.last} is the state at the last evaluation or interruption")
        if files.crash.exists():
            say(f"repeat that step with: {command('replay')} {shlex.quote(str(files.crash))}")
    if end.advice:
        out = "" if args.out == "model.npz" else f"--out {shlex.quote(args.out)} "
        say(end.advice.replace("--resume", f"{out}--resume"))
    if end.outcome is Outcome.DIVERGED:
        return 1
    best = trainer.progress
    loss = "" if best.best_loss is None else f", validation loss {best.best_loss:.4f}"
    say(f"{files.best}: step {best.best_step}{loss}; write with: {command('generate')} --ckpt {shlex.quote(str(files.best))}")
    return 0


def _write_error(error: OSError, args: argparse.Namespace, files: RunFiles) -> str:
    """A message for an error of writing: what went wrong, and where the last good state is."""
    where = f": {error.filename}" if error.filename else ""
    if files.last.is_file():
        kept = f"; {files.last} is complete, continue with: {_resume_command(args)}"
    else:
        previous = files.previous_paths()[0]
        kept = f"; the checkpoint of the run before is now {previous}" if previous.exists() else ""
    return f"cannot write: {error.strerror or error}{where}{kept}"


def _resume_command(args: argparse.Namespace) -> str:
    out = "" if args.out == "model.npz" else f" --out {shlex.quote(args.out)}"
    val_text = f" --val-text {shlex.quote(args.val_text)}" if args.val_text else ""
    return " ".join([command("train"), *map(shlex.quote, args.text)]) + f"{val_text}{out} --resume"
