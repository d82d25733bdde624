"""The CUDA kernels without a GPU: the kernels on NumPy's arrays, and a backend that behaves like that of a GPU."""

import numpy as np
import pytest
from support import cuda_on_cpu, device_array

from npgpt.engine import backend
from npgpt.engine.backend import Backend
from npgpt.kernels.cuda import base, kernels
from npgpt.kernels.cuda.kernels import CudaKernels

on_cpu = pytest.mark.skipif(cuda_on_cpu.MISSING is not None, reason=cuda_on_cpu.MISSING or "")


def use_two_warps(monkeypatch):
    """Give each block two warps. With fewer, a kernel that mixes up the rows of its warps would pass."""
    for module in (base, kernels):
        monkeypatch.setattr(module, "THREADS", 64)


def kernels_on_numpy(monkeypatch):
    """The CUDA kernels on NumPy's arrays."""
    use_two_warps(monkeypatch)
    return CudaKernels(np, cuda_on_cpu.launch, cuda_on_cpu.Gemm())


def pretended_device(monkeypatch):
    """A backend named "cuda" whose arrays are not NumPy's. The CUDA kernels compute on the CPU."""
    use_two_warps(monkeypatch)
    xp = device_array.Module()
    kernels = CudaKernels(xp, device_array.launch_on(cuda_on_cpu.launch), device_array.gemm_on(cuda_on_cpu.Gemm()))
    pretended = Backend("cuda", xp, kernels, device_array.Recording)
    monkeypatch.setitem(backend._backends, device_array.ndarray, pretended)
    return pretended
