"""Who else is told of a training run: a page that a browser shows, and TensorBoard. Nothing is trained here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.console.terminal import say
from npgpt.training.events import End, Evaluation, Step
from npgpt.training.trainer import Trainer

Observer = Callable[[Step | Evaluation | End], None]
WATCH_PORT = 8001  # beside the 8000 of `serve`
PACKAGES = {"starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve", "matplotlib": "plot"}  # with their extras


def check_installed(*packages: str) -> None:
    """Raise RequestError, saying how to install them, if packages are missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({PACKAGES[name] for name in missing}))
        raise RequestError(f"this needs {', '.join(missing)}; install with: pip install 'npgpt[{extras}]'")


class Observers:
    """What the flags --watch and --tensorboard ask for. Making it checks what could fail later."""

    def __init__(self, watch_port: int | None, tensorboard: str | None) -> None:
        """Raises RequestError if a package is missing, the port is taken, or the folder cannot be written to."""
        self._listening = self._writer = None
        if watch_port is not None:
            check_installed(*PACKAGES)
            from npgpt.serving.server import address, listen

            self._listening = listen("127.0.0.1", watch_port)
            self._address = address(self._listening)
        if tensorboard is not None:
            from npgpt.report.tensorboard import TensorBoardWriter

            self._writer = TensorBoardWriter(Path(tensorboard))

    @contextlib.contextmanager
    def of(self, trainer: Trainer) -> Iterator[Observer]:
        """Inside `with`, a function to be told every event of the run. The page is there from the first event on."""
        with contextlib.ExitStack() as stack:
            observers: list[Observer] = []
            if self._listening is not None:
                say(f"        watch it in a browser: {self._address}")
                observers.append(self._page(trainer, stack))
            if self._writer is not None:
                self._writer.begin(trainer.checkpoint())
                stack.callback(self._writer.close)
                observers.append(self._writer.write)

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
