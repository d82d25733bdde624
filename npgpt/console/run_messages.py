"""What `npgpt train` tells a person: the banner, a line for each evaluation, how the run ended. Nothing is trained here."""

from __future__ import annotations

import argparse
import shlex

from npgpt.console.terminal import command, duration, say
from npgpt.evaluation.loss import Loss
from npgpt.parallel.limits import core_limit
from npgpt.parallel.machine import describe_blas, describe_kernels
from npgpt.parallel.step import micro_batches
from npgpt.storage.run import RunFiles
from npgpt.text.corpus import Corpus
from npgpt.text.sources import Sources
from npgpt.text.tokenizer import text_size
from npgpt.training.advice import MUCH_REPEATED, with_out
from npgpt.training.events import End, Evaluation, Outcome
from npgpt.training.trainer import Trainer

MOST_FILES = 20  # files of a text that are listed one by one


def print_banner(trainer: Trainer, corpus: Corpus, files: RunFiles, base: str | None = None) -> None:
    """base: the checkpoint that the run starts from, if there is one."""
    dataset, config, model = trainer.dataset, trainer.config, trainer.model
    held_out = f"{len(dataset.val):,} held out" + (f": {corpus.val_sources}" if corpus.val_sources else "")
    say(f"text    {corpus.sources}: {_size_of_text(trainer)}; {len(dataset.train):,} to train on, {held_out}")
    for sources in (corpus.sources, corpus.val_sources):
        if sources:
            _print_files(sources)
    if dataset.repeated_share > MUCH_REPEATED:
        share = f"{dataset.repeated_share:.0%} of the held-out text also occurs in the training text"
        say(f"warning: {share}, so the validation loss will be too low; remove the copies, or hold out another text")
    c = model.config
    say(f"model   {model.num_parameters():,} parameters: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd},", end=" ")
    say(f"block_size {c.block_size}, dropout {c.dropout:g}, {c.activation}, {c.position} positions")
    precision = " in bfloat16" if config.bf16 else " in TF32" if config.tf32 else ""
    say(f"run     {config.steps:,} steps of {config.batch_size} x {c.block_size} tokens", end=" ")
    say(f"on {model.backend.name}{precision},", end=" ")
    say(f"{config.optimizer}, seed {config.seed}, log in {files.log}")
    if model.backend.is_cpu:
        cores = core_limit()
        threads = config.threads or cores.value
        is_own = config.threads or cores.source == "cores" or trainer.ranks.size > 1
        limited = "" if is_own else f" (limited by {cores.source})"
        say(f"        {threads} worker{'' if threads == 1 else 's'}{limited}, {describe_kernels()} kernels, {describe_blas()}")
    if trainer.ranks.size > 1:
        of_a_rank = None if model.backend.is_cpu else -(-config.batch_size // trainer.ranks.size)
        parts = len(micro_batches(config.batch_size, c.block_size, config.micro_batch or of_a_rank))
        idle = f"; only {parts} have work, because a batch has {parts} micro-batches (--micro-batch)"
        say(f"        {trainer.ranks.description}{idle if parts < trainer.ranks.size else ''}")
    if trainer.files and trainer.files.are_of_earlier_run:
        previous = files.previous_paths()[0]
        replaced = ", in place of the run there" if previous.exists() else ""
        say(f"        the run that is now in {files.best} is kept as {previous}{replaced}")
    if base is not None:
        say(f"        it starts with the weights of {base}")
    if trainer.progress.step:
        say(f"        resumed at step {trainer.progress.step}")
    if trainer.changes.settings:
        again = "" if trainer.changes.comparable else "; the search for the lowest validation loss begins again"
        say(f"        from step {trainer.progress.step + 1} on: {trainer.changes}{again}")


def _size_of_text(trainer: Trainer) -> str:
    tokenizer, n = trainer.tokenizer, len(trainer.dataset.ids)
    if tokenizer.is_characters:
        is_new = not trainer.pretrained and not trainer.progress.step
        return f"{n:,} characters, {tokenizer.vocab_size} {'different' if is_new else 'known to the model'}"
    n_characters, _ = text_size(tokenizer, trainer.dataset.ids)
    return f"{n_characters:,} characters, {n:,} tokens of a BPE with {tokenizer.vocab_size:,}"


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


def evaluation_line(event: Evaluation, tokens_per_second: float, seconds_left: float, is_characters: bool) -> str:
    losses = [] if event.train_loss is None else [f"train loss {event.train_loss:.4f}"]
    if event.val_loss is not None:
        plus_minus = "" if event.val_stderr is None else f" ± {event.val_stderr:.4f}"
        losses.append(f"val loss {event.val_loss:.4f}{plus_minus}" + (" (best)" if event.best else ""))
    if not is_characters and event.bits_per_character is not None:  # None: the predicted tokens begin no character
        losses.append(f"{event.bits_per_character:.4f} bits per character, {event.bits_per_byte:.4f} per byte")
    if event.train_loss is None:
        return f"step {event.step}: {', '.join(losses)}: the model it starts from"
    left = f", {duration(seconds_left)} left" if seconds_left else ""
    return f"step {event.step}: {', '.join(losses)}, {tokens_per_second:,.0f} tokens/s{left}"


def _final_line(trainer: Trainer, files: RunFiles, generate: str) -> str:
    """Which model is in the checkpoint, and how good it is. generate: the command that writes with it."""
    progress, val = trainer.progress, trainer.dataset.val
    loss = ""
    if progress.best_loss is not None:
        loss = f", validation loss {progress.best_loss:.4f}"
        if not trainer.tokenizer.is_characters:
            bits = Loss(progress.best_loss, None, len(val) - 1, *text_size(trainer.tokenizer, val[1:])).bits_per_character
            loss += " nats per token" + ("" if bits is None else f", {bits:.4f} bits per character")
    if progress.best_step == 0 and progress.best_loss is not None:
        return (
            f"No evaluation was better than the model that this run started from. So {files.best} is that model{loss}; the "
            f"weights after step {progress.step} are in {files.last}"
        )
    return f"{files.best}: step {progress.best_step}{loss}; write with: {generate}"


def report_end(trainer: Trainer, end: End, args: argparse.Namespace, files: RunFiles, signal_number: int) -> int:
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
        say(with_out(end.advice, args.out))
    if end.outcome is Outcome.DIVERGED:
        return 1
    say(_final_line(trainer, files, f"{command('generate')} --ckpt {shlex.quote(str(files.best))}"))
    return 0


def write_error(error: OSError, args: argparse.Namespace, files: RunFiles) -> str:
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
