"""Worker threads: the same numbers as one, errors that arrive, the BLAS given back."""

import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from npgpt import GPT, AdamW, GPTConfig, ops
from npgpt.engine.streams import Stream, generator
from npgpt.parallel import machine, processes
from npgpt.parallel import workers as workers_module
from npgpt.parallel.processes import Processes
from npgpt.parallel.step import ParallelStep, micro_batches
from npgpt.parallel.workers import Workers

ROOT = Path(__file__).parent.parent.parent
CONFIG = GPTConfig(11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2)


def batch(rows=7):
    ids = np.random.default_rng(0).integers(0, 11, (rows, 9))
    return ids[:, :-1], ids[:, 1:]


def gradient_of(threads, micro_batch, dtype=np.float64):
    model = GPT(CONFIG, seed=1, dtype=dtype)
    model.parameters().grad[...] = 99.0  # left over from before; must be forgotten
    with Workers(threads) as workers:
        loss = ParallelStep(model, workers, micro_batch)(*batch(), seed=3, number=4)
    return loss, model.flat.grad.copy()


def test_threads_do_not_change_the_step():
    loss, gradient = gradient_of(1, 2)
    for threads in (2, 3, 8):
        other_loss, other = gradient_of(threads, 2)
        assert other_loss == pytest.approx(loss, rel=1e-14)
        np.testing.assert_allclose(other, gradient, rtol=1e-10, atol=1e-14)


def test_same_threads_same_bytes():
    first, second = gradient_of(3, 1, np.float32), gradient_of(3, 1, np.float32)
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


def test_micro_batches_add_up_to_the_batch():
    """By hand: each piece with the generator of its number, weighted by its share of the batch."""
    model = GPT(CONFIG, seed=1, dtype=np.float64)
    x, y = batch()
    total = 0.0
    for i, piece in enumerate([slice(0, 2), slice(2, 4), slice(4, 7)]):
        logits, _ = model(x[piece], rng=generator(3, Stream.DROPOUT, 4, i))
        loss = ops.cross_entropy(logits, y[piece], reduction="none").sum() / y.size
        loss.backward()
        total += loss.item()
    loss, gradient = gradient_of(2, 3)
    assert loss == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(gradient, model.flat.grad, rtol=1e-10, atol=1e-14)


def test_workers_see_new_weights():
    model = GPT(CONFIG, seed=1)
    with Workers(2) as workers:
        step = ParallelStep(model, workers, 1)
        before = step(*batch(), seed=0, number=0)
        model.parameters().data *= 2
        assert step(*batch(), seed=0, number=0) != before


@pytest.mark.parametrize(("rows", "tokens", "size"), [(32, 128, None), (12, 64, None), (1, 500, None), (7, 8, 3), (5, 2000, 9)])
def test_micro_batches_cover_the_batch(rows, tokens, size):
    pieces = micro_batches(rows, tokens, size)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(rows))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


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


def test_adamw_over_workers_is_the_same_to_the_bit(monkeypatch):
    monkeypatch.setattr(workers_module, "BLOCK", 16)
    results = []
    for spread in (False, True):
        model = GPT(CONFIG, seed=1)
        optimizer = AdamW(model.parameters())
        with Workers(3) as workers:
            for _ in range(3):
                model.flat.grad[...] = np.linspace(-1, 1, model.flat.grad.size)
                optimizer.step(*[workers.over] * spread)
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


@pytest.mark.parametrize(
    ("kernel", "avx512", "words"),
    [
        ("SkylakeX", True, r"openblas 0\.3 \(SkylakeX kernels\)$"),
        ("Haswell", True, "AVX-512 unused"),
        ("Haswell", False, r"kernels\)$"),
    ],
)
def test_the_blas_is_described(monkeypatch, kernel, avx512, words):
    library = {"user_api": "blas", "internal_api": "openblas", "version": "0.3", "architecture": kernel}
    monkeypatch.setattr(machine, "_blas", lambda: SimpleNamespace(info=lambda: [library]))
    monkeypatch.setattr(machine, "_has_avx512", lambda: avx512)
    monkeypatch.setenv("OPENBLAS_CORETYPE", kernel)
    assert re.search(words, machine.describe_blas())
    assert ("OPENBLAS_CORETYPE=Haswell" in machine.describe_blas()) == (words == "AVX-512 unused")


def test_the_blas_is_held_and_given_back():
    def blas_threads():
        return [library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        assert before, "threadpoolctl sees no BLAS here"
        with Workers(2):
            assert all(n == 1 for n in blas_threads())
        assert blas_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_a_step_takes_no_new_pages_once_warm():
    """In a process of its own: page faults of later steps are few, where there is a glibc to tell. Now and then a
    step needs more memory than any before, when the workers happen to overlap differently; so the best of several."""
    program = (
        "import resource, numpy as np\n"
        "from npgpt import GPT, GPTConfig\n"
        "from npgpt.parallel.machine import keep_freed_memory\n"
        "from npgpt.parallel.step import ParallelStep\n"
        "from npgpt.parallel.workers import Workers\n"
        "ids = np.zeros((8, 128), dtype=int)\n"
        "with Workers(2) as workers:\n"
        "    step = ParallelStep(GPT(GPTConfig(65, n_layer=2, n_embd=128)), workers, 4)\n"
        "    faults = []\n"
        "    for number in range(8):\n"
        "        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "        step(ids, ids, 0, number)\n"
        "        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "assert min(faults) < 200 or not keep_freed_memory(), faults\n"
    )
    root = str(Path(__file__).parent.parent.parent)
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": root}, check=True, timeout=100)


# ---------------------------------------------------------------- processes


@pytest.fixture
def in_processes():
    """A step that three workers share, two of them processes; and its model."""
    model = GPT(CONFIG, seed=1)
    with Workers(3) as workers:
        step = ParallelStep(model, workers, 1)
        step.use(Processes)
        yield step, model
        step.close()


def test_processes_give_the_bytes_of_threads(in_processes):
    step, model = in_processes
    expected = GPT(CONFIG, seed=1)
    with Workers(3) as workers:
        by_threads = ParallelStep(expected, workers, 1)
        for rows in (7, 2, 1, 7):  # with two and one, some have nothing to do
            assert step(*batch(rows), seed=3, number=rows) == by_threads(*batch(rows), seed=3, number=rows)
            np.testing.assert_array_equal(model.flat.grad, expected.flat.grad)
            for m in (model, expected):
                AdamW(m.parameters(), lr=0.1).step()
            np.testing.assert_array_equal(model.flat.data, expected.flat.data)
    step.close()
    assert step(*batch(), seed=3, number=4) == by_threads_alone(expected)
    np.testing.assert_array_equal(model.state_dict()["wte.weight"], expected.state_dict()["wte.weight"])


def by_threads_alone(model):
    with Workers(3) as workers:
        return ParallelStep(model, workers, 1)(*batch(), seed=3, number=4)


def test_a_process_that_dies_costs_nothing_but_speed(in_processes):
    step, _ = in_processes
    expected = by_threads_alone(GPT(CONFIG, seed=1))
    assert step(*batch(), seed=3, number=4) == expected
    for child in step._remote._children[:1]:
        child.kill()
        child.wait()
    with pytest.warns(RuntimeWarning, match="a worker process has died .*; going on with threads"):
        assert step(*batch(), seed=3, number=4) == expected
    assert step(*batch(), seed=3, number=4) == expected


def test_a_process_that_says_something_else_is_as_good_as_dead(in_processes, monkeypatch):
    step, _ = in_processes

    def load(file):
        raise pickle.UnpicklingError("Hello")

    monkeypatch.setattr(processes.pickle, "load", load)
    with pytest.warns(RuntimeWarning, match="a worker process has died"):
        assert step(*batch(), seed=3, number=4) == by_threads_alone(GPT(CONFIG, seed=1))


def test_processes_do_not_run_what_lies_about(tmp_path, monkeypatch):
    """Their modules are their parent's, whatever the folder they are started in, and what they print is no answer."""
    (tmp_path / "pickle.py").write_text("raise RuntimeError('not to be run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Workers(2) as workers:
        step = ParallelStep(GPT(CONFIG, seed=1), workers, 1)
        step.use(Processes)
        assert np.isfinite(step(*batch(), seed=3, number=4))
        step.close()


def test_what_a_process_lacks_memory_for_is_said_here(in_processes, monkeypatch):
    step, _ = in_processes
    step(*batch(), seed=3, number=4)
    monkeypatch.setattr(processes.pickle, "load", lambda file: MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        step(*batch(), seed=3, number=4)
    monkeypatch.undo()
    assert step(*batch(), seed=3, number=4) == by_threads_alone(GPT(CONFIG, seed=1))


def test_processes_end_with_their_parent():
    script = (
        "import os, numpy as np\n"
        "from npgpt import GPT, GPTConfig\n"
        "from npgpt.parallel.processes import Processes\n"
        "from npgpt.parallel.step import ParallelStep\n"
        "from npgpt.parallel.workers import Workers\n"
        "config = GPTConfig(11, block_size=8, n_layer=1, n_head=2, n_embd=8)\n"
        "ids = np.zeros((7, 8), dtype=int)\n"
        "step = ParallelStep(GPT(config, seed=1), Workers(3).__enter__(), 1)\n"
        "step.use(Processes)\n"
        "step(ids, ids, seed=3, number=4)\n"
        "print(*[child.pid for child in step._remote._children], flush=True)\n"
        "os._exit(0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    if os.name != "posix":
        return
    deadline = time.monotonic() + 20
    for pid in map(int, result.stdout.split()):
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z")
