"""What a training run yields: a record for each step and each evaluation, and one for the end. Only data."""

from __future__ import annotations

import enum
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
    """One evaluation, after step `step`. Losses are in nats per token."""

    step: int
    train_loss: float  # the mean over the steps since the last evaluation
    val_loss: float | None  # over at most `eval_tokens` held-out tokens; None if no text is held out
    val_stderr: float | None  # the standard error of val_loss
    best: bool  # whether val_loss is the lowest so far; always true without held-out text
    sample: str
    seconds: float


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
