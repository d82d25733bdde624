"""Shows a training run elsewhere while it goes on: in a browser, in TensorBoard. Nothing is trained here."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.console.extras import SERVE, check_installed
from npgpt.console.terminal import say
from npgpt.training.events import End, Evaluation, Step
from npgpt.training.trainer import Trainer

Observer = Callable[[Step | Evaluation | End], None]
WATCH_PORT = 8001  # beside the 8000 of `serve`


class Observers:
    """What the flags --watch and --tensorboard ask for.

    The constructor checks packages, port and folder, and writes no file.
    """

    def __init__(self, watch_port: int | None, tensorboard: str | None) -> None:
        """Raises RequestError if a package is missing, the port is taken, or the folder cannot be written to."""
        self._listening, self._folder = None, None if tensorboard is None else Path(tensorboard)
        if self._folder is not None:
            check_installed("tensorboardX")
            existing = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                raise RequestError(f"--tensorboard: {self._folder} cannot be written to; name another folder")
        if watch_port is not None:
            check_installed(*SERVE, "matplotlib")
            from npgpt.serving.server import address, listen

            self._listening = listen("127.0.0.1", watch_port, "--watch")
            self._address = address(self._listening)
            weakref.finalize(self, self._listening.close)  # a run that never begins leaves no open socket

    @contextlib.contextmanager
    def of(self, trainer: Trainer) -> Iterator[Observer]:
        """Inside `with`, a function to be told every event of the run. The page is there from the first event on."""
        with contextlib.ExitStack() as stack:
            observers: list[Observer] = []
            if self._folder is not None:
                from npgpt.report.tensorboard import TensorBoardWriter

                writer = TensorBoardWriter(self._folder)
                stack.callback(writer.close)
                writer.begin(trainer.checkpoint())
                observers.append(writer.write)
            if self._listening is not None:
                stack.enter_context(self._listening)
                say(f"        watch it in a browser: {self._address}")
                observers.append(self._page(trainer, stack))

            def tell(event: Step | Evaluation | End) -> None:
                for observer in observers:
                    observer(event)

            yield tell

    def _page(self, trainer: Trainer, stack: contextlib.ExitStack) -> Observer:
        from npgpt.serving.live import LiveReport
        from npgpt.serving.server import running

        assert trainer.files is not None
        assert self._listening is not None
        listening, files = self._listening, trainer.files
        live: LiveReport | None = None

        def observe(event: Step | Evaluation | End) -> None:
            nonlocal live
            if live is None:  # now the log at this path is that of this run
                live = LiveReport(files.best.name, trainer.checkpoint(), files.log)
                stack.enter_context(running(live, listening))
            if isinstance(event, End):
                live.finish()

        return observe
