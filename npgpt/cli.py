"""`npgpt NAME ...`: the commands, and everything that is printed to people.

Generated text and asked-for reports go to stdout, progress and messages to stderr. Exit status: 0 done,
1 the work failed, 2 the request was wrong, 130 and 143 interrupted. A wrong request is answered in one
line. Nothing here is needed by a user of the library.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np

import npgpt
from npgpt import ops
from npgpt.backend import DeviceError, Stream, generator, select
from npgpt.checkpoint import Checkpoint, CheckpointError, load
from npgpt.config import PRESETS, GenerateConfig, GPTConfig, RequestError, TrainConfig, add_flags, given
from npgpt.data import PIECE, Dataset, fingerprint, read_ids, read_text, split
from npgpt.evaluate import compare, evaluate
from npgpt.generate import Token, generate_texts
from npgpt.gpt import GPT
from npgpt.gradcheck import GradientError, check_tensors
from npgpt.likeness import LARGEST_TEXT, NGRAM, Likeness, likeness
from npgpt.parallel import ParallelStep, Workers, available_cores, describe_blas, one_blas_thread
from npgpt.train import (
    End,
    Evaluation,
    Outcome,
    Step,
    Trainer,
    crash_path,
    files_of,
    last_path,
    log_path,
    memory_advice,
    read_log,
)

# ---------------------------------------------------------------- train


def train_parser() -> argparse.ArgumentParser:
    parser = _parser(
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
    add_flags(parser, TrainConfig)
    add_flags(parser, GPTConfig, skip=("vocab_size",))
    return parser


def train(args: argparse.Namespace) -> int:
    out = _checkpoint_path(args.out)
    if Path(args.text).resolve() in [path.resolve() for path in files_of(out)]:
        raise RequestError(f"{args.text} is one of the files this run would write; choose another --out")
    tokenizer, ids = read_ids(args.text, track=_progress_bar)
    resumed_from = None if args.resume is None else Path(args.resume) if args.resume else last_path(out)
    for name, value in PRESETS.get(args.preset, {}).items():
        if not hasattr(args, name):
            setattr(args, name, value)
    asked_model, asked_training = given(GPTConfig, args), given(TrainConfig, args)
    if resumed_from is None:
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
    try:
        with _interruptible() as stop_requested:
            model = GPT(config, seed=train_config.seed, backend=backend)
            trainer = Trainer(model, tokenizer, dataset, train_config, out, source=args.text)
            different = []
            if last is not None and resumed_from is not None:
                different = trainer.resume(last, elsewhere=resumed_from.resolve() != last_path(out).resolve())
            _banner(trainer, args.text)
            if different:
                _say(
                    f"warning: {'; '.join(different)}: the numbers will differ in their last digits from an uninterrupted run's"
                )
            end = _show_run(trainer, stop_requested)
    except MemoryError:
        return _failed("train", f"out of memory: {memory_advice(config, train_config)}")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        kept, before_it = last_path(out), out.with_name(f"{out.stem}.previous.npz")
        resume = f"; {kept} is whole, continue with: {_resume_command(args)}" if kept.is_file() else ""
        resume = resume or (f"; what the run before has left is now {before_it}" if before_it.exists() else "")
        return _failed("train", f"cannot write: {error.strerror or error}{where}{resume}")
    if end.outcome is Outcome.INTERRUPTED:
        _say(f"stopped after step {end.step}; continue with: {_resume_command(args)}")
        return 128 + stop_requested.signal_number
    if end.outcome is Outcome.EARLY_STOP:
        _say(f"stopped early at step {end.step}: {train_config.patience} evaluations without a better one (see --patience)")
    if end.outcome is Outcome.DIVERGED:
        _say(f"stopped before step {end.step + 1} changed a weight: {end.reason}")
        if last_path(out).exists():
            _say(f"{last_path(out)} is the state at the evaluation or interruption before that")
        if crash_path(out).exists():
            _say(f"repeat that step with: bin/npgpt replay {shlex.quote(str(crash_path(out)))}")
    if end.advice:
        _say(end.advice)
    if end.outcome is Outcome.DIVERGED:
        return 1
    best = trainer.progress
    loss = "" if best.best_loss is None else f", validation loss {best.best_loss:.4f}"
    _say(f"{out}: step {best.best_step}{loss}; write with: bin/generate --ckpt {shlex.quote(str(out))}")
    return 0


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
    _say(f"text    {source}: {len(dataset.ids):,} characters, {trainer.tokenizer.vocab_size} different;", end=" ")
    _say(f"{len(dataset.train):,} to train on, {len(dataset.val):,} held out")
    c = model.config
    _say(f"model   {model.num_parameters():,} parameters: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd},", end=" ")
    _say(f"block_size {c.block_size}, dropout {c.dropout:g}, {c.activation}")
    _say(f"run     {config.steps:,} steps of {config.batch_size} x {c.block_size} tokens on {model.backend.name},", end=" ")
    _say(f"seed {config.seed}, log in {log_path(trainer.out)}" if trainer.out else f"seed {config.seed}")
    if model.backend.name == "cpu":
        threads = config.threads or available_cores()
        _say(f"        {threads} thread{'' if threads == 1 else 's'}, {describe_blas()}")
    if trainer.progress.step:
        _say(f"        resumed at step {trainer.progress.step}")


def _progress_bar(iterable: Iterable[Any], total: int | None, desc: str) -> Iterable[Any]:
    """tqdm over the pieces of a text, on a terminal, once it takes longer than a second."""
    from tqdm import tqdm

    return tqdm(iterable, desc=desc, total=total, unit="MiB", unit_scale=PIECE >> 20, delay=1, disable=None, leave=False)


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
                    _say(_evaluation_line(event, tokens / elapsed, left))
                    if event.sample:
                        _say("\n".join("    | " + line for line in event.sample.strip("\n").split("\n")))
            else:
                return event
    raise AssertionError("a run ends with an End record")


def _evaluation_line(event: Evaluation, tokens_per_second: float, seconds_left: float) -> str:
    losses = f"train loss {event.train_loss:.4f}"
    if event.val_loss is not None:
        plus_minus = "" if event.val_stderr is None else f" ± {event.val_stderr:.4f}"
        losses += f", val loss {event.val_loss:.4f}{plus_minus}" + (" (best)" if event.best else "")
    left = f", {_duration(seconds_left)} left" if seconds_left else ""
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


# ---------------------------------------------------------------- generate


def generate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "generate",
        "Write text with a trained model. On a terminal, without a prompt, it asks for one, and for another after each\n"
        "answer, until end of file (Ctrl-D).",
        [
            'bin/generate --ckpt model.npz --prompt "HOB:" --temperature 0.7 --top-k 20',
            "bin/generate --ckpt model.npz --num-samples 3 --max-new-tokens 100 --stop HALE:",
        ],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue, - for standard input (default: a new line)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    parser.add_argument(
        "--unknown",
        choices=("error", "skip", "replace"),
        default="error",
        help="what to do with characters of the prompt the model has never seen; replace takes the closest one it has, "
        "the other case or the letter without its accent, or skips (default: error)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text when it is written; may be given several times",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a sample: its text, tokens, ids and their log-probabilities",
    )
    add_flags(parser, GenerateConfig)
    return parser


def generate(args: argparse.Namespace) -> int:
    settings = GenerateConfig(**given(GenerateConfig, args))
    if settings.seed is None and args.json:  # so that what is written can be drawn again
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))
    if "" in args.stop:
        raise RequestError("--stop must be a text of at least one character, got an empty one")
    checkpoint = load(args.ckpt)
    for stop in args.stop:
        if unknown := checkpoint.tokenizer.unknown(stop):
            raise RequestError(f"--stop {stop!r} could never come: the model does not know {', '.join(map(repr, unknown))}")
    if args.prompt_file is not None:
        prompt = read_text(args.prompt_file)
    elif args.prompt == "-":
        prompt = _from_stdin()
    elif args.prompt is None and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return _ask(checkpoint, settings, args)
    else:
        prompt = args.prompt or ""
    _write_samples(checkpoint, _known(checkpoint, prompt, args.unknown), settings, args)
    return 0


def _from_stdin() -> str:
    """Standard input, read as a text file is."""
    if sys.stdin is None:
        raise RequestError("--prompt - reads standard input, which is closed")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise RequestError(f"the prompt on standard input is not UTF-8 text: {byte}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _known(checkpoint: Checkpoint, prompt: str, unknown: str) -> str:
    """The prompt as the model can take it. Raises RequestError for characters it does not know, unless told otherwise."""
    if unknown != "error":
        return checkpoint.tokenizer.without_unknown(prompt, replace=unknown == "replace")
    try:
        checkpoint.tokenizer.encode(prompt)
    except RequestError as error:
        raise RequestError(f"{error}; --unknown skip leaves such out, --unknown replace takes the closest") from None
    return prompt


def _write_samples(checkpoint: Checkpoint, prompt: str, settings: GenerateConfig, args: argparse.Namespace) -> None:
    """Write the samples to stdout, the first as it is drawn, the others after it; the speed to a terminal's stderr."""
    started, shown = time.perf_counter(), 0
    tokens: list[Token] = []
    texts = dict.fromkeys(range(settings.num_samples), "")
    done: set[int] = set()
    stopped: set[int] = set()
    live = not args.json
    if live:
        sys.stdout.write(prompt)
    for piece in generate_texts(checkpoint.model, checkpoint.tokenizer, prompt, settings, args.stop, tokens=tokens):
        texts[piece.sample] += piece.text
        done |= {piece.sample} if piece.done else set()
        stopped |= {piece.sample} if piece.stopped else set()
        if live and piece.sample == shown:
            sys.stdout.write(piece.text)
        while live and shown in done:  # it, and what has waited for it
            sys.stdout.write("\n")
            shown += 1
            if shown in texts:
                _say("----------------")
                sys.stdout.write(prompt + texts[shown])
        sys.stdout.flush()
    if args.json:
        drawn: dict[int, list[Token]] = {k: [] for k in texts}
        for token in tokens:
            drawn[token.sample].append(token)
        for sample, text in texts.items():
            own = drawn[sample]
            ids = [token.id for token in own]
            row: dict[str, Any] = {"sample": sample, "seed": settings.seed, "prompt": prompt, "text": text}
            row["finish_reason"] = "stop" if sample in stopped else "length"
            row["tokens"] = [checkpoint.tokenizer.itos[i] for i in ids]
            row |= {"ids": ids, "logprobs": [round(token.logprob, 6) for token in own]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        _say(f"{len(tokens):,} tokens, {len(tokens) / max(seconds, 1e-9):,.0f} a second")


def _ask(checkpoint: Checkpoint, settings: GenerateConfig, args: argparse.Namespace) -> int:
    """Ask for prompts and continue them, until end of file. Ctrl-C ends an answer."""
    with contextlib.suppress(ModuleNotFoundError):  # line editing and history, where Python has it (not on Windows)
        import readline  # noqa: F401
    _say("a prompt, Enter; each is continued on its own; Ctrl-C ends an answer, Ctrl-D the session")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            _say("")
            return 0
        except KeyboardInterrupt:
            _say("")
            continue
        try:
            _write_samples(checkpoint, _known(checkpoint, prompt, args.unknown), settings, args)
        except RequestError as error:
            _say(str(error))
        except KeyboardInterrupt:
            _say("")


# ---------------------------------------------------------------- evaluate


def evaluate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "evaluate",
        "The exact loss of a model on a text; and, on the text it was trained on, how like that text what it writes is:\n"
        "rates of characters, share of words that occur in it, longest span copied from it, share of new 8-grams.",
        ["bin/evaluate --ckpt model.npz", "bin/evaluate --ckpt model.npz another.txt --json"],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    parser.add_argument(
        "text",
        nargs="?",
        metavar="TEXT",
        help="a text file (default: the one the model was trained on, of which only the held-out part counts)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines for people")
    parser.add_argument(
        "--sample-tokens",
        type=_at_least_0,
        default=2000,
        metavar="N",
        help="characters to sample for comparing with the training text; 0: none (default: 2000)",
    )
    return parser


def _at_least_0(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"sample_tokens must be a whole number at least 0, got {text!r}")
    return int(text)


def evaluate_command(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt)
    path, ids, held_out = _text_of(checkpoint, args.text, "name one after the flags")
    if held_out is None:
        what, scored = f"all of {path}", ids
    elif len(held_out):
        what, scored = f"the held-out part of {path}", held_out
    else:
        what, scored = f"all of {path}, every character of which the model was trained on", ids
    result = evaluate(checkpoint.model, scored)
    if not np.isfinite(result.loss):
        return _failed("evaluate", f"the loss is {result.loss}: the model's weights or what it computes are not finite numbers")
    like = None
    if held_out is not None and args.sample_tokens:
        trained_on = checkpoint.tokenizer.decode(ids[: min(len(ids) - len(held_out), LARGEST_TEXT)])
        like = likeness(_samples_of(checkpoint, args.sample_tokens), trained_on)
    numbers = {"what": what, "characters": result.n_targets, "loss": result.loss, "stderr": result.stderr}
    numbers |= {"perplexity": result.perplexity, "bits_per_character": result.bits_per_token}
    if args.json:
        print(json.dumps(numbers | {"likeness": like and dataclasses.asdict(like)}, ensure_ascii=False))
        return 0
    plus_minus = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    print(f"{what}: {result.n_targets:,} characters predicted")
    print(f"loss {result.loss:.4f}{plus_minus} nats per character")
    print(f"perplexity {result.perplexity:.3f}, {result.bits_per_token:.4f} bits per character")
    if like:
        _print_likeness(like)
    return 0


def _text_of(checkpoint: Checkpoint, asked: str | None, hint: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(where it is, the ids of the text to judge a model on, the held-out ones of them when it was trained on it)."""
    path, trained = asked or checkpoint.source, checkpoint.train_config
    if path is None or (asked is None and trained is None):
        raise RequestError(f"this checkpoint does not say what text it was trained on; {hint}")
    if asked is None and not Path(path).is_file():
        raise RequestError(f"the text it was trained on, {path}, is not here; {hint}")
    _, ids = read_ids(path, checkpoint.tokenizer, _progress_bar)
    held_out = None
    if trained is not None and fingerprint(ids) == checkpoint.fingerprint:
        held_out = split(ids, trained.val_fraction)[1]
    if asked is None and held_out is None:
        raise RequestError(f"{path} is no longer the text this model was trained on; {hint} to judge it on another")
    return path, ids, held_out


def _samples_of(checkpoint: Checkpoint, tokens: int) -> list[str]:
    """Texts from the model, sixteen side by side, at temperature 0.8, the same every time."""
    n = min(16, tokens)
    settings = GenerateConfig(max_new_tokens=tokens // n, seed=0, num_samples=n, window="half")
    texts = dict.fromkeys(range(n), "")
    for piece in generate_texts(checkpoint.model, checkpoint.tokenizer, "", settings):
        texts[piece.sample] += piece.text
    return list(texts.values())


def _print_likeness(like: Likeness) -> None:
    print(f"{like.characters:,} sampled characters (temperature 0.8) against the {like.of:,} of the training text:")
    for kind, (ours, theirs) in like.rates.items():
        print(f"  {kind:13} {100 * ours:5.1f} %, there {100 * theirs:5.1f} %")
    if like.known_words is not None:
        print(f"  {100 * like.known_words:.0f} % of the words occur there")
    if like.new_ngrams is not None:
        print(f"  {100 * like.new_ngrams:.0f} % of the spans of {NGRAM} characters do not")
    print(f"  the longest span copied has {len(like.longest_copy)} characters: {like.longest_copy[:60]!r}")


# ---------------------------------------------------------------- compare


def compare_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "compare",
        "What differs between runs, and whether it matters: settings, parameters, time, and the difference of their\n"
        "losses on the same held-out text. For changing one thing at a time. The standard error says how much another\n"
        "text of this kind could change the difference; another seed can change it more, so repeat what is close.",
        ["bin/compare a.npz b.npz", "bin/compare small.npz large.npz --text another.txt"],
    )
    parser.add_argument(
        "ckpt", nargs="+", metavar="FILE", help="checkpoints written by train; the first is what others are held against"
    )
    parser.add_argument("--text", metavar="TEXT", help="the text to judge on (default: the held-out part of the first one's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a checkpoint")
    return parser


def compare_command(args: argparse.Namespace) -> int:
    if len(args.ckpt) < 2:
        raise RequestError(f"expected two checkpoints or more to compare, got {len(args.ckpt)}")
    runs = {name: load(name) for name in args.ckpt}
    if len(runs) < len(args.ckpt):
        raise RequestError("a checkpoint is named twice")
    first = runs[args.ckpt[0]]
    path, ids, held_out = _text_of(first, args.text, "name one with --text")
    judged = ids if held_out is None or not len(held_out) else held_out
    text = first.tokenizer.decode(judged)
    settings = {
        name: vars(run.config) | (vars(run.train_config) if run.train_config else {}) | {"text": run.source}
        for name, run in runs.items()
    }
    differing = [key for key in settings[args.ckpt[0]] if len({repr(s.get(key)) for s in settings.values()}) > 1]
    with Workers() as workers:
        results = compare([(run.model, run.tokenizer.encode_array(text)) for run in runs.values()], workers)
    for name, (loss, _) in zip(runs, results, strict=True):
        if not np.isfinite(loss.loss):
            return _failed(
                "compare", f"the loss of {name} is {loss.loss}: its weights, or what it computes, are not finite numbers"
            )
    rows = []
    for (name, run), (loss, against) in zip(runs.items(), results, strict=True):
        row = {"checkpoint": name, "step": run.step, "parameters": run.config.num_parameters()}
        row |= {"seconds": _seconds_of(Path(name)), "loss": loss.loss, "stderr": loss.stderr}
        row |= {"difference": against and against.difference, "difference_stderr": against and against.stderr}
        rows.append(row | {"settings": {key: settings[name].get(key) for key in differing}})
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    for name, run in runs.items():
        if run.fingerprint != first.fingerprint:
            _say(f"warning: {name} was trained on another text than {args.ckpt[0]}")
        elif held_out is not None and run.train_config and run.train_config.val_fraction < _held_out_fraction(first):
            _say(f"warning: {name} was trained on a part of what is held out here; put it first")
    part = "the held-out part" if held_out is not None and len(held_out) else "all"
    print(f"on {part} of {path}, {len(judged) - 1:,} characters predicted")
    width = max(map(len, args.ckpt))
    for row in rows:
        seconds = "" if row["seconds"] is None else f", {_duration(row['seconds'])}"
        print(f"{row['checkpoint']:{width}}  loss {row['loss']:.4f}{_verdict(row)}")
        print(f"{'':{width}}  step {row['step']}, {row['parameters']:,} parameters{seconds}")
        if differing:
            print(f"{'':{width}}  " + ", ".join(f"{key} {value}" for key, value in row["settings"].items()))
    return 0


def _held_out_fraction(run: Checkpoint) -> float:
    return run.train_config.val_fraction if run.train_config else 0.0


def _verdict(row: dict[str, Any]) -> str:
    """How a loss differs from the first one's."""
    difference, stderr = row["difference"], row["difference_stderr"]
    if difference is None:
        return ""
    if stderr is None:
        return f", {difference:+.4f}"
    clear = "no clear difference" if abs(difference) <= 2 * stderr else "better" if difference < 0 else "worse"
    return f", {difference:+.4f} ± {stderr:.4f}: {clear}"


def _seconds_of(path: Path) -> float | None:
    """How long a run has taken, from its log; None when that is not there or does not say."""
    parts = [0.0]
    for event in read_log(log_path(path)):
        if event["event"] in ("start", "resume"):
            parts.append(0.0)
        parts[-1] = event.get("elapsed", parts[-1])
    return sum(parts) or None


# ---------------------------------------------------------------- gradcheck


GRADCHECK_MODEL = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def gradcheck_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "gradcheck",
        "Hold every parameter's gradient in a small GPT against finite differences, in float64, dropout on: of each\n"
        "parameter a dozen elements, and three random directions that every element has a part in. Where the function\n"
        "is not smooth (a kink, as ReLU's at 0) there is nothing to compare with; such places are counted.",
        ["bin/gradcheck --activation relu --n-layer 3", "bin/gradcheck --ckpt model.npz"],
    )
    parser.add_argument(
        "--ckpt", metavar="FILE", help="check the model of a checkpoint, with its weights (default: a small one)"
    )
    add_flags(parser, GPTConfig, defaults=GRADCHECK_MODEL)
    return parser


def gradcheck(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    asked = given(GPTConfig, args)
    if args.ckpt and asked:
        raise RequestError(f"a checkpoint has its own shape: leave out --ckpt or --{next(iter(asked)).replace('_', '-')}")
    trained = None
    if args.ckpt:
        checkpoint = load(args.ckpt)
        if checkpoint.crash is not None:
            raise RequestError(f"{args.ckpt} is a crash file, whose numbers are beyond checking; see npgpt replay")
        trained = checkpoint.model
    config = trained.config if trained else GPTConfig(**(GRADCHECK_MODEL | asked))
    model = GPT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    if trained:
        model.load_state_dict(trained.state_dict())
    else:
        for p in model.parameters():  # weights of ordinary size, so that no term is too small to show
            p.data[...] += 0.3 * rng.standard_normal(p.shape)
    ids = rng.integers(0, config.vocab_size, (2, min(config.block_size, 8) + 1))
    x, y = ids[:, :-1], ids[:, 1:]

    def loss() -> npgpt.Tensor:
        logits, _ = model(x, rng=generator(0, Stream.DROPOUT))  # the same masks every time
        return ops.cross_entropy(logits, y, reduction="none")

    parameters = dict(model.named_parameters())
    width = max(map(len, parameters))
    print(f"{'parameter':{width}}  {'shape':>9}  checked  kinks  largest error  median error")
    reports = check_tensors(loss, parameters, op="GPT", rtol=1e-7, max_elements=12)
    with one_blas_thread(), tqdm(total=len(parameters), unit="parameter", disable=None, leave=False) as bar:
        for report in reports:
            shape = "x".join(map(str, parameters[report.name].shape))
            errors = f"{report.max_error:13.1e}  {report.median_error:12.1e}"
            with bar.external_write_mode(file=sys.stdout):
                print(f"{report.name:{width}}  {shape:>9}  {report.checked:7}  {report.kinks:5}  {errors}", flush=True)
            bar.update()
    print("all gradients agree with finite differences to 1e-7")
    return 0


# ---------------------------------------------------------------- replay


def replay_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "replay",
        "Repeat the step at which a training run found a number that is not finite, and say which operation gave it.",
        ["bin/npgpt replay model.crash.npz"],
    )
    parser.add_argument("ckpt", metavar="FILE", help="the crash file the run has left")
    return parser


def replay(args: argparse.Namespace) -> int:
    crash = load(args.ckpt)
    if crash.crash is None or crash.batch is None or crash.train_config is None:
        raise RequestError(f"{args.ckpt} is no crash file, but the checkpoint of a run; train writes a NAME.crash.npz")
    config = crash.train_config
    with Workers(1) as workers:
        step = ParallelStep(crash.model, workers, config.micro_batch)
        loss = step(*crash.batch, config.seed, crash.step)
        found = step.diagnose(*crash.batch, config.seed, crash.step)
    print(f"step {crash.step + 1}, loss {loss}: {found}")
    if found != crash.crash:
        print(f"the run itself had found: {crash.crash}")
    return 0


# ---------------------------------------------------------------- inspect


def inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("inspect", "What a checkpoint holds.", ["bin/inspect model.npz", "bin/inspect --arrays model.npz"])
    parser.add_argument("ckpt", metavar="FILE", help="a checkpoint written by train")
    parser.add_argument("--arrays", action="store_true", help="also list every array")
    return parser


def inspect(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt, with_optimizer=True)
    config, progress = checkpoint.config, checkpoint.progress
    print(f"{args.ckpt}: {checkpoint.model.num_parameters():,} parameters, step {checkpoint.step}")
    verified = "the SHA-256 of every array verified" if checkpoint.format > 1 else "which has no hashes to verify"
    print(f"file        format {checkpoint.format}, {verified}")
    if checkpoint.crash is not None:
        print(f"crash       {checkpoint.crash} (npgpt replay repeats the step)")
    print("model       " + ", ".join(f"{k} {v}" for k, v in vars(config).items()))
    if checkpoint.train_config:
        print("training    " + ", ".join(f"{k} {v}" for k, v in vars(checkpoint.train_config).items()))
    print(f"vocabulary  {checkpoint.tokenizer.characters!r}")
    if checkpoint.fingerprint:
        print(f"text        SHA-256 of its ids {checkpoint.fingerprint}")
    if checkpoint.machine:
        print("machine     " + ", ".join(f"{k} {v}" for k, v in checkpoint.machine.items()))
    for step, train_loss, val_loss, _ in progress.get("history", []):
        best = " (best)" if step == progress.get("best_step") else ""
        val = "" if val_loss is None else f", val loss {val_loss:.4f}{best}"
        print(f"step {step:6}  train loss {train_loss:.4f}{val}")
    if args.arrays:
        for name, array in checkpoint.model.state_dict().items():
            with np.errstate(over="ignore", invalid="ignore"):  # of a crash file
                numbers = f"mean {array.mean():+.4f}  std {array.std():.4f}"
            print(f"{name:28} {array.shape!s:14} {array.dtype}  {numbers}")
    return 0


# ---------------------------------------------------------------- main

COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int], str]] = {
    "train": (train_parser, train, "train a GPT on a text file"),
    "generate": (generate_parser, generate, "write text with a trained model"),
    "evaluate": (evaluate_parser, evaluate_command, "the exact loss of a model on a text"),
    "compare": (compare_parser, compare_command, "what differs between runs, and whether it matters"),
    "gradcheck": (gradcheck_parser, gradcheck, "check the hand-written gradients"),
    "replay": (replay_parser, replay, "repeat the step at which a run went wrong"),
    "inspect": (inspect_parser, inspect, "what a checkpoint holds"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started this
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where something else has taken the stream's place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    with contextlib.redirect_stderr(_Unread(sys.stderr)):
        try:
            status = COMMANDS[name][1](COMMANDS[name][0]().parse_args(argv[1:])) if name else _no_command(argv)
            sys.stdout.flush()
        except (RequestError, DeviceError) as error:
            _say(f"npgpt {name}: {error}")
            return 2
        except (GradientError, FloatingPointError) as error:
            return _failed(name, str(error))
        except MemoryError:
            return _failed(name, "out of memory")
        except BrokenPipeError:  # `npgpt generate | head`: the reader has what it wanted
            _silence(sys.stdout)
            return 0
        except OSError as error:
            _silence(sys.stdout)  # it may be what failed, and be tried again at the end
            return _failed(name, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        except KeyboardInterrupt:
            return 130
        return status


def _no_command(argv: list[str]) -> int:
    if not argv:
        _say(f"npgpt: expected a command, one of {', '.join(COMMANDS)} (see npgpt --help)")
        return 2
    if argv[0] in ("-h", "--help"):
        print("usage: npgpt NAME ...\n")
        print("\n".join(f"  npgpt {name:10} {about}" for name, (_, _, about) in COMMANDS.items()))
        print("\nnpgpt NAME --help says more; bin/NAME is the same as npgpt NAME.")
        return 0
    if argv[0] == "--version":
        print(f"npgpt {npgpt.__version__}, NumPy {np.__version__}, {describe_blas()}, {available_cores()} cores")
        return 0
    close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    _say(f"npgpt: unknown command {argv[0]!r}; {hint}")
    return 2


class _Unread:
    """A stream that may go away, such as the terminal of a run left alone: what is written then is lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _silence(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _silence(stream: Any) -> None:
    """Send what is still written to a stream nowhere."""
    with contextlib.suppress(OSError):  # one that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line in one line, and guesses what a misspelt flag was meant to be."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(wrong.split("=")[0], flags, n=1)
            message = f"unknown argument {wrong}" + (f"; did you mean {close[0]}?" if close else "")
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser(name: str, about: str, examples: list[str]) -> argparse.ArgumentParser:
    description = "examples:\n" + "\n".join(f"  {e}" for e in examples) + f"\n\n{about}"
    return _Parser(
        prog=f"npgpt {name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _say(message: str, end: str = "\n") -> None:
    """Print to stderr."""
    print(message, file=sys.stderr, end=end, flush=True)


def _failed(name: str, message: str) -> int:
    _say(f"npgpt {name}".rstrip() + f": {message}")
    return 1


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
