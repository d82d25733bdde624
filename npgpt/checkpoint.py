"""One file holds a model: weights, vocabulary, configuration, optimiser state, progress. No pickle.

The file is an `.npz`, a zip of NumPy arrays that any NumPy reads:

    checkpoint.json               everything that is not an array
    blocks.0.attn.qkv.weight.npy  one member per parameter, under its name in the model
    optimizer.exp_avg.npy         AdamW's running means, flat, as optim.AdamW keeps them
    optimizer.exp_avg_sq.npy

Members are stored, not compressed: weights hardly shrink. Nothing in it is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.backend import CPU, Backend
from npgpt.config import GPTConfig, RequestError, TrainConfig
from npgpt.gpt import GPT
from npgpt.optim import AdamW
from npgpt.tokenizer import CharTokenizer

FORMAT = 1
HEADER = "checkpoint.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


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

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def step(self) -> int:
        return self.progress.get("step", 0)


def save(
    path: str | Path,
    model: GPT,
    tokenizer: CharTokenizer,
    *,
    optimizer: AdamW | None = None,
    train_config: TrainConfig | None = None,
    progress: dict[str, Any] | None = None,
    source: str | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write a checkpoint. What was at `path` before stays whole until the new file is complete.

    Raises OSError when it cannot be written; nothing is left behind then.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "vocabulary": tokenizer.characters,
        "train_config": dataclasses.asdict(train_config) if train_config else None,
        "progress": progress or {},
        "source": source,
        "fingerprint": fingerprint,
        "optimizer_steps": optimizer.steps if optimizer else None,
    }
    arrays = model.state_dict()
    if optimizer:
        state = optimizer.state_dict()
        arrays |= {f"optimizer.{name}": state[name] for name in MOMENTS}

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                # ZipInfo's own date, not today's: the same contents are the same bytes.
                archive.writestr(zipfile.ZipInfo(HEADER), json.dumps(header, ensure_ascii=False, allow_nan=False))
                for name, array in arrays.items():
                    with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, backend: Backend = CPU, with_optimizer: bool = False) -> Checkpoint:
    """Rebuild model and tokenizer from a checkpoint alone.

    with_optimizer: also read what resuming needs. Raises CheckpointError when the file is missing, damaged,
    of another format or at odds with its own configuration.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive, backend, with_optimizer)
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}; bin/train writes one") from None
    except IsADirectoryError:
        raise CheckpointError(f"expected a checkpoint, got a folder: {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except CheckpointError:
        raise
    # What zipfile raises for damaged directories, compressed, encrypted or otherwise unsupported members.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: {error}") from None


def _read(path: Path, archive: zipfile.ZipFile, backend: Backend, with_optimizer: bool) -> Checkpoint:
    names = set(archive.namelist())
    if HEADER not in names:
        raise CheckpointError(f"{path} is not an npgpt checkpoint: it has no {HEADER}")
    try:
        header = json.loads(archive.read(HEADER))
        if header["format"] != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {header['format']!r}, this version reads {FORMAT}")
        config = GPTConfig.from_dict(header["config"])
        tokenizer = CharTokenizer(header["vocabulary"])
        train_config = TrainConfig.from_dict(header["train_config"]) if header["train_config"] else None
        progress, source, fingerprint = header["progress"], header["source"], header["fingerprint"]
        optimizer_steps = header["optimizer_steps"]
    except CheckpointError:
        raise
    except (RequestError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its {HEADER} cannot be used ({error})") from None
    if not isinstance(progress, dict):
        raise CheckpointError(f"{path} is damaged: its progress is not a table of values")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path} is damaged: vocabulary of {tokenizer.vocab_size} characters, model of {config.vocab_size}"
        )

    def array(name: str) -> np.ndarray:
        try:
            with archive.open(name + ".npy") as member:
                found = np.lib.format.read_array(member, allow_pickle=False)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: array {name} cannot be read ({error})") from None
        if found.dtype.kind != "f" or not np.isfinite(found).all():
            raise CheckpointError(f"{path} is damaged: array {name} does not hold finite numbers")
        return found

    stored = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    model = GPT(config, seed=None, backend=backend)
    try:
        model.load_state_dict({name: array(name) for name in stored if not name.startswith("optimizer.")})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    optimizer_state = None
    if with_optimizer and optimizer_steps is not None:
        optimizer_state = {"steps": optimizer_steps} | {name: array(f"optimizer.{name}") for name in MOMENTS}
    return Checkpoint(model, tokenizer, train_config, progress, source, fingerprint, optimizer_state)
