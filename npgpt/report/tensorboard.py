"""Writes the events of a run for TensorBoard, by tensorboardX. Needs the extra [tensorboard]."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from npgpt.storage.checkpoint import Checkpoint
from npgpt.training.events import End, Evaluation, Step


class TensorBoardWriter:
    """Writes scalars and samples into files that TensorBoard reads."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if the folder cannot be written to."""
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = SummaryWriter(str(folder))

    def begin(self, checkpoint: Checkpoint) -> None:
        """Write the settings of the run that begins or goes on."""
        settings = {"model": asdict(checkpoint.config)}
        if checkpoint.train_config:
            settings["training"] = asdict(checkpoint.train_config)
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", checkpoint.step)

    def write(self, event: Step | Evaluation | End) -> None:
        """Write one event."""
        if isinstance(event, Step):
            numbers: dict[str, float | None] = {
                "train/loss": event.loss,
                "train/grad_norm": event.grad_norm,
                "train/lr": event.lr,
            }
            numbers["speed/tokens_per_second"] = event.tokens / max(event.seconds, 1e-9)
        elif isinstance(event, Evaluation):
            numbers = {"val/loss": event.val_loss, "val/bits_per_character": event.bits_per_character}
            if event.sample:
                quoted = "\n".join("    " + line for line in event.sample.split("\n"))  # a block of code in Markdown
                self._writer.add_text("sample", quoted, event.step)
        else:
            self._writer.add_text("end", f"{event.outcome.value}. {event.reason or event.advice}", event.step)
            return
        for name, number in numbers.items():
            if number is not None:
                self._writer.add_scalar(name, number, event.step)

    def close(self) -> None:
        self._writer.close()
