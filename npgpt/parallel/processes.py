"""Worker processes: the same work as worker threads, without one Python lock for all.

Threads share one interpreter. When an operation ends, its thread has to wait for the interpreter's lock. In small
models this takes about a quarter of a step, and more with more cores. Each process has an interpreter of its own.

Weights and gradients are in shared memory, and the batch goes through a pipe. The shares of the workers and the order of
the sums are the same as with threads, so the results have the same bits. If a process dies, threads repeat the step.
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
from npgpt.engine.backend import bfloat16_products, rounds_to_bfloat16
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import blas_threads, keep_freed_memory
from npgpt.parallel.step import Share, dropout_generators, forward_backward

SECONDS_TO_PAY_OFF = 10.0  # processes start only if more than this remains, because starting them takes time

# The worker gets its parent's module path, so it imports the same modules in any folder. Its answers go to standard output.
# So before any other import, everything that is printed goes to standard error.
MAIN = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); sys.path[:] = sys.argv[1:]; "
    "from npgpt.parallel.processes import work; work(answers)"
)
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SECONDS_TO_FINISH = 5.0  # a worker gets this long to finish its share when the processes are closed


def processes_pay_off(seconds_left: float) -> bool:
    """Whether worker processes are worth starting for a run with this much computing time left."""
    return seconds_left > SECONDS_TO_PAY_OFF


class SharedMemory:
    """Bytes that this process and its children share.

    The memory has no name in the file system, except on Windows. So it is freed even if all processes are killed.
    """

    def __init__(self, size: int) -> None:
        """Raises OSError if there is not enough memory."""
        self._path = None
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("npgpt")
        else:
            self.fd, path = tempfile.mkstemp(prefix="npgpt")
            if sys.platform == "win32":  # there an open file cannot be deleted
                self._path = path
            else:
                Path(path).unlink()
        try:
            if hasattr(os, "posix_fallocate"):  # raises now if the space is not there, instead of crashing later
                os.posix_fallocate(self.fd, 0, size)
            else:
                os.ftruncate(self.fd, size)
            self.bytes = mmap.mmap(self.fd, size)
        except OSError:
            self._release()
            raise

    @property
    def name(self) -> str | int:
        """What a child needs to open the memory: a file descriptor to inherit, or a file's path."""
        return self._path or self.fd

    @staticmethod
    def open(name: str | int, size: int) -> mmap.mmap:
        fd = name if isinstance(name, int) else os.open(name, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Release the memory. Arrays that are still views into it keep it alive until they go."""
        with contextlib.suppress(BufferError):
            self.bytes.close()
        self._release()

    def _release(self) -> None:
        os.close(self.fd)
        if self._path:
            with contextlib.suppress(OSError):  # if a view still uses the file
                Path(self._path).unlink()


class Processes:
    """Worker processes for the steps of one model. Its weights and its gradient are in shared memory until `close`."""

    def __init__(self, model: GPT, number: int) -> None:
        """Start `number` processes. Raises OSError if they cannot be started."""
        if not sys.executable:
            raise OSError("Python does not know the path of its own executable")
        if getattr(sys, "frozen", False):  # the executable is an application, which would start again
            raise OSError("a frozen application cannot start Python")
        self._model = model
        self._id_dtype = np.min_scalar_type(model.config.vocab_size - 1)
        flat = model.flat
        nbytes = flat.data.nbytes
        self._memory = SharedMemory(nbytes * (2 + number))
        arrays = [np.frombuffer(self._memory.bytes, flat.data.dtype, flat.data.size, i * nbytes) for i in range(2 + number)]
        self._children: list[subprocess.Popen[bytes]] = []
        self.gradients = arrays[2:]
        setup = {"config": vars(model.config), "dtype": flat.data.dtype.str, "memory": self._memory.name}
        setup["bf16_products"] = rounds_to_bfloat16(model.backend)
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
        # The worker gets a session of its own: Ctrl-C reaches only this process, which ends its workers itself.
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        elif isinstance(self._memory.name, int):
            options["pass_fds"] = [self._memory.name]
        path = [str(Path(folder).absolute()) for folder in sys.path]
        command = [sys.executable, "-c", MAIN, *path]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD, **options)

    def begin(self, worker: int, x: np.ndarray, y: np.ndarray, share: Share, seed: int, number: int) -> None:
        """Let a worker compute the gradient of its share of step `number`. Raises OSError if the worker has died."""
        self._send(worker, (x.astype(self._id_dtype), y.astype(self._id_dtype), share, seed, number))

    def loss(self, worker: int) -> float:
        """Wait for the worker, and return its share of the loss.

        Raises MemoryError if the worker ran out of memory, and EOFError if it has died.
        """
        stdout = self._children[worker].stdout
        assert stdout is not None  # it is a pipe
        try:
            answer = pickle.load(stdout)
        except pickle.UnpicklingError:  # half an answer of a killed worker, or output of something else
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
        """End the processes, and move the model's weights and gradient back to memory of this process."""
        self._stop()
        flat = self._model.flat
        self.gradients = []
        try:
            with contextlib.suppress(MemoryError):  # then the arrays stay in the shared memory
                flat.move_to(np.empty_like(flat.data), np.empty_like(flat.grad))
        finally:
            self._memory.close()

    def _stop(self) -> None:
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # the child may have died without reading its pipe
                    if pipe:
                        pipe.close()
        deadline = time.monotonic() + SECONDS_TO_FINISH
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the child is in the middle of a long step
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()
            child.wait()


def work(answers_fd: int) -> None:
    """The loop of a worker process. It ends when its parent closes the pipe or dies."""
    tasks = sys.stdin.buffer
    keep_freed_memory()
    # The parent may end at any moment, even in the middle of a message. Then this process ends too.
    ends = contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError)
    with blas_threads(1), ends, os.fdopen(answers_fd, "wb") as answers, contextlib.ExitStack() as precision:
        setup = pickle.load(tasks)
        memory = SharedMemory.open(setup["memory"], setup["size"])
        model = GPT(GPTConfig(**setup["config"]), seed=None, dtype=np.dtype(setup["dtype"]))
        flat = model.flat
        flat.bind(
            np.frombuffer(memory, flat.data.dtype, flat.data.size),
            np.frombuffer(memory, flat.data.dtype, flat.data.size, setup["gradient"]),
        )
        precision.enter_context(bfloat16_products(model.backend, setup["bf16_products"]))
        while True:
            x, y, share, seed, number = pickle.load(tasks)
            answer: float | MemoryError
            try:
                generators = dropout_generators(model, seed, number)
                answer = forward_backward(model, x.astype(np.int64), y.astype(np.int64), share, generators)
            except MemoryError as error:
                answer = MemoryError(*error.args)
            answers.write(pickle.dumps(answer))
            answers.flush()
