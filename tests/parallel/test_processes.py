"""Worker processes: they give the same bytes as threads, and threads replace a process that fails."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.steps import CONFIG, batch

from npgpt import GPT, AdamW
from npgpt.parallel import processes
from npgpt.parallel.processes import Processes
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def in_processes():
    """A step over three workers and its model. Two of the workers are processes."""
    model = GPT(CONFIG, seed=1)
    with Workers(3) as workers:
        step = ParallelStep(model, workers, 1)
        step.use_remote_workers(Processes)
        yield step, model
        step.close()


def test_processes_give_the_bytes_of_threads(in_processes):
    step, model = in_processes
    expected = GPT(CONFIG, seed=1)
    with Workers(3) as workers:
        by_threads = ParallelStep(expected, workers, 1)
        for rows in (7, 2, 1, 7):  # with two rows or one, some workers have no micro-batch
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


def test_threads_replace_a_process_that_dies(in_processes):
    step, _ = in_processes
    expected = by_threads_alone(GPT(CONFIG, seed=1))
    assert step(*batch(), seed=3, number=4) == expected
    for child in step._remote._children[:1]:
        child.kill()
        child.wait()
    with pytest.warns(RuntimeWarning, match="a worker process has died, .*; training continues with threads"):
        assert step(*batch(), seed=3, number=4) == expected
    assert step(*batch(), seed=3, number=4) == expected


def test_threads_replace_a_process_with_an_unreadable_answer(in_processes, monkeypatch):
    step, _ = in_processes

    def load(file):
        raise pickle.UnpicklingError("Hello")

    monkeypatch.setattr(processes.pickle, "load", load)
    with pytest.warns(RuntimeWarning, match="a worker process has died"):
        assert step(*batch(), seed=3, number=4) == by_threads_alone(GPT(CONFIG, seed=1))


def test_processes_do_not_import_from_the_current_folder(tmp_path, monkeypatch):
    """Worker processes import the modules of their parent, even if the current folder has a module of the same name."""
    (tmp_path / "pickle.py").write_text("raise RuntimeError('not to be run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Workers(2) as workers:
        step = ParallelStep(GPT(CONFIG, seed=1), workers, 1)
        step.use_remote_workers(Processes)
        assert np.isfinite(step(*batch(), seed=3, number=4))
        step.close()


def test_a_memory_error_in_a_process_is_raised_here(in_processes, monkeypatch):
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
        "step.use_remote_workers(Processes)\n"
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


def test_a_frozen_application_does_not_start_itself(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match="a frozen application cannot start Python"):
        Processes(GPT(CONFIG, seed=1), 2)
