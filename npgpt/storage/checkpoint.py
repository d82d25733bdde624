"""One file holds a model: weights, vocabulary, configuration, optimiser state, progress. No pickle.

The file is an `.npz`, a zip of NumPy arrays that any NumPy reads:

    checkpoint.json               everything that is not an array, and the SHA-256 of every other member
    blocks.0.attn.qkv.weight.npy  one member per parameter, under its name in the model
    optimizer.exp_avg.npy         AdamW's running means, flat, as optim.AdamW keeps them
    optimizer.exp_avg_sq.npy
    batch.x.npy  batch.y.npy      of a crash file alone: the batch of the step that went wrong

Members are stored, not compressed: weights hardly shrink. The same state gives the same bytes. Reading
trusts nothing: every size is checked against the file's before memory is taken, nothing is evaluated or
unpickled, and what is left over or missing is an error. Either a file is exactly what was written, or
`CheckpointError` says what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.engine.backend import CPU, Backend
from npgpt.model.gpt import GPT
from npgpt.storage.files import whole_file
from npgpt.text.characters import CharTokenizer

FORMAT = 2  # 1 had no hashes, machine or crash
HEADER = "checkpoint.json"
MOMENTS = ("optimizer.exp_avg", "optimizer.exp_avg_sq")
BATCH = ("batch.x", "batch.y")
LARGEST_HEADER = 2 << 20  # bytes; room for all characters in use and ten thousand evaluations
CHUNK = 1 << 20  # bytes read at a time
ZIP_END = 22  # bytes: how far before its end a zip without comment has the mark of its directory


class CheckpointError(RequestError):
    """A file is not a checkpoint this version can use; the message says what is wrong with it."""


@dataclass
class Checkpoint:
    """What `load` found."""

    model: GPT
    tokenizer: CharTokenizer
    train_config: TrainConfig | None = None  # how it was trained
    progress: dict[str, Any] = field(default_factory=dict)  # train.Progress as a dictionary
    source: str | None = None  # the text it was trained on: where it was
    fingerprint: str | None = None  # and the SHA-256 of its ids
    optimizer_state: dict[str, Any] | None = None  # for AdamW.load_state_dict
    machine: dict[str, Any] | None = None  # what decides the rounding: device, threads, NumPy, BLAS
    crash: str | None = None  # of a crash file: what went wrong
    batch: tuple[np.ndarray, np.ndarray] | None = None  # and x and y of that step
    format: int = FORMAT

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def step(self) -> int:
        return self.progress.get("step", 0)


# ---------------------------------------------------------------- writing


def save(
    path: str | Path,
    model: GPT,
    tokenizer: CharTokenizer,
    *,
    optimizer: Any = None,
    train_config: TrainConfig | None = None,
    progress: dict[str, Any] | None = None,
    source: str | None = None,
    fingerprint: str | None = None,
    machine: dict[str, Any] | None = None,
    crash: str | None = None,
    batch: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Write a checkpoint. What was at `path` before stays whole until the new file is complete, on the disk and
    has been read back.

    Raises OSError when it cannot be written or does not read back, and ValueError for what `load` would refuse:
    numbers that are not finite, say. Nothing is left behind then.
    """
    arrays = model.state_dict()
    if optimizer:
        state = optimizer.state_dict()
        arrays |= {name: state[name.removeprefix("optimizer.")] for name in MOMENTS}
    if batch:
        arrays |= {name: np.asarray(ids, dtype=np.int64) for name, ids in zip(BATCH, batch, strict=True)}
    for name, array in arrays.items():
        if array.dtype.str not in ("<i8", "<f4", "<f8"):
            raise ValueError(f"a checkpoint holds float32 and float64, {name} is {array.dtype}")
        if crash is None and not np.isfinite(array).all():
            raise ValueError(f"{name} does not hold finite numbers, so it is not saved")
    if (crash is None) != (batch is None):
        raise ValueError("a crash file needs its batch, and no other has one")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"vocabulary of {tokenizer.vocab_size} characters, model of {model.config.vocab_size}")
    members = {name: _npy(array) for name, array in arrays.items()}
    header: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "vocabulary": tokenizer.characters,
        "train_config": dataclasses.asdict(train_config) if train_config else None,
        "progress": progress or {},
        "source": None if source is None else _one_line(source),
        "fingerprint": fingerprint,
        "machine": machine,
        "crash": crash,
        "optimizer_steps": optimizer.steps if optimizer else None,
        "sha256": {name: _sha256(*parts) for name, parts in members.items()},
    }
    for key, fits in FIELDS.items():
        if not fits(header[key]):
            raise ValueError(f"{key} cannot be saved: {str(header[key])[:200]!r}")
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    if len(text) > LARGEST_HEADER:
        raise ValueError(f"everything but the arrays takes {len(text):,} bytes, a checkpoint has room for {LARGEST_HEADER:,}")

    def verify(written: Path) -> None:
        """Every byte is what it should be."""
        try:
            with _open(written) as found:
                found.check_hashes()
        except CheckpointError as error:
            raise OSError(errno.EIO, f"what was written reads back differently ({error})") from None

    with whole_file(Path(path), verify) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # ZipInfo's own date, not today's: the same contents are the same bytes.
        archive.writestr(zipfile.ZipInfo(HEADER), text)
        for name, parts in members.items():
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                for part in parts:
                    member.write(part)


def _one_line(text: str) -> str:
    """With escapes for what is not printable or not UTF-8: file names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """An array as a file of NumPy's format, version 1.0: its header, and its data."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    text += " " * (-(len(NPY_MAGIC) + 2 + len(text) + 1) % 64) + "\n"
    return NPY_MAGIC + struct.pack("<H", len(text)) + text.encode(), array.reshape(-1).view(np.uint8).data


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading

NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(
    rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \(((?:\d{1,18}, ?){0,4}(?:\d{1,18})?)\), \} *\n"
)

KEYS = {
    1: {"format", "config", "vocabulary", "train_config", "progress", "source", "fingerprint", "optimizer_steps"},
}
KEYS[2] = KEYS[1] | {"machine", "crash", "sha256"}


def load(path: str | Path, backend: Backend = CPU, with_optimizer: bool = False) -> Checkpoint:
    """Rebuild model and tokenizer from a checkpoint alone.

    with_optimizer: also read what resuming needs. Raises CheckpointError when the file is missing, damaged,
    of another format or at odds with its own configuration.
    """
    with _open(Path(path)) as found:
        header = found.header
        model = GPT(found.config, seed=None, backend=backend)
        found.check_shapes({name: p.shape for name, p in model.named_parameters()})
        finite = header.get("crash") is None  # a crash file shows what is not
        for name, p in model.named_parameters():
            p.data[...] = backend.asarray(found.array(name, p.dtype, finite))
        batch = optimizer_state = None
        if header.get("crash") is not None:
            x, y = (found.array(name) for name in BATCH)
            batch = x, y
            if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= found.config.vocab_size:
                raise CheckpointError("its batch has ids outside the vocabulary")
        if with_optimizer and header["optimizer_steps"] is not None:
            dtype = model.wte.weight.dtype
            moments = {name.removeprefix("optimizer."): found.array(name, dtype, finite) for name in MOMENTS}
            optimizer_state = {"steps": header["optimizer_steps"]} | moments
        return Checkpoint(
            model,
            found.tokenizer,
            found.train_config,
            header["progress"],
            header["source"],
            header["fingerprint"],
            optimizer_state,
            header.get("machine"),
            header.get("crash"),
            batch,
            header["format"],
        )


def step_of(path: Path) -> int:
    """The step a checkpoint is at, without reading its arrays. Raises CheckpointError as `load` does."""
    with _open(path) as found:
        return found.header["progress"].get("step", 0)


class _Archive:
    """An opened checkpoint whose members and header have been checked, but not yet its arrays."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        """size: of the file, in bytes."""
        self._zip = archive
        self._members = _members(archive, size)
        self.header = _parse_header(archive.read(self._members[HEADER]))
        self.config = GPTConfig.from_dict(self.header["config"])
        trained = self.header["train_config"]
        self.train_config = None if trained is None else TrainConfig.from_dict(trained)
        vocabulary, n = self.header["vocabulary"], self.config.num_parameters()
        if len(vocabulary) != self.config.vocab_size:
            raise CheckpointError(f"vocabulary of {len(vocabulary)} characters, model of {self.config.vocab_size}")
        held = sum(info.file_size for info in self._members.values())
        if 4 * n > held:  # before a model of that size is made
            raise CheckpointError(f"its configuration describes {n:,} parameters, more than its {held:,} bytes can hold")
        self.tokenizer = CharTokenizer(vocabulary)
        self._check_names()

    def _check_names(self) -> None:
        """The arrays are those that have a hash."""
        names = {name.removesuffix(".npy") for name in self._members} - {HEADER}
        if self.header["format"] > 1 and names != set(self.header["sha256"]):
            differing = [_short(name) for name in sorted(names ^ set(self.header["sha256"]))]
            raise CheckpointError(f"its list of hashes and its arrays differ: {_some(differing)}")

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """The arrays are those that the configuration demands, in the shapes it demands; `expected` has those of
        the parameters."""
        if self.header["optimizer_steps"] is not None:
            expected = expected | dict.fromkeys(MOMENTS, (self.config.num_parameters(),))
        if self.header.get("crash") is not None:
            rows = self.train_config.batch_size if self.train_config else 0
            expected = expected | dict.fromkeys(BATCH, (rows, self.config.block_size))
        names = [name.removesuffix(".npy") for name in self._members if name != HEADER]
        problems = [f"missing {name}" for name in expected if name not in names]
        problems += [f"unknown {_short(name)}" for name in names if name not in expected]
        for name in names if not problems else []:
            info = self._members[name + ".npy"]
            with self._zip.open(info) as member:
                dtype, shape, _ = _read_npy_header(name, member, info.file_size)
            if (dtype.kind == "i") != (name in BATCH):
                problems.append(f"{name} is of dtype {dtype}")
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        if problems:
            raise CheckpointError(_some(problems))

    def array(self, name: str, dtype: Any = None, finite: bool = True) -> np.ndarray:
        """An array, its hash verified, as `dtype`; finite: a number that is not is an error."""
        info = self._members[name + ".npy"]
        with self._zip.open(info) as member:
            stored, shape, header = _read_npy_header(name, member, info.file_size)
            array = np.empty(shape, dtype=stored)
            data = array.reshape(-1).view(np.uint8).data
            digest = hashlib.sha256(header)
            for start in range(0, len(data), CHUNK):
                piece = member.read(min(CHUNK, len(data) - start))
                data[start : start + len(piece)] = piece
                digest.update(piece)
            if member.read(1):
                raise CheckpointError(f"array {name} is longer than its shape")
        self._compare_hash(name, digest.hexdigest())
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is seen below
            array = array.astype(dtype or stored.newbyteorder("="), copy=False)
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CheckpointError(f"array {name} does not hold finite numbers")
        return array

    def check_hashes(self) -> None:
        """Read every array and compare its hash, without keeping it."""
        for name in self.header["sha256"]:
            digest = hashlib.sha256()
            with self._zip.open(self._members[name + ".npy"]) as member:
                while piece := member.read(CHUNK):
                    digest.update(piece)
            self._compare_hash(name, digest.hexdigest())

    def _compare_hash(self, name: str, found: str) -> None:
        if self.header["format"] > 1 and self.header["sha256"][name] != found:
            raise CheckpointError(f"array {name} is not what was written (its SHA-256 differs)")


@contextmanager
def _open(path: Path) -> Iterator[_Archive]:
    """A checked archive; every way of being unreadable, here or in the block, is a CheckpointError naming the file."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, say, which might never end
            raise CheckpointError("it is not a file of its own")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - ZIP_END))
            whole = file.read(4) == b"PK\5\6"
            with zipfile.ZipFile(file) as archive:
                found = _Archive(archive, size)
                if not whole:
                    raise CheckpointError("there is something after its end")
                yield found
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}; bin/train writes one") from None
    except IsADirectoryError:
        raise CheckpointError(f"expected a checkpoint, got a folder: {path}") from None
    except _UnusableError as error:
        raise CheckpointError(f"{path} {error}") from None
    except RequestError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    # What zipfile raises for damaged directories, compressed, encrypted or otherwise unsupported members.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


class _UnusableError(CheckpointError):
    """Not damaged, but nothing for this version; the message goes on after the file's name."""


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name: each once, stored as it is, within the file."""
    members: dict[str, zipfile.ZipInfo] = {}
    others, total = [], 0
    for info in archive.infolist():
        name = info.filename
        if name in members:
            raise CheckpointError(f"it has two members named {_short(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(f"its member {_short(name)} is compressed or encrypted, expected it as it is")
        if name != HEADER and not name.endswith(".npy"):
            others.append(name)
        total += info.file_size
        members[name] = info
    if HEADER not in members:
        shown = ", ".join(map(_short, list(members)[:3])) + (", ..." if len(members) > 3 else "")
        raise _UnusableError(f"is not an npgpt checkpoint: it has no {HEADER}, but {shown or 'nothing'}")
    if min(info.header_offset for info in members.values()) != 0:
        raise CheckpointError("there is something before its beginning")
    if others:
        raise CheckpointError(f"its member {_short(others[0])} is not an array")
    if total > size:
        raise CheckpointError(f"its members claim {total:,} bytes, the file has {size:,}")
    if members[HEADER].file_size > LARGEST_HEADER:
        raise CheckpointError(f"its {HEADER} has {members[HEADER].file_size:,} bytes, expected {LARGEST_HEADER:,} at most")
    return members


def _parse_header(data: bytes) -> dict[str, Any]:
    """checkpoint.json as a dictionary whose keys and types are as `save` writes them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {HEADER} cannot be used ({error})") from None
    if not isinstance(header, dict) or "format" not in header:
        raise _UnusableError(f"is not an npgpt checkpoint: its {HEADER} has no format")
    number = header["format"]
    if type(number) is not int or number not in KEYS:
        raise _UnusableError(f"has checkpoint format {_short(number)}, this version reads {' and '.join(map(str, KEYS))}")
    wrong = sorted(KEYS[number] ^ set(header))
    if wrong:
        raise CheckpointError(f"its {HEADER} cannot be used (missing or unknown: {_some([_short(key) for key in wrong])})")
    for key, fits in FIELDS.items():
        if key in header and not fits(header[key]):
            raise CheckpointError(f"its {HEADER} cannot be used ({key} is {_short(header[key])})")
    return header


def _short(value: Any) -> str:
    """For a message: on one line, and not long, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(problems: list[str]) -> str:
    """The first few."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value is None or check(value)


def _is_line(value: Any) -> bool:
    """A text that can be shown as it is."""
    return isinstance(value, str) and value.isprintable() and len(value) < 5000


def _is_vocabulary(value: Any) -> bool:
    """A text that can be written as UTF-8 (JSON can spell halves of characters)."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_history(value: Any) -> bool:
    """Rows of step, training loss, validation loss and its standard error."""
    checks = (_is_count, _is_number, _or_none(_is_number), _or_none(_is_number))
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(checks) and all(check(n) for check, n in zip(checks, row, strict=True))
        for row in value
    )


PROGRESS = {  # of train.Progress, or nothing
    "step": _is_count,
    "best_step": _is_count,
    "best_loss": _or_none(_is_number),
    "stale_evaluations": _is_count,
    "loss_sum": _is_number,
    "loss_count": _is_count,
    "history": _is_history,
}

FIELDS: dict[str, Callable[[Any], Any]] = {
    "config": lambda value: isinstance(value, dict),
    "vocabulary": _is_vocabulary,
    "train_config": _or_none(lambda value: isinstance(value, dict)),
    "progress": lambda value: isinstance(value, dict) and all(k in PROGRESS and PROGRESS[k](v) for k, v in value.items()),
    "source": _or_none(_is_line),
    "fingerprint": _or_none(lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)),
    "optimizer_steps": _or_none(_is_count),
    "machine": _or_none(lambda value: isinstance(value, dict) and all(_is_line(n) for pair in value.items() for n in pair)),
    "crash": _or_none(_is_line),
    "sha256": lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
}


def _read_npy_header(name: str, member: Any, size: int) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """(dtype, shape, the header's bytes) of a member of `size` bytes, which are as many as the shape says."""
    start = member.read(len(NPY_MAGIC) + 2)
    if len(start) != len(NPY_MAGIC) + 2 or not start.startswith(NPY_MAGIC):
        raise CheckpointError(f"array {name} is not in NumPy's format 1.0")
    text = member.read(struct.unpack("<H", start[-2:])[0])
    match = NPY_HEADER.fullmatch(text)
    if not match or match[1] not in (b"<f4", b"<f8", b"<i8"):
        raise CheckpointError(f"array {name} does not hold plain numbers of a known kind")
    dtype, shape = np.dtype(match[1].decode()), tuple(int(n) for n in re.findall(rb"\d+", match[2]))
    expected = len(start) + len(text) + math.prod(shape) * dtype.itemsize
    if expected != size:
        raise CheckpointError(f"array {name} of shape {shape} would take {expected:,} bytes, it has {size:,}")
    return dtype, shape, start + text
