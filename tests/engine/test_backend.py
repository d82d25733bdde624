"""Selecting a backend: what is missing for a GPU, the array's own device, TF32, bfloat16."""

import ctypes
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support import devices

from npgpt import Tensor
from npgpt.engine import backend
from npgpt.engine.backend import CPU, Backend, _why_no_cuda, backend_of, select


def test_auto_warns_when_a_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(backend, "_why_no_cuda", lambda: "CuPy is not installed; install it with: pip")
    with pytest.warns(RuntimeWarning, match="the GPU of this machine is not used: CuPy is not installed"):
        assert select("auto") is CPU
    monkeypatch.setattr(backend, "_why_no_cuda", lambda: "there is no NVIDIA driver")
    assert select("auto") is CPU


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ImportError("libcublas.so.13"), "CuPy is installed but cannot be imported: libcublas.so.13"),
        (PermissionError(13, "Permission denied", "/home/x/.cupy"), "CuPy cannot keep compiled kernels .*; set CUPY_CACHE_DIR"),
        (
            RuntimeError("cuda_fp16.h: no such file\nmore"),
            r"cannot compute \(cuda_fp16.h: no such file\); docs/gpu.md says how",
        ),
        (RuntimeError(), r"CuPy is installed but cannot compute \(RuntimeError\)"),
        (SyntaxError("a kernel that does not compile"), r"cannot compute \(a kernel that does not compile\)"),
    ],
)
def test_what_does_not_work_is_found_at_the_start(monkeypatch, error, shown):
    """`auto` goes on with the CPU and warns; "cuda" is refused. CuPy is a module that has only what is used before."""

    def fail(backend):
        raise error

    compiler = SimpleNamespace(CompileException=SyntaxError)
    cupy = SimpleNamespace(ndarray=type("ndarray", (), {}), cuda=SimpleNamespace(compiler=compiler))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(backend, "_why_no_cuda", lambda: None)
    for name in ("CudaKernels", "CudaLaunch", "CublasGemm"):
        monkeypatch.setattr(backend, name, lambda *_: None)
    monkeypatch.setattr(backend, "try_out", fail)
    with pytest.warns(RuntimeWarning, match=f"the GPU of this machine is not used: .*{shown}"):
        assert select("auto") is CPU
    with pytest.raises(backend.DeviceError, match=f"device 'cuda' cannot be used: .*{shown}"):
        select("cuda")


@devices.on_cpu
def test_a_kernel_and_a_product_are_tried_out(monkeypatch):
    pretended = devices.pretended_device(monkeypatch)
    calls = []
    for name in ("gelu_forward", "linear_forward"):
        run = getattr(pretended.kernels, name)
        monkeypatch.setattr(pretended.kernels, name, lambda *a, run=run, name=name: calls.append(name) or run(*a))
    backend.try_out(pretended)
    assert calls == ["gelu_forward", "linear_forward"]


def test_bfloat16_names_what_it_needs(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.1.0")
    monkeypatch.setitem(sys.modules, "ml_dtypes", sys.modules.get("ml_dtypes") or SimpleNamespace())
    with pytest.raises(backend.DeviceError, match=r"needs NumPy 2\.1\.2 or newer, this is 2\.1\.0"):
        backend.bfloat16()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(backend.DeviceError, match="-m pip install ml_dtypes"):
        backend.bfloat16()


def test_tf32_is_on_inside_its_block(cuda_kernels):
    pretended = Backend("cuda", np, cuda_kernels)
    seen = []
    for yes in (True, False):
        with backend.tf32(pretended, yes), backend.tf32(pretended, True):
            seen.append(cuda_kernels.gemm.tf32)
        seen.append(cuda_kernels.gemm.tf32)
    assert seen == [True, False, True, False]
    with backend.tf32(CPU):
        pass


def test_the_missing_part_is_named(monkeypatch):
    def driver_of(gpus, version=13_000, init=0):
        def write(value):
            return lambda pointer: setattr(pointer._obj, "value", value) or 0

        return SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=write(gpus), cuDriverGetVersion=write(version))

    def no_driver(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert "no NVIDIA driver; install one" in _why_no_cuda()
    for driver in (driver_of(0), driver_of(1, init=100)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert "no usable GPU" in _why_no_cuda()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for version, package in [(13_020, "cupy-cuda13x"), (12_080, "cupy-cuda12x")]:
        monkeypatch.setattr(ctypes, "CDLL", lambda name, version=version: driver_of(1, version))
        assert f"-m pip install '{package}[ctk]" in _why_no_cuda()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert _why_no_cuda() is None


def test_the_array_decides_the_backend():
    assert backend_of(np.ones(1)) is CPU
    assert Tensor([1.0]).backend is CPU
    assert select("cpu") is CPU
    with pytest.raises(TypeError, match="list"):
        backend_of([1.0])
    with pytest.raises(ValueError, match="device"):
        select("tpu")
