"""Work that an interruption cannot end half-way. What the work does is not known here."""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Shield:
    """Does work so that Ctrl-C cannot end it half-way, as a context manager. `shield(work)` returns what `work()` returns.

    Python raises KeyboardInterrupt in the main thread, between any two instructions. So the work is done in another thread,
    which the caller waits for. An interruption of the caller waits until the work is done. If the work has not begun by then,
    it never begins. The caller's context variables, such as those of `no_grad`, apply to the work too.

    threaded: with False, the work is done in the caller's thread, without this protection.
    """

    def __init__(self, threaded: bool = True) -> None:
        self._threaded = threaded
        # SimpleQueue, locks and _thread have no Python code inside, which an interruption could end half-way. threading.Thread
        # has, and so has threading.Event.
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()

    def __enter__(self) -> Shield:
        if self._threaded:
            _thread.start_new_thread(self._serve, ())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._calls.put(None)

    def __call__(self, work: Callable[[], Result]) -> Result:
        if not self._threaded:
            return work()
        call = _Call(work)
        try:
            self._calls.put(call)
            call.wait()
        except BaseException:
            if not call.claim():  # the work has begun, or has ended
                call.wait_whatever_happens()
            raise
        return call.result()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.serve()
            call = None  # otherwise the result would live until the next call


class _Call:
    """A piece of work, and what has become of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._context = work, contextvars.copy_context()
        self._claimed, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def claim(self) -> bool:
        """Whether the work is the caller's now, to do it or to drop it: only one thread gets it."""
        return self._claimed.acquire(blocking=False)

    def serve(self) -> None:
        """Do the work, if nobody has dropped it."""
        if not self.claim():
            return
        try:
            self._result = self._context.run(self._work)
        except BaseException as error:  # noqa: BLE001 (`result` raises it again)
            self._error = error
        finally:
            self._is_done = True
            self._ended.release()

    def wait(self) -> None:
        self._ended.acquire()

    def wait_whatever_happens(self) -> None:
        while not self._is_done:
            with contextlib.suppress(KeyboardInterrupt):  # the caller raises the first one
                self._ended.acquire(timeout=0.1)

    def result(self) -> Any:
        """What the work returned. Raises what it raised."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # the traceback refers to this call: a cycle
        return self._result
