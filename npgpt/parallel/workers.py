"""Worker threads that work through a list together. This file does not know what they compute."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from npgpt.kernels.cpu import BLOCK
from npgpt.parallel.limits import available_cores
from npgpt.parallel.machine import blas_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """What applies a function to many items, side by side."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]: ...


class Workers:
    """A pool of worker threads, as a context manager.

    Inside `with`, the BLAS uses one thread, because the workers themselves are the threads. On leaving, the BLAS gets back
    the number of threads it had.
    """

    def __init__(self, threads: int | None = None) -> None:
        """threads: None means one for each core this process may use."""
        self.threads = threads or available_cores()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        self._opened.enter_context(blas_threads(1))
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="npgpt")
        self._opened.callback(lambda: self._executor.shutdown(cancel_futures=True))
        if self.threads > 1:
            self._start_threads()
        return self

    def _start_threads(self) -> None:
        """Start all threads now. If the system refuses one, go on with those that could be started."""
        begin, started = threading.Event(), 0
        try:
            for _ in range(self.threads):
                self._executor.submit(begin.wait)  # all wait, so each needs a thread of its own
                started += 1
        except RuntimeError:  # "can't start new thread"
            warnings.warn(
                f"the system allows {max(1, started)} of {self.threads} worker threads; going on with these",
                RuntimeWarning,
                stacklevel=3,
            )
            self.threads = max(1, started)
            begin.set()
            self._executor.shutdown(cancel_futures=True)  # it would try again to start the other threads
            self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="npgpt")
        finally:
            begin.set()

    def __exit__(self, *exception: Any) -> None:
        self._opened.close()  # a second time it does nothing

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """[function(item) for item in items], computed side by side.

        An exception is raised here, with its traceback, after all workers have finished. With one thread, the caller's
        thread does the work, because GPU libraries keep settings for each thread.
        """
        if self.threads == 1:
            return [function(item) for item in items]
        futures = [self._executor.submit(function, item) for item in items]
        failures = [e for e in (future.exception() for future in futures) if e is not None]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def over(self, function: Callable[[slice], None], n: int) -> None:
        """Call function(slice) for slices that cover range(n), one slice for each worker. A short range is one slice."""
        pieces = max(1, min(self.threads, n // BLOCK))
        if pieces == 1:
            function(slice(0, n))
        else:
            self.map(function, even_slices(n, pieces))


def even_slices(n: int, pieces: int) -> list[slice]:
    """range(n) as slices of nearly equal length."""
    return [slice(a, b) for a, b in pairwise(n * i // pieces for i in range(pieces + 1))]
