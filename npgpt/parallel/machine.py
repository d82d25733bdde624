"""The BLAS of this process, what decides rounding, and two settings of the process: BLAS threads and malloc."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from threadpoolctl import ThreadpoolController

from npgpt.engine.backend import CPU_KERNELS

AVX512_KERNELS = {"skylakex", "cooperlake", "sapphirerapids"}  # the kernels of OpenBLAS that use AVX-512


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Inside `with`, the BLAS of this process uses this number of threads.

    Small products are fastest on one thread, because handing them to other threads costs more than it gains. On a busy
    machine the difference is much larger.
    """
    # ThreadpoolController.limit does the same, but takes five times as long, and generation enters this for every token.
    wish = object()
    try:
        with _wishes_lock:
            if not _wishes:
                _blas_before[:] = [library.num_threads for library in _blas_libraries()]
            _wishes[wish] = threads
            _set_blas_threads()
        yield
    finally:
        with _wishes_lock:
            if _wishes.pop(wish, None) is not None:
                _set_blas_threads()


# The number of threads is one of the whole process. So the wishes of all `blas_threads` blocks that are open, in whatever
# thread, are kept here. The newest applies. The last block to end sets the number from before the first.
_wishes_lock = threading.RLock()
_wishes: dict[object, int] = {}
_blas_before: list[int] = []


def _set_blas_threads() -> None:
    newest = next(reversed(_wishes.values()), None)
    CPU_KERNELS.threads = newest or 0
    for library, before in zip(_blas_libraries(), _blas_before, strict=True):
        # threadpoolctl 3.8 lets the first thread that sets the number of OpenBLAS set it again, and ignores other threads
        # without a word. Here every thread may set it.
        release = getattr(library, "clear_controlling_thread", None)
        if release:
            release(force=True)
        library.set_num_threads(before if newest is None else newest)
        if release:
            release(force=True)


@functools.cache
def _blas_libraries() -> list[Any]:
    libraries = [library for library in _blas().lib_controllers if library.user_api == "blas"]
    if not libraries and _built_with() != "accelerate":  # Apple's library chooses its threads itself
        warnings.warn(
            f"threadpoolctl {threadpoolctl.__version__} does not find the BLAS of NumPy {np.__version__} ({_built_with()}), so "
            "its threads cannot be limited, and training may be many times slower; try: pip install -U threadpoolctl, or "
            "set OPENBLAS_NUM_THREADS=1 (MKL_NUM_THREADS=1 for MKL)",
            RuntimeWarning,
            stacklevel=2,
        )
    return libraries


def _built_with() -> str:
    """The BLAS that NumPy was built with, such as scipy-openblas, mkl or accelerate."""
    built: Any = np.show_config(mode="dicts")
    return str(built.get("Build Dependencies", {}).get("blas", {}).get("name", "unknown"))


def describe_kernels() -> str:
    """Which kernels compute on a CPU, such as "native AVX2" or "NumPy"; see kernels/native."""
    return CPU_KERNELS.description


def describe_machine(device: str, threads: int) -> dict[str, str]:
    """The properties that decide rounding: device, threads, NumPy, BLAS; on a CPU the kernels too.

    On one processor, runs with equal properties and the same seed give the same bytes."""
    found = [library for library in _blas().info() if library["user_api"] == "blas"]
    blas = " ".join(str(found[0].get(key)) for key in ("internal_api", "version", "architecture")) if found else "unknown"
    described = {"device": device, "threads": str(threads), "NumPy": np.__version__, "BLAS": blas}
    return described | ({"kernels": describe_kernels()} if device.startswith("cpu") else {})


def describe_blas() -> str:
    """The BLAS that NumPy uses and its kernels for this processor.

    A hint follows if these kernels leave the processor's AVX-512 unused, which makes matrix products half as fast.
    """
    found = [library for library in _blas().info() if library["user_api"] == "blas"]
    if not found:
        return f"BLAS {_built_with()}"
    blas = found[0]
    kernel = blas.get("architecture")
    text = f"{blas['internal_api']} {blas['version']}" + (f" ({kernel} kernels)" if kernel else "")
    if kernel and kernel.lower() not in AVX512_KERNELS and _has_avx512():
        pinned = os.environ.get("OPENBLAS_CORETYPE")
        because = f"because OPENBLAS_CORETYPE={pinned}" if pinned else "try OPENBLAS_CORETYPE=SkylakeX"
        text += f"; this processor's AVX-512 is unused ({because})"
    return text


def _has_avx512() -> bool:
    """Whether this processor has AVX-512. Only Linux tells; elsewhere the answer is False."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " avx512f " in cpuinfo.read_text(encoding="utf-8")


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step. Returns whether there is a glibc.

    By default malloc returns large freed blocks to the system, and the next step gets new pages. In the default model this
    costs 30,000 page faults a step, a twentieth of its time. All threads share one arena, because malloc
    returns the memory of further arenas in any case. The setting applies to the whole process, so only training asks for
    it. On macOS, Windows and musl nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # the numbers of these options in malloc.h
    largest_mmap_threshold = 32 << 20  # glibc accepts no more
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_threshold, largest_mmap_threshold)
    libc.mallopt(trim_threshold, 2**31 - 1)
    return True
