"""Worker processes: what worker threads do, without waiting for each other in Python.

Threads share one interpreter, and each time an operation ends, its thread has to wait for the lock. With small
models that is a third of the time, and more with more cores. A process has an interpreter of its own. Weights and
gradients lie in memory all of them see; the batch goes down a pipe. Which micro-batches a worker takes, and in
which order gradients are added up, is as with threads, so the numbers are the same to the last bit. When a process
dies, the step is computed again by threads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.settings import GPTConfig
from npgpt.model.gpt import GPT
from npgpt.parallel.step import Share, blas_threads, forward_backward_of, keep_freed_memory

# A worker imports what its parent would, whatever folder it was started in. Its standard output is for answers, so
# whatever prints is sent elsewhere before anything else is imported.
MAIN = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); sys.path[:] = sys.argv[1:]; "
    "from npgpt.parallel.processes import work; work(answers)"
)
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PATIENCE = 5.0  # seconds in which a worker may end what it is at


class SharedMemory:
    """Bytes that this process and its children see. Except on Windows without a name, so that nothing is left behind."""

    def __init__(self, size: int) -> None:
        """Raises OSError when there is no room."""
        self._path = None
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("npgpt")
        else:
            self.fd, path = tempfile.mkstemp(prefix="npgpt")
            if sys.platform == "win32":  # where a file that is open keeps its name
                self._path = path
            else:
                Path(path).unlink()
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is to be found out now
                os.posix_fallocate(self.fd, 0, size)
            else:
                os.ftruncate(self.fd, size)
            self.bytes = mmap.mmap(self.fd, size)
        except OSError:
            self._give_back()
            raise

    @property
    def name(self) -> str | int:
        """How a child finds it: a file descriptor to be passed on, or a file's path."""
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
        self._give_back()

    def _give_back(self) -> None:
        os.close(self.fd)
        if self._path:
            with contextlib.suppress(OSError):  # while something looks at it
                Path(self._path).unlink()


class Processes:
    """Worker processes for the steps of one model, whose weights and gradient are in shared memory until `close`."""

    def __init__(self, model: GPT, number: int) -> None:
        """Raises OSError when they cannot be started."""
        if not sys.executable:
            raise OSError("it is not known which Python this is")
        self._model = model
        self._id_dtype = np.min_scalar_type(model.config.vocab_size - 1)
        flat = model.flat
        nbytes = flat.data.nbytes
        self._memory = SharedMemory(nbytes * (2 + number))
        arrays = [np.frombuffer(self._memory.bytes, flat.data.dtype, flat.data.size, i * nbytes) for i in range(2 + number)]
        self._children: list[subprocess.Popen[bytes]] = []
        self.gradients = arrays[2:]
        setup = {"config": vars(model.config), "dtype": flat.data.dtype.str, "memory": self._memory.name}
        started = False
        try:
            for i in range(number):
                self._children.append(self._start())
                self._send(i, setup | {"size": nbytes * (2 + number), "gradient": (2 + i) * nbytes})
            started = True
        finally:
            if not started:
                self._stop()
                self._memory.close()
        flat.move_to(arrays[0], arrays[1])

    def _start(self) -> subprocess.Popen[bytes]:
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for this process, which ends them when it ends
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        elif isinstance(self._memory.name, int):
            apart["pass_fds"] = [self._memory.name]
        path = [str(Path(folder).absolute()) for folder in sys.path]
        command = [sys.executable, "-c", MAIN, *path]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD, **apart)

    def begin(self, worker: int, x: np.ndarray, y: np.ndarray, share: Share, seed: int, number: int) -> None:
        """Have a worker put the gradient of these micro-batches of a step into its array. Raises OSError when it has ended."""
        self._send(worker, (x.astype(self._id_dtype), y.astype(self._id_dtype), share, seed, number))

    def loss(self, worker: int) -> float:
        """What it has computed. Raises MemoryError when there was no memory for it, EOFError when it has ended."""
        stdout = self._children[worker].stdout
        assert stdout is not None  # it is a pipe
        try:
            answer = pickle.load(stdout)
        except pickle.UnpicklingError:  # ended in the middle of a word, or not by one of ours
            raise EOFError from None
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
        self.gradients = []
        try:
            with contextlib.suppress(MemoryError):  # then they stay where they are
                flat.move_to(np.empty_like(flat.data), np.empty_like(flat.grad))
        finally:
            self._memory.close()

    def _stop(self) -> None:
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # it may have died with something unread
                    if pipe:
                        pipe.close()
        deadline = time.monotonic() + PATIENCE
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the middle of a long step
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()
            child.wait()


def work(answers_fd: int) -> None:
    """What a worker process does until its parent goes away."""
    answers, tasks = os.fdopen(answers_fd, "wb"), sys.stdin.buffer
    keep_freed_memory()
    # The parent may end at any moment, and in the middle of a message; so does this then.
    with blas_threads(1), contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        setup = pickle.load(tasks)
        memory = SharedMemory.open(setup["memory"], setup["size"])
        model = GPT(GPTConfig(**setup["config"]), seed=None, dtype=np.dtype(setup["dtype"]))
        flat = model.flat
        flat.look_at(
            np.frombuffer(memory, flat.data.dtype, flat.data.size),
            np.frombuffer(memory, flat.data.dtype, flat.data.size, setup["gradient"]),
        )
        while True:
            x, y, share, seed, number = pickle.load(tasks)
            answer: float | MemoryError
            try:
                answer = forward_backward_of(model, x.astype(np.int64), y.astype(np.int64), share, seed, number)
            except MemoryError as error:
                answer = MemoryError(*error.args)
            answers.write(pickle.dumps(answer))
            answers.flush()
