"""Loading the kernels in C: which file, and which functions for this processor. What they compute is in the `.c` files.

`setup.py` compiles them if there is a compiler. The library is loaded with ctypes, which releases Python's lock during a call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
# The arguments of each function: p is the address of an array or NULL, n an int64, d a double.
FUNCTIONS = {
    "gelu_forward": "ppn",
    "gelu_backward": "pppn",
    "dropout": "ppppnnd",
    "adamw": "ppppnnddddddd",
    "layer_norm_forward": "ppppppnnd",
    "layer_norm_backward": "ppppppppnn",
    "add_column_sums": "ppnn",
    "embedding_backward": "pppnn",
    "attention_forward": "pppppppp" + "nnnnn" + "nnnnnn" + "ndd",
    "attention_backward": "ppppppppppp" + "nnnnn" + "nnnnnn" + "nnnnnn" + "dd",
    "cross_entropy_forward": "ppppnn",
    "cross_entropy_backward": "ppppnn",
    "few_rows_product": "ppppnnnn",
    "decode_attention": "ppppppnnnnnnnd",
    "decode_blocks": "pppppppp" + "nnnnnnnn" + "dnn",
    "product": "pppppnnnnnnnn",
    "bfloat16_product": "pppppnnnnnnnn",
}
# Functions that say a number for some sizes. Scratch memory is in bytes, exponentials are in elements.
NUMBERS = {"product_scratch": "n", "attention_scratch": "nn", "attention_exponentials": "nn", "longest_head": ""}
# The kinds of processor, the best one first, and their names in messages.
PROCESSORS = {"avx512bf16": "AVX-512 and bfloat16", "avx512": "AVX-512", "avx2": "AVX2", "any": "SIMD of 16 bytes"}
CACHE_LINE = 64  # bytes
OBJECT_HEAD = object.__basicsize__  # bytes
TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "d": ctypes.c_double}
_pointer_at = ctypes.c_void_p.from_address


def address_of(array: np.ndarray) -> int | None:
    """Where the elements of an array begin.

    `array.ctypes.data` is the same, and takes as long as a small kernel. An array is a Python object whose first field after
    the object's head is this address (NumPy's documentation of PyArrayObject).
    """
    return _pointer_at(id(array) + OBJECT_HEAD).value


class Library:
    """The functions for one kind of processor: `library("gelu_forward", x, y, n)`."""

    def __init__(self, loaded: ctypes.CDLL, processor: str) -> None:
        """processor: one of PROCESSORS; see the files processors_*.c."""
        self.processor = processor
        self.has_bfloat16 = processor == "avx512bf16"
        names = [name for name in FUNCTIONS if self.has_bfloat16 or name != "bfloat16_product"]
        self._functions = {name: getattr(loaded, f"{name}_{processor}") for name in names}
        for name, function in self._functions.items():
            function.argtypes, function.restype = [TYPES[kind] for kind in FUNCTIONS[name]], None
        self._numbers = {name: getattr(loaded, f"{name}_{processor}") for name in NUMBERS}
        for name, function in self._numbers.items():
            function.argtypes, function.restype = [TYPES[kind] for kind in NUMBERS[name]], ctypes.c_int64
        self._of_thread = threading.local()

    def __call__(self, name: str, *arguments: Any) -> None:
        """arguments: NumPy arrays, which must be contiguous; None for a null pointer; numbers."""
        self._functions[name](*[address_of(a) if isinstance(a, np.ndarray) else a for a in arguments])

    def size(self, name: str, *sizes: int) -> int:
        """One of NUMBERS."""
        return int(self._numbers[name](*sizes))

    def scratch(self, name: str, *sizes: int) -> np.ndarray:
        """Memory for a call of a kernel, as much as one of NUMBERS says. Each thread has its own, and keeps it."""
        needed = self.size(name, *sizes)
        memory: np.ndarray | None = getattr(self._of_thread, "memory", None)
        if memory is None or memory.nbytes < needed:
            memory = np.empty(needed + CACHE_LINE, dtype=np.uint8)
            start = -memory.ctypes.data % CACHE_LINE  # a vector that begins in one cache line and ends in another takes longer
            memory = self._of_thread.memory = memory[start : start + needed]
        return memory


def processors() -> tuple[str, ...]:
    """The kinds of processor for which this machine can run kernels, the best one first."""
    loaded = _loaded()
    if loaded is None:
        return ()
    kinds = tuple(PROCESSORS)
    return kinds[kinds.index(loaded.best_processor().decode()) :]


@functools.cache
def library(processor: str | None = None) -> Library | None:
    """The kernels for this processor, or for one of `processors()`; None if there are none here.

    There are none if no compiler was there at installation, or if the variable NPGPT_NATIVE is 0.
    """
    loaded = _loaded()
    return Library(loaded, processor or processors()[0]) if loaded is not None else None


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    if os.environ.get("NPGPT_NATIVE") == "0":
        return None
    paths = [FOLDER / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = [path for path in paths if path.exists()]
    if not found:
        return None
    try:
        loaded = ctypes.CDLL(str(found[0]))
        loaded.best_processor.restype = loaded.sources.restype = ctypes.c_char_p
        problem = None if loaded.sources().decode() == hash_of_sources(FOLDER) else "was built from other sources"
    except (OSError, AttributeError) as error:  # for another processor or C library, or damaged
        problem = f"cannot be loaded ({error})"
    array = np.zeros(1)
    if problem is None and address_of(array) != array.ctypes.data:
        problem = "does not find the elements of an array in this Python"
    if problem is None:
        return loaded
    warnings.warn(
        f"{found[0].name} {problem}, so NumPy computes everything; build it again with: pip install -v -e . (it shows the "
        "errors of the compiler)",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def hash_of_sources(folder: Path) -> str:
    """A hash of the C files in a folder. A library contains that of the files it was built from. setup.py has this too."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
