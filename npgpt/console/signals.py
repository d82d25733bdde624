"""Stopping in good order: the first SIGINT, SIGTERM or SIGHUP asks a run to stop at the end of its step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Calling it returns whether the process has been asked to stop. `signal_number` is the signal, or 0."""

    signal_number = 0

    def __call__(self) -> bool:
        return self.signal_number != 0


@contextlib.contextmanager
def interruptible(speak: bool = True) -> Iterator[StopRequest]:
    """Inside `with`, the first SIGINT, SIGTERM or SIGHUP sets the StopRequest. A second one ends the process at once.

    speak: whether to say what happens now. Outside the main thread nothing is done, because Python handles signals there alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request():
            os._exit(128 + number)
        request.signal_number = number
        if not speak:
            return
        with contextlib.suppress(OSError):  # the reader of stderr may have received the signal too
            # os.write, because the signal may have interrupted a print.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    # A closing terminal sends SIGHUP. Under `nohup` the process ignores SIGHUP, and that does not change here.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield request
    finally:
        if not request():  # after a request the process is about to end, and a second signal must still end it at once
            for number, handler in before.items():
                signal.signal(number, handler)
