"""Worker threads: order, exceptions, ranges, and the BLAS threads."""

import threading

import numpy as np
import pytest
from support.steps import CONFIG
from threadpoolctl import ThreadpoolController, threadpool_limits

from npgpt import GPT, AdamW
from npgpt.parallel import workers as workers_module
from npgpt.parallel.workers import Workers


def test_map_keeps_the_order_and_runs_side_by_side():
    barrier = threading.Barrier(3, timeout=20)
    with Workers(3) as workers:
        assert workers.map(lambda i: (barrier.wait(), i)[1], [3, 1, 2]) == [3, 1, 2]


@pytest.mark.parametrize(("n", "calls"), [(0, 1), (19, 1), (20, 2), (31, 3), (1000, 3)])
def test_over_covers_the_range_once(monkeypatch, n, calls):
    monkeypatch.setattr(workers_module, "BLOCK", 10)
    touched, slices = np.zeros(n), []
    with Workers(3) as workers:

        def touch(at):
            touched[at] += 1
            slices.append(at)

        workers.over(touch, n)
    assert len(slices) == calls
    assert (touched == 1).all()


def test_adamw_over_workers_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(workers_module, "BLOCK", 16)
    results = []
    for spread in (False, True):
        model = GPT(CONFIG, seed=1)
        optimizer = AdamW(model.parameters())
        with Workers(3) as workers:
            for _ in range(3):
                model.flat.grad[...] = np.linspace(-1, 1, model.flat.grad.size)
                optimizer.step(*[workers] * spread)
        results.append((model.flat.data.copy(), optimizer.exp_avg, optimizer.exp_avg_sq))
    for alone, spread in zip(*results, strict=True):
        np.testing.assert_array_equal(spread, alone)


def test_an_exception_arrives_with_its_traceback():
    def fail_on_two(i):
        if i == 2:
            raise ArithmeticError("two")
        return i

    with Workers(2) as workers:
        with pytest.raises(ArithmeticError, match="two") as caught:
            workers.map(fail_on_two, range(5))
        assert "fail_on_two" in [entry.name for entry in caught.traceback]
        assert workers.map(fail_on_two, [1]) == [1]


def test_workers_limit_the_blas_to_one_thread():
    def blas_threads():
        return [library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        assert before, "threadpoolctl sees no BLAS here"
        with Workers(2):
            assert all(n == 1 for n in blas_threads())
        assert blas_threads() == before


def test_the_last_of_several_users_gives_the_blas_its_threads_back():
    """Two runs in one process may end in any order."""

    def blas_threads():
        return {library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"}

    with threadpool_limits(limits=2, user_api="blas"):
        first, second = Workers(2), Workers(2)
        first.__enter__()
        second.__enter__()
        first.__exit__()
        assert blas_threads() == {1}
        second.__exit__()
        second.__exit__()  # a second time it does nothing
        assert blas_threads() == {2}


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_threads_that_cannot_be_started_are_done_without(monkeypatch, allowed):
    """The system refuses new threads, as under `ulimit -u`."""
    real, started = threading.Thread.start, []

    def start(thread):
        if sum(other.is_alive() for other in started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    workers = Workers(4)
    with pytest.warns(RuntimeWarning, match=f"the system allows {max(1, allowed)} of 4 worker threads"):
        workers.__enter__()
    assert workers.threads == max(1, allowed)
    assert workers.map(lambda i: i * i, range(10)) == [i * i for i in range(10)]
    workers.__exit__(None, None, None)
