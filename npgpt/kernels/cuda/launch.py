"""Compiling the `.cu` files and launching their kernels on the current GPU. What is launched is decided in kernels.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FILES = ("common.cu", "norm.cu", "elementwise.cu", "softmax.cu", "embedding.cu")
# For each dtype of activations: T in C++ (the type of an element), A in C++ (the type of an accumulator), and A in NumPy.
ELEMENTS: dict[str, tuple[str, str, np.dtype]] = {
    "float32": ("float", "float", np.dtype(np.float32)),
    "float64": ("double", "double", np.dtype(np.float64)),
    "bfloat16": ("bfloat16", "float", np.dtype(np.float32)),
}


def source() -> str:
    """All kernels, as one text for the compiler."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in FILES)


def compiler_options(dtype: str) -> tuple[str, ...]:
    """The compiler's options for activations of `dtype`."""
    element, accumulator, _ = ELEMENTS[dtype]
    return ("-std=c++14", f"-DSCALAR={element}", f"-DACCUMULATOR={accumulator}")


class Launch(Protocol):
    """A way to run a kernel. Tests use one that runs the same sources on a CPU."""

    def __call__(self, name: str, dtype: str, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]) -> None:
        """Run the kernel `name` for activations of `dtype`, on a grid of blocks of `threads` threads.

        An argument is an array, None (a null pointer), an int (long long) or a float (double).
        """


class CudaLaunch:
    """Launches kernels on the current GPU, through CuPy.

    It compiles the kernels for a dtype when that dtype is first used. CuPy keeps the result on disk.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernel, self._module = functools.cache(self._find), functools.cache(self._compile)

    def __call__(self, name: str, dtype: str, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]) -> None:
        self._kernel(name, dtype)(grid, (threads,), tuple(np.uint64(0) if a is None else a for a in arguments))

    def _find(self, name: str, dtype: str) -> Any:
        return self._module(dtype).get_function(name)

    def _compile(self, dtype: str) -> Any:
        return self._cupy.RawModule(code=source(), options=compiler_options(dtype))
