"""What a training run checks before it begins: that its parts fit each other, and that all ranks have the same ones."""

from __future__ import annotations

import hashlib
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import TrainConfig
from npgpt.engine.backend import has_bfloat16_products, to_numpy
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import describe_kernels
from npgpt.parallel.ranks import Ranks
from npgpt.text.dataset import Dataset


def check_arguments(model: GPT, dataset: Dataset, config: TrainConfig) -> None:
    """Raise RequestError if the settings of a run do not fit its model, its dataset or this machine."""
    if config.device not in ("auto", model.backend.name):
        raise RequestError(f"the settings ask for device {config.device!r}, but the model is on {model.backend.name!r}")
    for name in ("batch_size", "seed", "val_fraction", "block_size"):
        expected = model.config.block_size if name == "block_size" else getattr(config, name)
        if getattr(dataset, name) != expected:
            raise RequestError(f"the dataset's {name} is {getattr(dataset, name)}, the run's is {expected}; they must be equal")
    largest = max(int(dataset.ids.max(initial=0)), int(dataset.val.max(initial=0)))
    if largest >= model.config.vocab_size:
        raise RequestError(
            f"the dataset's ids go up to {largest}, the model knows 0..{model.config.vocab_size - 1}; "
            "encode the text with the model's own tokenizer"
        )
    if config.bf16 and model.backend.is_cpu and not has_bfloat16_products(model.backend):
        raise RequestError(
            f"bf16 needs a GPU, or AVX512-BF16 and the kernels in C, and this run has {describe_kernels()}; use --no-bf16"
        )
    if config.tf32 and model.backend.is_cpu:
        raise RequestError(
            "tf32 works on a GPU only, and this run is on the CPU; use --no-tf32, or --device cuda to see what is missing"
        )


def check_ranks(ranks: Ranks, parts: dict[str, Any], model: GPT | None = None) -> None:
    """Raise RequestError if the ranks differ in `parts` or in the weights of the model.

    parts: name -> a value that must be equal on all ranks.
    """
    if ranks.size == 1:
        return
    if model:
        parts = parts | {"weights": hashlib.sha256(to_numpy(model.flat.data).data).hexdigest()}
    for rank, others in enumerate(ranks.gather(parts)):
        for name, value in parts.items():
            if others[name] != value:
                needed = "all ranks need the same files, flags and kind of processor"
                raise RequestError(f"rank {rank} has another {name} than rank {ranks.rank}; {needed}")
