"""Folders of Hugging Face: reading a model and its tokenizer from one, and writing one. The settings and layouts of tensors are
in architectures.py, the bytes of tensors in safetensors.py. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig
from npgpt.exchange.architectures import Layout, TheirModel, architecture_of, from_their_settings, to_their_settings
from npgpt.exchange.safetensors import SafetensorsFile, write_safetensors
from npgpt.exchange.weights import arrays_with_biases, to_dtype
from npgpt.model.gpt import GPT
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.tokenizer import Tokenizer
from npgpt.text.tokenizer_files import has_tokenizer, read_json, read_tokenizer, tokenizer_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BUFFERS = re.compile(r"(.+\.)?(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|rotary_emb\.inv_freq)")
CONVERSION = """it has pytorch_model.bin alone, which npgpt does not read, because unpickling can run any program; convert it by
  python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}')" """


@dataclass(frozen=True)
class Imported:
    """A model that was read. notes: what differs from the files, in words."""

    model: GPT
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- reading


def read_model(source: str | Path, block_size: int | None = None, dtype: Any = np.float32) -> Imported:
    """The model in a folder of Hugging Face, or in a `.safetensors` file beside its `config.json`.

    block_size: for learned positions, crop the context to this length. Beside the model, one tensor is in memory at a time, or
    two to compare an output layer with the token embedding.

    Raises RequestError, naming the file, for anything that npgpt cannot compute exactly, and for damaged files.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise RequestError(f"no such file or folder: {source}")
    with ExitStack() as stack:
        try:
            paths = _shards(source)
            theirs = from_their_settings(read_json(folder / CONFIG))
            tensors = _Tensors(paths, stack)
            return _model_of(theirs, tensors, block_size, dtype)
        except RequestError as error:
            raise RequestError(f"cannot import {source}: {error}") from None


def read_tokenizer_of(source: str | Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer beside a model. Raises RequestError if there is none, or if it has more tokens than the model."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if not has_tokenizer(folder):
        raise RequestError(
            f"{folder} has no tokenizer that npgpt can read (tokenizer.json, or vocab.json and merges.txt); name one with "
            "--tokenizer"
        )
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Raise RequestError if the model has too few ids for the tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model knows {config.vocab_size:,} ids")


def _shards(source: Path) -> list[Path]:
    """The files that hold the tensors."""
    if source.is_file():
        if source.suffix != ".safetensors":
            raise RequestError("expected a folder or a .safetensors file")
        return [source]
    if (source / WEIGHTS).exists():
        return [source / WEIGHTS]
    if not (source / INDEX).exists():
        if (source / "pytorch_model.bin").exists():
            raise RequestError(CONVERSION.format(source).strip())
        raise RequestError(f"it has no {WEIGHTS}")
    index = read_json(source / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) and Path(name).name == name for name in files.values()):
        raise RequestError(f"its {INDEX} does not say which file has which tensor")
    names = sorted(set(files.values()))
    missing = [name for name in names if not (source / name).exists()]
    if missing:
        raise RequestError(f"{missing[0]} is missing, one of the {len(names)} files that its {INDEX} names")
    return [source / name for name in names]


class _Tensors:
    """The tensors of several files, by name. Buffers that are no parameters are left out."""

    def __init__(self, paths: list[Path], stack: ExitStack) -> None:
        self._file_of: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            stack.callback(file.close)
            for name in file.shapes:
                if name in self._file_of:
                    raise RequestError(f"two of its files have a tensor {name[:60]!r}")
                if not BUFFERS.fullmatch(name):
                    self._file_of[name] = file

        self.shapes = {name: file.shapes[name] for name, file in self._file_of.items()}
        self.size = sum(map(math.prod, self.shapes.values()))  # how many numbers they have

    def take(self, name: str) -> np.ndarray:
        if name not in self._file_of:
            raise RequestError(f"its tensor {name} is missing")
        return self._file_of[name].tensor(name)


def _model_of(theirs: TheirModel, tensors: _Tensors, block_size: int | None, dtype: Any) -> Imported:
    config, arch, notes = theirs.config, theirs.architecture, list(theirs.notes)
    missing_prefix = "" if any(name.startswith(arch.prefix) for name in tensors.shapes) else arch.prefix
    head, table = (arch.layout(name, config).name.removeprefix(missing_prefix) for name in ("lm_head.weight", "wte.weight"))
    known = set()
    if config.tie_weights and head in tensors.shapes:
        known.add(head)
        if not np.array_equal(tensors.take(head), tensors.take(table)):
            config = dataclasses.replace(config, tie_weights=False)
            notes.append("its output layer differs from its token embedding, so they are not tied")
    if block_size is not None and block_size != config.block_size:
        if block_size > config.block_size and config.position == "learned":
            raise RequestError(f"it has learned {config.block_size} positions, so block_size cannot be {block_size}")
        notes.append(f"block_size was {config.block_size} and is now {block_size}")
    smaller = config if block_size is None else dataclasses.replace(config, block_size=block_size)
    if smaller.num_parameters() > tensors.size:  # checked before a model of that size is made
        raise RequestError(
            f"its {CONFIG} describes {smaller.num_parameters():,} parameters, but its tensors have {tensors.size:,} numbers"
        )
    model = GPT(smaller, seed=None, dtype=dtype)
    layouts = {name: arch.layout(name, config) for name, _ in model.named_parameters()}
    names = {name: layout.name.removeprefix(missing_prefix) for name, layout in layouts.items()}
    if unknown := sorted(tensors.shapes.keys() - known - set(names.values())):
        more = f", and {len(unknown) - 1} more" if unknown[1:] else ""
        raise RequestError(f"its tensor {unknown[0][:60]!r} is unknown{more}")
    for name, p in model.named_parameters():
        shape = (config.block_size, *p.shape[1:]) if name == "wpe.weight" else p.shape
        expected = _their_shape(layouts[name], shape)
        array = tensors.take(names[name])
        if array.shape != expected:
            raise RequestError(f"its tensor {names[name]} has shape {array.shape}, expected {expected}")
        p.data[...] = to_dtype(name, layouts[name].to_ours(array)[: p.shape[0]], p.dtype)
        if ".attn.qkv." in name:
            p.data[..., : config.n_embd] *= p.dtype.type(theirs.q_scale(int(name.split(".")[1])))
    return Imported(model, notes)


def _their_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    return layout.to_theirs(np.broadcast_to(np.float32(0), shape)).shape


# ---------------------------------------------------------------- writing


def write_folder(checkpoint: Checkpoint, folder: str | Path, dtype: str = "f32") -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers can load. dtype: "f32" or "f16".

    The folder appears when everything in it is complete. Raises RequestError if there is something in it already, or if a
    weight is too large for float16, and OSError if it cannot be written.
    """
    model, config, tokenizer = checkpoint.model, checkpoint.config, checkpoint.tokenizer
    arch, kind = architecture_of(config), np.dtype(np.float16 if dtype == "f16" else np.float32)
    arrays = arrays_with_biases(model)
    layouts = {layout.name: (name, layout) for name in arrays for layout in [arch.layout(name, config)]}

    def tensor(theirs: str) -> np.ndarray:
        name, layout = layouts[theirs]
        return to_dtype(name, layout.to_theirs(arrays[name]), kind)

    settings = to_their_settings(config, tokenizer.end_id) | {"dtype": str(kind), "torch_dtype": str(kind)}
    of_tokenizer: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    of_tokenizer |= {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": config.block_size}
    if tokenizer.end_id is not None:
        of_tokenizer["eos_token"] = tokenizer.decode([tokenizer.end_id])
    with _new_folder(Path(folder)) as new:
        with (new / WEIGHTS).open("wb") as file:
            shapes = {theirs: _their_shape(layout, arrays[name].shape) for theirs, (name, layout) in layouts.items()}
            write_safetensors(file, shapes, kind, tensor)
        for name, contents in {CONFIG: settings, "tokenizer_config.json": of_tokenizer}.items():
            (new / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8", newline="\n")
        (new / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8", newline="\n")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` at the end of the `with` block. After an error, nothing is left behind."""
    path = path.resolve()  # so that "." has a name
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{path} exists already; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent}; make it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
