"""What a training run yields: a record for each step and each evaluation, and one for the end. No training here."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One optimiser step. `step` counts from 1. `loss` is the batch's mean cross-entropy in nats, with dropout."""

    step: int
    loss: float
    grad_norm: float  # before clipping
    lr: float
    tokens: int
    seconds: float  # on a GPU, the mean over a group of steps


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, after step `step`. Losses are in nats per token.

    The bits are those of val_loss, or of train_loss if no text is held out. They compare runs with different tokenizers.
    """

    step: int
    train_loss: float | None  # the mean over the steps since the last evaluation; None before the first step
    val_loss: float | None  # over at most `eval_tokens` held-out tokens; None if no text is held out
    val_stderr: float | None  # the standard error of val_loss
    best: bool  # whether val_loss is the lowest so far; always true without held-out text
    sample: str
    seconds: float
    bits_per_character: float | None = None
    bits_per_byte: float | None = None


class Outcome(enum.Enum):
    """Why a run ended."""

    FINISHED = "finished"
    EARLY_STOP = "early_stop"  # the validation loss did not improve for a while
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"  # a loss or a gradient was not finite


@dataclass(frozen=True)
class End:
    """The last record of a run."""

    step: int
    outcome: Outcome
    advice: str
    reason: str = ""  # if the run diverged: what was not finite, and where it came from


class Events(Iterator[Step | Evaluation | End]):
    """The records of a run, as an iterator. The run goes on only while it is iterated over, so it warns if it never was."""

    def __init__(self, events: Generator[Step | Evaluation | End, None, None]) -> None:
        self._events, self._begun = events, False

    def __next__(self) -> Step | Evaluation | End:
        self._begun = True
        return next(self._events)

    def close(self) -> None:
        """Leave the run where it is. `run()` continues from there."""
        self._begun = True
        self._events.close()

    def __del__(self) -> None:
        if not self._begun:
            warnings.warn(
                "trainer.run() was not iterated over, so nothing was trained; write: for event in trainer.run(): ...",
                RuntimeWarning,
                stacklevel=2,
            )
