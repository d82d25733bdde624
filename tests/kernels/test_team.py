"""Threads that make one call together: their number, side by side calls, a call that ends early."""

import threading

import numpy as np
import pytest
from support.native import native_kernels

from npgpt import GPT, GPTConfig
from npgpt.kernels.native.library import processors
from npgpt.kernels.native.team import Team
from npgpt.model import gpt

CONFIG = GPTConfig(11, block_size=12, n_layer=2, n_head=3, n_embd=192)


@pytest.fixture
def kernels():
    return native_kernels(processors()[0] if processors() else "any")


@pytest.fixture
def model(kernels, monkeypatch):
    monkeypatch.setattr(gpt, "CPU_KERNELS", kernels)
    return GPT(CONFIG, seed=1)


def decoded(model, rows, tokens=14):
    cache = model.new_cache(rows)
    return [model.decode(np.arange(rows) + i % 3, cache).tobytes() for i in range(min(tokens, CONFIG.block_size))]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_number_of_threads_changes_no_bit(model, kernels, rows, monkeypatch):
    members = []
    run = kernels._team.run
    monkeypatch.setattr(kernels._team, "run", lambda call, n: (members.append(n), run(call, n)))
    results = []
    for threads in (1, 2, 3, 8):
        kernels.threads = threads
        results.append(decoded(model, rows))
    assert results == results[:1] * 4
    assert set(members) == {1, 2, 3}  # 192 columns are too few for eight


def test_calls_side_by_side_do_not_wait_for_each_other(model, kernels):
    """Two callers with three members each: without a lock, each would have some of the helpers."""
    kernels.threads = 3
    expected, found = decoded(model, 2), []
    callers = [
        threading.Thread(target=lambda: found.extend(decoded(model, 2) for _ in range(10)), daemon=True) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=100)
    assert len(found) == 40
    assert all(result == expected for result in found)


def test_a_system_without_more_threads(model, kernels, monkeypatch):
    kernels.threads = 1
    expected = decoded(model, 2)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    kernels.threads = 3
    assert decoded(model, 2) == expected
    assert kernels._team._calls == []


def test_an_interrupted_call_sets_its_helpers_free(model, kernels):
    """Ctrl-C before the caller itself takes part. The helpers, which wait for it in C, leave, and the next call is right."""
    kernels.threads = 2
    expected = decoded(model, 2)
    run, left = kernels._run, threading.Event()

    def interrupted(name, *arguments):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        run(name, *arguments)
        left.set()

    kernels._run = interrupted
    with pytest.raises(KeyboardInterrupt):
        decoded(model, 2)
    assert left.wait(timeout=20)
    kernels._run = run
    assert decoded(model, 2) == expected


def test_each_member_makes_the_call_once():
    team, seen = Team(), []
    team.run(lambda member, members, meeting: seen.append((member, members)), 1)
    assert seen == [(0, 1)]
    done = threading.Event()
    team.run(lambda member, members, meeting: (seen.append((member, members)), member and done.set()), 2)
    assert done.wait(timeout=60)
    assert sorted(seen[1:]) == [(0, 2), (1, 2)]
