"""The safetensors format: a JSON header, and the bytes of arrays. This file knows no model.

It is written here and not taken from the library of that name, because the library cannot read bfloat16 into NumPy arrays, and
because this way no extra is needed. The format: https://huggingface.co/docs/safetensors.

Reading trusts nothing. Nothing is evaluated or unpickled. Every size is compared with the size of the file before memory is
taken.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.header import unique_names

MAX_HEADER_BYTES = 100_000_000  # as in the library
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # what is read as numbers, and how it is stored


class SafetensorsFile:
    """An open file. Its header has been checked. `shapes` holds the shape of each tensor."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError, naming the file, if it cannot be read or is damaged."""
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._entries, self._start = _read_header(self._file)
        except RequestError as error:
            self._file.close()
            raise RequestError(f"{path} is not a safetensors file, or is damaged: {error}") from None
        self.shapes: dict[str, tuple[int, ...]] = {name: entry[1] for name, entry in self._entries.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32 or float64. Raises RequestError if it does not hold floating-point numbers, or NaN."""
        dtype, shape, begin = self._entries[name]
        if dtype not in READABLE:
            raise RequestError(f"{self.path}: tensor {name} is of dtype {dtype}, expected one of {', '.join(READABLE)}")
        self._file.seek(self._start + begin)
        data = np.fromfile(self._file, dtype=READABLE[dtype], count=math.prod(shape))
        if data.size != math.prod(shape):
            raise RequestError(f"{self.path} has become shorter while it was read")
        if dtype == "BF16":  # the upper half of a float32
            data = (data.astype("<u4") << 16).view("<f4")
        array = data.astype(np.float64 if dtype == "F64" else np.float32, copy=False).reshape(shape)
        if not np.isfinite(array).all():
            raise RequestError(f"{self.path}: tensor {name} has a number that is not finite")
        return array

    def close(self) -> None:
        self._file.close()


def _read_header(file: BinaryIO) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """({name: (dtype, shape, where its data begins)}, where the data of all tensors begin). Raises RequestError."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise RequestError(f"its header would have {length:,} bytes, the file has {size:,}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise RequestError("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value) for name, value in header.items()}
    end = 0
    for name, (dtype, shape, begin) in sorted(entries.items(), key=lambda item: (item[1][2], math.prod(item[1][1]))):
        if begin != end:
            raise RequestError(f"the data of tensor {name[:60]!r} begins at {begin:,}, expected {end:,}")
        end += math.prod(shape) * ITEM_BYTES[dtype]
    if end != size - 8 - length:
        raise RequestError(f"its tensors have {end:,} bytes, the file has {size - 8 - length:,} for them")
    return entries, 8 + length


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, where the data begin) of a tensor, checked."""

    def is_list_of_counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)

    shown = repr(name[:60])
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise RequestError(f"tensor {shown} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES or not is_list_of_counts(shape) or not is_list_of_counts(offsets):
        raise RequestError(f"tensor {shown} has a dtype, shape or data_offsets that cannot be")
    if len(offsets) != 2 or len(shape) > 8 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise RequestError(f"tensor {shown} of shape {shape} does not fit its data_offsets {offsets}")
    return dtype, tuple(shape), offsets[0]


def write_safetensors(
    file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, array: Callable[[str], np.ndarray]
) -> None:
    """Write tensors, one after the other. dtype: float32 or float16. array: returns the tensor of a name."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        kind = "F32" if dtype.itemsize == 4 else "F16"
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in shapes:
        file.write(np.ascontiguousarray(array(name), dtype=dtype.newbyteorder("<")).data)
