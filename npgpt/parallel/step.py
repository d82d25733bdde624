"""How one step's work is spread over the processor: worker threads, a micro-batch at a time.

NumPy lets go of Python's global lock inside its operations, so threads run them side by side: all of
them, where a BLAS with threads of its own speeds up the matrix products alone. And a micro-batch is small
enough for its activations to stay in a core's cache. Workers share the weights; each has gradients of its
own, which are added up in a fixed order, so that the same seed and number of threads give the same bytes.

No formulas here, and nothing of GPT beyond its call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from npgpt.engine.backend import Stream, tf32
from npgpt.engine.watch import NonFiniteError, detect_anomaly
from npgpt.kernels.cpu import BLOCK
from npgpt.kernels.reference import Array
from npgpt.model.gpt import GPT

Item = TypeVar("Item")
Result = TypeVar("Result")

AVX512_KERNELS = {"skylakex", "cooperlake", "sapphirerapids"}  # of OpenBLAS
MICRO_BATCH_TOKENS = 1024  # measured: fewer, and the products lose speed; more, and activations leave the cache


def available_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Inside `with`, the BLAS of this process uses so many threads. One is for products so small that handing them to
    threads costs more than it gains, far more when the machine is busy."""
    # As ThreadpoolController.limit, which takes five times as long: text is drawn with one such block a token.
    libraries = [library for library in _blas().lib_controllers if library.user_api == "blas"]
    before = [library.num_threads for library in libraries]
    try:
        for library in libraries:
            library.set_num_threads(threads)
        yield
    finally:
        for library, number in zip(libraries, before, strict=True):
            library.set_num_threads(number)


def machine(device: str, threads: int) -> dict[str, str]:
    """What decides the rounding of a run on one processor: with the same, the same seed gives the same bytes."""
    found = [library for library in _blas().info() if library["user_api"] == "blas"]
    blas = " ".join(str(found[0].get(key)) for key in ("internal_api", "version", "architecture")) if found else "unknown"
    return {"device": device, "threads": str(threads), "NumPy": np.__version__, "BLAS": blas}


def describe_blas() -> str:
    """The library NumPy's matrix products run on, its kernel for this processor, and a word when that kernel
    leaves AVX-512 unused, which halves the speed of the products."""
    found = [library for library in _blas().info() if library["user_api"] == "blas"]
    if not found:
        return "BLAS unknown"
    blas = found[0]
    kernel = blas.get("architecture")
    text = f"{blas['internal_api']} {blas['version']}" + (f" ({kernel} kernels)" if kernel else "")
    if kernel and kernel.lower() not in AVX512_KERNELS and _has_avx512():
        pinned = os.environ.get("OPENBLAS_CORETYPE")
        because = f"because OPENBLAS_CORETYPE={pinned}" if pinned else "try OPENBLAS_CORETYPE=SkylakeX"
        text += f", which leave this processor's AVX-512 unused: {because}"
    return text


def _has_avx512() -> bool:
    """Whether Linux says that this processor has AVX-512; elsewhere it is not known, and False."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " avx512f " in cpuinfo.read_text(encoding="utf-8")


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed for the next step; whether there was a glibc to tell.

    By default it hands large blocks back to the system at every free, and the next step takes each page anew:
    30,000 page faults a step on the default model, a twentieth of its time. One arena for all threads, since
    the arenas of threads are handed back whatever they are told. It concerns the whole process, so only
    training asks for it. Elsewhere (macOS, Windows, musl) nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # of malloc.h
    largest_mmap_threshold = 32 << 20  # glibc takes no more
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_threshold, largest_mmap_threshold)
    libc.mallopt(trim_threshold, 2**31 - 1)
    return True


class Workers:
    """A number of threads that work through a list together. Use it as a context manager: inside, the BLAS
    is held to one thread (the workers are the threads); on leaving, it gets back what it had."""

    def __init__(self, threads: int | None = None) -> None:
        """threads: None means every core this process may use."""
        self.threads = threads or available_cores()

    def __enter__(self) -> Workers:
        self._limit = blas_threads(1)
        self._limit.__enter__()
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="npgpt")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._executor.shutdown(cancel_futures=True)
        self._limit.__exit__(*exception)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """[function(item) for item in items], computed side by side. An exception reaches the caller with its
        traceback, when no worker is busy any more. One thread is the caller's own, which is also where a GPU's library
        keeps its settings."""
        if self.threads == 1:
            return [function(item) for item in items]
        futures = [self._executor.submit(function, item) for item in items]
        failures = [e for e in (future.exception() for future in futures) if e is not None]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def over(self, function: Callable[[slice], None], n: int) -> None:
        """Call function(slice) side by side on slices that cover range(n), a worker each; short ranges at once."""
        pieces = max(1, min(self.threads, n // BLOCK))
        if pieces == 1:
            function(slice(0, n))
        else:
            self.map(function, _cut(n, pieces))


Share = list[tuple[int, slice]]  # of a step: numbers of micro-batches, and their rows


class Helpers(Protocol):
    """Workers beside this thread; see processes.py."""

    gradients: list[np.ndarray]

    def begin(self, worker: int, x: np.ndarray, y: np.ndarray, share: Share, seed: int, number: int) -> None: ...

    def loss(self, worker: int) -> float: ...

    def close(self) -> None: ...


class ParallelStep:
    """Forward and backward of a batch over workers: loss = step(x, y, seed, number)."""

    def __init__(
        self, model: GPT, workers: Workers, micro_batch: int | None = None, dtype: Any = None, use_tf32: bool = False
    ) -> None:
        """micro_batch: sequences in a micro-batch; None chooses by the number of tokens (on a GPU: all). On a GPU also
        dtype: of the activations, see GPT; and use_tf32: whether products of float32 are rounded to TF32."""
        keep_freed_memory()
        self.model, self.workers, self.micro_batch, self.dtype, self._use_tf32 = model, workers, micro_batch, dtype, use_tf32
        self._helpers: Helpers | None = None
        # The first worker uses the model itself; the others, where they are threads, models that look at the same weights.
        self._models = [model]

    def __call__(self, x: Array, y: Array, seed: int, number: int) -> Any:
        """The batch's mean loss; its gradient is then in the model's parameters. Dropout in micro-batch i is a
        function of (seed, number, i). On a GPU the loss is an array of no dimensions: float(loss) waits until it is
        computed."""
        pieces = list(enumerate(self._pieces(x)))
        shares = [pieces[worker :: self.workers.threads] for worker in range(min(self.workers.threads, len(pieces)))]

        def work(worker: int) -> float:
            with tf32(self.model.backend, self._use_tf32):
                return forward_backward_of(self._models[worker], x, y, shares[worker], seed, number, self.dtype)

        losses = self._with_helpers(x, y, shares, seed, number) if self._helpers and len(shares) > 1 else None
        if losses is None:
            while len(self._models) < len(shares):
                self._models.append(self._twin())
            losses = self.workers.map(work, range(len(shares)))
        gradients = self._helpers.gradients if self._helpers else [twin.flat.grad for twin in self._models[1:]]
        first, others = self.model.flat.grad, gradients[: len(shares) - 1]

        def add_up(at: slice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):
                for gradient in others:
                    first[at] += gradient[at]

        if others:
            self.workers.over(add_up, first.size)
        return sum(losses)

    def use(self, start: Callable[[GPT, int], Helpers]) -> None:
        """From now on share steps with `start(model, number)` instead of threads. The model's flat buffers are then others:
        whoever looked into the old ones no longer sees the model. Raises OSError when they cannot be started."""
        self.close()
        self._helpers = start(self.model, self.workers.threads - 1)
        del self._models[1:]

    def close(self) -> None:
        """Do without helpers again."""
        helpers, self._helpers = self._helpers, None
        if helpers:
            helpers.close()

    def _twin(self) -> GPT:
        twin = GPT(self.model.config, seed=None, backend=self.model.backend, dtype=self.model.wte.weight.dtype)
        twin.share_weights(self.model)
        return twin

    def _with_helpers(self, x: np.ndarray, y: np.ndarray, shares: list[Share], seed: int, number: int) -> list[float] | None:
        """The losses of the shares, the first computed here and the rest by helpers; None when one of them has died."""
        assert self._helpers
        done = False
        try:
            for i, share in enumerate(shares[1:]):
                self._helpers.begin(i, x, y, share, seed, number)
            losses = [forward_backward_of(self.model, x, y, shares[0], seed, number)]
            losses += [self._helpers.loss(i) for i in range(len(shares) - 1)]
            done = True
            return losses
        except (EOFError, OSError):
            warnings.warn(
                "a worker process has died (of too little memory? --threads takes fewer); going on with threads",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        finally:
            if not done:  # an answer may be on its way that nobody would wait for
                self.close()

    def diagnose(self, x: np.ndarray, y: np.ndarray, seed: int, number: int) -> str:
        """Why this step's loss or gradient is not finite: the step once more, in one thread, watching every
        operation. Names the weight, or the operation and the weight beside it, or the gradient."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        isfinite = self.model.backend.xp.isfinite
        for p in self.model.parameters():
            if not isfinite(p.data).all():
                return f"the weight {names[id(p)]} is not finite"
        self.model.zero_grad()
        try:
            with detect_anomaly(), tf32(self.model.backend, self._use_tf32):
                for i, piece in enumerate(self._pieces(x)):
                    _forward_backward(self.model, x, y, piece, seed, number, i, self.dtype)
        except NonFiniteError as error:
            leaf = names.get(id(error.leaf))
            return f"{error}" + (f", at or just after {leaf}" if leaf else "")
        for p in self.model.parameters():
            if not isfinite(p.grad).all():
                return f"the gradient of {names[id(p)]} is not finite, though its parts are"
        with np.errstate(over="ignore"):
            norm = float(self.model.flat.grad @ self.model.flat.grad)
        return "every part of the gradient is finite, but its norm is not" if not np.isfinite(norm) else "all of it is finite"

    def _pieces(self, x: np.ndarray) -> list[slice]:
        rows, tokens = x.shape
        on_cpu = self.model.backend.name == "cpu"
        return micro_batches(rows, tokens, self.micro_batch if on_cpu else self.micro_batch or rows)


def forward_backward_of(model: GPT, x: Array, y: Array, share: Share, seed: int, number: int, dtype: Any = None) -> Any:
    """Put the gradient of some micro-batches of step `number` into the model; returns their share of the loss."""
    model.zero_grad()
    return sum(_forward_backward(model, x, y, piece, seed, number, i, dtype) for i, piece in share)


def _forward_backward(model: GPT, x: Array, y: Array, piece: slice, seed: int, number: int, i: int, dtype: Any) -> Any:
    """Add the gradient of micro-batch i, weighted by its share of the batch; returns its share of the loss."""
    rng = model.backend.generator(seed, Stream.DROPOUT, number, i)
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is no number says it itself
        _, loss = model(x[piece], y[piece], rng, dtype=dtype)
        assert loss is not None  # there are targets
        share = (piece.stop - piece.start) / len(x)
        loss.backward(model.backend.xp.asarray(share, dtype=loss.dtype))
    return share * (loss.item() if model.backend.name == "cpu" else loss.data)


def micro_batches(rows: int, tokens_in_row: int, size: int | None = None) -> list[slice]:
    """A batch of `rows` sequences cut into pieces of nearly equal length, `size` at most; None chooses by the
    number of tokens. It does not depend on the number of workers, so that neither do the dropout masks."""
    if size is None:
        n = -(-rows * tokens_in_row // MICRO_BATCH_TOKENS)
        n = min(rows, n + n % 2)  # even, for an even number of cores
    else:
        n = -(-rows // size)
    return _cut(rows, n)


def _cut(n: int, pieces: int) -> list[slice]:
    """range(n) in slices of nearly equal length."""
    return [slice(a, b) for a, b in pairwise(n * i // pieces for i in range(pieces + 1))]
