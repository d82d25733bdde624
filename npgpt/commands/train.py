"""`npgpt train`: choose what to train, run the trainer, report what happens. How training works is in training/."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import shlex
import time
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import PRESETS, GPTConfig, TrainConfig
from npgpt.console.flags import add_flags, add_rank_flags, file_to_write, port, positive, settings_from
from npgpt.console.observers import WATCH_PORT, Observers
from npgpt.console.run_messages import print_banner, report_end, write_error
from npgpt.console.run_progress import show_run
from npgpt.console.signals import StopRequest, interruptible
from npgpt.console.terminal import command_parser, failed, progress_bar, say
from npgpt.console.train_flags import check_flags, check_flags_of_ranks
from npgpt.engine.backend import select
from npgpt.model.gpt import GPT
from npgpt.model.resize import check_resizable, resized
from npgpt.parallel.ranks import Ranks, open_ranks, speaks
from npgpt.storage.archive import CheckpointError
from npgpt.storage.checkpoint import Checkpoint, load
from npgpt.storage.run import RunFiles
from npgpt.text.bpe import NewBPE
from npgpt.text.characters import CharTokenizer, MoreCharacters
from npgpt.text.corpus import Corpus
from npgpt.text.record import TextRecord
from npgpt.text.sources import STDIN
from npgpt.text.tokenizer import Tokenizer, UnknownCharacterError
from npgpt.text.tokenizer_files import DEFAULT_VOCAB_SIZE, tokenizer_named
from npgpt.training.events import End
from npgpt.training.memory import check_memory, memory_advice
from npgpt.training.plan import plan
from npgpt.training.resumption import FinishedError
from npgpt.training.trainer import Trainer

ABOUT = "train a GPT on a text"
AUTO = "auto"  # of --resume
FINE_TUNING_LR = 1e-4  # the default with --from: a tenth of what a new model learns with


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Train a GPT on a text: on its characters, or on tokens of several characters.",
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
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="char: one token for each character (the default); bpe: a byte-level BPE, trained on DATA; or the file or folder "
        "of a tokenizer: tokenizer.json (a byte-level BPE, or one of characters), or vocab.json and merges.txt",
    )
    parser.add_argument(
        "--vocab-size",
        dest="bpe_size",
        type=positive("vocab_size"),
        metavar="N",
        help=f"with --tokenizer bpe: the largest number of tokens, 256 or more (default: {DEFAULT_VOCAB_SIZE})",
    )
    parser.add_argument(
        "--from",
        dest="base",
        metavar="FILE",
        help="start with the weights and the tokenizer of this checkpoint (fine-tuning); block_size and dropout may change; "
        f"the default of --lr is then {FINE_TUNING_LR:g}",
    )
    parser.add_argument(
        "--add-characters",
        action="store_true",
        help="with --from: give each character of DATA that the model does not know a new token",
    )
    parser.add_argument("--out", default="model.npz", metavar="FILE", help="the checkpoint to write (default: model.npz)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="continue a run from its last state (the .last.npz beside --out), or from FILE; auto: continue if there is a last "
        "state, else start, so that a scheduler can start the same command again",
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
    parser.add_argument(
        "--watch",
        nargs="?",
        const=WATCH_PORT,
        type=port,
        metavar="PORT",
        help=f"show the curves and samples while they grow, on a page for a browser of this computer, at port {WATCH_PORT} or "
        "the one given; needs the extras [serve] and [plot]",
    )
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="also write what TensorBoard shows into this folder; needs the extra [tensorboard]"
    )
    add_rank_flags(parser)
    parser.is_silent = not speaks()
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
    with open_ranks(args.ranks, args.rank_timeout) as ranks, contextlib.ExitStack() as silence:
        if not ranks.is_first:  # the first one speaks for all
            nowhere = silence.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    started, is_auto = time.perf_counter(), args.resume == AUTO
    prepared = ranks.together(lambda: _prepare(args, started, ranks))
    choice, files = prepared.choice, prepared.files
    try:
        with interruptible(ranks.is_first) as stop_requested:
            trainer, end = _train(args, prepared, stop_requested, ranks)
    except FinishedError as error:
        if not is_auto:
            raise
        say(f"npgpt train: {error}")
        return 0
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError):
            message = write_error(error, args, files)
        elif select(choice.training.device).is_cpu:
            message = f"out of memory: {memory_advice(choice.model, choice.training)}"
        else:
            message = "out of GPU memory: lower --micro-batch or --batch-size, then --n-embd or --n-layer"
        ranks.end_all(error, message)
        return failed("train", message)
    return report_end(trainer, end, args, files, max(ranks.gather(stop_requested.signal_number)))


def _prepare(args: argparse.Namespace, started: float, ranks: Ranks) -> _Prepared:
    """Read everything, and choose what to train. Raises RequestError if the run cannot be."""
    check_flags_of_ranks(args, ranks)
    files = _files_to_write(args.out)
    if args.resume == AUTO:
        _continue_or_start(args, ranks.on_first(files.last.exists))
    check_flags(args)
    observers = Observers(args.watch, args.tensorboard) if ranks.is_first else Observers(None, None)
    last = None if args.resume is None else _state_to_resume(args, files)
    base = None if args.base is None else load(args.base)
    read = functools.partial(_read, args, files, last, base)
    corpus = ranks.on_first(read) if args.text_from_rank_0 else read()
    if args.minutes:
        choice = _plan(args, started + 60 * args.minutes, files, corpus, base)
    elif base:
        choice = _fine_tuning(args, base, corpus)
    elif last:
        choice = _resumption(args, last, elsewhere=_resumed_path(args, files).resolve() != files.last.resolve())
    else:
        model = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **_asked(args, GPTConfig))
        choice = _Choice(model, TrainConfig(**_asked(args, TrainConfig)))
    return _Prepared(choice, files, corpus, observers)


def _continue_or_start(args: argparse.Namespace, is_there: bool) -> None:
    """Turn `--resume auto` into `--resume`, or into a new run if there is nothing to continue."""
    args.resume = "" if is_there else None
    if is_there:  # these say how a new run begins
        args.tokenizer = args.bpe_size = args.base = args.minutes = None
        args.add_characters = False


# ---------------------------------------------------------------- choosing


@dataclasses.dataclass
class _Choice:
    """What to train.

    last: the state to continue from. elsewhere: `last` is not the state of --out. trained: a model that was trained before.
    """

    model: GPTConfig
    training: TrainConfig
    last: Checkpoint | None = None
    elsewhere: bool = False
    trained: GPT | None = None


@dataclasses.dataclass
class _Prepared:
    """What a run needs before it begins."""

    choice: _Choice
    files: RunFiles
    corpus: Corpus
    observers: Observers


def _files_to_write(path: str) -> RunFiles:
    """The files of the run with `--out path`. Raises RequestError if they could not be written."""
    out = file_to_write(path, ".npz")
    if out.is_symlink():  # replace the file that the link names, not the link
        out = file_to_write(str(out.resolve()), ".npz")
    if out.stem.endswith((".last", ".crash", ".previous")):
        raise RequestError(f"--out must not end in .last, .crash or .previous, because a run's other files do, got {path}")
    return RunFiles(out)


def _read(args: argparse.Namespace, files: RunFiles, last: Checkpoint | None, base: Checkpoint | None) -> Corpus:
    """Read the text that the flags name; in a resumed run, by default the text of the run before, with its tokenizer."""
    text, val_text = (last.text, last.val_text) if last else (None, None)
    tokenizer = _tokenizer(args, last or base)
    paths = args.text or _recorded(text, "DATA")
    val_path = args.val_text
    if val_path is None and val_text is not None:
        (val_path,) = _recorded(val_text, "--val-text")
        if settings_from(args, TrainConfig).get("val_fraction"):
            raise RequestError(f"the run has a held-out text of its own, {val_path}, so --val-fraction must be 0 or left out")
    before = last.train_config if last and last.train_config else TrainConfig()
    fraction = settings_from(args, TrainConfig).get("val_fraction", before.val_fraction)
    written = [*files.paths(), *files.previous_paths()]
    try:
        return Corpus.read(paths, val_path, tokenizer, written, progress_bar, fraction)
    except UnknownCharacterError as error:
        what, instead = ("cannot resume", "start a new run") if last else ("cannot use --from", "use --add-characters")
        if not last and not isinstance(tokenizer, CharTokenizer):
            instead = "train a new model"
        raise RequestError(f"{what}: {error}; remove what the model does not know, or {instead}") from None


def _tokenizer(args: argparse.Namespace, trained: Checkpoint | None) -> Tokenizer | NewBPE | MoreCharacters | None:
    """The tokenizer of a trained model, or what the flags ask for."""
    if trained is None:
        return tokenizer_named(args.tokenizer, args.bpe_size)
    if not args.add_characters:
        return trained.tokenizer
    if not isinstance(trained.tokenizer, CharTokenizer):
        raise RequestError("--add-characters is for models of characters; a BPE has tokens for every byte")
    return MoreCharacters(trained.tokenizer)


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


def _plan(args: argparse.Namespace, until: float, files: RunFiles, corpus: Corpus, base: Checkpoint | None) -> _Choice:
    """Choose a run that ends when `time.perf_counter()` reaches `until`, and print the reasons."""
    backend = select(getattr(args, "device", "auto"))
    with files.locked():  # finds another run now, not after minutes of timing
        pass
    if args.minutes > 1:  # otherwise the timing takes a second
        say(f"plan    timing what could be trained in {args.minutes:g} minutes")
    asked = _asked(args, GPTConfig) | _asked(args, TrainConfig)
    if base:
        check_resizable(base.config, GPTConfig(**(vars(base.config) | _asked(args, GPTConfig))))
        shape = {name: value for name, value in vars(base.config).items() if name != "vocab_size"}
        asked = shape | {"optimizer": "adamw", "lr": FINE_TUNING_LR} | asked
    chosen = plan(until, corpus, backend, asked)
    say(f"plan    {chosen.reasons[0]}\n        {chosen.reasons[1]}")
    return _Choice(chosen.model, chosen.training, trained=_resized(base, chosen.model, chosen.training) if base else None)


def _fine_tuning(args: argparse.Namespace, base: Checkpoint, corpus: Corpus) -> _Choice:
    """A new run that starts with the weights of `base`."""
    vocab_size = max(base.config.vocab_size, corpus.tokenizer.vocab_size)
    model = GPTConfig(**(vars(base.config) | {"vocab_size": vocab_size} | _asked(args, GPTConfig)))
    training = TrainConfig(**({"lr": FINE_TUNING_LR} | _asked(args, TrainConfig)))
    return _Choice(model, training, trained=_resized(base, model, training))


def _resized(base: Checkpoint, model: GPTConfig, training: TrainConfig) -> GPT:
    backend = select(training.device)
    if backend.is_cpu:
        check_memory(model, training)
    return resized(base.model, model, base.tokenizer.vocab_size, training.seed, backend)


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


def _train(args: argparse.Namespace, prepared: _Prepared, stop_requested: StopRequest, ranks: Ranks) -> tuple[Trainer, End]:
    trainer, different = ranks.together(lambda: _make_trainer(prepared, ranks))
    print_banner(trainer, prepared.corpus, prepared.files, args.base)
    if different:
        say(f"warning: {'; '.join(different)}: the numbers will differ slightly from those of an uninterrupted run")
    with prepared.observers.of(trainer) as tell:
        return trainer, show_run(trainer, stop_requested, tell)


def _make_trainer(prepared: _Prepared, ranks: Ranks) -> tuple[Trainer, list[str]]:
    """The trainer, and what a resumed run will differ in from the run before."""
    choice, corpus = prepared.choice, prepared.corpus
    model, training = choice.model, choice.training
    backend = select(training.device)
    dataset = corpus.dataset(model.block_size, training)
    if backend.is_cpu:
        check_memory(model, training, ranks.on_this_machine)
    gpt = choice.trained or GPT(model, seed=training.seed, backend=backend)
    sources, val_sources = (found.given if found else () for found in (corpus.sources, corpus.val_sources))
    pretrained = choice.trained is not None
    trainer = Trainer(gpt, corpus.tokenizer, dataset, training, prepared.files.best, sources, val_sources, pretrained, ranks)
    different = [] if choice.last is None else trainer.resume(choice.last, choice.elsewhere)
    choice.last = choice.trained = None  # their memory can go
    return trainer, different
