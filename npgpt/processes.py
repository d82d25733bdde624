"""Worker processes: what worker threads do, without waiting for each other in Python.

Threads share one interpreter, and each time an operation ends, its thread has to wait for the lock. With small
models that is a third of the time, and more with more cores. A process has an interpreter of its own. Weights and
gradients lie in memory all of them see; the rest of a step is a few kilobytes down a pipe. Which micro-batches
a worker takes, and in which order gradients are added up, is as with threads, so the numbers are the same to the
last bit. A process that dies costs nothing but its speed: its part of the step is computed here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config import GPTConfig
from npgpt.gpt import GPT
from npgpt.parallel import Share, blas_threads, forward_backward_of, keep_freed_memory

MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from npgpt.processes import work; work()"


class SharedMemory:
    """Bytes that this process and its children see. On Linux without a name, so that nothing is left behind."""

    def __init__(self, size: int) -> None:
        self._path = None
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("npgpt")
        else:
            self.fd, self._path = tempfile.mkstemp(prefix="npgpt")
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    @property
    def name(self) -> str | int:
        """How a child finds it: a file's path, or a file descriptor to be passed on."""
        return self._path or self.fd

    @staticmethod
    def open(name: str | int, size: int) -> mmap.mmap:
        fd = name if isinstance(name, int) else os.open(name, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give it back; what still looks at it keeps it alive until then."""
        with contextlib.suppress(BufferError):
            self.bytes.close()
        os.close(self.fd)
        if self._path:
            with contextlib.suppress(OSError):  # Windows, while something looks at it
                Path(self._path).unlink()


class Processes:
    """Worker processes for the steps of one model, whose weights and gradient are in shared memory until `close`."""

    def __init__(self, model: GPT, number: int) -> None:
        """Raises OSError when they cannot be started."""
        self._model = model
        flat = model.flat
        nbytes = flat.data.nbytes
        self._memory = SharedMemory(nbytes * (2 + number))
        arrays = [np.frombuffer(self._memory.bytes, flat.data.dtype, flat.data.size, i * nbytes) for i in range(2 + number)]
        self._children: list[subprocess.Popen[bytes]] = []
        self.gradients = arrays[2:]
        setup = {"config": vars(model.config), "dtype": flat.data.dtype.str, "memory": self._memory.name}
        try:
            for i in range(number):
                self._children.append(self._start())
                self._send(i, setup | {"size": nbytes * (2 + number), "gradient": (2 + i) * nbytes})
        except OSError:
            self._stop()
            self._memory.close()
            raise
        flat.move_to(arrays[0], arrays[1])

    def _start(self) -> subprocess.Popen[bytes]:
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for this process, which ends them when it ends
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        elif isinstance(self._memory.name, int):
            apart["pass_fds"] = [self._memory.name]
        command = [sys.executable, "-c", MAIN, str(Path(__file__).parent.parent)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart)

    def begin(self, worker: int, x: np.ndarray, y: np.ndarray, share: Share, seed: int, number: int) -> None:
        """Have a worker put the gradient of these micro-batches of a step into its array. Raises OSError when it has ended."""
        self._send(worker, (x, y, share, seed, number))

    def loss(self, worker: int) -> float:
        """What it has computed. Raises MemoryError when there was no memory for it, EOFError when it has ended."""
        stdout = self._children[worker].stdout
        assert stdout is not None  # it is a pipe
        answer = pickle.load(stdout)
        if isinstance(answer, MemoryError):
            raise answer
        return float(answer)

    def _send(self, worker: int, message: Any) -> None:
        stdin = self._children[worker].stdin
        assert stdin is not None
        stdin.write(pickle.dumps(message, protocol=5))
        stdin.flush()

    def close(self) -> None:
        """End the processes; the model's weights and gradient are this process's alone again."""
        self._stop()
        flat = self._model.flat
        flat.move_to(np.empty_like(flat.data), np.empty_like(flat.grad))
        self.gradients = []
        self._memory.close()

    def _stop(self) -> None:
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # it may have died with something unread
                    if pipe:
                        pipe.close()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the middle of a long step
                child.wait(5)
            child.kill()
            child.wait()


def work() -> None:
    """What a worker process does until its parent goes away."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not answer
    tasks = sys.stdin.buffer
    keep_freed_memory()
    setup = pickle.load(tasks)
    memory = SharedMemory.open(setup["memory"], setup["size"])
    model = GPT(GPTConfig(**setup["config"]), seed=None, dtype=np.dtype(setup["dtype"]))
    flat = model.flat
    flat.look_at(
        np.frombuffer(memory, flat.data.dtype, flat.data.size),
        np.frombuffer(memory, flat.data.dtype, flat.data.size, setup["gradient"]),
    )
    with blas_threads(1), contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended, and so does this
        while True:
            x, y, share, seed, number = pickle.load(tasks)
            answer: float | MemoryError
            try:
                answer = forward_backward_of(model, x, y, share, seed, number)
            except MemoryError as error:
                answer = MemoryError(*error.args)
            answers.write(pickle.dumps(answer))
            answers.flush()
