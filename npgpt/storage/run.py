"""The files of a training run: where they are, who may write them, how they are saved and logged. No training.

A run whose checkpoint is `model.npz` has these files:

    model.npz        the model with the lowest validation loss so far
    model.last.npz   the state at the last evaluation or interruption; a run resumes from it
    model.jsonl      the log: one JSON object per line
    model.crash.npz  after a loss or gradient that was not finite: that step, for `npgpt replay`

Files of an earlier run are kept as `model.previous.npz` and so on. While a run lasts, `.model.npz.lock` keeps a second run
from writing the same files.
"""

from __future__ import annotations

import contextlib
import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint, save, step_of
from npgpt.storage.files import atomic_copy, atomic_write, lock, remove_leftovers


class RunFiles:
    """The files of one run. At first they may belong to an earlier run; `claim` makes them this run's own."""

    def __init__(self, best: Path) -> None:
        """best: the path of the run's checkpoint. Raises RequestError if it does not end in .npz."""
        if best.suffix != ".npz":
            raise RequestError(f"out must end in .npz, got {best}")
        self.best = best
        self.saved_step: int | None = None  # the step of the state that this run saved last
        self._owned = False  # whether the files belong to this run

    # ---------------------------------------------------------------- paths

    @property
    def last(self) -> Path:
        return self.best.with_name(f"{self.best.stem}.last.npz")

    @property
    def log(self) -> Path:
        return log_path(self.best)

    @property
    def crash(self) -> Path:
        return self.best.with_name(f"{self.best.stem}.crash.npz")

    def paths(self) -> list[Path]:
        """The paths of all files, whether or not they exist."""
        return [self.best, self.last, self.log, self.crash]

    def previous_paths(self) -> list[Path]:
        """Where the files of the run before are kept."""
        return [self._previous(path) for path in self.paths()]

    def _previous(self, path: Path) -> Path:
        return path.with_name(path.name.replace(self.best.stem, f"{self.best.stem}.previous", 1))

    # ---------------------------------------------------------------- ownership

    def locked(self) -> AbstractContextManager[None]:
        """Inside `with`, no other run can write these files. Raises RequestError if another run has them locked."""
        return lock(self.best.with_name(f".{self.best.name}.lock"), str(self.best))

    @property
    def are_of_earlier_run(self) -> bool:
        """Whether files of an earlier run are here, which `claim` will set aside."""
        return not self._owned and any(path.exists() for path in self.paths())

    def adopt(self, step: int) -> None:
        """Mark the files as this run's own. step: the step of the state that was loaded from them."""
        self._owned, self.saved_step = True, step

    def disown(self) -> None:
        """Mark the files as another run's: `claim` will set them aside."""
        self._owned, self.saved_step = False, None

    def claim(self) -> bool:
        """Make the files this run's own, and set aside those of an earlier run. The caller must hold the lock.

        Returns whether the checkpoint at `best` belongs to this run. Raises RequestError if another run has continued from the
        state in the meantime.
        """
        for path in self.paths():
            remove_leftovers(path)
        state_step = step_of(self.last) if self._owned and self.last.exists() else None
        if state_step is not None and state_step != self.saved_step:
            raise RequestError(f"another run has continued from {self.last} in the meantime; start again with --resume")
        state_is_gone = state_step is None and self.saved_step is not None
        if not self._owned or state_is_gone:
            self._set_aside()
            self._owned = True
            return False
        return self.saved_step is None or self.best.exists()

    def _set_aside(self) -> None:
        """Rename the files of an earlier run. Files of the run before it go, so that all `previous` files are of one run."""
        if any(path.exists() for path in self.paths()):
            for path in self.paths():
                if path.exists():
                    path.replace(self._previous(path))
                else:
                    self._previous(path).unlink(missing_ok=True)

    # ---------------------------------------------------------------- saving

    def save(self, checkpoint: Checkpoint, is_best: bool) -> None:
        """Write the state to `last`. Copy it to `best` if it is the best so far, or none was evaluated yet. Raises OSError."""
        save(self.last, checkpoint)
        self.saved_step = checkpoint.step
        # A run that stops before its first evaluation leaves a model too, its newest one.
        unjudged = not checkpoint.progress.history and checkpoint.progress.best_loss is None
        if is_best or not self.best.exists() or unjudged:
            atomic_copy(self.last, self.best)

    def try_to_save(self, checkpoint: Checkpoint) -> None:
        """Write the run's state to a temporary file and remove it. Raises what `save` would raise."""
        try:
            save(self.crash, checkpoint, keep=False)  # the longest of the names
        except OSError as error:
            error.filename = str(self.last)
            raise

    # ---------------------------------------------------------------- the log

    def append_to_log(self, event: dict[str, Any]) -> None:
        """Add one line to the log. An event named "start" begins a new log. Raises OSError."""
        with self.log.open("w" if event["event"] == "start" else "a", encoding="utf-8", newline="\n") as log:
            log.write(_line(event))

    def cut_log(self, step: int) -> None:
        """Remove from the log what came after `step`, and an incomplete last line. Raises OSError."""
        if self.log.exists():
            kept = [_line(event) for event in read_log(self.log) if event["step"] <= step]
            with atomic_write(self.log, lambda _: None) as file:
                file.write("".join(kept).encode())


def log_path(checkpoint: Path) -> Path:
    """The path of the log of the run that writes this checkpoint, or this state (see the top)."""
    stem = checkpoint.stem.removesuffix(".last").removesuffix(".crash")
    return checkpoint.with_name(f"{stem}.jsonl")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a run's log; an empty list if there is no log. Incomplete lines are left out."""
    events = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
                events.append(event)
    return events


def number_in_log(value: Any) -> float:
    """A value of an event as a number; NaN if it is not a finite number. A stranger may have written the log."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else math.nan


def seconds_of(events: list[dict[str, Any]]) -> list[float]:
    """For each event of a log, how long the run had taken until then. A log counts from each start or resumption."""
    before = seconds = 0.0
    found = []
    for event in events:
        elapsed = number_in_log(event.get("elapsed"))
        if event["event"] in ("start", "resume"):
            before = seconds
        seconds = before + (0.0 if math.isnan(elapsed) else elapsed)
        found.append(seconds)
    return found


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"
