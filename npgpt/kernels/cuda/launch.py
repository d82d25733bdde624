"""Compiling the `.cu` files and launching their kernels on the current GPU. What is launched is decided in kernels.py.

The kernels are in two modules: those of attention, which are compiled for one head_dim, and all others.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FILES = ("common.cu", "sums.cu", "norm.cu", "elementwise.cu", "softmax.cu", "embedding.cu")
ATTENTION_FILES = ("common.cu", "tensor_cores.cu", "tiles.cu", "attention.cu")
# For each dtype of activations: T in C++ (the type of an element), A in C++ (the type of an accumulator), and A in NumPy.
ELEMENTS: dict[str, tuple[str, str, np.dtype]] = {
    "float32": ("float", "float", np.dtype(np.float32)),
    "float64": ("double", "double", np.dtype(np.float64)),
    "bfloat16": ("bfloat16", "float", np.dtype(np.float32)),
}
OLDEST_TENSOR_CORES = 80  # the compute capability, times ten, of the first GPUs with instructions for bfloat16 and TF32


def source(head_dim: int | None = None) -> str:
    """All kernels of attention for a head_dim, or with None all other kernels, as one text for the compiler."""
    names = ATTENTION_FILES if head_dim else FILES
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def compiler_options(dtype: str, head_dim: int | None = None) -> tuple[str, ...]:
    """The compiler's options for activations of `dtype`."""
    element, accumulator, _ = ELEMENTS[dtype]
    options = ("-std=c++14", f"-DSCALAR={element}", f"-DACCUMULATOR={accumulator}")
    return (*options, f"-DHEAD_DIM={head_dim}") if head_dim else options


class Launch(Protocol):
    """A way to run a kernel. Tests use one that runs the same sources on a CPU."""

    has_tensor_cores: bool  # whether kernels of attention can run

    def __call__(
        self,
        name: str,
        dtype: str,
        grid: tuple[int, int],
        threads: int,
        arguments: tuple[Any, ...],
        head_dim: int | None = None,
    ) -> None:
        """Run the kernel `name` for activations of `dtype`, on a grid of blocks of `threads` threads.

        An argument is an array, None (a null pointer), an int (long long) or a float (double). head_dim: for the kernels of
        attention only.
        """


class CudaLaunch:
    """Launches kernels on the current GPU, through CuPy.

    It compiles a module when one of its kernels is first used. CuPy keeps the result on disk.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.has_tensor_cores = int(cupy.cuda.Device().compute_capability) >= OLDEST_TENSOR_CORES
        self._kernel, self._module = functools.cache(self._find), functools.cache(self._compile)

    def __call__(
        self,
        name: str,
        dtype: str,
        grid: tuple[int, int],
        threads: int,
        arguments: tuple[Any, ...],
        head_dim: int | None = None,
    ) -> None:
        given = tuple(np.uint64(0) if a is None else a for a in arguments)
        self._kernel(name, dtype, head_dim)(grid, (threads,), given)

    def _find(self, name: str, dtype: str, head_dim: int | None) -> Any:
        return self._module(dtype, head_dim).get_function(name)

    def _compile(self, dtype: str, head_dim: int | None) -> Any:
        return self._cupy.RawModule(code=source(head_dim), options=compiler_options(dtype, head_dim))
