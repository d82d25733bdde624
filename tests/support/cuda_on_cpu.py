"""The CUDA kernels compiled for a CPU and launched with NumPy's arrays, so that they can be tested without a GPU."""

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from npgpt.engine.backend import DeviceError, bfloat16
from npgpt.kernels.cuda import launch as launching
from npgpt.kernels.cuda.operands import Operand

DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
with contextlib.suppress(DeviceError):
    DTYPES["bfloat16"] = bfloat16()

COMPILER = shutil.which("g++")
MISSING = None if COMPILER and sys.platform == "linux" else "g++ on Linux is needed to run the kernels on a CPU"


def entry_points(source):
    """The kernels in the source, as {name: C++ parameters}."""
    return dict(re.findall(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(\s*([^)]*)\)', source))


def program(variant):
    """The C++ program: the kernels, and for each kernel a function that runs it on a grid."""
    source = launching.source(variant)
    lines = [f'#include "{Path(__file__).parent / "cuda_on_cpu.cpp"}"', source]
    for name, parameters in entry_points(source).items():
        names = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        lines.append(f'extern "C" void run_{name}(int grid_x, int grid_y, int block, {parameters}) {{')
        lines.append(f"    run(grid_x, grid_y, block, [=] {{ {name}({names}); }});\n}}")
    return "\n".join(lines)


@functools.cache
def library(dtype, variant=None):
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        source.write_text(program(variant), encoding="utf-8")
        flags = [
            "-O1",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
            *launching.compiler_options(dtype, variant),
        ]
        done = subprocess.run([COMPILER, *flags, "-o", built, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(built))


# The arguments that may be views with strides. Other kernels know no strides.
VIEWS = {
    "copy": ("x", "y"),
    "cross_entropy_forward": ("logits",),
    "cross_entropy_backward": ("logits",),
    "attention_forward": ("q", "k", "v"),
    "attention_backward_queries": ("q", "k", "v", "dq"),
    "attention_backward_keys": ("q", "k", "v", "dk", "dv"),
}


def launch(name, dtype, grid, threads, arguments, variant=None):
    """Does what `launch.Launch` does, on the CPU. It asserts that arrays are contiguous, unless the kernel takes a view."""
    parameters = entry_points(launching.source(variant))[name].split(",")
    assert len(parameters) == len(arguments), f"{name} takes {parameters}"
    assert 1 <= grid[0] < 2**31
    assert 1 <= grid[1] < 65_536
    in_python = {"T": DTYPES[dtype], "A": launching.ELEMENTS[dtype][2]}
    integers = {"long long": np.int64, "unsigned long long": np.uint64, "unsigned short": np.uint16, "unsigned": np.uint32}
    types = in_python | {name: np.dtype(dtype) for name, dtype in integers.items()}
    values = []
    for parameter, argument in zip(parameters, arguments, strict=True):
        kind, called = parameter.replace("const ", "").strip().rsplit(" ", 1)
        if kind.endswith("*"):
            assert argument is None or argument.dtype == types[kind[:-1]], (name, parameter)
            is_view = called in VIEWS.get(name, ())
            assert argument is None or is_view or argument.flags.c_contiguous, (name, parameter)
            values.append(ctypes.c_void_p(argument.ctypes.data if argument is not None else None))
        elif kind == "double":
            assert type(argument) is float, (name, parameter)
            values.append(ctypes.c_double(argument))
        else:
            assert type(argument) is int, (name, parameter)
            assert kind == "long long"
            values.append(ctypes.c_longlong(argument))
    getattr(library(dtype, variant), f"run_{name}")(*grid, threads, *values)


launch.has_tensor_cores = True


class Gemm:
    """Does what `products.Gemm` does. It uses only the given strides and sizes to find the numbers in memory."""

    tf32 = False

    def __call__(self, a: Operand, b: Operand, out: Operand, sizes, count, add):
        m, n, k = sizes
        assert out.array.flags.c_contiguous
        assert not out.transposed
        left, right, result = (
            self._matrices(operand, *shape, count) for operand, shape in ((a, (m, k)), (b, (k, n)), (out, (m, n)))
        )
        wide = launching.ELEMENTS[a.array.dtype.name][2]
        product = left.astype(wide) @ right.astype(wide)
        result[...] = (product + result if add else product).astype(result.dtype)

    def with_bias(self, a: Operand, b: Operand, out: Operand, sizes, bias):
        """In float64, a bias needs a launch of its own, as with cuBLASLt."""
        if bias.dtype == np.float64:
            return False
        m, n, k = sizes
        assert bias.shape == (m,)
        assert bias.flags.c_contiguous
        assert {x.array.dtype for x in (a, b, out)} == {bias.dtype}
        left, right, result = (
            self._matrices(operand, *shape, 1) for operand, shape in ((a, (m, k)), (b, (k, n)), (out, (m, n)))
        )
        wide = launching.ELEMENTS[bias.dtype.name][2]
        result[...] = (left.astype(wide) @ right.astype(wide) + bias.astype(wide)[:, None]).astype(bias.dtype)
        return True

    def _matrices(self, operand, rows, columns, count):
        stored = (columns, rows) if operand.transposed else (rows, columns)
        assert stored[0] <= operand.leading, "columns overlap"
        size = operand.array.itemsize
        found = np.lib.stride_tricks.as_strided(
            operand.array, (count, *stored), (operand.stride * size, size, operand.leading * size)
        )
        return found.swapaxes(1, 2) if operand.transposed else found
