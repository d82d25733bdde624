"""Which array module and which kernels serve an array: the only place that knows devices exist.

`backend_of(array)` reads it off the array itself, so there is no global switch and arrays of two
devices can live side by side. No mathematics here. CuPy is imported when, and only when, somebody asks
for a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.cuda.kernels import CudaKernels, CudaLaunch, Key
from npgpt.kernels.cuda.products import CublasGemm
from npgpt.kernels.reference import Array, Kernels

OLDEST_NUMPY_WITH_BFLOAT16 = "2.1.2"  # with an older one CuPy 14 leaves it out


class DeviceError(RuntimeError):
    """The device asked for cannot be used here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """A device: its array module `xp` and the kernels that compute on it."""

    name: str  # "cpu" or "cuda"
    xp: Any
    kernels: Kernels

    def asarray(self, array: Any, dtype: Any = None) -> Array:
        """The same numbers on this device (no copy when they are there already)."""
        if self.xp is np:
            array = to_numpy(array)
        return self.xp.asarray(array, dtype=dtype)

    def generator(self, seed: int, stream: Stream, *counters: int) -> Any:
        """What dropout on this device draws from, a pure function of its arguments. See `Stream`."""
        if self.name == "cpu":
            return generator(seed, stream, *counters)
        return Key(int(_seed_sequence(seed, stream, *counters).generate_state(1, np.uint64)[0]) >> 1)


class Stream(enum.IntEnum):
    """What random numbers are for. Streams never share numbers, so drawing more of one (a longer
    sample, another evaluation) changes nothing in another."""

    INIT = 0
    BATCH = 1
    DROPOUT = 2
    SAMPLE = 3


def _seed_sequence(seed: int, stream: Stream, *counters: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *counters))


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """A NumPy generator that depends on (seed, stream, counters) alone: step 7 of a run draws the same
    numbers whether or not step 6 was computed in the same process."""
    return np.random.Generator(np.random.SFC64(_seed_sequence(seed, stream, *counters)))


CPU = Backend("cpu", np, CpuKernels())

_backends: dict[type, Backend] = {np.ndarray: CPU}


def backend_of(*arrays: Array) -> Backend:
    """The backend the arrays live on.

    Raises TypeError when they live on different devices, or one is no array this library knows.
    """
    found: Backend | None = None
    for array in arrays:
        backend = _backends.get(type(array)) or _backend_by_subclass(array)
        if found is not None and backend is not found:
            raise TypeError(
                f"one operation needs its inputs on one device, got some on {found.name!r} and some on "
                f"{backend.name!r}; move one with backend.asarray(...)"
            )
        found = backend
    if found is None:
        raise TypeError("backend_of needs at least one array")
    return found


def _backend_by_subclass(array: Array) -> Backend:
    for kind, backend in _backends.items():
        if isinstance(array, kind):  # a view such as numpy.memmap
            return backend
    raise TypeError(f"expected a NumPy array (or a CuPy array after select('cuda')), got {type(array).__name__}")


def select(name: str = "auto") -> Backend:
    """The backend by name: "cpu", "cuda", or "auto" (a GPU when one is usable, else the CPU).

    Raises DeviceError when "cuda" cannot be used, ValueError for any other name.
    """
    if name == "cpu":
        return CPU
    if name in ("auto", "cuda"):
        missing = _why_no_cuda()
        if not missing:
            try:
                return _cuda()
            except ImportError as error:  # another CUDA's, or half of it
                missing = f"CuPy is installed and cannot be imported: {error}"
        if name == "auto":
            if missing.startswith("CuPy"):
                warnings.warn(f"there is a GPU, and it is left alone: {missing}", RuntimeWarning, stacklevel=2)
            return CPU
        raise DeviceError(f"device 'cuda' cannot be used: {missing}")
    raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")


def bfloat16() -> np.dtype:
    """The dtype: a float's range with 8 bits of precision. Raises DeviceError when the package that has it is missing, or
    NumPy is too old for CuPy to know it."""
    try:
        import ml_dtypes
    except ImportError:
        raise DeviceError(f"bfloat16 needs ml_dtypes; install it with: {sys.executable} -m pip install ml_dtypes") from None
    if np.lib.NumpyVersion(np.__version__) < OLDEST_NUMPY_WITH_BFLOAT16:
        raise DeviceError(f"bfloat16 needs NumPy {OLDEST_NUMPY_WITH_BFLOAT16} or newer, this is {np.__version__}")
    return np.dtype(ml_dtypes.bfloat16)


def is_float(dtype: np.dtype) -> bool:
    """Whether a gradient can be held in it."""
    return dtype.kind == "f" or dtype.name == "bfloat16"  # which NumPy does not know


@contextmanager
def tf32(backend: Backend, yes: bool = True) -> Iterator[None]:
    """Within it, if `yes`, the products of linear layers and attention on a GPU round float32 operands to TF32."""
    gemm = backend.kernels.gemm if isinstance(backend.kernels, CudaKernels) else None
    if gemm is None or gemm.tf32 == yes:
        yield
        return
    gemm.tf32 = yes
    try:
        yield
    finally:
        gemm.tf32 = not yes


def to_numpy(array: Array) -> np.ndarray:
    """The array in host memory (itself when it is there already)."""
    get = getattr(array, "get", None)  # cupy.ndarray.get copies from the device
    return get() if get is not None else np.asarray(array)


def _why_no_cuda() -> str | None:
    """What keeps CUDA from being used, in words with the remedy; None when nothing does.

    Asks the driver directly, which takes milliseconds, before CuPy is imported, which takes longer.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver; install one (https://www.nvidia.com/drivers), or use --device cpu"
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return "the NVIDIA driver reports no usable GPU; use --device cpu"
    if importlib.util.find_spec("cupy") is None:
        driver.cuDriverGetVersion(ctypes.byref(version))
        major = 13 if version.value >= 13_000 else 12
        return f"CuPy is not installed; install it with: {sys.executable} -m pip install 'cupy-cuda{major}x[ctk]>=14'"
    return None


def _cuda() -> Backend:
    import cupy

    if cupy.ndarray not in _backends:
        _backends[cupy.ndarray] = Backend("cuda", cupy, CudaKernels(cupy, CudaLaunch(cupy), CublasGemm(cupy)))
    return _backends[cupy.ndarray]
