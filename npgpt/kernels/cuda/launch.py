"""Compiling the `.cu` files and launching their kernels on the current GPU. kernels.py and attention.py say what is launched.

The kernels are in two modules: those of attention, which are compiled for one `Variant`, and all others.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class Variant(NamedTuple):
    """What the kernels of attention are compiled for."""

    head_dim: int
    is_exact: bool = True  # in float32: whether products have the precision of float32, or that of TF32


def source(variant: Variant | None = None) -> str:
    """All kernels of attention, or without a variant all other kernels, as one text for the compiler."""
    names = ATTENTION_FILES if variant else FILES
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def compiler_options(dtype: str, variant: Variant | None = None) -> tuple[str, ...]:
    """The compiler's options for activations of `dtype`."""
    element, accumulator, _ = ELEMENTS[dtype]
    options = ("-std=c++14", f"-DSCALAR={element}", f"-DACCUMULATOR={accumulator}")
    return (*options, f"-DHEAD_DIM={variant.head_dim}", f"-DEXACT={int(variant.is_exact)}") if variant else options


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
        variant: Variant | None = None,
    ) -> None:
        """Run the kernel `name` for activations of `dtype`, on a grid of blocks of `threads` threads.

        An argument is an array, None (a null pointer), an int (long long) or a float (double). variant: for the kernels of
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
        variant: Variant | None = None,
    ) -> None:
        given = tuple(np.uint64(0) if a is None else a for a in arguments)
        self._kernel(name, dtype, variant)(grid, (threads,), given)

    def _find(self, name: str, dtype: str, variant: Variant | None) -> Any:
        return self._module(dtype, variant).get_function(name)

    def _compile(self, dtype: str, variant: Variant | None) -> Any:
        return self._cupy.RawModule(code=source(variant), options=compiler_options(dtype, variant))
