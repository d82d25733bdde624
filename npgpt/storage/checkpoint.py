"""A checkpoint: one file that holds a model, its tokenizer, and the state of its training. No pickle.

The archive (archive.py) has these members:

    checkpoint.json               everything that is not an array (header.py), and the SHA-256 of every other member
    tokenizer.json                only with a BPE: the tokenizer
    blocks.0.attn.qkv.weight.npy  one member for each parameter, under its name in the model
    optimizer.exp_avg.npy         the optimiser's running means, as flat arrays
    optimizer.exp_avg_sq.npy
    batch.x.npy  batch.y.npy      only in a crash file: the batch of the step that failed

This file builds a model from an archive, and an archive from a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.engine.backend import CPU, Backend, to_numpy
from npgpt.model.gpt import GPT
from npgpt.storage.archive import (
    DTYPES,
    TOKENIZER,
    Archive,
    CheckpointError,
    encode_array,
    first_few,
    open_archive,
    sha256,
    shortened,
    write_archive,
)
from npgpt.storage.header import FORMAT, Progress, encode_header, one_line, parse_header
from npgpt.text.bpe import BPETokenizer
from npgpt.text.characters import CharTokenizer
from npgpt.text.record import TextRecord
from npgpt.text.tokenizer import Tokenizer

MOMENTS = ("optimizer.exp_avg", "optimizer.exp_avg_sq")
BATCH = ("batch.x", "batch.y")


@dataclass
class Checkpoint:
    """Everything that a checkpoint file holds. A model and its tokenizer are enough to make one."""

    model: GPT
    tokenizer: Tokenizer
    train_config: TrainConfig | None = None  # how the model is trained
    progress: Progress = field(default_factory=Progress)
    text: TextRecord | None = None  # the text that the model is trained on
    val_text: TextRecord | None = None  # the held-out text, if it is not a part of the training text
    optimizer_state: dict[str, Any] | None = None  # from the optimiser's state_dict
    machine: dict[str, str] | None = None  # what decides rounding: device, threads, NumPy, BLAS
    crash: str | None = None  # in a crash file: what went wrong
    batch: tuple[np.ndarray, np.ndarray] | None = None  # in a crash file: x and y of the step that failed
    format: int = FORMAT  # the format number of the file it was loaded from

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def step(self) -> int:
        return self.progress.step


# ---------------------------------------------------------------- writing


def save(path: str | Path, checkpoint: Checkpoint | GPT, tokenizer: Tokenizer | None = None, *, keep: bool = True) -> None:
    """Write a Checkpoint, or a model and its tokenizer. A file at `path` is replaced only once the new one is complete.

    The model's vocab_size may be larger than the tokenizer's. The ids above are padding, and sampling never draws them.
    keep: with False, the new file is removed after it was written and read back. `path` then stays as it is.

    Raises OSError if the file cannot be written or does not read back as it should, and ValueError for anything that
    `load` would refuse, such as numbers that are not finite. In both cases no temporary file is left behind.
    """
    if isinstance(checkpoint, GPT):
        if tokenizer is None:
            raise TypeError("to save a model, pass its tokenizer too: save(path, model, tokenizer)")
        checkpoint = Checkpoint(checkpoint, tokenizer)
    elif tokenizer is not None:
        raise TypeError("a Checkpoint has its own tokenizer: save(path, checkpoint)")
    arrays = _arrays_of(checkpoint)
    members: dict[str, Sequence[bytes | memoryview]] = {name: encode_array(array) for name, array in arrays.items()}
    vocabulary = None
    if isinstance(checkpoint.tokenizer, BPETokenizer):
        members[TOKENIZER] = [checkpoint.tokenizer.json.encode()]
    else:
        assert isinstance(checkpoint.tokenizer, CharTokenizer)
        vocabulary = checkpoint.tokenizer.characters
    hashes = {name: sha256(member) for name, member in members.items()}
    header = encode_header(
        {
            "config": dataclasses.asdict(checkpoint.config),
            "vocabulary": vocabulary,
            "train_config": dataclasses.asdict(checkpoint.train_config) if checkpoint.train_config else None,
            "progress": dataclasses.asdict(checkpoint.progress),
            "text": _encoded_text(checkpoint.text),
            "val_text": _encoded_text(checkpoint.val_text),
            "machine": checkpoint.machine,
            "crash": checkpoint.crash,
            "optimizer_steps": checkpoint.optimizer_state["steps"] if checkpoint.optimizer_state else None,
            "sha256": hashes,
        }
    )
    write_archive(Path(path), header, members, hashes, keep)


def _encoded_text(text: TextRecord | None) -> dict[str, Any] | None:
    return None if text is None else dataclasses.asdict(text) | {"sources": [one_line(source) for source in text.sources]}


def _decoded_text(text: dict[str, Any] | None) -> TextRecord | None:
    return None if text is None else TextRecord(tuple(text["sources"]), text["sha256"], text["n_characters"])


def _arrays_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The arrays to be saved, by name. Raises ValueError if they cannot be saved, or do not fit together."""
    if (checkpoint.crash is None) != (checkpoint.batch is None):
        raise ValueError("a crash file needs its batch, and no other file has one")
    if checkpoint.tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {checkpoint.tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{checkpoint.config.vocab_size}"
        )
    arrays = {name: to_numpy(p.data) for name, p in checkpoint.model.named_parameters()}  # no copies
    if checkpoint.optimizer_state:
        moments = {name: checkpoint.optimizer_state[name.removeprefix("optimizer.")] for name in MOMENTS}
        for name, array in moments.items():
            if array.shape != (checkpoint.config.num_parameters(),):
                raise ValueError(f"{name} has shape {array.shape}, expected {(checkpoint.config.num_parameters(),)}")
        arrays |= moments
    if checkpoint.batch:
        arrays |= {name: np.asarray(ids, dtype=np.int64) for name, ids in zip(BATCH, checkpoint.batch, strict=True)}
        _check_batch(checkpoint, [arrays[name] for name in BATCH])
    for name, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise ValueError(f"expected an array of float32 or float64, {name} is {array.dtype}")
        with np.errstate(over="ignore"):  # `load` makes float32 of it, so a large float64 would become infinite
            finite = array.dtype.kind == "i" or bool(np.isfinite(array.astype(np.float32, copy=False)).all())
        if checkpoint.crash is None and not finite:
            raise ValueError(f"{name} has a number that is not finite, so it is not saved")
    return arrays


def _check_batch(checkpoint: Checkpoint, batch: list[np.ndarray]) -> None:
    if checkpoint.train_config is None:
        raise ValueError("a crash file needs the train_config of its run")
    expected = (checkpoint.train_config.batch_size, checkpoint.config.block_size)
    for ids in batch:
        if ids.shape != expected:
            raise ValueError(f"the batch of a crash file must have shape {expected}, got {ids.shape}")
        if ids.min() < 0 or ids.max() >= checkpoint.config.vocab_size:
            raise ValueError(f"the batch of a crash file must have ids in 0..{checkpoint.config.vocab_size - 1}")


# ---------------------------------------------------------------- reading


def load(path: str | Path, backend: Backend = CPU, with_optimizer: bool = False) -> Checkpoint:
    """Rebuild a model and its tokenizer from a checkpoint file.

    The weights become float32. backend: the device for the model. with_optimizer: also read the optimiser's state, which
    resuming needs.

    Raises CheckpointError if the file is missing or damaged, has an unknown format or contradicts its own configuration.
    """
    with _opened(Path(path)) as found:
        header = found.header
        model = GPT(found.config, seed=None, backend=backend)
        found.check_shapes({name: p.shape for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.data[...] = backend.asarray(found.array(name, p.dtype))
        batch = optimizer_state = None
        if header["crash"] is not None:
            x, y = (found.array(name) for name in BATCH)
            batch = x, y
            if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= found.config.vocab_size:
                raise CheckpointError("its batch has ids outside the vocabulary")
        if with_optimizer and header["optimizer_steps"] is not None:
            moments = {name.removeprefix("optimizer."): found.array(name, model.wte.weight.dtype) for name in MOMENTS}
            optimizer_state = {"steps": header["optimizer_steps"]} | moments
        return Checkpoint(
            model,
            found.tokenizer,
            train_config=found.train_config,
            progress=Progress(**header["progress"]),
            optimizer_state=optimizer_state,
            batch=batch,
            text=_decoded_text(header["text"]),
            val_text=_decoded_text(header["val_text"]),
            **{key: header[key] for key in ("machine", "crash", "format")},
        )


def step_of(path: Path) -> int:
    """The step of a checkpoint, without reading its arrays. Raises CheckpointError as `load` does."""
    with _opened(path) as found:
        return found.header["progress"].get("step", 0)


@contextmanager
def _opened(path: Path) -> Iterator[_OpenCheckpoint]:
    with open_archive(path) as archive:
        yield _OpenCheckpoint(archive)


class _OpenCheckpoint:
    """An open checkpoint. Its header has been parsed and checked. Its arrays have not been read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self.header = parse_header(archive.header)
        self.config = GPTConfig.from_dict(self.header["config"])
        trained = self.header["train_config"]
        self.train_config = None if trained is None else TrainConfig.from_dict(trained)
        hashes = self.header["sha256"]  # None in format 1
        self.tokenizer = self._read_tokenizer(None if hashes is None else hashes.get(TOKENIZER))
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"its tokenizer has {self.tokenizer.vocab_size} tokens, but its vocab_size is {self.config.vocab_size}"
            )
        n = self.config.num_parameters()
        if 4 * n > archive.total_bytes:  # checked before a model of that size is made
            raise CheckpointError(
                f"its configuration describes {n:,} parameters, more than its {archive.total_bytes:,} bytes can hold"
            )
        names = {*archive.names, *([TOKENIZER] if isinstance(self.tokenizer, BPETokenizer) else [])}
        if hashes is not None and names != set(hashes):
            differing = [shortened(name) for name in sorted(names ^ set(hashes))]
            raise CheckpointError(f"its list of hashes and its arrays differ: {first_few(differing)}")

    def _read_tokenizer(self, digest: str | None) -> Tokenizer:
        vocabulary, description = self.header["vocabulary"], self._archive.text(TOKENIZER, digest)
        if (vocabulary is None) == (description is None):
            raise CheckpointError(f"expected a vocabulary or a {TOKENIZER}, found {'none' if description is None else 'both'}")
        if description is None:
            return CharTokenizer(vocabulary)
        try:
            return BPETokenizer(description.decode("utf-8"))
        except ValueError as error:  # also a RequestError
            raise CheckpointError(f"its {TOKENIZER} cannot be used ({error})") from None

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if an array is missing or unknown, or has another shape or dtype than the configuration
        requires.

        expected: the shapes of the parameters.
        """
        if self.header["optimizer_steps"] is not None:
            expected = expected | dict.fromkeys(MOMENTS, (self.config.num_parameters(),))
        if self.header["crash"] is not None:
            rows = self.train_config.batch_size if self.train_config else 0
            expected = expected | dict.fromkeys(BATCH, (rows, self.config.block_size))
        names = self._archive.names
        problems = [f"missing {name}" for name in expected if name not in names]
        problems += [f"unknown {shortened(name)}" for name in names if name not in expected]
        for name in names if not problems else []:
            dtype, shape = self._archive.dtype_and_shape(name)
            if (dtype.kind == "i") != (name in BATCH):
                problems.append(f"{name} is of dtype {dtype}")
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        if problems:
            raise CheckpointError(first_few(problems))

    def array(self, name: str, dtype: Any = None) -> np.ndarray:
        """An array, as `dtype`, with its hash verified. Only a crash file may hold numbers that are not finite."""
        hashes = self.header["sha256"]
        digest = None if hashes is None else hashes[name]
        return self._archive.array(name, digest, dtype, finite=self.header["crash"] is None)
