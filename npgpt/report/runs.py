"""What a report knows of a run: its settings and results as numbers and texts, from its checkpoint and its log. No HTML.

A log may come from a stranger or may have been cut off. What is not a number there becomes NaN, and is not drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.storage.checkpoint import Checkpoint
from npgpt.storage.run import number_in_log, seconds_of


@dataclass(frozen=True)
class Steps:
    """The optimiser steps in a log, as arrays (n,)."""

    step: np.ndarray
    minutes: np.ndarray  # since the run began
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    tokens_per_second: np.ndarray


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run, as arrays (n,), and the sample of each."""

    step: np.ndarray
    minutes: np.ndarray  # since the run began
    train_loss: np.ndarray
    val_loss: np.ndarray
    val_stderr: np.ndarray
    bits_per_character: np.ndarray
    samples: list[str]


class Run:
    """One run: `checkpoint` says what was trained, `events` (a log; see storage/run.py) how it went."""

    def __init__(self, name: str, checkpoint: Checkpoint, events: list[dict[str, Any]], out: str | None = None) -> None:
        """out: the path of the checkpoint, for commands that resume the run; by default the name."""
        self.out = out or name
        self.name, self.checkpoint, self.events = name, checkpoint, events
        self.seconds = seconds_of(events)
        self.steps = self._steps()
        self.evaluations = self._evaluations()

    @property
    def best(self) -> int | None:
        """The number of the evaluation with the lowest validation loss, or training loss if nothing is held out."""
        losses = self.evaluations.val_loss
        if not np.isfinite(losses).any():
            losses = self.evaluations.train_loss
        return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None

    @property
    def end(self) -> dict[str, Any] | None:
        """The event that ended the run; None if it goes on, or was killed."""
        return self.events[-1] if self.events and self.events[-1]["event"] == "end" else None

    @property
    def step(self) -> int:
        """The last known step."""
        return max((event["step"] for event in self.events), default=self.checkpoint.step)

    @property
    def total_steps(self) -> int | None:
        """How many steps the run was asked for; None if unknown."""
        return self.checkpoint.train_config.steps if self.checkpoint.train_config else None

    @property
    def time_left(self) -> str:
        """How long the run will still take, in words. Estimated from the steps since the last start or resumption."""
        begun = max((i for i, event in enumerate(self.events) if event["event"] in ("start", "resume")), default=None)
        if begun is None or self.total_steps is None or self.step <= self.events[begun]["step"]:
            return "unknown"
        done = self.step - self.events[begun]["step"]
        minutes = (self.seconds[-1] - self.seconds[begun]) / done * (self.total_steps - self.step) / 60
        return f"{minutes:.0f} min" if minutes >= 9.5 else f"{minutes:.1f} min"

    def changes(self) -> list[str]:
        """What was changed when the run was resumed, a line for each time."""
        found = []
        for event in self.events:
            changed = event.get("changes")
            if event["event"] == "resume" and isinstance(changed, dict):
                pairs = [(name, pair) for name, pair in changed.items() if isinstance(pair, list) and len(pair) == 2]
                named = ", ".join(f"{name} was {before} and became {now}" for name, (before, now) in pairs)
                found.append(f"From step {event['step'] + 1:,} on: {named}.")
        return found

    def settings(self) -> dict[str, str]:
        """Every setting of the model and of its training, as a text."""
        training = vars(self.checkpoint.train_config) if self.checkpoint.train_config else {}
        tokenizer = self.checkpoint.tokenizer
        described = f"{'characters' if tokenizer.is_characters else 'a BPE'}, {tokenizer.vocab_size:,}"
        return {"tokenizer": described} | {
            name: str(value) for name, value in (vars(self.checkpoint.config) | training).items()
        }

    def _steps(self) -> Steps:
        at = [i for i, event in enumerate(self.events) if event["event"] == "step"]
        events = [self.events[i] for i in at]
        seconds = _column(events, "seconds")
        with np.errstate(over="ignore"):
            tokens = np.divide(_column(events, "tokens"), seconds, out=np.full(len(at), np.nan), where=seconds > 0)
        return Steps(
            _column(events, "step"),
            np.array([self.seconds[i] for i in at]) / 60,
            _column(events, "loss"),
            _column(events, "lr"),
            _column(events, "grad_norm"),
            tokens,
        )

    def _evaluations(self) -> Evaluations:
        at = [i for i, event in enumerate(self.events) if event["event"] == "evaluation"]
        events = [self.events[i] for i in at]
        minutes = np.array([self.seconds[i] for i in at]) / 60
        if not events:  # without a log, the checkpoint remembers the losses
            keys = ("step", "train_loss", "val_loss", "val_stderr")
            events = [dict(zip(keys, row, strict=True)) for row in self.checkpoint.progress.history]
            minutes = np.full(len(events), np.nan)
        val_loss, bits = _column(events, "val_loss"), _column(events, "bits_per_character")
        if self.checkpoint.tokenizer.is_characters:  # logs of older versions do not have the bits
            bits = np.where(np.isfinite(bits), bits, val_loss / math.log(2))
        return Evaluations(
            _column(events, "step"),
            minutes,
            _column(events, "train_loss"),
            val_loss,
            _column(events, "val_stderr"),
            bits,
            [str(event.get("sample") or "") for event in events],
        )


def _column(events: list[dict[str, Any]], key: str) -> np.ndarray:
    """(n,): one value of each event; NaN where it is not a finite number."""
    return np.array([number_in_log(event.get(key)) for event in events], dtype=float)


def differing(runs: list[Run]) -> list[str]:
    """The names of the settings in which the runs differ."""
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if len({own.get(name) for own in settings}) > 1]


def short_names(paths: list[Path]) -> list[str]:
    """A short name for each checkpoint: its file name, or its path where two file names are equal."""
    names = [path.name for path in paths]
    return [path.name if names.count(path.name) == 1 else str(path) for path in paths]
