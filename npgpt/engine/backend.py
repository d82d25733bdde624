"""Backends: for each kind of array, its array module and its kernels. Only this file knows which devices exist.

`backend_of(array)` finds the backend from the array's type. So there is no global switch, and arrays of two devices can
exist side by side. There is no mathematics here. CuPy is imported only when somebody asks for a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.engine.streams import Stream, generator, seed_sequence
from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.cuda.kernels import CudaKernels
from npgpt.kernels.cuda.launch import CudaLaunch
from npgpt.kernels.cuda.products import CublasGemm
from npgpt.kernels.cuda.random import Key
from npgpt.kernels.cuda.recording import CudaGraph, Recording
from npgpt.kernels.native.kernels import NativeKernels
from npgpt.kernels.native.library import library
from npgpt.kernels.reference import Array, Kernels

OLDEST_NUMPY_WITH_BFLOAT16 = "2.1.2"  # CuPy 14 has no bfloat16 with an older NumPy


class DeviceError(RuntimeError):
    """The requested device cannot be used here. The message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """A device: its array module `xp`, and the kernels that compute on it."""

    name: str  # "cpu" or "cuda"
    xp: Any
    kernels: Kernels
    record: Callable[[Callable[[], Any]], Recording] | None = None  # records what a function computes, on a GPU

    @property
    def is_cpu(self) -> bool:
        """Whether arrays are NumPy's, in host memory."""
        return self.xp is np

    def asarray(self, array: Any, dtype: Any = None) -> Array:
        """The array on this device. It is copied only if it is on another device or has another dtype."""
        if self.is_cpu:
            array = to_numpy(array)
        return self.xp.asarray(array, dtype=dtype)

    def generator(self, seed: int, stream: Stream, *counters: int) -> Any:
        """The random generator for dropout on this device; a pure function of the arguments. See streams.py."""
        if self.is_cpu:
            return generator(seed, stream, *counters)
        return Key(self.asarray(random_key(seed, stream, *counters)))


def random_key(seed: int, stream: Stream, *counters: int) -> np.ndarray:
    """The content of a `Key`: one uint64, a pure function of the arguments."""
    return seed_sequence(seed, stream, *counters).generate_state(1, np.uint64) >> np.uint64(1)


def _cpu_kernels() -> CpuKernels:
    native = library()
    return NativeKernels(native) if native else CpuKernels()


CPU_KERNELS = _cpu_kernels()
CPU = Backend("cpu", np, CPU_KERNELS)

_backends: dict[type, Backend] = {np.ndarray: CPU}


def backend_of(*arrays: Array) -> Backend:
    """The backend that the arrays belong to.

    Raises TypeError if the arrays are on different devices, or if one is not an array of a known module.
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
    for array_type, backend in _backends.items():
        if isinstance(array, array_type):  # a subclass such as numpy.memmap
            return backend
    raise TypeError(f"expected a NumPy array (or a CuPy array after select('cuda')), got {type(array).__name__}")


def select(name: str = "auto") -> Backend:
    """The backend by name: "cpu", "cuda", or "auto" (a GPU if one is usable, else the CPU).

    Raises DeviceError if "cuda" cannot be used, and ValueError for any other name.
    """
    if name == "cpu":
        return CPU
    if name in ("auto", "cuda"):
        missing = _why_no_cuda()
        if not missing:
            try:
                return _cuda()
            except ImportError as error:  # CuPy for another CUDA version, or an incomplete installation
                missing = f"CuPy is installed but cannot be imported: {error}"
            except OSError as error:
                missing = f"CuPy cannot keep compiled kernels ({error}); set CUPY_CACHE_DIR to a folder that can be written"
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                missing = (
                    f"CuPy is installed but cannot compute ({reason}); docs/gpu.md says how to install it with its headers"
                )
        if name == "auto":
            if missing.startswith("CuPy"):
                warnings.warn(f"the GPU of this machine is not used: {missing}", RuntimeWarning, stacklevel=2)
            return CPU
        raise DeviceError(f"device 'cuda' cannot be used: {missing}")
    raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")


def bfloat16() -> np.dtype:
    """The dtype bfloat16: the range of float32 with 8 bits of precision.

    Raises DeviceError if the package ml_dtypes is missing, or if NumPy is too old for CuPy's bfloat16.
    """
    try:
        import ml_dtypes
    except ImportError:
        raise DeviceError(f"bfloat16 needs ml_dtypes; install it with: {sys.executable} -m pip install ml_dtypes") from None
    if np.lib.NumpyVersion(np.__version__) < OLDEST_NUMPY_WITH_BFLOAT16:
        raise DeviceError(f"bfloat16 needs NumPy {OLDEST_NUMPY_WITH_BFLOAT16} or newer, this is {np.__version__}")
    return np.dtype(ml_dtypes.bfloat16)


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype can hold gradients."""
    return dtype.kind == "f" or dtype.name == "bfloat16"  # NumPy does not count bfloat16 among the floats


@contextmanager
def tf32(backend: Backend, enabled: bool = True) -> Iterator[None]:
    """Inside `with`, and if `enabled`, matrix products on a GPU round float32 operands to TF32."""
    gemm = backend.kernels.gemm if isinstance(backend.kernels, CudaKernels) else None
    if gemm is None or gemm.tf32 == enabled:
        yield
        return
    gemm.tf32 = enabled
    try:
        yield
    finally:
        gemm.tf32 = not enabled


@contextmanager
def weights_rounded_ahead(backend: Backend, flat: Array, weights: list[Array], dtype: np.dtype | None) -> Iterator[None]:
    """Inside `with`, and if `dtype` is given, linear layers on a GPU take the weights from one copy in `dtype`.

    flat: an array whose parts, one after the other, are the weights. They must not change inside.
    """
    if dtype is None or not isinstance(backend.kernels, CudaKernels):
        yield
        return
    with backend.kernels.weights_rounded_ahead(flat, weights, dtype):
        yield


def has_bfloat16_products(backend: Backend) -> bool:
    """Whether products on a CPU can round to bfloat16; see `bfloat16_products`."""
    return isinstance(backend.kernels, NativeKernels) and backend.kernels.has_bfloat16


_rounding_lock = threading.Lock()


@contextmanager
def bfloat16_products(backend: Backend, enabled: bool = True) -> Iterator[None]:
    """Inside `with`, and if `enabled`, linear layers on a CPU round the operands of their products to bfloat16.

    This holds for all threads of the process, because worker threads compute for the thread that has entered.

    Raises DeviceError if this processor has no such products.
    """
    if not enabled:
        yield
        return
    kernels = backend.kernels
    if not (isinstance(kernels, NativeKernels) and kernels.has_bfloat16):
        raise DeviceError("products of bfloat16 need a processor with AVX512-BF16, and the kernels in C")
    with _rounding_lock:
        kernels.rounding += 1
    try:
        yield
    finally:
        with _rounding_lock:
            kernels.rounding -= 1


def rounds_to_bfloat16(backend: Backend) -> bool:
    """Whether products on a CPU round to bfloat16 now; see `bfloat16_products`."""
    return isinstance(backend.kernels, NativeKernels) and backend.kernels.bfloat16_products


@contextmanager
def rounded_products(backend: Backend, use_tf32: bool, bf16_products: bool) -> Iterator[None]:
    """Both `tf32` and `bfloat16_products`."""
    with tf32(backend, use_tf32), bfloat16_products(backend, bf16_products):
        yield


def to_numpy(array: Array) -> np.ndarray:
    """The array in host memory. A NumPy array is returned as it is."""
    get = getattr(array, "get", None)  # cupy.ndarray.get copies from the device
    return get() if get is not None else np.asarray(array)


def _why_no_cuda() -> str | None:
    """What keeps CUDA from being used, with the remedy; None if nothing does.

    This function asks the driver directly, which takes milliseconds. Importing CuPy takes much longer.
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
        kernels = CudaKernels(cupy, CudaLaunch(cupy), CublasGemm(cupy))
        backend = Backend("cuda", cupy, kernels, functools.partial(CudaGraph, cupy))
        try:
            try_out(backend)
        except cupy.cuda.compiler.CompileException as error:
            raise RuntimeError(str(error)) from error
        _backends[cupy.ndarray] = backend
    return _backends[cupy.ndarray]


def try_out(backend: Backend) -> None:
    """Compute with one kernel and one product. So what is wrong shows before a run, and not in the middle of it."""
    x = backend.xp.ones((2, 2), dtype=np.float32)
    y, _ = backend.kernels.gelu_forward(x)
    backend.kernels.linear_forward(y, x, None)
    to_numpy(y)
