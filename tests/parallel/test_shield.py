"""Work that an interruption of the caller cannot end half-way."""

import contextlib
import signal
import threading
import time

import pytest

from npgpt.engine.graph import is_recording, no_grad
from npgpt.parallel.shield import Shield, _Call


@pytest.mark.parametrize("threaded", [True, False])
def test_results_and_errors_reach_the_caller(threaded):
    with Shield(threaded) as shield:
        assert shield(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            shield(lambda: 1 / 0)
        with no_grad():
            assert not shield(is_recording)
        assert shield(is_recording)


def test_the_thread_ends_with_the_block():
    class AtItsEnd:
        """A thread's own variables go when the thread ends."""

        def __del__(self):
            ended.set()

    ended, own = threading.Event(), threading.local()
    with Shield() as shield:
        shield(lambda: setattr(own, "value", AtItsEnd()))
        assert not ended.is_set()
    assert ended.wait(5)


def test_work_that_has_not_begun_never_begins(monkeypatch):
    """The interruption comes before the other thread has taken the work."""
    done = []
    with Shield() as shield:
        free = threading.Event()
        shield._calls.put(_Call(free.wait))  # the thread is busy
        monkeypatch.setattr(_Call, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shield(lambda: done.append(1))
        monkeypatch.undo()
        free.set()
        assert shield(lambda: 2) == 2
    assert done == []


def interrupt(call):
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such timers")
def test_an_interruption_waits_for_the_work():
    done = []

    def work():
        for i in range(20):
            time.sleep(0.01)
            done.append(i)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with Shield() as shield:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.03)  # more than one
            with contextlib.suppress(KeyboardInterrupt):
                shield(work)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert done == list(range(20))
