"""Threads that make one call of a kernel together. The kernel itself says what each of them computes.

Worker threads (parallel/workers.py) compute independent pieces, which take milliseconds. The members of a team wait for each
other some thirty times in a millisecond, so they do that in C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

Call = Callable[[int, int, np.ndarray], None]  # (member, number of members, where they meet)


class Team:
    """The calling thread, which is member 0, and helpers that stay for the next call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[SimpleQueue[tuple[Call, int, np.ndarray]]] = []  # of each helper

    def run(self, call: Call, members: int) -> None:
        """Make the call with this number of members, or with fewer if the system allows no more threads."""
        if members == 1:
            call(0, 1, np.zeros(3, dtype=np.int64))
            return
        with self._lock:  # two calls side by side would wait for each other's helpers
            members = self._start(members)
            meeting = np.zeros(3, dtype=np.int64)  # see decode.c
            try:
                for calls in self._calls[: members - 1]:
                    calls.put((call, members, meeting))
                call(0, members, meeting)
            except BaseException:  # such as Ctrl-C before all helpers had the call: those that have it must not wait for ever
                meeting[2] = 1
                raise

    def _start(self, members: int) -> int:
        """Start the helpers that are missing. Returns how many members there are."""
        while len(self._calls) < members - 1:
            calls: SimpleQueue[tuple[Call, int, np.ndarray]] = SimpleQueue()
            helper = threading.Thread(target=self._help, args=(calls, len(self._calls) + 1), name="npgpt team", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # "can't start new thread"
                break
            self._calls.append(calls)
        return min(members, 1 + len(self._calls))

    @staticmethod
    def _help(calls: SimpleQueue[tuple[Call, int, np.ndarray]], member: int) -> None:
        while True:
            call, members, meeting = calls.get()
            call(member, members, meeting)
            del call, meeting  # an idle helper keeps no arrays
