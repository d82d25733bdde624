"""A run while it goes on: a progress bar on a terminal, and a line for each evaluation everywhere. Nothing is trained here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from npgpt.console.observers import Observer
from npgpt.console.run_messages import evaluation_line
from npgpt.console.terminal import say
from npgpt.training.events import End, Evaluation, Step
from npgpt.training.trainer import Trainer


def show_run(trainer: Trainer, stop_requested: Callable[[], bool], tell: Observer) -> End:
    """Run the trainer to its end, and tell `tell` and the user what happens."""
    from tqdm import tqdm

    started = shown = time.perf_counter()
    tokens = 0
    # disable=None: no bar if stderr is not a terminal.
    bar = tqdm(
        total=trainer.config.steps, initial=trainer.progress.step, unit="step", disable=None, dynamic_ncols=True, leave=False
    )
    with bar:
        for event in trainer.run(stop_requested):
            tell(event)
            if isinstance(event, Step):
                tokens += event.tokens
                bar.update(event.step - bar.n)
                if time.perf_counter() - shown > 0.5:
                    shown = time.perf_counter()
                    bar.set_postfix_str(f"loss {event.loss:.3f}, {event.tokens / event.seconds:,.0f} tokens/s", refresh=False)
            elif isinstance(event, Evaluation):
                elapsed = time.perf_counter() - started
                steps_left = trainer.config.steps - event.step
                left = elapsed * (steps_left * trainer.dataset.batch_size * trainer.dataset.block_size) / max(1, tokens)
                with bar.external_write_mode(file=sys.stderr):
                    say(evaluation_line(event, tokens / elapsed, left, trainer.tokenizer.is_characters))
                    if event.sample:
                        say("\n".join("    | " + line for line in event.sample.strip("\n").split("\n")))
            else:
                return event
    raise AssertionError("a run ends with an End record")
