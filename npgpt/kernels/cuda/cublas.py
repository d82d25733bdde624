"""What the two libraries for products share: how they are found, and how they report errors. No products are here."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def loaded_library(cublas: Any, name_on_windows: str, version: int) -> ctypes.CDLL:
    """The library that CuPy has loaded. cublas: CuPy's module for it. version: of CUDA, such as 13020."""
    # Elsewhere than on Windows, a search in a library also finds the functions of the libraries that it needs.
    return ctypes.CDLL(f"{name_on_windows}64_{version // 1000}.dll" if sys.platform == "win32" else cublas.__file__)


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS answered with status {status}; https://docs.nvidia.com/cuda/cublas/ lists them")
