"""NVIDIA's run-time compiler (NVRTC) accepts every CUDA kernel, and keeps its values in registers. These tests need no GPU."""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from support import cuda_on_cpu

from npgpt.kernels.cuda import launch
from npgpt.kernels.cuda.launch import Variant

FEW = 8  # bytes of registers in memory: the exact products of attention need two or three registers more than there are


def nvrtc():
    """The library of NVIDIA's run-time compiler; None if it is not installed."""
    found = importlib.util.find_spec("nvidia")
    pattern = "nvrtc64*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    for folder in found.submodule_search_locations or [] if found else []:
        for builtins in Path(folder).rglob("libnvrtc-builtins.so*"):  # some versions of NVRTC do not find this library
            ctypes.CDLL(str(builtins))
        for path in sorted(Path(folder).rglob(pattern)):
            return ctypes.CDLL(str(path))
    return None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        *((dtype, None) for dtype in launch.ELEMENTS),
        *(("float32", Variant(n, is_exact)) for n in (1, 32, 64) for is_exact in (True, False)),
        *(("bfloat16", Variant(n)) for n in (20, 64, 128)),
    ],
)
def test_every_kernel_compiles(architecture, dtype, variant):
    library = nvrtc()
    if library is None:
        pytest.skip("the CUDA compiler is not installed: make nvrtc")
    program = ctypes.c_void_p()
    text = launch.source(variant)
    source, names = text.encode(), cuda_on_cpu.entry_points(text)
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    options = [*launch.compiler_options(dtype, variant), f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    options = [option.encode() for option in options]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    text = log.value.decode()
    assert not re.search("warning|error", text, re.IGNORECASE), text
    in_memory = [int(n) for n in re.findall(r"(\d+) bytes stack frame", text)]
    assert len(in_memory) == len(names)
    assert max(in_memory) <= FEW, text
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, binary)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    for name in names:
        assert name.encode() in binary.raw
